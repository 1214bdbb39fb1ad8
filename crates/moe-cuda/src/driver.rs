//! libcuda, opened at run time: the functions that this crate calls, and their errors.
//!
//! Handles (contexts, streams, modules, ..) are pointers that only the library reads; here they are
//! `usize`. Device pointers are `u64`. Types follow `cuda.h` of CUDA 12.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW, Symbol};

use crate::{Error, Result};

/// A pointer of the library's own.
pub(crate) type Handle = usize;

/// `CUipcMemHandle`: memory of this process as another one opens it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct IpcHandle(pub(crate) [u64; 8]);

/// The oldest driver interface: CUDA 12.0, the first that knows Hopper's tensor maps.
const OLDEST: c_int = 12_000;

macro_rules! functions {
    ($($name:ident($($arg:ty),*);)*) => {
        /// The functions used; all return an error code.
        #[allow(non_snake_case, reason = "the names of cuda.h")]
        pub(crate) struct Driver { $(pub(crate) $name: unsafe extern "C" fn($($arg),*) -> c_int,)* }

        impl Driver {
            fn load(library: &Library) -> std::result::Result<Self, &'static str> {
                // SAFETY: the types are those of cuda.h, with handles as stated above.
                unsafe { Ok(Self { $($name: look_up(library, stringify!($name))?,)* }) }
            }
        }
    };
}

functions! {
    cuInit(c_uint);
    cuDriverGetVersion(*mut c_int);
    cuGetErrorName(c_int, *mut *const c_char);
    cuGetErrorString(c_int, *mut *const c_char);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut c_int, c_int);
    cuDeviceGetName(*mut c_char, c_int, c_int);
    cuDeviceGetAttribute(*mut c_int, c_int, c_int);
    cuDeviceGetUuid_v2(*mut u64, c_int);
    cuDevicePrimaryCtxRetain(*mut Handle, c_int);
    cuDevicePrimaryCtxRelease_v2(c_int);
    cuCtxSetCurrent(Handle);
    cuDeviceCanAccessPeer(*mut c_int, c_int, c_int);
    cuCtxEnablePeerAccess(Handle, c_uint);
    cuIpcGetMemHandle(*mut IpcHandle, u64);
    cuIpcOpenMemHandle_v2(*mut u64, IpcHandle, c_uint);
    cuIpcCloseMemHandle(u64);
    cuMemGetInfo_v2(*mut usize, *mut usize);
    cuMemAlloc_v2(*mut u64, usize);
    cuMemFree_v2(u64);
    cuMemAllocHost_v2(*mut *mut c_void, usize);
    cuMemFreeHost(*mut c_void);
    cuMemcpyHtoDAsync_v2(u64, *const c_void, usize, Handle);
    cuMemcpyDtoHAsync_v2(*mut c_void, u64, usize, Handle);
    cuMemcpyDtoDAsync_v2(u64, u64, usize, Handle);
    cuMemsetD8Async(u64, u8, usize, Handle);
    cuStreamCreate(*mut Handle, c_uint);
    cuStreamDestroy_v2(Handle);
    cuStreamSynchronize(Handle);
    cuStreamWaitEvent(Handle, Handle, c_uint);
    cuStreamBeginCapture_v2(Handle, c_int);
    cuStreamEndCapture(Handle, *mut Handle);
    cuGraphInstantiateWithFlags(*mut Handle, Handle, u64);
    cuGraphLaunch(Handle, Handle);
    cuGraphExecDestroy(Handle);
    cuGraphDestroy(Handle);
    cuEventCreate(*mut Handle, c_uint);
    cuEventRecord(Handle, Handle);
    cuEventSynchronize(Handle);
    cuEventQuery(Handle);
    cuEventElapsedTime(*mut f32, Handle, Handle);
    cuEventDestroy_v2(Handle);
    cuModuleLoadData(*mut Handle, *const c_void);
    cuModuleUnload(Handle);
    cuModuleGetFunction(*mut Handle, Handle, *const c_char);
    cuFuncSetAttribute(Handle, c_int, c_int);
    cuOccupancyMaxActiveBlocksPerMultiprocessor(*mut c_int, Handle, c_int, usize);
    cuLaunchKernel(
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle,
        *mut *mut c_void, *mut *mut c_void
    );
    cuLaunchCooperativeKernel(
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void
    );
    cuLaunchKernelEx(*const LaunchConfig, Handle, *mut *mut c_void, *mut *mut c_void);
    cuTensorMapEncodeTiled(
        *mut c_void, c_int, c_uint, u64, *const u64, *const u64, *const u32, *const u32,
        c_int, c_int, c_int, c_int
    );
}

/// `CUlaunchConfig`.
#[repr(C)]
pub(crate) struct LaunchConfig {
    pub(crate) grid: [c_uint; 3],
    pub(crate) block: [c_uint; 3],
    pub(crate) shared: c_uint,
    pub(crate) stream: Handle,
    pub(crate) attributes: *const LaunchAttribute,
    pub(crate) count: c_uint,
}

/// `CUlaunchAttribute`: a number, and a union of 64 bytes.
#[repr(C)]
pub(crate) struct LaunchAttribute {
    pub(crate) id: c_uint,
    pub(crate) padding: c_uint,
    pub(crate) value: [c_uint; 16],
}

impl LaunchAttribute {
    /// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`: the kernel may begin before the one ahead of it has ended.
    pub(crate) fn early() -> Self {
        let mut value = [0; 16];
        value[0] = 1;
        Self { id: 6, padding: 0, value }
    }
}

/// The function of that name; the error is the name.
///
/// # Safety
/// `F` must be the function's type.
pub(crate) unsafe fn look_up<F: Copy>(
    library: &Library,
    name: &'static str,
) -> std::result::Result<F, &'static str> {
    // SAFETY: as the caller promises.
    let symbol: Symbol<F> = unsafe { library.get(name) }.map_err(|_| name)?;
    Ok(*symbol)
}

/// The driver, opened and initialised once; why not, if it cannot be.
pub(crate) fn driver() -> Result<&'static Driver> {
    static DRIVER: OnceLock<std::result::Result<Driver, String>> = OnceLock::new();
    DRIVER
        .get_or_init(open)
        .as_ref()
        .map_err(|reason| Error::Library { what: "NVIDIA driver", reason: reason.clone() })
}

fn open() -> std::result::Result<Driver, String> {
    // SAFETY: loading runs the library's initialisers; the driver is made for that.
    let library = ["libcuda.so.1", "libcuda.so"]
        .iter()
        .find_map(|name| unsafe { Library::open(Some(*name), RTLD_NOW | RTLD_LOCAL) }.ok())
        .ok_or("libcuda.so.1 is not on this machine; it comes with NVIDIA's driver")?;
    let driver = Driver::load(&library)
        .map_err(|name| format!("it has no {name}: install a driver for CUDA 12.0 or newer"))?;
    // The driver does not survive being unloaded while a context of it lives.
    std::mem::forget(library);
    let mut version = 0;
    // SAFETY: the pointer is good for one int; any thread may ask at any time.
    let code = unsafe { (driver.cuDriverGetVersion)(&mut version) };
    if code == 0 && version < OLDEST {
        return Err(format!(
            "it is for CUDA {}.{}, too old: install a driver for CUDA 12.0 or newer",
            version / 1000,
            version % 1000 / 10
        ));
    }
    // SAFETY: flags must be 0, and are.
    match unsafe { (driver.cuInit)(0) } {
        0 => Ok(driver),
        code => {
            let (name, text) = driver.explain(code);
            Err(format!("libcuda is here, but does not start: {name} ({text})"))
        }
    }
}

impl Driver {
    /// Whether launches that begin early can be captured: since CUDA 12.3.
    pub(crate) fn launches_early(&self) -> bool {
        let mut version = 0;
        // SAFETY: as in `open`.
        let code = unsafe { (self.cuDriverGetVersion)(&mut version) };
        code == 0 && version >= 12_030
    }

    /// An error's name and explanation.
    pub(crate) fn explain(&self, code: c_int) -> (String, String) {
        let say = |ask: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text = std::ptr::null();
            // SAFETY: the call leaves null or a string that is never freed.
            unsafe {
                let known = ask(code, &mut text) == 0 && !text.is_null();
                known.then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
            }
        };
        (
            say(self.cuGetErrorName).unwrap_or_else(|| format!("error {code}")),
            say(self.cuGetErrorString).unwrap_or_else(|| "unknown to this driver".into()),
        )
    }

    /// `code` as a result.
    pub(crate) fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        self.check_at(call, code, String::new)
    }

    /// `code` as a result; `at` says what had been launched.
    pub(crate) fn check_at(
        &self,
        call: &'static str,
        code: c_int,
        at: impl FnOnce() -> String,
    ) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let (code, text) = self.explain(code);
        Err(Error::Call { call, code, text, at: at() })
    }
}

/// Calls a function of the driver and checks its result: `call!(driver.cuMemFree_v2(pointer))?`.
/// Expands to an unsafe block: the use says in a SAFETY comment why the arguments are good.
macro_rules! call {
    ($driver:ident.$name:ident($($arg:expr),* $(,)?)) => {
        // SAFETY: stated where the macro is used.
        $driver.check(stringify!($name), unsafe { ($driver.$name)($($arg),*) })
    };
}
pub(crate) use call;
