//! `inspect` and `explain`.

use crate::{case, cases, checkpoint, json, moe_runner, name_of};

#[test]
fn inspect_tells_what_a_checkpoint_is() {
    let case = case("deepseek_v2");
    let report = json(["inspect".as_ref(), case.as_os_str(), "--json".as_ref()]);
    assert_eq!(report["architecture"], "deepseek_v2");
    assert_eq!(report["moe_layers"], serde_json::json!([1, 2]));
    assert_eq!(report["ok"], true);
    let layer = &report["layers"][0];
    assert_eq!(layer["formats"]["up"], serde_json::json!(["f32"]));
    let routing = layer["routing"].to_string();
    assert!(routing.contains("best 2 of 4 groups (by best expert"), "{routing}");
    assert!(routing.contains("16"), "the scaling factor: {routing}");
    let bytes = &report["bytes"];
    let sum: u64 = ["experts", "shared_experts", "gate", "rest"]
        .iter()
        .map(|class| bytes[class].as_u64().unwrap())
        .sum();
    assert_eq!(bytes["total"].as_u64(), Some(sum));
    // experts × (gate, up, down) × hidden × intermediate × 4 bytes × layers
    let size = |key: &str| layer[key].as_u64().unwrap();
    let experts = size("experts") * 3 * size("hidden") * size("intermediate") * 4 * 2;
    assert_eq!(bytes["experts"].as_u64(), Some(experts));
}

/// Every recorded checkpoint is described, and complete.
#[test]
fn inspect_describes_every_recorded_checkpoint() {
    for case in cases() {
        let output = moe_runner(["inspect".as_ref(), checkpoint(&case).as_os_str()]);
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(stdout.contains("routing"), "{}: {stdout}", name_of(&case));
        assert!(stdout.contains("complete: every tensor"), "{}: {stdout}", name_of(&case));
        assert_eq!(output.status.code(), Some(0), "{}", name_of(&case));
    }
}

#[test]
fn explain_accounts_for_every_kernel() {
    let case = case("qwen2_moe_f16");
    let explain = |flags: &[&str]| {
        let mut args = vec!["explain".as_ref(), case.as_os_str(), "--json".as_ref()];
        args.extend(flags.iter().map(std::ffi::OsStr::new));
        json(args)
    };
    let all = explain(&[]);
    assert_eq!(all["layers"].as_array().unwrap().len(), 2);
    let layer = &explain(&["--layer", "2", "--machine", "avx2"])["layers"][0];
    assert_eq!(layer["layer"], 2);
    assert_eq!(layer["chosen"], "cpu_avx2");
    let rejected = layer["rejected"].as_array().unwrap();
    let avx512 = rejected.iter().find(|kernel| kernel["kernel"] == "cpu_avx512").unwrap();
    assert!(avx512["reasons"][0].as_str().unwrap().contains("avx512"), "{avx512}");
    let able = layer["able"].as_array().unwrap();
    assert!(able.iter().any(|kernel| kernel["kernel"] == "reference"), "{able:?}");
    let portable = &explain(&["--machine", "portable"])["layers"][0];
    assert_eq!(portable["chosen"], "cpu_portable");
}

#[test]
fn explain_names_a_refused_kernels_reasons() {
    let case = case("qwen2_moe_f16");
    let args = ["--json", "--machine", "portable", "--kernel", "cpu_avx512"];
    let mut all = vec!["explain".as_ref(), case.as_os_str()];
    all.extend(args.iter().map(std::ffi::OsStr::new));
    let output = moe_runner(all);
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["layers"][0]["chosen"].is_null());
    assert!(report["layers"][0]["why"].as_str().unwrap().contains("needs avx512"));
}
