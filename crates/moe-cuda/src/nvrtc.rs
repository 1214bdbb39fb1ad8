//! NVRTC, opened at run time: CUDA C++ in, machine code of one architecture out, with the
//! compiler's report of what each kernel takes. Needs no GPU and no driver.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};

use crate::driver::{Handle, look_up};
use crate::{Error, Result};

macro_rules! functions {
    ($($name:ident($($arg:ty),*);)*) => {
        #[allow(non_snake_case, reason = "the names of nvrtc.h")]
        struct Functions { $($name: unsafe extern "C" fn($($arg),*) -> c_int,)* }

        impl Functions {
            fn load(library: &Library) -> std::result::Result<Self, &'static str> {
                // SAFETY: the types are those of nvrtc.h; programs are pointers of the library's.
                unsafe { Ok(Self { $($name: look_up(library, stringify!($name))?,)* }) }
            }
        }
    };
}

functions! {
    nvrtcVersion(*mut c_int, *mut c_int);
    nvrtcCreateProgram(
        *mut Handle, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
    );
    nvrtcDestroyProgram(*mut Handle);
    nvrtcCompileProgram(Handle, c_int, *const *const c_char);
    nvrtcGetCUBINSize(Handle, *mut usize);
    nvrtcGetCUBIN(Handle, *mut c_char);
    nvrtcGetProgramLogSize(Handle, *mut usize);
    nvrtcGetProgramLog(Handle, *mut c_char);
}

/// The compiler.
pub struct Compiler {
    functions: Functions,
    version: (u32, u32),
}

/// Machine code of one source.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// A cubin.
    pub code: Vec<u8>,
    /// The compiler's messages, with its report if one was asked for.
    pub log: String,
}

/// A source: its own text and the headers it includes, by name.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Its name in messages.
    pub name: &'static str,
    /// CUDA C++.
    pub text: &'static str,
    /// Name and text of each header.
    pub headers: &'static [(&'static str, &'static str)],
}

impl Compiler {
    /// Opens the library at `path`, or the newest known one that the loader finds.
    ///
    /// # Errors
    /// If there is none, or one older than CUDA 12.0.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let missing = |reason| Error::Library { what: "NVRTC", reason };
        let names: Vec<PathBuf> = match path {
            Some(path) => vec![path.into()],
            None => ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"].map(PathBuf::from).to_vec(),
        };
        let mut refusals = Vec::new();
        for name in names {
            preload_builtins(&name);
            // SAFETY: loading runs the library's initialisers; NVRTC is made for that.
            let library = match unsafe { Library::open(Some(&name), RTLD_NOW | RTLD_LOCAL) } {
                Ok(library) => library,
                Err(refusal) => {
                    refusals.push(refusal.to_string());
                    continue;
                }
            };
            let functions = Functions::load(&library).map_err(|name| {
                missing(format!("it has no {name}: version 12.0 or newer is needed"))
            })?;
            let (mut major, mut minor) = (0, 0);
            // SAFETY: both pointers are good for one int.
            let code = unsafe { (functions.nvrtcVersion)(&mut major, &mut minor) };
            if code != 0 || major < 12 {
                return Err(missing(format!("it is version {major}.{minor}; 12.0 is needed")));
            }
            // Never unloaded: it may have left threads and handlers behind.
            std::mem::forget(library);
            return Ok(Self { functions, version: (major as u32, minor as u32) });
        }
        Err(missing(format!(
            "kernels cannot be compiled; install CUDA's NVRTC (Debian: libnvrtc12, PyPI: \
             nvidia-cuda-nvrtc) and put its folder into LD_LIBRARY_PATH. Tried: {}",
            refusals.join("; ")
        )))
    }

    /// Major and minor.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Compiles for `arch`, such as `sm_90a`. `options` are NVRTC's, such as `-DNAME=1`.
    ///
    /// # Errors
    /// If the source has errors, or the compiler does not know the architecture.
    pub fn compile(&self, source: &Source, arch: &str, options: &[String]) -> Result<Compiled> {
        let text = |text: &str| CString::new(text).unwrap_or_default();
        let name = text(source.name);
        let body = text(source.text);
        let headers: Vec<_> = source.headers.iter().map(|(n, t)| (text(n), text(t))).collect();
        let header_names: Vec<_> = headers.iter().map(|(name, _)| name.as_ptr()).collect();
        let header_texts: Vec<_> = headers.iter().map(|(_, text)| text.as_ptr()).collect();
        let f = &self.functions;
        let mut program = Program { functions: f, handle: 0 };
        // SAFETY: all strings end with a zero and outlive the call, which copies them.
        let code = unsafe {
            (f.nvrtcCreateProgram)(
                &mut program.handle,
                body.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                header_texts.as_ptr(),
                header_names.as_ptr(),
            )
        };
        let failed = |code: c_int, log: String| Error::Compile {
            kernel: source.name,
            arch: arch.to_owned(),
            reason: match code {
                5 => format!("NVRTC {}.{} does not know it", self.version.0, self.version.1),
                _ => format!("NVRTC error {code}"),
            },
            log,
        };
        if code != 0 {
            return Err(failed(code, String::new()));
        }
        let options: Vec<CString> = options
            .iter()
            .map(|option| text(option))
            .chain(["--std=c++17", "-default-device"].map(text))
            .chain([text(&format!("--gpu-architecture={arch}"))])
            .collect();
        let pointers: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: as above.
        let code = unsafe {
            (f.nvrtcCompileProgram)(program.handle, pointers.len() as c_int, pointers.as_ptr())
        };
        let log = program.log();
        if code != 0 {
            return Err(failed(code, log));
        }
        let mut size = 0;
        // SAFETY: the pointer is good for one size.
        let code = unsafe { (f.nvrtcGetCUBINSize)(program.handle, &mut size) };
        let mut cubin = vec![0; size];
        // SAFETY: the buffer has the size that was asked for.
        let code = code | unsafe { (f.nvrtcGetCUBIN)(program.handle, cubin.as_mut_ptr().cast()) };
        match code {
            0 => Ok(Compiled { code: cubin, log }),
            code => Err(failed(code, log)),
        }
    }
}

struct Program<'a> {
    functions: &'a Functions,
    handle: Handle,
}

impl Program<'_> {
    fn log(&self) -> String {
        let mut size = 0;
        // SAFETY: the pointer is good for one size.
        if unsafe { (self.functions.nvrtcGetProgramLogSize)(self.handle, &mut size) } != 0 {
            return String::new();
        }
        let mut log = vec![0u8; size + 1];
        // SAFETY: the buffer has the size that was asked for, and one more that stays zero.
        let code =
            unsafe { (self.functions.nvrtcGetProgramLog)(self.handle, log.as_mut_ptr().cast()) };
        let text = CStr::from_bytes_until_nul(&log).unwrap_or_default();
        if code == 0 { text.to_string_lossy().trim().to_owned() } else { String::new() }
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        if self.handle != 0 {
            // SAFETY: made once, destroyed once.
            unsafe { (self.functions.nvrtcDestroyProgram)(&mut self.handle) };
        }
    }
}

/// NVRTC opens its builtins by bare name when it first compiles. Beside a library that was opened by
/// path they are not found, unless they are loaded already.
fn preload_builtins(library: &Path) {
    let Some(entries) = library
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .and_then(|folder| folder.read_dir().ok())
    else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("libnvrtc-builtins.so.") {
            // SAFETY: a part of NVRTC, opened as NVRTC would. Where this fails, NVRTC says so.
            if let Ok(library) = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) } {
                std::mem::forget(library);
            }
        }
    }
}

/// What a kernel takes of a multiprocessor, from the compiler's report (`--ptxas-options=-v`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    /// The kernel.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: usize,
    /// Bytes of a thread's stack.
    pub stack: usize,
    /// Bytes stored to and loaded from memory because registers ran out.
    pub spills: usize,
}

/// Reads the report in a compiler's log; one entry for each kernel.
pub fn resources(log: &str) -> Vec<Resources> {
    fn before<'a>(line: &'a str, what: &str) -> Option<usize> {
        let (head, _) = line.split_once(what)?;
        head.rsplit([' ', ',', '.']).find(|word: &&'a str| !word.is_empty())?.parse().ok()
    }
    let mut found: Vec<Resources> = Vec::new();
    // The report of a kernel is followed by those of functions that were not inlined.
    let mut of_kernel = false;
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            found.push(Resources { kernel, registers: 0, stack: 0, spills: 0 });
        } else if let Some((_, name)) = line.split_once("Function properties for ") {
            of_kernel = found.last().is_some_and(|last| last.kernel == name.trim());
        } else if let Some(last) = found.last_mut() {
            if let Some(spilled) = before(line, " bytes spill stores") {
                last.spills += spilled + before(line, " bytes spill loads").unwrap_or(0);
                if of_kernel {
                    last.stack = before(line, " bytes stack frame").unwrap_or(0);
                }
            }
            if let Some(registers) = before(line, " registers") {
                last.registers = registers;
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_is_read() {
        let log = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'one' for 'sm_90a'\n\
            ptxas info    : Function properties for one\n\
            ptxas         .     256 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n\
            ptxas info    : Used 40 registers, used 0 barriers, 256 bytes cumulative stack size\n\
            ptxas info    : Function properties for __internal_accurate_pow\n\
            ptxas         .     16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Compiling entry function 'two' for 'sm_90a'\n\
            ptxas info    : Function properties for two\n\
            ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 255 registers";
        let of = |kernel: &str, registers, stack, spills| Resources {
            kernel: kernel.into(),
            registers,
            stack,
            spills,
        };
        assert_eq!(resources(log), [of("one", 40, 256, 12), of("two", 255, 0, 0)]);
    }
}
