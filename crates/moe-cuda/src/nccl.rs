//! NCCL, opened at run time: bytes between the GPUs of several ranks.
//!
//! [`NcclLink`] is one rank's end for parts of host memory, which go to other ranks and come from them through
//! the memory of the GPUs. [`NcclPeers`] is one for memory of the GPUs themselves, in the order of a stream of
//! the caller's. Nothing here waits for another rank. What another rank must do first is polled for, so that a
//! caller can give up: `abort` ends what hangs.

use std::collections::VecDeque;
use std::ffi::{CStr, c_char, c_int};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::driver::{Handle, call, look_up};
use crate::{Buffer, Error, Event, Gpu, Pinned, Result, Stream};

/// The oldest version that can be polled instead of waited for.
const OLDEST: c_int = 21_400;
/// How long a rank that ends well waits for its end of the library to do so.
const PATIENCE: Duration = Duration::from_secs(5);

const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// `ncclUint8`.
const BYTES: c_int = 1;

/// What ranks hand to each other to find each other.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NcclId(pub [u8; NcclId::LEN]);

impl NcclId {
    /// Bytes of one.
    pub const LEN: usize = 128;
}

/// `ncclConfig_t` of version 2.17: newer libraries take it as what it says it is.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: usize,
    split_share: c_int,
}

impl Config {
    fn polled() -> Self {
        const UNDEFINED: c_int = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21_700,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: 0,
            split_share: UNDEFINED,
        }
    }
}

macro_rules! functions {
    ($($name:ident($($arg:ty),*) $(-> $result:ty)?;)*) => {
        #[allow(non_snake_case, reason = "the names of nccl.h")]
        struct Functions { $($name: unsafe extern "C" fn($($arg),*) -> functions!(@ $($result)?),)* }

        impl Functions {
            fn load(library: &Library) -> std::result::Result<Self, &'static str> {
                // SAFETY: the types are those of nccl.h; communicators are pointers of the library's.
                unsafe { Ok(Self { $($name: look_up(library, stringify!($name))?,)* }) }
            }
        }
    };
    (@) => { c_int };
    (@ $result:ty) => { $result };
}

functions! {
    ncclGetVersion(*mut c_int);
    ncclGetUniqueId(*mut NcclId);
    ncclCommInitRankConfig(*mut Handle, c_int, NcclId, c_int, *mut Config);
    ncclCommGetAsyncError(Handle, *mut c_int);
    ncclCommFinalize(Handle);
    ncclCommDestroy(Handle);
    ncclCommAbort(Handle);
    ncclGetErrorString(c_int) -> *const c_char;
    ncclGetLastError(Handle) -> *const c_char;
    ncclSend(u64, usize, c_int, c_int, Handle, Handle);
    ncclRecv(u64, usize, c_int, c_int, Handle, Handle);
    ncclGroupStart();
    ncclGroupEnd();
}

/// The library.
pub struct Nccl {
    functions: Functions,
    version: c_int,
}

impl Nccl {
    /// Opens the library at `path`, or the one that the loader finds.
    ///
    /// # Errors
    /// If there is none, or one older than 2.14.
    pub fn open(path: Option<&Path>) -> Result<Arc<Self>> {
        let missing = |reason| Error::Library { what: "NCCL", reason };
        let names: Vec<PathBuf> = match path {
            Some(path) => vec![path.into()],
            None => ["libnccl.so.2", "libnccl.so"].map(PathBuf::from).to_vec(),
        };
        let mut refusals = Vec::new();
        for name in names {
            // SAFETY: loading runs the library's initialisers; NCCL is made for that.
            let library = match unsafe { Library::open(Some(&name), RTLD_NOW | RTLD_LOCAL) } {
                Ok(library) => library,
                Err(refusal) => {
                    refusals.push(refusal.to_string());
                    continue;
                }
            };
            let functions = Functions::load(&library).map_err(|function| {
                let name = name.display();
                missing(format!("{name} has no {function}: version 2.14 or newer is needed"))
            })?;
            let mut version = 0;
            // SAFETY: the pointer is good for one int.
            let code = unsafe { (functions.ncclGetVersion)(&mut version) };
            if code != SUCCESS || version < OLDEST {
                let (major, minor, patch) = split(version);
                let is = format!("{} is version {major}.{minor}.{patch}", name.display());
                return Err(missing(format!("{is}; 2.14 is needed")));
            }
            // Never unloaded: it leaves threads behind.
            std::mem::forget(library);
            return Ok(Arc::new(Self { functions, version }));
        }
        Err(missing(format!(
            "GPUs cannot be connected; install NCCL (Debian: libnccl2, PyPI: nvidia-nccl-cu12) and put \
             its folder into LD_LIBRARY_PATH. Tried: {}",
            refusals.join("; ")
        )))
    }

    /// Major, minor, patch.
    pub fn version(&self) -> (u32, u32, u32) {
        split(self.version)
    }

    /// A new meeting of ranks; one of them makes it, and gives it to all.
    ///
    /// # Errors
    /// If the library finds no way for ranks to reach each other.
    pub fn new_id(&self) -> Result<NcclId> {
        let mut id = NcclId([0; NcclId::LEN]);
        // SAFETY: the pointer is good for one id.
        let code = unsafe { (self.functions.ncclGetUniqueId)(&mut id) };
        self.check("ncclGetUniqueId", code, 0)?;
        Ok(id)
    }

    /// `code` as a result; what is in progress is well.
    fn check(&self, call: &'static str, code: c_int, communicator: Handle) -> Result<()> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: both leave null or a string of the library's; a null communicator is allowed.
        let (name, last) = unsafe {
            (
                text((self.functions.ncclGetErrorString)(code)),
                text((self.functions.ncclGetLastError)(communicator)),
            )
        };
        let text = last.lines().last().unwrap_or_default().trim().to_owned();
        Err(Error::Call { call, code: name, text, at: String::new() })
    }
}

fn split(version: c_int) -> (u32, u32, u32) {
    let version = version.max(0) as u32;
    // 2.8 and before count otherwise: 2804 is 2.8.4
    match version < 10_000 {
        true => (version / 1000, version % 1000 / 100, version % 100),
        false => (version / 10_000, version % 10_000 / 100, version % 100),
    }
}

/// # Safety
/// Null, or a string that ends with a zero.
unsafe fn text(text: *const c_char) -> String {
    match text.is_null() {
        true => String::new(),
        // SAFETY: as the caller promises.
        false => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
    }
}

/// One rank among others, with a GPU of its own.
struct Member {
    nccl: Arc<Nccl>,
    gpu: Gpu,
    /// 0 once it has ended.
    communicator: Handle,
}

/// One rank's end, on a GPU of its own. What is [put on its way](Self::start) arrives in that order.
pub struct NcclLink {
    member: Member,
    stream: Stream,
    under_way: VecDeque<Transfer>,
    spares: Vec<Staging>,
}

/// Memory that parts pass through.
struct Staging {
    send: Pinned<u8>,
    send_device: Buffer<u8>,
    receive: Pinned<u8>,
    receive_device: Buffer<u8>,
    done: Event,
}

struct Transfer {
    staging: Staging,
    received: usize,
    /// All of it is on the stream.
    launched: bool,
}

/// Bytes of a GPU's memory that go to a rank, or come from one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leg {
    /// The other rank.
    pub peer: usize,
    /// Device pointer.
    pub address: u64,
    /// How many.
    pub bytes: usize,
}

impl Member {
    fn begin(nccl: &Arc<Nccl>, gpu: &Gpu, id: NcclId, rank: usize, ranks: usize) -> Result<Self> {
        gpu.bind()?;
        let (mut communicator, mut config) = (0, Config::polled());
        // SAFETY: both pointers are good; the GPU is this thread's.
        let code = unsafe {
            (nccl.functions.ncclCommInitRankConfig)(
                &mut communicator,
                ranks as c_int,
                id,
                rank as c_int,
                &mut config,
            )
        };
        nccl.check("ncclCommInitRankConfig", code, communicator)?;
        Ok(Self { nccl: nccl.clone(), gpu: gpu.clone(), communicator })
    }

    /// True once the library is done with what it was last asked for.
    fn is_ready(&self) -> Result<bool> {
        let mut state = SUCCESS;
        // SAFETY: the communicator lives; the pointer is good for one int.
        let code =
            unsafe { (self.nccl.functions.ncclCommGetAsyncError)(self.communicator, &mut state) };
        self.check("ncclCommGetAsyncError", code)?;
        self.check("NCCL", state)?;
        Ok(state != IN_PROGRESS)
    }

    /// Puts sends and receives on `stream`, as one group.
    ///
    /// # Safety
    /// The memory of all legs is there until they are done.
    unsafe fn exchange(&self, stream: &Stream, sends: &[Leg], receives: &[Leg]) -> Result<()> {
        if self.communicator == 0 {
            return Err(Error::Library { what: "NCCL", reason: "the connection has ended".into() });
        }
        self.gpu.bind()?;
        let (f, stream) = (&self.nccl.functions, stream.handle());
        // SAFETY: groups may be opened at any time.
        self.check("ncclGroupStart", unsafe { (f.ncclGroupStart)() })?;
        let (mut code, mut call) = (SUCCESS, "");
        for &Leg { peer, address, bytes } in sends {
            // SAFETY: the memory is as the caller promises; the communicator and the stream live.
            let sent = unsafe {
                (f.ncclSend)(address, bytes, BYTES, peer as c_int, self.communicator, stream)
            };
            first(&mut code, &mut call, sent, "ncclSend");
        }
        for &Leg { peer, address, bytes } in receives {
            // SAFETY: as above.
            let received = unsafe {
                (f.ncclRecv)(address, bytes, BYTES, peer as c_int, self.communicator, stream)
            };
            first(&mut code, &mut call, received, "ncclRecv");
        }
        // Also where one has failed: the group must not stay open.
        // SAFETY: opened above, on this thread.
        let ended = unsafe { (f.ncclGroupEnd)() };
        first(&mut code, &mut call, ended, "ncclGroupEnd");
        self.check(call, code)
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        self.nccl.check(call, code, self.communicator)
    }

    /// Ends this rank's end of the library, if that can end well.
    fn leave(&mut self) -> Result<()> {
        self.gpu.bind()?;
        // SAFETY: the communicator lives, and nothing is under way.
        let code = unsafe { (self.nccl.functions.ncclCommFinalize)(self.communicator) };
        self.check("ncclCommFinalize", code)?;
        let since = Instant::now();
        while !self.is_ready()? && since.elapsed() < PATIENCE {
            std::thread::yield_now();
        }
        if since.elapsed() < PATIENCE {
            let communicator = std::mem::take(&mut self.communicator);
            // SAFETY: finalized, and not used again.
            unsafe { (self.nccl.functions.ncclCommDestroy)(communicator) };
        }
        Ok(())
    }

    fn abort(&mut self) {
        if self.communicator != 0 {
            let communicator = std::mem::take(&mut self.communicator);
            let _ = self.gpu.bind();
            // SAFETY: the communicator lives, and is not used again.
            unsafe { (self.nccl.functions.ncclCommAbort)(communicator) };
        }
    }

    /// Leaves if nothing is under way, else aborts.
    fn end(&mut self, idle: bool) {
        if self.communicator != 0 && idle && !std::thread::panicking() {
            // what cannot end well is ended below
            let _ = self.leave();
        }
        self.abort();
    }
}

/// One rank's end for memory of the GPUs.
pub struct NcclPeers {
    member: Member,
}

impl NcclPeers {
    /// Begins to join the other ranks as `rank` of `ranks` with GPU `gpu`;
    /// [`is_ready`](Self::is_ready) tells when all have.
    ///
    /// # Errors
    /// What the driver or the library refuses.
    pub fn begin(
        nccl: &Arc<Nccl>,
        gpu: &Gpu,
        id: NcclId,
        rank: usize,
        ranks: usize,
    ) -> Result<Self> {
        Ok(Self { member: Member::begin(nccl, gpu, id, rank, ranks)? })
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        &self.member.gpu
    }

    /// True once the library is done with what it was last asked for: then it is on the stream, and more can be
    /// asked for.
    ///
    /// # Errors
    /// What went wrong meanwhile, here or at another rank.
    pub fn is_ready(&self) -> Result<bool> {
        self.member.is_ready()
    }

    /// Puts one exchange on `stream`, for which all ranks do the same at the other ends, in the same order. The
    /// library [is ready](Self::is_ready); what comes later on the stream must be put there once it is so again.
    ///
    /// # Safety
    /// The memory of all legs is there until they are done.
    ///
    /// # Errors
    /// What the library refuses.
    pub unsafe fn start(&self, stream: &Stream, sends: &[Leg], receives: &[Leg]) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.member.exchange(stream, sends, receives) }
    }

    /// Ends everything that is under way, here; the other ranks must do the same. Nothing arrives after it.
    pub fn abort(&mut self) {
        self.member.abort();
    }
}

impl Drop for NcclPeers {
    fn drop(&mut self) {
        let idle = self.member.communicator != 0 && self.is_ready().unwrap_or(false);
        self.member.end(idle);
    }
}

impl NcclLink {
    /// Begins to join the other ranks as `rank` of `ranks` with GPU `gpu`;
    /// [`is_ready`](Self::is_ready) tells when all have.
    ///
    /// # Errors
    /// What the driver or the library refuses.
    pub fn begin(
        nccl: &Arc<Nccl>,
        gpu: &Gpu,
        id: NcclId,
        rank: usize,
        ranks: usize,
    ) -> Result<Self> {
        Ok(Self {
            stream: Stream::new(gpu)?,
            member: Member::begin(nccl, gpu, id, rank, ranks)?,
            under_way: VecDeque::new(),
            spares: Vec::new(),
        })
    }

    /// True once the library is done with what it was last asked for, and can be asked again.
    ///
    /// # Errors
    /// What went wrong meanwhile, here or at another rank.
    pub fn is_ready(&mut self) -> Result<bool> {
        let ready = self.member.is_ready()?;
        if ready {
            self.copy_back()?;
        }
        Ok(ready)
    }

    /// Puts one exchange on its way: bytes to some ranks, and room for so many bytes from some, which all
    /// do the same at the other end, in the same order of exchanges. The library
    /// [is ready](Self::is_ready).
    ///
    /// # Errors
    /// What the driver or the library refuses, or no memory.
    pub fn start(&mut self, sends: &[(usize, &[u8])], receives: &[(usize, usize)]) -> Result<()> {
        let sent: usize = sends.iter().map(|(_, part)| part.len()).sum();
        let received: usize = receives.iter().map(|(_, len)| len).sum();
        let mut staging = self.staging(sent, received)?;
        let mut at = 0;
        for (_, part) in sends {
            staging.send.as_mut_slice()[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        let driver = self.member.gpu.bind()?;
        let (host, device) =
            (staging.send.as_slice().as_ptr(), staging.send_device.view().address());
        if sent > 0 {
            let stream = self.stream.handle();
            // SAFETY: both sides hold as many bytes, and are kept until the transfer is done.
            call!(driver.cuMemcpyHtoDAsync_v2(device, host.cast(), sent, stream))?;
        }
        let legs = |parts: &mut dyn Iterator<Item = (usize, usize)>, mut address: u64| {
            parts
                .map(|(peer, bytes)| {
                    let leg = Leg { peer, address, bytes };
                    address += bytes as u64;
                    leg
                })
                .collect::<Vec<_>>()
        };
        let to = legs(&mut sends.iter().map(|(peer, part)| (*peer, part.len())), device);
        let room = staging.receive_device.view().address();
        let from = legs(&mut receives.iter().copied(), room);
        // SAFETY: all parts lie in the buffers, which are kept until the transfer is done.
        let started = unsafe { self.member.exchange(&self.stream, &to, &from) };
        self.under_way.push_back(Transfer { staging, received, launched: false });
        started?;
        self.is_ready().map(drop)
    }

    /// What has been received follows on the stream once the library has put its part there.
    fn copy_back(&mut self) -> Result<()> {
        let stream = self.stream.handle();
        for transfer in self.under_way.iter_mut().filter(|transfer| !transfer.launched) {
            let Transfer { staging, received, launched } = transfer;
            let driver = self.member.gpu.bind()?;
            let host = staging.receive.as_mut_slice().as_mut_ptr();
            let device = staging.receive_device.view().address();
            if *received > 0 {
                // SAFETY: both sides hold as many bytes, and are kept until the transfer is done.
                call!(driver.cuMemcpyDtoHAsync_v2(host.cast(), device, *received, stream))?;
            }
            self.stream.record(&staging.done)?;
            *launched = true;
        }
        Ok(())
    }

    /// True once the oldest exchange that has not been [taken](Self::take) is there.
    ///
    /// # Errors
    /// What went wrong meanwhile, here or at another rank.
    pub fn has_arrived(&mut self) -> Result<bool> {
        if self.under_way.front().is_none_or(|transfer| !transfer.launched) && !self.is_ready()? {
            return Ok(false);
        }
        let Some(transfer) = self.under_way.front() else { return Ok(false) };
        if transfer.staging.done.is_reached()? {
            return Ok(true);
        }
        self.is_ready()?;
        Ok(false)
    }

    /// Copies what the oldest exchange has received, one part after another, to `to`, and is done with
    /// it. It [has arrived](Self::has_arrived).
    pub fn take(&mut self, to: &mut [u8]) {
        if let Some(Transfer { staging, received, .. }) = self.under_way.pop_front() {
            let len = received.min(to.len());
            to[..len].copy_from_slice(&staging.receive.as_slice()[..len]);
            self.spares.push(staging);
        }
    }

    /// Ends everything that is under way, here; the other ranks must do the same. Nothing arrives after
    /// it.
    pub fn abort(&mut self) {
        self.member.abort();
    }

    fn staging(&mut self, send: usize, receive: usize) -> Result<Staging> {
        let gpu = &self.member.gpu;
        let mut staging = match self.spares.pop() {
            Some(spare) => spare,
            None => Staging {
                send: Pinned::new(gpu, 0)?,
                send_device: Buffer::new(gpu, 0, "rows to other ranks")?,
                receive: Pinned::new(gpu, 0)?,
                receive_device: Buffer::new(gpu, 0, "rows from other ranks")?,
                done: Event::new(gpu)?,
            },
        };
        // larger than needed, so that sizes that vary a little do not allocate each time
        let room = |bytes: usize| bytes.next_multiple_of(1 << 16).max(bytes / 4 * 5);
        if staging.send.as_slice().len() < send {
            staging.send = Pinned::new(gpu, room(send))?;
            staging.send_device = Buffer::new(gpu, room(send), "rows to other ranks")?;
        }
        if staging.receive.as_slice().len() < receive {
            staging.receive = Pinned::new(gpu, room(receive))?;
            staging.receive_device = Buffer::new(gpu, room(receive), "rows from other ranks")?;
        }
        Ok(staging)
    }
}

impl Drop for NcclLink {
    fn drop(&mut self) {
        self.member.end(self.under_way.is_empty());
    }
}

/// Keeps the first code that is an error.
fn first(code: &mut c_int, call: &mut &'static str, new: c_int, of: &'static str) {
    if (*code == SUCCESS || *code == IN_PROGRESS) && new != SUCCESS {
        (*code, *call) = (new, of);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_in_both_ways_of_counting() {
        assert_eq!(split(2804), (2, 8, 4));
        assert_eq!(split(21_403), (2, 14, 3));
        assert_eq!(split(22_705), (2, 27, 5));
        assert_eq!(size_of::<Config>(), 48);
    }

    #[test]
    fn what_is_no_nccl_is_told_in_one_line() {
        let error = Nccl::open(Some(Path::new("/nonexistent/libnccl.so.2"))).err().unwrap();
        let error = error.to_string();
        assert!(error.starts_with("no NCCL: ") && error.contains("LD_LIBRARY_PATH"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}
