//! Checkpoints before they are fetched, and without a look at what is in them.

use crate::{case, json, moe_runner};

/// A folder with `config.json` alone.
fn before(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(case(name).join("config.json"), folder.path().join("config.json")).unwrap();
    folder
}

#[test]
fn the_configuration_tells_shapes_bytes_kernels_and_ranks() {
    for name in ["qwen2_moe_f16", "deepseek_v3_bf16", "quant_qwen3_moe_fp8_block"] {
        let there = case(name);
        let folder = before(name);
        let [known, expected] = [there.as_os_str(), folder.path().as_os_str()]
            .map(|path| json(["inspect".as_ref(), path, "--json".as_ref()]));
        assert!(known["unseen"].is_null() && expected["unseen"].is_string(), "{name}");
        for key in ["architecture", "decoder_layers", "moe_layers"] {
            assert_eq!(known[key], expected[key], "{name} {key}");
        }
        assert_eq!(known["bytes"]["experts"], expected["bytes"]["experts"], "{name}");
        let [known, expected] = [&known["layers"][0], &expected["layers"][0]];
        for key in ["hidden", "experts", "top_k", "formats", "routing"] {
            assert_eq!(known[key], expected[key], "{name} {key}");
        }
        let output = moe_runner(["explain".as_ref(), folder.path().as_os_str()]);
        assert_eq!(output.status.code(), Some(0), "{name}");
        let plan = ["plan".as_ref(), folder.path().as_os_str(), "--ranks".as_ref(), "2".as_ref()];
        assert_eq!(moe_runner(plan).status.code(), Some(0), "{name}");
    }
}
