//! Compiled kernels: from source to a function that can be launched, with a cache on disk.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::{fs, io};

use crate::driver::{Handle, LaunchAttribute, LaunchConfig, call};
use crate::memory::Pod;
use crate::nvrtc::{Compiler, Source};
use crate::{Error, Gpu, Result, Stream};

/// Kernels of one GPU: compiled when first asked for, loaded once, cached on disk.
pub struct Modules {
    gpu: Gpu,
    arch: String,
    compiler: Compiler,
    cache: Option<PathBuf>,
    early: bool,
    loaded: Mutex<HashMap<Key, Arc<Module>>>,
}

type Key = (&'static str, Vec<String>);

/// Machine code on the GPU.
struct Module {
    gpu: Gpu,
    handle: Handle,
}

impl Drop for Module {
    fn drop(&mut self) {
        if let Ok(driver) = self.gpu.bind() {
            // SAFETY: loaded once, unloaded once; its functions keep it alive.
            let _ = unsafe { (driver.cuModuleUnload)(self.handle) };
        }
    }
}

/// A kernel, ready to launch.
#[derive(Clone)]
pub struct Function {
    module: Arc<Module>,
    handle: Handle,
    name: &'static str,
    early: bool,
}

impl Modules {
    /// Kernels for `gpu`, by `compiler`. `cache` is a folder for compiled code, made when needed;
    /// without one, every process compiles anew.
    pub fn new(gpu: &Gpu, compiler: Compiler, cache: Option<PathBuf>) -> Self {
        let arch = gpu.properties().arch();
        let early = gpu.bind().is_ok_and(|driver| driver.launches_early());
        Self { gpu: gpu.clone(), arch, compiler, cache, early, loaded: Mutex::default() }
    }

    /// The folder of compiled kernels of this user: `moe-runner/cuda` in `$XDG_CACHE_HOME` or
    /// `~/.cache`; none where neither is set.
    pub fn user_cache() -> Option<PathBuf> {
        let set =
            |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let base = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
        Some(base.join("moe-runner").join("cuda"))
    }

    /// The GPU they run on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The kernel `name` of a source, compiled with `options` (NVRTC's, such as `-DNAME=1`).
    ///
    /// # Errors
    /// If it does not compile or load. A cache that cannot be read or written is no error.
    pub fn function(
        &self,
        source: &Source,
        options: &[String],
        name: &'static str,
    ) -> Result<Function> {
        let key = (source.name, options.to_vec());
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let module = match loaded.get(&key) {
            Some(module) => Arc::clone(module),
            None => {
                let code = self.code(source, options)?;
                let driver = self.gpu.bind()?;
                let mut handle = 0;
                // SAFETY: the pointer is good for one handle; a cubin says its own length.
                call!(driver.cuModuleLoadData(&mut handle, code.as_ptr().cast()))?;
                let module = Arc::new(Module { gpu: self.gpu.clone(), handle });
                loaded.insert(key, Arc::clone(&module));
                module
            }
        };
        let driver = self.gpu.bind()?;
        let c_name = CString::new(name).unwrap_or_default();
        let mut handle = 0;
        // SAFETY: the pointer is good for one handle, the name ends with a zero.
        call!(driver.cuModuleGetFunction(&mut handle, module.handle, c_name.as_ptr()))?;
        Ok(Function { module, handle, name, early: self.early })
    }

    /// Machine code, from the cache where it is.
    fn code(&self, source: &Source, options: &[String]) -> Result<Vec<u8>> {
        let path = self.cache.as_ref().map(|folder| {
            folder.join(format!(
                "{}-{}-{:032x}.cubin",
                source.name,
                self.arch,
                self.key(source, options)
            ))
        });
        if let Some(code) = path.as_deref().and_then(read) {
            return Ok(code);
        }
        let code = self.compiler.compile(source, &self.arch, options)?.code;
        if let Some(path) = path {
            // The next process compiles again: slower, and as right.
            let _ = write(&path, &code);
        }
        Ok(code)
    }

    /// Of everything that the code depends on.
    fn key(&self, source: &Source, options: &[String]) -> u128 {
        let mut hash = Hash::new();
        let (major, minor) = self.compiler.version();
        hash.add(format!("{major}.{minor}").as_bytes());
        hash.add(self.arch.as_bytes());
        hash.add(source.text.as_bytes());
        for (name, text) in source.headers {
            hash.add(name.as_bytes());
            hash.add(text.as_bytes());
        }
        for option in options {
            hash.add(option.as_bytes());
        }
        hash.0
    }
}

/// A cached file's code; nothing if there is none or if it is damaged. Its last 16 bytes are the
/// hash of the others.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    let code = bytes.len().checked_sub(16)?;
    let stored = u128::from_le_bytes(bytes[code..].try_into().ok()?);
    bytes.truncate(code);
    (Hash::of(&bytes) == stored).then_some(bytes)
}

/// Under a temporary name, then renamed: nobody ever reads half a file.
fn write(path: &Path, code: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    let temporary = folder.join(name);
    let mut bytes = code.to_vec();
    bytes.extend_from_slice(&Hash::of(code).to_le_bytes());
    let done = fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    if done.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    done
}

/// FNV-1a of 128 bits, of parts with their lengths. Tells files apart, and finds damaged ones; no
/// protection against somebody who may write to the folder.
struct Hash(u128);

impl Hash {
    fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    fn of(bytes: &[u8]) -> u128 {
        let mut hash = Self::new();
        hash.add(bytes);
        hash.0
    }

    fn add(&mut self, bytes: &[u8]) {
        for &byte in (bytes.len() as u64).to_le_bytes().iter().chain(bytes) {
            self.0 =
                (self.0 ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }
}

/// How many threads a launch has.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks along x and y.
    pub grid: (u32, u32),
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
    /// All blocks are resident at once and may wait for each other.
    pub cooperative: bool,
}

impl Launch {
    /// Blocks in a row that do not wait for each other, without dynamic shared memory.
    pub fn plain(blocks: u32, threads: u32) -> Self {
        Self { grid: (blocks, 1), block: threads, shared: 0, cooperative: false }
    }
}

/// What can be handed to a kernel: numbers, and structures of them laid out as in C.
///
/// # Safety
/// The kernel's parameter has the same layout.
pub unsafe trait Argument {
    /// Where it lies.
    fn address(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}

// SAFETY: numbers are laid out alike on both sides.
unsafe impl<T: Pod> Argument for T {}

impl Function {
    /// Allows blocks of this kernel `bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// If the GPU has not that much.
    pub fn allow_shared(&self, bytes: u32) -> Result<()> {
        const MAX_DYNAMIC_SHARED: i32 = 8;
        let driver = self.module.gpu.bind()?;
        // SAFETY: the function lives as long as its module.
        call!(driver.cuFuncSetAttribute(self.handle, MAX_DYNAMIC_SHARED, bytes as i32))
    }

    /// Blocks of this kernel that one multiprocessor holds at once.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn resident_blocks(&self, block: u32, shared: u32) -> Result<usize> {
        let driver = self.module.gpu.bind()?;
        let mut blocks = 0;
        // SAFETY: the pointer is good for one int; the function lives as long as its module.
        call!(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
            &mut blocks,
            self.handle,
            block as i32,
            shared as usize
        ))?;
        Ok(blocks as usize)
    }

    /// Puts the kernel on a stream.
    ///
    /// # Safety
    /// The arguments are the kernel's parameters in number, order and layout; what they point to is
    /// as large as the kernel takes it to be and lives until the work is done.
    ///
    /// # Errors
    /// If the launch is refused, or an earlier step failed.
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        launch: Launch,
        arguments: &[&dyn Argument],
    ) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.put(stream, launch, arguments, false) }
    }

    /// The same for a kernel that may begin while the step before it on the stream ends: it waits for that by itself,
    /// by `wait_for_step_before` of ptx.cuh. With a driver that cannot capture that, as any other.
    ///
    /// # Safety
    /// As [`Self::launch`], and the kernel waits so before it touches what earlier steps write or read.
    ///
    /// # Errors
    /// As [`Self::launch`].
    pub unsafe fn launch_early(
        &self,
        stream: &Stream,
        launch: Launch,
        arguments: &[&dyn Argument],
    ) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.put(stream, launch, arguments, self.early) }
    }

    unsafe fn put(
        &self,
        stream: &Stream,
        launch: Launch,
        arguments: &[&dyn Argument],
        early: bool,
    ) -> Result<()> {
        const MOST: usize = 24;
        if arguments.len() > MOST {
            return Err(Error::input(self.name, format!("{} arguments", arguments.len())));
        }
        let mut addresses = [std::ptr::null_mut(); MOST];
        for (address, argument) in addresses.iter_mut().zip(arguments) {
            *address = argument.address();
        }
        let driver = stream.enter(self.name)?;
        let ((x, y), at) = (launch.grid, addresses.as_mut_ptr());
        let (handle, block, shared, queue) =
            (self.handle, launch.block, launch.shared, stream.handle());
        // SAFETY: the driver copies the arguments before it returns; the rest is the caller's.
        let code = unsafe {
            if early {
                let attribute = LaunchAttribute::early();
                let config = LaunchConfig {
                    grid: [x, y, 1],
                    block: [block, 1, 1],
                    shared,
                    stream: queue,
                    attributes: &attribute,
                    count: 1,
                };
                (driver.cuLaunchKernelEx)(&config, handle, at, std::ptr::null_mut())
            } else if launch.cooperative {
                (driver.cuLaunchCooperativeKernel)(handle, x, y, 1, block, 1, 1, shared, queue, at)
            } else {
                let extra = std::ptr::null_mut();
                (driver.cuLaunchKernel)(handle, x, y, 1, block, 1, 1, shared, queue, at, extra)
            }
        };
        stream.check(driver, "cuLaunchKernel", code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_of_the_cache_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deeper").join("kernel.cubin");
        assert_eq!(read(&path), None);
        write(&path, b"machine code").unwrap();
        assert_eq!(read(&path).as_deref(), Some(b"machine code".as_slice()));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        let mut bytes = fs::read(&path).unwrap();
        bytes[3] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(read(&path), None);
        fs::write(&path, &bytes[..9]).unwrap();
        assert_eq!(read(&path), None);
    }
}
