//! One GPU: its primary context, what it is, and its memory.

use std::ffi::{CStr, c_int};
use std::fmt;
use std::sync::Arc;

use crate::driver::{Driver, Handle, call, driver};
use crate::{Error, Result};

/// The least compute capability: Ampere's, the first with bf16 on tensor cores and `cp.async`.
const LEAST: (u32, u32) = (8, 0);

/// A GPU in use. Clones share it.
#[derive(Clone)]
pub struct Gpu {
    inner: Arc<Inner>,
}

struct Inner {
    driver: &'static Driver,
    index: usize,
    device: c_int,
    context: Handle,
    properties: Properties,
}

/// What a GPU is.
#[derive(Clone, Debug)]
pub struct Properties {
    /// Such as "NVIDIA H200".
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of its last cache.
    pub l2_bytes: usize,
    /// Shared memory that one block can have, in bytes.
    pub shared_bytes: usize,
}

impl Properties {
    /// What kernels are compiled for: `sm_80`, `sm_90a`, .. From 9.0 on with all features of this
    /// very chip (the `a`), code that runs on no other.
    pub fn arch(&self) -> String {
        let (major, minor) = self.capability;
        format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" })
    }
}

impl Gpu {
    /// Number of GPUs that the driver shows.
    ///
    /// # Errors
    /// If there is no driver, or one that is too old.
    pub fn count() -> Result<usize> {
        let driver = driver()?;
        let mut count = 0;
        // SAFETY: the pointer is good for one int.
        call!(driver.cuDeviceGetCount(&mut count))?;
        Ok(count as usize)
    }

    /// Takes GPU `index` into use.
    ///
    /// # Errors
    /// If there is no driver, no such GPU, or if it is older than compute capability 8.0.
    pub fn new(index: usize) -> Result<Self> {
        let driver = driver()?;
        let count = Self::count()?;
        if index >= count {
            return Err(Error::Gpu { index, reason: format!("the driver shows {count} GPUs") });
        }
        let mut device = 0;
        // SAFETY: the pointer is good for one int.
        call!(driver.cuDeviceGet(&mut device, index as c_int))?;
        let properties = properties(driver, device)?;
        if properties.capability < LEAST {
            let (major, minor) = properties.capability;
            return Err(Error::Gpu {
                index,
                reason: format!(
                    "{} has compute capability {major}.{minor}; 8.0 (Ampere) or newer is needed",
                    properties.name
                ),
            });
        }
        let mut context = 0;
        // SAFETY: the pointer is good for one handle; the context is released with the last clone.
        call!(driver.cuDevicePrimaryCtxRetain(&mut context, device))?;
        let gpu = Self { inner: Arc::new(Inner { driver, index, device, context, properties }) };
        gpu.bind()?;
        Ok(gpu)
    }

    /// What it is.
    pub fn properties(&self) -> &Properties {
        &self.inner.properties
    }

    /// Its number, from 0.
    pub fn index(&self) -> usize {
        self.inner.index
    }

    /// What tells this very GPU from all others, of any machine.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn uuid(&self) -> Result<[u64; 2]> {
        let driver = self.bind()?;
        let mut uuid = [0; 2];
        // SAFETY: the pointer is good for 16 bytes.
        call!(driver.cuDeviceGetUuid_v2(uuid.as_mut_ptr(), self.inner.device))?;
        Ok(uuid)
    }

    /// Makes sure that kernels of this GPU can read and write memory of `other`, of the same process; false if they
    /// cannot.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn reach(&self, other: &Gpu) -> Result<bool> {
        const ALREADY: c_int = 704;
        let driver = self.bind()?;
        if self.inner.device == other.inner.device {
            return Ok(true);
        }
        let mut can = 0;
        // SAFETY: the pointer is good for one int.
        call!(driver.cuDeviceCanAccessPeer(&mut can, self.inner.device, other.inner.device))?;
        if can == 0 {
            return Ok(false);
        }
        // SAFETY: the other context lives: it is retained for as long as the process has used it, and access ends with it.
        match unsafe { (driver.cuCtxEnablePeerAccess)(other.inner.context, 0) } {
            ALREADY => Ok(true),
            code => driver.check("cuCtxEnablePeerAccess", code).map(|()| true),
        }
    }

    /// Bytes of its memory: free now, and in all.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let driver = self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both pointers are good for one size.
        call!(driver.cuMemGetInfo_v2(&mut free, &mut total))?;
        Ok((free as u64, total as u64))
    }

    /// Makes this GPU's context the calling thread's. Every other call of the driver comes after.
    pub(crate) fn bind(&self) -> Result<&'static Driver> {
        let driver = self.inner.driver;
        // SAFETY: the context is retained as long as `inner` lives.
        call!(driver.cuCtxSetCurrent(self.inner.context))?;
        Ok(driver)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // An error here has no one to tell it to, and the process loses nothing by it.
        // SAFETY: retained once in `new`.
        let _ = unsafe { (self.driver.cuDevicePrimaryCtxRelease_v2)(self.device) };
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GPU {}: {}", self.inner.index, self.inner.properties.name)
    }
}

fn properties(driver: &Driver, device: c_int) -> Result<Properties> {
    let attribute = |number: c_int| -> Result<usize> {
        let mut value = 0;
        // SAFETY: the pointer is good for one int.
        call!(driver.cuDeviceGetAttribute(&mut value, number, device))?;
        Ok(value as usize)
    };
    let mut name = [0; 128];
    // SAFETY: the buffer's length goes along; the driver ends the name with a zero inside it.
    call!(driver.cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device))?;
    // SAFETY: as above.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    // The numbers are those of CUdevice_attribute.
    Ok(Properties {
        name,
        capability: (attribute(75)? as u32, attribute(76)? as u32),
        multiprocessors: attribute(16)?,
        l2_bytes: attribute(38)?,
        shared_bytes: attribute(97)?,
    })
}
