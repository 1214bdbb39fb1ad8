//! The command as a function of this process.

use std::ffi::OsString;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use moe_runner_cli::{Failure, report};

use crate::case;

fn call(args: &[&str], stop: bool) -> Result<serde_json::Value, Failure> {
    let model = case("qwen2_moe_f16");
    let args = args.iter().map(|arg| match *arg {
        "MODEL" => model.clone().into_os_string(),
        arg => arg.into(),
    });
    let named = std::iter::once(OsString::from("moe-runner")).chain(args);
    let json = report(named, Arc::new(AtomicBool::new(stop)))?;
    Ok(serde_json::from_str(&json).unwrap())
}

/// What takes long ends when it is asked to, and leaves nothing; the next call knows nothing of that.
#[test]
fn work_ends_when_nobody_wants_it_any_more() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy");
    let copy = copy.to_str().unwrap();
    for command in [
        &["check", "MODEL", "--no-timing", "--tokens", "1"][..],
        &["inspect", "MODEL", "--doctor"],
        &["bench", "MODEL", "--tokens", "1", "--threads", "1"],
        &["quantize", "MODEL", "--format", "fp8", "--output", copy],
    ] {
        let failure = call(command, true).unwrap_err();
        assert_eq!(failure.kind, "interrupted", "{command:?}: {}", failure.message);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{command:?}");
    }
    assert_eq!(
        call(&["check", "MODEL", "--no-timing", "--tokens", "1"], false).unwrap()["ok"],
        true
    );
}

#[test]
fn what_is_wrong_has_a_kind() {
    let kind = |args: &[&str]| call(args, false).unwrap_err().kind;
    assert_eq!(kind(&["inspect", "/no/such"]), "io");
    assert_eq!(kind(&["inspect", "MODEL", "--frobnicate"]), "arguments");
    assert_eq!(kind(&["check", "MODEL", "--kernel", "fastest"]), "arguments");
    assert_eq!(
        kind(&["check", "MODEL", "--kernel", "emulation_nvfp4", "--no-timing"]),
        "no_kernel"
    );
}
