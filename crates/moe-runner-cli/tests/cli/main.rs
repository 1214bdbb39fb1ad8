//! The command as its users see it: files in, files and status out.

#![allow(missing_docs)]

mod acid;
mod bad_input;
mod bench;
mod book;
mod check;
mod describe;
mod doctor;
mod files;
mod functions;
mod host;
mod int8;
mod interface;
mod outline;
mod plan;
mod quantize;
mod ranks;
mod report;
mod run;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs the command.
fn moe_runner<A: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = A>) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moe-runner")).args(args).output().unwrap()
}

/// The JSON on standard output of a command that succeeds.
fn json<A: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = A>) -> serde_json::Value {
    let output = moe_runner(args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("standard output is one JSON object")
}

/// Standard error of a command that fails with this status: lines that name a problem.
fn refused<A: AsRef<std::ffi::OsStr>>(
    status: i32,
    args: impl IntoIterator<Item = A> + Clone,
) -> String {
    let output = moe_runner(args);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{stderr}");
    assert!(stderr.starts_with("error: "), "{stderr}");
    assert!(!stderr.contains("panicked") && !stderr.contains("internal error"), "{stderr}");
    assert!(stderr.lines().skip(1).all(|line| line.starts_with("  because: ")), "{stderr}");
    assert!(stderr.lines().count() <= 3, "{stderr}");
    stderr
}

/// Recorded cases: those of the repository, and more where a larger collection lies beside it.
fn cases() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut cases = Vec::new();
    for folder in ["../moe-runner/tests/golden", "../../../shared/golden"] {
        let Ok(entries) = std::fs::read_dir(root.join(folder)) else {
            eprintln!("SKIPPED: no recorded cases in {folder}");
            continue;
        };
        let folders = entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
        cases.extend(folders.filter(|path| path.join("golden.safetensors").exists()));
    }
    assert!(!cases.is_empty(), "the repository holds recorded cases");
    cases.sort();
    cases
}

/// Recorded cases whose weights are plain floats.
fn float_cases() -> Vec<PathBuf> {
    const QUANTISED: [&str; 4] = ["quant_", "mxfp4", "_q4_", "_q5_"];
    let mut cases = cases();
    cases.retain(|case| {
        let name = name_of(case);
        !QUANTISED.iter().any(|part| name.contains(part)) && !name.ends_with("q8_0")
    });
    cases
}

fn name_of(case: &Path) -> &str {
    case.file_name().unwrap().to_str().unwrap()
}

/// One of the repository's cases.
fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-runner/tests/golden").join(name)
}

/// What the command takes as the checkpoint of a case.
fn checkpoint(case: &Path) -> PathBuf {
    let gguf = case.join("model.gguf");
    if gguf.exists() { gguf } else { case.to_owned() }
}
