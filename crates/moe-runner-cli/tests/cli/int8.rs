//! `--int8-activations`: a choice of the user's, which every command that computes takes.

use crate::{case, json, refused};

fn model(name: &str) -> String {
    case(name).join("model.gguf").to_str().unwrap().to_owned()
}

/// Layers are right beside the reference, which quantises too; what they were without it is near, not equal.
#[test]
fn check_is_right_with_it() {
    for name in ["gguf_qwen3moe_q4_k_m", "gguf_qwen3moe_q8_0", "gguf_qwen3moe_mxfp4"] {
        let model = model(name);
        let args =
            ["check", &model, "--no-timing", "--json", "--int8-activations", "--against", &model];
        let report = json(args);
        for layer in report["layers"].as_array().unwrap() {
            let number = |key: &str| layer[key].as_f64().unwrap();
            assert_eq!(number("bound"), 1e-4, "{name}");
            assert!(number("nmse") < 1e-5, "{name}: {}", layer["nmse"]);
            let cost = number("original_nmse");
            assert!((1e-7..1e-3).contains(&cost), "{name}: {cost:e}");
        }
    }
}

/// Without it the kernel refuses, and names the option; with it, it is the choice where a processor has it.
#[test]
fn explain_names_it() {
    let model = model("gguf_qwen3moe_q4_0");
    let explain = |more: &[&str]| {
        let mut args =
            vec!["explain", &model, "--json", "--layers", "0", "--machine", "avx512_bf16"];
        args.extend(more);
        json(args)["layers"][0].clone()
    };
    let without = explain(&[]);
    assert_eq!(without["chosen"], "cpu_avx512");
    let rejected = without["rejected"].as_array().unwrap();
    let kernel = rejected.iter().find(|one| one["kernel"] == "cpu_avx512_vnni_q8").unwrap();
    let reason = "does not take activations as unquantised (--int8-activations)";
    assert_eq!(kernel["reasons"], serde_json::json!([reason]));
    assert_eq!(explain(&["--int8-activations"])["chosen"], "cpu_avx512_vnni_q8");
}

/// An option that would do nothing is an error.
#[test]
fn floats_are_refused() {
    let model = model("gguf_qwen3moe_bf16");
    let text = refused(1, ["check", &model, "--no-timing", "--int8-activations"]);
    assert!(text.contains("--int8-activations") && text.contains("the experts are bf16"), "{text}");
}
