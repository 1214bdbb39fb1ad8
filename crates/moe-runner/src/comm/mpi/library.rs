//! libmpi, opened at run time: which one, which binary interface it speaks, and its functions.
//!
//! Three interfaces are in use. They share the functions' names and differ in what a handle is:
//! Open MPI's are addresses of its global objects, MPICH's are ints with fixed values, the MPI-5
//! standard's are pointers with fixed values. All fit a `usize`. An int is passed as a `usize` in a
//! register, of which the callee reads the lower half (x86-64 and AArch64 pass the first six
//! arguments so, and no handle comes later); an int written to a zeroed `usize` leaves the upper
//! half zero on little-endian machines, which are the only ones supported.

use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::path::Path;
use std::ptr;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};

use crate::{Error, Result};

/// A communicator, datatype, error handler or request, of any interface.
pub(super) type Handle = usize;

/// Room for an `MPI_Status` of any interface (the largest has 32 bytes).
type Status = [u64; 8];

macro_rules! functions {
    ($($name:ident($($arg:ty),*);)*) => {
        /// The functions used; all return an error code.
        #[allow(non_snake_case, reason = "the names of the MPI standard")]
        struct Functions { $($name: unsafe extern "C" fn($($arg),*) -> c_int,)* }

        impl Functions {
            /// Looks all of them up; the error is the name of one that is missing.
            fn load(library: &Library) -> std::result::Result<Self, &'static str> {
                // SAFETY: the types are those of the MPI standard, with handles as stated above.
                unsafe { Ok(Self { $($name: look_up(library, stringify!($name))?,)* }) }
            }
        }
    };
}

functions! {
    MPI_Initialized(*mut c_int);
    MPI_Finalized(*mut c_int);
    MPI_Init_thread(*mut c_int, *mut c_void, c_int, *mut c_int);
    MPI_Query_thread(*mut c_int);
    MPI_Finalize();
    MPI_Get_library_version(*mut c_char, *mut c_int);
    MPI_Error_string(c_int, *mut c_char, *mut c_int);
    MPI_Comm_rank(Handle, *mut c_int);
    MPI_Comm_size(Handle, *mut c_int);
    MPI_Comm_dup(Handle, *mut Handle);
    MPI_Comm_split(Handle, c_int, c_int, *mut Handle);
    MPI_Comm_free(*mut Handle);
    MPI_Comm_set_errhandler(Handle, Handle);
    MPI_Isend(*const c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle);
    MPI_Irecv(*mut c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle);
    MPI_Test(*mut Handle, *mut c_int, *mut Status);
}

/// The function of that name; the error is the name.
///
/// # Safety
/// `F` must be the function's type.
unsafe fn look_up<F: Copy>(
    library: &Library,
    name: &'static str,
) -> std::result::Result<F, &'static str> {
    // SAFETY: as the caller promises.
    let symbol: Symbol<F> = unsafe { library.get(name) }.map_err(|_| name)?;
    Ok(*symbol)
}

/// The binary interface, by what its handles are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Abi {
    OpenMpi,
    Mpich,
    Standard,
}

/// The values that differ between interfaces.
struct Constants {
    world: Handle,
    byte: Handle,
    errors_return: Handle,
    thread_funneled: c_int,
}

/// An open and initialised libmpi. Not closed again: MPI libraries do not survive it.
pub(super) struct Mpi {
    functions: Functions,
    constants: Constants,
    /// Whether this crate called `MPI_Init_thread`, and so has to finalize.
    initialised_here: bool,
    /// The library's name and version.
    pub(super) version: String,
}

/// The library names to try: those of the launcher that started this process come first, so that
/// of several installed libraries the matching one is taken.
fn candidates() -> Vec<&'static str> {
    let set = |name: &str| std::env::var_os(name).is_some();
    let (open_mpi, mpich, standard) =
        (["libmpi.so.40"], ["libmpi.so.12", "libmpich.so.12"], ["libmpi_abi.so.1"]);
    let mut names = Vec::new();
    if !set("OMPI_COMM_WORLD_SIZE") && set("PMI_SIZE") {
        names.extend(mpich.iter().chain(&standard).chain(&open_mpi));
    } else {
        names.extend(open_mpi.iter().chain(&mpich).chain(&standard));
    }
    names.extend(["libmpi.so", "libmpich.so", "libmpi.dylib"]);
    names
}

impl Mpi {
    /// Opens and initialises the library at `path`, or the first known one that is installed.
    pub(super) fn open(path: Option<&Path>) -> Result<Self> {
        if cfg!(target_endian = "big") {
            return Err(error("MPI is supported on little-endian machines only"));
        }
        let names: Vec<&OsStr> = match path {
            Some(path) => vec![path.as_os_str()],
            None => candidates().into_iter().map(OsStr::new).collect(),
        };
        let mut refusals = Vec::new();
        for name in names {
            // SAFETY: loading runs the library's initialisers; MPI libraries are made for that.
            // RTLD_GLOBAL because Open MPI's own plugins look their symbols up globally.
            match unsafe { Library::open(Some(name), RTLD_NOW | RTLD_GLOBAL) } {
                Ok(library) => return Self::start(library, &name.to_string_lossy()),
                Err(refusal) => refusals.push(format!("  {refusal}")),
            }
        }
        Err(error(format!(
            "no MPI library found; install Open MPI (Debian: openmpi-bin) or MPICH, or put its \
             folder into LD_LIBRARY_PATH. Tried:\n{}",
            refusals.join("\n")
        )))
    }

    fn start(library: Library, name: &str) -> Result<Self> {
        let functions = Functions::load(&library)
            .map_err(|missing| error(format!("{name}: not an MPI library: it has no {missing}")))?;
        let constants = constants(&library, name).ok_or_else(|| {
            error(format!("{name}: an Open MPI without the symbols of its handles"))
        })?;
        std::mem::forget(library);
        let mut mpi =
            Self { functions, constants, initialised_here: false, version: String::new() };
        mpi.initialise()?;
        mpi.version = mpi.library_version();
        Ok(mpi)
    }

    fn initialise(&mut self) -> Result<()> {
        let f = &self.functions;
        let (mut initialised, mut finalized, mut level) = (0, 0, 0);
        let funneled = self.constants.thread_funneled;
        // SAFETY: these may be called at any time; the pointers are to live ints.
        unsafe {
            self.check("MPI_Initialized", (f.MPI_Initialized)(&mut initialised))?;
            self.check("MPI_Finalized", (f.MPI_Finalized)(&mut finalized))?;
        }
        if finalized != 0 {
            return Err(error("MPI has been finalized in this process; it cannot start again"));
        }
        if initialised != 0 {
            // SAFETY: MPI is initialised; the pointer is to a live int.
            self.check("MPI_Query_thread", unsafe { (f.MPI_Query_thread)(&mut level) })?;
        } else {
            let (argc, argv) = (ptr::null_mut(), ptr::null_mut());
            // SAFETY: MPI is not initialised; argc and argv may be null since MPI-2.
            let code = unsafe { (f.MPI_Init_thread)(argc, argv, funneled, &mut level) };
            self.check("MPI_Init_thread", code)?;
        }
        if level < funneled {
            return Err(error("this MPI library does not allow other threads beside it"));
        }
        self.initialised_here = initialised == 0;
        Ok(())
    }

    fn library_version(&self) -> String {
        // MPI_MAX_LIBRARY_VERSION_STRING is at most 8192.
        let mut text = vec![0 as c_char; 8192];
        let mut len = 0;
        // SAFETY: the buffer has the room that the standard asks for; it stays terminated.
        let code = unsafe { (self.functions.MPI_Get_library_version)(text.as_mut_ptr(), &mut len) };
        if code != 0 {
            return "MPI".to_owned();
        }
        let text = text_of(&text);
        let line = text.lines().next().unwrap_or_default();
        line.split(',').next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// The handle of all ranks' communicator, ours alone: a duplicate, whose messages cannot meet
    /// those of others in this process.
    pub(super) fn world(&self) -> Result<Handle> {
        let mut comm = 0;
        // SAFETY: MPI is initialised; all ranks open MPI together; the pointer is to a live handle.
        let code = unsafe { (self.functions.MPI_Comm_dup)(self.constants.world, &mut comm) };
        self.check("MPI_Comm_dup", code)?;
        self.return_errors(comm)?;
        Ok(comm)
    }

    /// The communicator of the ranks with this color, in the order of `key`. Collective.
    pub(super) fn split(&self, comm: Handle, color: c_int, key: c_int) -> Result<Handle> {
        let mut part = 0;
        // SAFETY: a live communicator; all its ranks are here; the pointer is to a live handle.
        let code = unsafe { (self.functions.MPI_Comm_split)(comm, color, key, &mut part) };
        self.check("MPI_Comm_split", code)?;
        self.return_errors(part)?;
        Ok(part)
    }

    /// Gives a communicator back: libraries have some thousands of them. All its ranks do so, and
    /// nobody will use it again.
    pub(super) fn free(&self, mut comm: Handle) -> Result<()> {
        // SAFETY: a live communicator, whose messages have all come; the pointer is to a live handle.
        self.check("MPI_Comm_free", unsafe { (self.functions.MPI_Comm_free)(&mut comm) })
    }

    /// Errors come back as codes, instead of ending the process.
    fn return_errors(&self, comm: Handle) -> Result<()> {
        let handler = self.constants.errors_return;
        // SAFETY: a live communicator and a predefined error handler.
        let code = unsafe { (self.functions.MPI_Comm_set_errhandler)(comm, handler) };
        self.check("MPI_Comm_set_errhandler", code)
    }

    /// Rank and size of a communicator.
    pub(super) fn rank_and_size(&self, comm: Handle) -> Result<(usize, usize)> {
        let (mut rank, mut size) = (0, 0);
        // SAFETY: a live communicator; the pointers are to live ints.
        unsafe {
            self.check("MPI_Comm_rank", (self.functions.MPI_Comm_rank)(comm, &mut rank))?;
            self.check("MPI_Comm_size", (self.functions.MPI_Comm_size)(comm, &mut size))?;
        }
        Ok((rank as usize, size as usize))
    }

    /// Starts to send `len` bytes.
    ///
    /// # Safety
    /// The bytes must stay where they are, unchanged, until [`test`](Mpi::test) says that the
    /// request is complete, or for good.
    pub(super) unsafe fn send(
        &self,
        bytes: *const u8,
        len: c_int,
        to: usize,
        tag: c_int,
        comm: Handle,
    ) -> Result<Handle> {
        let (byte, to, mut request) = (self.constants.byte, to as c_int, 0);
        // SAFETY: as the caller promises; the request is a live handle.
        let code = unsafe {
            (self.functions.MPI_Isend)(bytes.cast(), len, byte, to, tag, comm, &mut request)
        };
        self.check("MPI_Isend", code)?;
        Ok(request)
    }

    /// Starts to receive at most `len` bytes.
    ///
    /// # Safety
    /// The room must stay where it is, unused, until [`test`](Mpi::test) says that the request is
    /// complete, or for good.
    pub(super) unsafe fn receive(
        &self,
        room: *mut u8,
        len: c_int,
        from: usize,
        tag: c_int,
        comm: Handle,
    ) -> Result<Handle> {
        let (byte, from, mut request) = (self.constants.byte, from as c_int, 0);
        // SAFETY: as the caller promises; the request is a live handle.
        let code = unsafe {
            (self.functions.MPI_Irecv)(room.cast(), len, byte, from, tag, comm, &mut request)
        };
        self.check("MPI_Irecv", code)?;
        Ok(request)
    }

    /// True once the request is complete; it must not be tested again after that.
    pub(super) fn test(&self, request: &mut Handle) -> Result<bool> {
        let (mut done, mut status) = (0, Status::default());
        // SAFETY: a request of `send` or `receive`, and room for any status.
        let code = unsafe { (self.functions.MPI_Test)(request, &mut done, &mut status) };
        self.check("MPI_Test", code)?;
        Ok(done != 0)
    }

    /// Ends MPI, if this crate started it. Waits for all ranks to do so.
    pub(super) fn finalize(&self) {
        if self.initialised_here {
            // SAFETY: initialised, once, on this thread; no request is open.
            unsafe { (self.functions.MPI_Finalize)() };
        }
    }

    fn check(&self, function: &str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // MPI_MAX_ERROR_STRING is at most 1024.
        let mut text = vec![0 as c_char; 1024];
        let mut len = 0;
        // SAFETY: the buffer has the room that the standard asks for; it stays terminated.
        unsafe { (self.functions.MPI_Error_string)(code, text.as_mut_ptr(), &mut len) };
        Err(error(format!("{function}: {}", text_of(&text))))
    }
}

fn constants(library: &Library, name: &str) -> Option<Constants> {
    let address = |name: &[u8]| {
        // SAFETY: the symbol is only looked up; its address is the handle's value.
        unsafe { library.get::<*const c_void>(name) }.ok().map(|symbol| symbol.into_raw() as usize)
    };
    // By file name first: an implementation's own library, with its own symbols, may be behind it.
    let abi = if name.contains("mpi_abi") {
        Abi::Standard
    } else if address(b"ompi_mpi_comm_world\0").is_some() {
        Abi::OpenMpi
    } else {
        Abi::Mpich
    };
    Some(match abi {
        Abi::OpenMpi => Constants {
            world: address(b"ompi_mpi_comm_world\0")?,
            byte: address(b"ompi_mpi_byte\0")?,
            errors_return: address(b"ompi_mpi_errors_return\0")?,
            thread_funneled: 1,
        },
        Abi::Mpich => Constants {
            world: 0x4400_0000,
            byte: 0x4c00_010d,
            errors_return: 0x5400_0001,
            thread_funneled: 1,
        },
        Abi::Standard => {
            Constants { world: 0x101, byte: 0x247, errors_return: 0x143, thread_funneled: 1024 }
        }
    })
}

fn text_of(buffer: &[c_char]) -> String {
    // SAFETY: the callers' buffers start zeroed, and MPI terminates what it writes within them.
    unsafe { CStr::from_ptr(buffer.as_ptr()) }.to_string_lossy().into_owned()
}

fn error(reason: impl Into<String>) -> Error {
    Error::Communication(reason.into())
}
