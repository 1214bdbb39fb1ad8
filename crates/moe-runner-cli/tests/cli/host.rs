//! What passes run on, and what they start from: `--pack-cache`, `--pin-threads`.

use std::path::Path;

use crate::{moe_runner, refused};

fn model() -> String {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny-moe");
    model.to_str().unwrap().to_owned()
}

/// Status, and standard error.
fn check(more: &[&str]) -> (bool, String) {
    let model = model();
    let mut args = vec!["check", &model, "--layers", "0", "--no-timing"];
    args.extend(more);
    let output = moe_runner(args);
    (output.status.success(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn packed_weights_are_kept_and_mapped() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    let with = ["--pack-cache", cache.to_str().unwrap()];
    let (ok, said) = check(&with);
    assert!(ok && said.contains("packed and kept") && !said.contains("mapped"), "{said}");
    let (ok, said) = check(&with);
    assert!(ok && said.contains(") mapped") && !said.contains("kept"), "{said}");
    let (ok, said) = check(&[]);
    assert!(ok && !said.contains("pack cache"), "{said}");
    // what cannot be written is a warning, not a failure
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let (ok, said) = check(&["--pack-cache", file.to_str().unwrap()]);
    assert!(ok && said.starts_with("warning: pack cache: "), "{said}");
}

#[test]
fn threads_stay_where_they_are_put() {
    let model = model();
    let pinned = |threads: &'static str| {
        let args = ["check", &model, "--layers", "0", "--no-timing", "--pin-threads", "--threads"];
        args.iter().map(|arg| arg.to_string()).chain([threads.to_owned()]).collect::<Vec<_>>()
    };
    if cfg!(not(target_os = "linux")) {
        assert!(refused(2, pinned("1")).contains("on Linux alone"));
        return;
    }
    let output = moe_runner(pinned("1"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // each on a processor of its own, or not at all
    let said = refused(2, pinned("4096"));
    assert!(said.contains("--pin-threads: there are 4096 threads"), "{said}");
    // two ranks of one thread each share nothing
    let two = std::thread::available_parallelism().unwrap().get() >= 2;
    let ranks = |threads| [pinned(threads), vec!["--dp".into(), "2".into()]].concat();
    if two {
        let output = moe_runner(ranks("2"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    assert!(refused(1, ranks("1")).contains("need a processor each"));
}
