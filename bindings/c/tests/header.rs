//! The committed header is what cbindgen writes from the source.

use std::path::Path;

/// `UPDATE=1 cargo test -p moe-runner-c --test header` writes it anew.
#[test]
fn the_header_is_that_of_the_source() {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(crate_dir.join("cbindgen.toml")).unwrap();
    let mut written = Vec::new();
    cbindgen::Builder::new()
        .with_crate(crate_dir)
        .with_config(config)
        .generate()
        .expect("cbindgen reads the source")
        .write(&mut written);
    let written = String::from_utf8(written).unwrap();
    let path = crate_dir.join("include/moe_runner.h");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &written).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == written, "include/moe_runner.h is not of this source: UPDATE=1 writes it");
}
