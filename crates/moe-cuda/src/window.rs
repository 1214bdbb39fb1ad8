//! Device memory that other ranks' GPUs write into: of the same process by its address, of another one of the same
//! machine as that one opens it.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::driver::{IpcHandle, call};
use crate::{Buffer, Gpu, Pinned, Result};

/// What another process of this machine needs to open a buffer.
pub type Offer = [u64; 8];

impl Buffer<u8> {
    /// This memory for other processes. It must live for as long as one of them has it open.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn offer(&self) -> Result<Offer> {
        let driver = self.gpu().bind()?;
        let mut handle = IpcHandle([0; 8]);
        // SAFETY: the pointer is good for one handle; the memory was allocated for itself.
        call!(driver.cuIpcGetMemHandle(&mut handle, self.view().address()))?;
        Ok(handle.0)
    }
}

/// Memory of a GPU of another process, open in this one.
#[derive(Debug)]
pub struct Opened {
    gpu: Gpu,
    address: u64,
}

impl Opened {
    /// For kernels of `gpu`.
    ///
    /// # Errors
    /// If the driver refuses: another machine's memory, a GPU that this one does not reach.
    pub fn new(gpu: &Gpu, offer: Offer) -> Result<Self> {
        const ENABLE_PEER_ACCESS: u32 = 1;
        let driver = gpu.bind()?;
        let mut address = 0;
        // SAFETY: the pointer is good for one device pointer; the driver checks the handle.
        call!(driver.cuIpcOpenMemHandle_v2(&mut address, IpcHandle(offer), ENABLE_PEER_ACCESS))?;
        Ok(Self { gpu: gpu.clone(), address })
    }

    /// Its address here.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Ok(driver) = self.gpu.bind() {
            // SAFETY: opened once, closed once. An error here is one that a later call reports.
            let _ = unsafe { (driver.cuIpcCloseMemHandle)(self.address) };
        }
    }
}

/// A word of the host that ends kernels that wait for another rank.
#[derive(Debug)]
pub struct StopWord(Pinned<u32>);

impl StopWord {
    /// One that says to go on.
    ///
    /// # Errors
    /// If the host cannot give it.
    pub fn new(gpu: &Gpu) -> Result<Self> {
        Pinned::new(gpu, 1).map(Self)
    }

    /// Ends them, and all that come.
    pub fn stop(&self) {
        let word = self.0.as_slice().as_ptr().cast_mut();
        // SAFETY: one aligned word, written here alone and always so; a kernel reads it.
        unsafe { AtomicU32::from_ptr(word) }.store(1, Ordering::Release);
    }

    /// Where any GPU reads it.
    pub fn address(&self) -> u64 {
        // pinned memory has one address for the host and all GPUs
        self.0.as_slice().as_ptr().addr() as u64
    }
}
