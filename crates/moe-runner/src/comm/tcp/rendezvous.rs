//! How processes find each other: all come to rank 0, which tells each where the others listen; then
//! every two connect.
//!
//! ```text
//! rank r → 0    hello: version, ranks, r, the port that r listens on
//! 0 → rank r    welcome: a number that names the meeting, where each rank listens; or a refusal
//! rank r → s<r  greeting: that number, r
//! ```
//! Nothing that comes from outside is waited for without a limit, and a stranger's connection holds up
//! nobody.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::Rendezvous;
use crate::comm::failure;
use crate::{Error, Result};

/// The first bytes of hello and greeting; the last of them is the version of the wire.
const HELLO: [u8; 8] = *b"moerank\x01";
const GREETING: [u8; 8] = *b"moepeer\x01";
const VERSION: &str = env!("CARGO_PKG_VERSION");
const VERSION_ROOM: usize = 16;
/// Bytes of a hello: magic, version, ranks, rank, port.
const HELLO_LEN: usize = 8 + VERSION_ROOM + 4 + 4 + 2;
/// Bytes of a greeting: magic, meeting, rank.
const GREETING_LEN: usize = 8 + 8 + 4;
/// Bytes of a welcome for each rank: its address and port.
const PLACE: usize = 16 + 2;
/// Bytes of a refusal at most.
const REFUSAL: usize = 1024;
/// Between two looks at what nobody announces.
const PAUSE: Duration = Duration::from_millis(5);
/// How much longer the others wait for rank 0 than it waits for them: they hear its reason.
const GRACE: Duration = Duration::from_secs(2);

/// Connections to all other ranks, by rank.
pub(super) fn meet(at: &Rendezvous, timeout: Duration) -> Result<Vec<Option<TcpStream>>> {
    let Rendezvous { address, rank, ranks } = at;
    let fail = |reason: String| failure(*rank, &format!("rendezvous at {address}: {reason}"));
    if rank >= ranks {
        return Err(Error::input("rank", format!("{rank} is none of {ranks} ranks")));
    }
    if *ranks > u32::MAX as usize {
        return Err(Error::input("ranks", format!("{ranks} are too many")));
    }
    let deadline = Instant::now() + timeout;
    let places: Vec<SocketAddr> = address
        .to_socket_addrs()
        .map_err(|error| fail(format!("no address of the form HOST:PORT ({error})")))?
        .collect();
    if *ranks == 1 {
        return Ok(vec![None]);
    }
    let meeting = Meeting { rank: *rank, ranks: *ranks, deadline, timeout };
    match rank {
        0 => meeting.host(&places),
        _ => meeting.visit(&places),
    }
    .map_err(fail)
}

struct Meeting {
    rank: usize,
    ranks: usize,
    deadline: Instant,
    timeout: Duration,
}

type Connections = Result<Vec<Option<TcpStream>>, String>;

impl Meeting {
    fn none(&self) -> Vec<Option<TcpStream>> {
        (0..self.ranks).map(|_| None).collect()
    }

    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    fn waited(&self) -> String {
        format!("waited {} s", self.timeout.as_secs_f32())
    }

    /// Rank 0: takes the others in.
    fn host(&self, places: &[SocketAddr]) -> Connections {
        let listener = TcpListener::bind(places)
            .map_err(|error| format!("rank 0 cannot listen there, on its own machine: {error}"))?;
        let mut guests = self.none();
        let mut table = vec![[0; PLACE]; self.ranks];
        let mut refusal = None;
        let all_here =
            collect(&listener, HELLO_LEN, self.ranks - 1, self.deadline, |hello, from| {
                let Some(hello) = Hello::decode(hello) else { return Verdict::Stranger };
                let taken = |rank: usize| guests.get(rank).is_some_and(Option::is_some);
                if let Some(reason) = hello.misfit(self.ranks, taken) {
                    refuse(&from, &format!("rank 0: {reason}"));
                    refusal = Some(reason);
                    return Verdict::End;
                }
                if let Ok(address) = from.peer_addr() {
                    table[hello.rank] = place(address.ip(), hello.port);
                }
                guests[hello.rank] = Some(from);
                Verdict::Taken
            });
        let absent: Vec<String> = (1..self.ranks)
            .filter(|rank| guests[*rank].is_none())
            .map(|rank| format!("rank {rank}"))
            .collect();
        let reason = match (refusal, all_here) {
            (Some(reason), _) => Some(reason),
            (None, Err(error)) => Some(error.to_string()),
            (None, Ok(false)) => Some(format!("{} for {}", self.waited(), absent.join(", "))),
            (None, Ok(true)) => None,
        };
        if let Some(reason) = reason {
            let told = format!("rank 0: {reason}");
            guests.iter().flatten().for_each(|guest| refuse(guest, &told));
            return Err(reason);
        }
        let name = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos() as u64);
        let name = name ^ u64::from(std::process::id()).rotate_right(16);
        let mut welcome = vec![1];
        welcome.extend_from_slice(&name.to_le_bytes());
        table.iter().for_each(|place| welcome.extend_from_slice(place));
        for (rank, guest) in guests.iter_mut().enumerate() {
            if let Some(guest) = guest {
                guest.write_all(&welcome).map_err(|error| format!("rank {rank} left: {error}"))?;
            }
        }
        Ok(guests)
    }

    /// Another rank: goes to rank 0, then to the ranks before it, and takes in those after it.
    fn visit(&self, places: &[SocketAddr]) -> Connections {
        let mut host = self.connect(places).map_err(|error| {
            format!("{} for rank 0, which cannot be reached there: {error}", self.waited())
        })?;
        let lost = |error: std::io::Error| match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                format!("{} for rank 0 to answer", self.waited())
            }
            ErrorKind::UnexpectedEof => "rank 0 left before all were there".to_owned(),
            _ => format!("rank 0 was lost: {error}"),
        };
        let listener = host
            .local_addr()
            .and_then(|address| TcpListener::bind((address.ip(), 0)))
            .map_err(|error| format!("cannot listen for other ranks: {error}"))?;
        let port = listener.local_addr().map_err(|error| error.to_string())?.port();
        let hello = Hello { version: version(), ranks: self.ranks, rank: self.rank, port };
        host.set_read_timeout(Some(self.left() + GRACE)).map_err(lost)?;
        host.write_all(&hello.encode()).map_err(lost)?;
        let mut verdict = [0];
        host.read_exact(&mut verdict).map_err(lost)?;
        if verdict != [1] {
            let mut reason = Vec::new();
            let _ = (&mut host).take(REFUSAL as u64).read_to_end(&mut reason);
            return Err(String::from_utf8_lossy(&reason).into_owned());
        }
        let mut welcome = vec![0; 8 + self.ranks * PLACE];
        host.read_exact(&mut welcome).map_err(lost)?;
        host.set_read_timeout(None).map_err(lost)?;
        let (name, table) = welcome.split_at(8);
        let mut connections = self.none();
        for (rank, place) in table.chunks_exact(PLACE).enumerate().take(self.rank).skip(1) {
            let mut peer = self.connect(&[address(place)]).map_err(|error| {
                format!("rank {rank} cannot be reached at {}: {error}", address(place))
            })?;
            let greeting = [&GREETING[..], name, &(self.rank as u32).to_le_bytes()].concat();
            peer.write_all(&greeting).map_err(|error| format!("rank {rank} left: {error}"))?;
            connections[rank] = Some(peer);
        }
        let after = self.ranks - 1 - self.rank;
        let all_here = collect(&listener, GREETING_LEN, after, self.deadline, |greeting, from| {
            let (start, rank) = greeting.split_at(16);
            let rank = rank.first_chunk().map_or(0, |rank| u32::from_le_bytes(*rank)) as usize;
            let expected = rank > self.rank && rank < self.ranks && connections[rank].is_none();
            if start != [&GREETING[..], name].concat() || !expected {
                return Verdict::Stranger;
            }
            connections[rank] = Some(from);
            Verdict::Taken
        });
        match all_here {
            Err(error) => Err(error.to_string()),
            Ok(true) => {
                connections[0] = Some(host);
                Ok(connections)
            }
            Ok(false) => {
                let absent = (self.rank + 1..self.ranks).filter(|r| connections[*r].is_none());
                let absent: Vec<String> = absent.map(|rank| format!("rank {rank}")).collect();
                Err(format!("{} for {}", self.waited(), absent.join(", ")))
            }
        }
    }

    /// A connection to the first of `places` that takes one; tried until time is up, since the other
    /// process may have yet to start.
    fn connect(&self, places: &[SocketAddr]) -> std::io::Result<TcpStream> {
        loop {
            let mut last = None;
            for place in places {
                let patience = self.left().clamp(PAUSE, Duration::from_secs(2));
                match TcpStream::connect_timeout(place, patience) {
                    Ok(stream) => return Ok(stream),
                    Err(error) => last = Some(error),
                }
            }
            if self.left().is_zero() {
                return Err(last.unwrap_or_else(|| ErrorKind::NotFound.into()));
            }
            thread::sleep(10 * PAUSE);
        }
    }
}

/// What becomes of a connection that has said who it is.
enum Verdict {
    Taken,
    Stranger,
    /// No more are taken in.
    End,
}

/// Takes connections in, each once its first `len` bytes are there, until `count` have been taken:
/// true; or until `deadline`, or an end: false.
fn collect(
    listener: &TcpListener,
    len: usize,
    count: usize,
    deadline: Instant,
    mut judge: impl FnMut(&[u8], TcpStream) -> Verdict,
) -> std::io::Result<bool> {
    listener.set_nonblocking(true)?;
    let (mut taken, mut pending) = (0, Vec::<(TcpStream, Vec<u8>)>::new());
    while taken < count {
        while let Ok((stream, _)) = listener.accept() {
            if stream.set_nonblocking(true).is_ok() {
                pending.push((stream, Vec::new()));
            }
        }
        for (mut stream, mut said) in std::mem::take(&mut pending) {
            let mut more = vec![0; len - said.len()];
            match stream.read(&mut more) {
                Ok(0) => continue,
                Ok(read) => said.extend_from_slice(&more[..read]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => continue,
            }
            if said.len() < len {
                pending.push((stream, said));
                continue;
            }
            if stream.set_nonblocking(false).is_err() {
                continue;
            }
            match judge(&said, stream) {
                Verdict::Taken => taken += 1,
                Verdict::Stranger => {}
                Verdict::End => return Ok(false),
            }
        }
        if taken < count {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            thread::sleep(PAUSE);
        }
    }
    Ok(true)
}

/// Tells a guest why there is no meeting. It may be gone.
fn refuse(mut guest: &TcpStream, reason: &str) {
    let mut end = reason.len().min(REFUSAL);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let _ = guest.write_all(&[&[0], &reason.as_bytes()[..end]].concat());
    let _ = guest.shutdown(std::net::Shutdown::Write);
}

struct Hello {
    version: [u8; VERSION_ROOM],
    ranks: usize,
    rank: usize,
    port: u16,
}

fn version() -> [u8; VERSION_ROOM] {
    let mut version = [0; VERSION_ROOM];
    let len = VERSION.len().min(VERSION_ROOM);
    version[..len].copy_from_slice(&VERSION.as_bytes()[..len]);
    version
}

impl Hello {
    fn encode(&self) -> Vec<u8> {
        [
            &HELLO[..],
            &self.version,
            &(self.ranks as u32).to_le_bytes(),
            &(self.rank as u32).to_le_bytes(),
            &self.port.to_le_bytes(),
        ]
        .concat()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_prefix(&HELLO)?;
        let (version, rest) = rest.split_first_chunk()?;
        let (ranks, rest) = rest.split_first_chunk()?;
        let (rank, rest) = rest.split_first_chunk()?;
        let (port, _) = rest.split_first_chunk()?;
        Some(Self {
            version: *version,
            ranks: u32::from_le_bytes(*ranks) as usize,
            rank: u32::from_le_bytes(*rank) as usize,
            port: u16::from_le_bytes(*port),
        })
    }

    /// Why this guest cannot take part among `ranks`.
    fn misfit(&self, ranks: usize, taken: impl Fn(usize) -> bool) -> Option<String> {
        let Self { rank, .. } = *self;
        if self.version != version() {
            let theirs = String::from_utf8_lossy(&self.version);
            let theirs = theirs.trim_end_matches('\0');
            return Some(format!("rank {rank} is version {theirs}, rank 0 is version {VERSION}"));
        }
        if self.ranks != ranks {
            let theirs = self.ranks;
            return Some(format!("rank {rank} expects {theirs} ranks, rank 0 expects {ranks}"));
        }
        (rank == 0 || rank >= ranks || taken(rank))
            .then(|| format!("two processes came as rank {rank}"))
    }
}

/// The wire form of an address: IPv6, or IPv4 as such.
fn place(ip: IpAddr, port: u16) -> [u8; PLACE] {
    let ip = match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let mut place = [0; PLACE];
    place[..16].copy_from_slice(&ip.octets());
    place[16..].copy_from_slice(&port.to_le_bytes());
    place
}

fn address(place: &[u8]) -> SocketAddr {
    let (ip, port) = place.split_at(16);
    let ip = ip.first_chunk::<16>().map_or(Ipv6Addr::UNSPECIFIED, |ip| Ipv6Addr::from(*ip));
    let port = port.first_chunk().map_or(0, |port| u16::from_le_bytes(*port));
    SocketAddr::new(ip.to_canonical(), port)
}
