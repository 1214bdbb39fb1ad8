//! What all groups of a process share: its connections, and what has come over them.
//!
//! Each connection has two threads: one reads what comes into the inbox, whoever waits for it; one
//! writes what is to be sent. So no rank waits for another one's reading, and nothing can block for
//! good but a rank that waits, which has a time-out.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::comm::{
    At, Buffers, Dtype, Head, Kind, Message, Part, Step, Underway, failure, sighting,
};
use crate::{Error, Result};

/// Bytes before a frame's elements.
const HEADER: usize = 24 + Head::WIRE;
/// Frames up to this many bytes are written in one piece.
const SMALL: usize = 16 << 10;
/// Bytes of the longest last words.
const WORDS: usize = 4096;
/// How long a rank that has failed stays to be heard.
const LINGER: Duration = Duration::from_secs(2);

/// How a rank leaves that has said so.
const LEFT: &str = "left";

/// What a frame is: its first byte.
mod frame {
    /// A part of an exchange.
    pub(super) const PART: u8 = 0;
    /// Last words.
    pub(super) const FAREWELL: u8 = 1;
    /// The sender needs nobody any more.
    pub(super) const LEAVE: u8 = 2;
}

/// The ranks of one group.
pub(super) struct Circle {
    /// This rank's number in it.
    pub(super) rank: usize,
    /// The members' ranks in the world.
    pub(super) members: Vec<usize>,
    /// What it is called on the connection to each member. Two ranks enter the groups that they share
    /// in the same order: both count them.
    names: Vec<u32>,
}

/// A part in the inbox: from which rank of the world, in which group as the two call it, the
/// exchange's number.
type Key = (usize, u32, u64);

#[derive(Default)]
struct Inbox {
    parts: HashMap<Key, (Head, Arc<Message>, Range<usize>)>,
    /// Parts that nobody wants, and that have not come yet.
    unwanted: HashSet<Key>,
    /// The collective that each rank was seen in last.
    seen: Vec<Option<Head>>,
    /// How each rank left, if it did.
    left: Vec<Option<String>>,
    /// Groups shared with each rank so far.
    groups: Vec<u32>,
}

struct Frame {
    header: [u8; HEADER],
    message: Arc<Message>,
    bytes: Range<usize>,
}

#[derive(Default)]
struct Outbox {
    frames: VecDeque<Frame>,
    /// Nothing comes after these.
    closed: bool,
}

struct Peer {
    socket: TcpStream,
    outbox: Mutex<Outbox>,
    filled: Condvar,
}

pub(super) struct World {
    rank: usize,
    timeout: Duration,
    inbox: Mutex<Inbox>,
    arrived: Condvar,
    /// The first failure.
    failed: OnceLock<String>,
    pub(super) buffers: Arc<Buffers>,
    /// By rank; none to itself.
    peers: Vec<Option<Peer>>,
}

/// What all handles of a process share: when the last is dropped, the rank leaves.
pub(super) struct Presence {
    pub(super) world: Arc<World>,
    threads: Vec<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Presence {
    /// Starts the threads of all `connections`, which are by rank.
    pub(super) fn new(
        rank: usize,
        connections: Vec<Option<TcpStream>>,
        timeout: Duration,
    ) -> Result<Self> {
        let ranks = connections.len();
        let peer = |socket: TcpStream| {
            // small frames must not wait for more
            let _ = socket.set_nodelay(true);
            Peer { socket, outbox: Mutex::default(), filled: Condvar::new() }
        };
        let inbox = Inbox {
            seen: vec![None; ranks],
            left: vec![None; ranks],
            groups: vec![0; ranks],
            ..Inbox::default()
        };
        let world = Arc::new(World {
            rank,
            timeout,
            inbox: Mutex::new(inbox),
            arrived: Condvar::new(),
            failed: OnceLock::new(),
            buffers: Arc::default(),
            peers: connections.into_iter().map(|socket| socket.map(peer)).collect(),
        });
        let mut presence = Self { world: world.clone(), threads: Vec::new() };
        for other in (0..ranks).filter(|other| *other != rank) {
            for (what, work) in [("from", World::read as fn(&World, usize)), ("to", World::write)] {
                let world = world.clone();
                let name = format!("{what} rank {other}");
                let thread = thread::Builder::new().name(name).spawn(move || work(&world, other));
                presence.threads.push(thread.map_err(|error| {
                    let what = "no thread could be started for the connection to";
                    presence.world.fail(format!("{what} rank {other}: {error}"), true)
                })?);
            }
        }
        Ok(presence)
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        let world = &*self.world;
        if thread::panicking() {
            let who = world.sighting(world.rank);
            world.fail(format!("{who}, panicked"), true);
        }
        let failed = world.failed.get().is_some();
        let message = Arc::new(Message::new());
        for peer in world.peers.iter().flatten() {
            if !failed {
                let header = header(frame::LEAVE, 0, 0, 0, &leave());
                peer.push(Frame { header, message: message.clone(), bytes: 0..0 });
            }
            lock(&peer.outbox).closed = true;
            peer.filled.notify_all();
        }
        let missing = world.await_departures(if failed { LINGER } else { world.timeout });
        if !failed && !missing.is_empty() {
            let waited = world.timeout.as_secs_f32();
            // This runs in a drop: there is no one to return it to.
            eprintln!("error: rank {}: waited {waited} s to leave, for {missing}", world.rank);
        }
        for peer in world.peers.iter().flatten() {
            let _ = peer.socket.shutdown(Shutdown::Both);
        }
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// What a rank says when it leaves.
fn leave() -> Head {
    let place = At::new("", Step::Finish).into();
    Head { kind: Kind::Leave, dtype: Dtype::Bytes, root: 0, total: 0, place }
}

fn header(what: u8, group: u32, number: u64, count: u64, head: &Head) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[0] = what;
    header[4..8].copy_from_slice(&group.to_le_bytes());
    header[8..16].copy_from_slice(&number.to_le_bytes());
    header[16..24].copy_from_slice(&count.to_le_bytes());
    header[24..].copy_from_slice(&head.encode());
    header
}

impl Peer {
    fn push(&self, frame: Frame) {
        lock(&self.outbox).frames.push_back(frame);
        self.filled.notify_all();
    }

    /// The next frame to send; none once the outbox is closed and empty.
    fn next(&self) -> Option<Frame> {
        let mut outbox = lock(&self.outbox);
        loop {
            if let Some(frame) = outbox.frames.pop_front() {
                return Some(frame);
            }
            if outbox.closed {
                return None;
            }
            outbox = self.filled.wait(outbox).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A group's exchanges.
impl World {
    /// The group of these ranks of the world, of which this one is number `rank`.
    pub(super) fn circle(&self, members: Vec<usize>, rank: usize) -> Circle {
        let mut inbox = lock(&self.inbox);
        let mut name = |member: &usize| {
            inbox.groups[*member] += 1;
            inbox.groups[*member]
        };
        let names = members.iter().map(&mut name).collect();
        Circle { rank, members, names }
    }

    fn check_failed(&self) -> Result<()> {
        self.failed.get().map_or(Ok(()), |cause| Err(failure(self.rank, cause)))
    }

    /// The first failure; a rank that has gone without a word is one.
    pub(super) fn check(&self) -> Result<()> {
        self.check_failed()?;
        let inbox = lock(&self.inbox);
        let lost = |(rank, how): (usize, &Option<String>)| {
            let how = how.as_ref().filter(|how| *how != LEFT)?;
            Some(format!("{}, {how}", sighting(rank, inbox.seen[rank].as_ref())))
        };
        let lost = inbox.left.iter().enumerate().find_map(lost);
        drop(inbox);
        lost.map_or(Ok(()), |cause| Err(self.fail(cause, true)))
    }

    /// Sends the parts of `message` on their way.
    pub(super) fn post(
        &self,
        circle: &Circle,
        number: u64,
        head: Head,
        message: Arc<Message>,
    ) -> Result<()> {
        self.check_failed()?;
        let width = message.dtype().size();
        for (peer, (member, name)) in circle.members.iter().zip(&circle.names).enumerate() {
            let span = message.span(peer);
            match &self.peers[*member] {
                Some(connection) => connection.push(Frame {
                    header: header(frame::PART, *name, number, span.len() as u64, &head),
                    bytes: span.start * width..span.end * width,
                    message: message.clone(),
                }),
                None => {
                    let mut inbox = lock(&self.inbox);
                    inbox.seen[self.rank] = Some(head);
                    inbox.parts.insert((*member, *name, number), (head, message.clone(), span));
                }
            }
        }
        Ok(())
    }

    /// True once all parts are there. With `block`, waits for them.
    pub(super) fn complete(
        &self,
        circle: &Circle,
        exchange: &Underway,
        since: Instant,
        block: bool,
    ) -> Result<bool> {
        let (head, deadline) = (&exchange.head, since + self.timeout);
        let mut inbox = lock(&self.inbox);
        let cause = loop {
            let part = |&(member, key): &(usize, Key)| Some((member, inbox.parts.get(&key)?.0));
            let conflict = circle
                .keys(exchange.number)
                .filter_map(|key| part(&key))
                .find_map(|(member, theirs)| Some((head.conflict(&theirs)?, member, theirs)));
            if let Some((conflict, member, theirs)) = conflict {
                let me = self.rank;
                break format!("{conflict}: rank {me} is in {head}, rank {member} in {theirs}");
            }
            let absent = || {
                let keys = circle.keys(exchange.number);
                keys.filter(|(_, key)| !inbox.parts.contains_key(key)).map(|(member, _)| member)
            };
            if absent().next().is_none() {
                return Ok(true);
            }
            self.check_failed()?;
            if let Some((member, how)) =
                absent().find_map(|member| Some((member, inbox.left[member].as_ref()?)))
            {
                let who = sighting(member, inbox.seen[member].as_ref());
                break format!("{who}, {how}; it is missing in {head}");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let missing = absent().map(|m| sighting(m, inbox.seen[m].as_ref()));
                let missing = missing.collect::<Vec<_>>().join("; ");
                break format!("waited {} s in {head} for {missing}", self.timeout.as_secs_f32());
            }
            if !block {
                return Ok(false);
            }
            let woken = self.arrived.wait_timeout(inbox, left);
            inbox = woken.unwrap_or_else(PoisonError::into_inner).0;
        };
        drop(inbox);
        Err(self.fail(cause, true))
    }

    /// Adds the parts, in rank order, to `parts`. All are there.
    pub(super) fn take(&self, circle: &Circle, number: u64, parts: &mut Vec<Part>) {
        let inbox = lock(&self.inbox);
        let taken = circle.keys(number).filter_map(|(_, key)| inbox.parts.get(&key));
        parts.extend(taken.map(|(_, message, span)| (message.clone(), span.clone())));
    }

    /// Nobody here needs the exchange any more.
    pub(super) fn finish(&self, circle: &Circle, number: u64) {
        let mut inbox = lock(&self.inbox);
        for (member, key) in circle.keys(number) {
            match inbox.parts.remove(&key) {
                // what this rank sent is kept where it was begun
                Some((_, message, _)) if member != self.rank => self.buffers.keep(message),
                Some(_) => {}
                None => drop(inbox.unwanted.insert(key)),
            }
        }
    }
}

impl Circle {
    /// Of each member, its rank in the world and the key of its part.
    fn keys(&self, number: u64) -> impl Iterator<Item = (usize, Key)> {
        let members = self.members.iter().zip(&self.names);
        members.map(move |(member, name)| (*member, (*member, *name, number)))
    }
}

/// Failing and leaving.
impl World {
    fn sighting(&self, rank: usize) -> String {
        sighting(rank, lock(&self.inbox).seen[rank].as_ref())
    }

    /// This rank cannot go on.
    pub(super) fn give_up(&self, reason: &str) {
        let who = self.sighting(self.rank);
        self.fail(format!("{who}, gave up: {reason}"), true);
    }

    /// Records the first failure, wakes who waits here, and, if `tell`, tells all other ranks.
    fn fail(&self, cause: String, tell: bool) -> Error {
        let first = self.failed.set(cause).is_ok();
        let cause = self.failed.get().map_or("", |cause| cause);
        if first && tell {
            let mut end = cause.len().min(WORDS);
            while !cause.is_char_boundary(end) {
                end -= 1;
            }
            let mut message = Message::new();
            // without memory the others learn it from the connections that close
            if message.reset(Dtype::Bytes, end).is_ok() {
                message.bytes_mut().copy_from_slice(&cause.as_bytes()[..end]);
                let message = Arc::new(message);
                let header = header(frame::FAREWELL, 0, 0, end as u64, &leave());
                for peer in self.peers.iter().flatten() {
                    peer.push(Frame { header, message: message.clone(), bytes: 0..end });
                }
            }
        }
        // whoever has looked and found no news, but does not wait yet, holds the lock
        drop(lock(&self.inbox));
        self.arrived.notify_all();
        failure(self.rank, cause)
    }

    /// Waits until all others have left; who has not within `patience`.
    fn await_departures(&self, patience: Duration) -> String {
        let deadline = Instant::now() + patience;
        let mut inbox = lock(&self.inbox);
        loop {
            let others = (0..self.peers.len()).filter(|rank| *rank != self.rank);
            let missing: Vec<String> = others
                .filter(|rank| inbox.left[*rank].is_none())
                .map(|rank| sighting(rank, inbox.seen[rank].as_ref()))
                .collect();
            let left = deadline.saturating_duration_since(Instant::now());
            if missing.is_empty() || left.is_zero() {
                return missing.join("; ");
            }
            let woken = self.arrived.wait_timeout(inbox, left);
            inbox = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// `rank` will send nothing more.
    fn departs(&self, rank: usize, how: impl Into<String>) {
        lock(&self.inbox).left[rank].get_or_insert_with(|| how.into());
        self.arrived.notify_all();
    }
}

/// The threads of a connection.
impl World {
    /// Puts what comes from `rank` into the inbox, until it leaves.
    fn read(&self, rank: usize) {
        if let Some(peer) = &self.peers[rank] {
            let mut socket = &peer.socket;
            loop {
                match self.read_frame(rank, &mut socket) {
                    Ok(true) => {}
                    Ok(false) => return,
                    Err(Broken::Connection(how)) => return self.departs(rank, how),
                    Err(Broken::Frame(cause)) => {
                        self.fail(cause, true);
                        return self.departs(rank, "sent what cannot be read");
                    }
                }
            }
        }
    }

    /// One frame; false if it is the last.
    fn read_frame(&self, rank: usize, socket: &mut &TcpStream) -> Result<bool, Broken> {
        let mut header = [0; HEADER];
        socket.read_exact(&mut header)?;
        let unreadable = || Broken::Frame(format!("rank {rank} sent what cannot be read"));
        let number = |range: Range<usize>| {
            header[range].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
        };
        let (group, exchange, count) = (number(4..8) as u32, number(8..16), number(16..24));
        match header[0] {
            frame::PART => {
                let head = header[24..].first_chunk().and_then(Head::decode);
                let head = head.ok_or_else(unreadable)?;
                let count = head
                    .part_size(count)
                    .map_err(|reason| Broken::Frame(format!("rank {rank}: {reason}, in {head}")))?;
                let mut message = self
                    .buffers
                    .take(head.dtype, count)
                    .map_err(|error| Broken::Frame(error.to_string()))?;
                let bytes = Arc::get_mut(&mut message).map(Message::bytes_mut).unwrap_or_default();
                socket.read_exact(bytes)?;
                self.deliver((rank, group, exchange), head, message);
                Ok(true)
            }
            frame::FAREWELL => {
                let mut words = vec![0; WORDS.min(count as usize)];
                socket.read_exact(&mut words)?;
                self.fail(String::from_utf8_lossy(&words).into_owned(), false);
                self.departs(rank, "gave up");
                Ok(false)
            }
            frame::LEAVE => {
                self.departs(rank, LEFT);
                Ok(false)
            }
            _ => Err(unreadable()),
        }
    }

    fn deliver(&self, key: Key, head: Head, message: Arc<Message>) {
        let span = 0..message.len();
        let mut inbox = lock(&self.inbox);
        inbox.seen[key.0] = Some(head);
        if inbox.unwanted.remove(&key) {
            return self.buffers.keep(message);
        }
        inbox.parts.insert(key, (head, message, span));
        drop(inbox);
        self.arrived.notify_all();
    }

    /// Sends what is in the outbox to `rank`, until it is closed.
    fn write(&self, rank: usize) {
        let Some(peer) = &self.peers[rank] else { return };
        let mut socket = &peer.socket;
        let mut small = Vec::with_capacity(SMALL);
        while let Some(frame) = peer.next() {
            let bytes = &frame.message.bytes()[frame.bytes.clone()];
            let sent = if HEADER + bytes.len() <= SMALL {
                small.clear();
                small.extend_from_slice(&frame.header);
                small.extend_from_slice(bytes);
                socket.write_all(&small)
            } else {
                socket.write_all(&frame.header).and_then(|()| socket.write_all(bytes))
            };
            if sent.is_err() {
                // the reading thread tells why
                return;
            }
        }
        let _ = peer.socket.shutdown(Shutdown::Write);
    }
}

/// Why a connection is read no more.
enum Broken {
    /// How its rank left.
    Connection(String),
    /// What is wrong with what it sent.
    Frame(String),
}

impl From<std::io::Error> for Broken {
    fn from(error: std::io::Error) -> Self {
        Self::Connection(match error.kind() {
            ErrorKind::UnexpectedEof => "was lost: its connection closed".to_owned(),
            _ => format!("was lost: {error}"),
        })
    }
}
