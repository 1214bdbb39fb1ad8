//! Checkpoints before they are fetched, and without a look at what is in them.

use crate::{case, json, moe_runner};

/// A folder with `config.json` alone.
fn before(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(case(name).join("config.json"), folder.path().join("config.json")).unwrap();
    folder
}

/// Numbers of an activation are those of the configuration.
#[test]
fn the_configuration_tells_the_formulas() {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"model_type": "kimi_k3", "hidden_size": 64, "num_hidden_layers": 2,
        "num_experts": 4, "num_experts_per_token": 2, "moe_intermediate_size": 32,
        "num_shared_experts": 1, "routed_expert_hidden_size": 48, "hidden_act": "situ",
        "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0}"#;
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let output = moe_runner(["inspect".as_ref(), folder.path().as_os_str()]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("4·tanh(g/4)·σ(g)·25·tanh(u/25)"), "{text}");
    assert!(text.contains("linear→48(x)"), "{text}");
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
