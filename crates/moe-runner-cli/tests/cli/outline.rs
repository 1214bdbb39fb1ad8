//! Checkpoints before they are fetched, and without a look at what is in them.

use crate::{case, checkpoint, json, moe_runner};

/// A folder with `config.json`, and the index where the case has one.
fn before(name: &str, index: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let source = checkpoint(&case(name)).to_owned();
    std::fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
    if index {
        let index = "model.safetensors.index.json";
        std::fs::copy(source.join(index), folder.path().join(index)).unwrap();
    }
    folder
}

#[test]
fn the_configuration_tells_shapes_bytes_kernels_and_ranks() {
    for name in ["qwen2_moe_f16", "deepseek_v3_bf16", "quant_qwen3_moe_fp8_block"] {
        let there = case(name);
        let folder = before(name, false);
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
        for command in ["explain", "plan"] {
            let output = moe_runner([command.as_ref(), folder.path().as_os_str()]);
            assert_eq!(output.status.code(), Some(0), "{name} {command}");
        }
    }
}
