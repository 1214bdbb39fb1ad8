//! Every kernel compiles for every architecture, without a GPU; hot ones spill no register.
//!
//! Needs NVRTC: `NVRTC=/path/to/libnvrtc.so.13 cargo test -p moe-cuda --test compile`. `.ci/cuda` gets
//! it from PyPI.

mod common;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use moe_cuda::{builds, resources};

#[test]
fn every_kernel_compiles_and_hot_ones_do_not_spill() {
    let compiler = match common::compiler() {
        Ok(compiler) => compiler,
        // A path that was given must be good.
        Err(reason) if std::env::var_os("NVRTC").is_some() => panic!("{reason}"),
        Err(reason) => {
            println!("skipped: {reason}");
            return;
        }
    };
    let mut jobs = Vec::new();
    for build in builds() {
        jobs.extend(build.archs.iter().map(|&arch| (build.clone(), arch)));
    }
    // Blackwell came with 12.8.
    jobs.retain(|(_, arch)| *arch != "sm_100a" || compiler.version() >= (12, 8));
    let (next, report) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some((build, arch)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut options = build.options.clone();
            options.push("--ptxas-options=-v".into());
            let compiled = compiler.compile(build.source, arch, &options).unwrap();
            assert!(compiled.code.starts_with(b"\x7fELF"));
            // "wgmma instructions are serialized", "setmaxnreg is ignored"
            assert!(!compiled.log.contains("(C75"), "{}", compiled.log);
            let found = resources(&compiled.log);
            assert!(!found.is_empty(), "no report in:\n{}", compiled.log);
            for kernel in found {
                let options = build.options.join(" ");
                let registers = kernel.registers;
                let line = format!("{arch} {} {options}: {registers} registers", kernel.kernel);
                assert!(registers > 0, "{line}");
                if build.hot {
                    assert_eq!((kernel.spills, kernel.stack), (0, 0), "{line}, spills");
                }
                report.lock().unwrap().push(line);
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        work();
    });
    let mut report = report.into_inner().unwrap();
    report.sort();
    println!("{}", report.join("\n"));
}
