//! What the doctor finds decides the verdict, the exit status and what is said.

use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;

use crate::{case, moe_runner};

const EXPERT: &str = "model.layers.2.mlp.experts.5";

/// A copy of a case in which the bytes of some tensors are changed.
fn spoiled(change: impl Fn(&str, &mut [u8])) -> TempDir {
    let folder = TempDir::new().unwrap();
    let case = case("qwen2_moe_f16");
    std::fs::copy(case.join("config.json"), folder.path().join("config.json")).unwrap();
    let mut bytes = std::fs::read(case.join("model.safetensors")).unwrap();
    let length = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..length]).unwrap();
    for (name, tensor) in header.as_object().unwrap() {
        let Some(place) = tensor.get("data_offsets") else { continue };
        let at = |i: usize| length + place[i].as_u64().unwrap() as usize;
        change(name, &mut bytes[at(0)..at(1)]);
    }
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    folder
}

/// Status, JSON and text of a command on a checkpoint.
fn said(command: &[&str], checkpoint: &Path) -> (Option<i32>, Value, String) {
    let args = |more: &[&str]| {
        let mut args: Vec<String> = vec![command[0].into(), checkpoint.display().to_string()];
        args.extend(command[1..].iter().chain(more).map(|arg| (*arg).to_owned()));
        if command[0] == "check" {
            args.push("--no-timing".into());
        }
        args
    };
    let (json, text) = (moe_runner(args(&["--json"])), moe_runner(args(&[])));
    assert_eq!(json.status.code(), text.status.code());
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&json.stderr);
    let value = serde_json::from_slice(&json.stdout).unwrap_or_else(|_| panic!("{stderr}"));
    (json.status.code(), value, text)
}

#[test]
fn an_expert_of_zeros_is_not_right() {
    let folder = spoiled(|name, bytes| {
        if name.starts_with(EXPERT) {
            bytes.fill(0);
        }
    });
    let (status, json, text) = said(&["check"], folder.path());
    assert_eq!((status, json["ok"].as_bool()), (Some(1), Some(false)), "{text}");
    let layer = &json["layers"][1];
    let finding = &layer["findings"][0];
    assert_eq!(finding["kind"], "zero_weights");
    assert_eq!(finding["severity"], "error");
    assert_eq!(finding["layer"], 2);
    assert_eq!(finding["experts"], serde_json::json!([5]));
    assert!(finding["tensors"][0].as_str().unwrap().starts_with(EXPERT), "{finding}");
    assert!(finding["file"].as_str().unwrap().ends_with("model.safetensors"), "{finding}");
    assert_eq!(finding["message"], layer["problems"][0]);
    assert!(text.contains("WRONG: 1 of 2 MoE layers; first, layer 2: expert 5:"), "{text}");

    // headers do not tell
    assert_eq!(said(&["inspect"], folder.path()).0, Some(0));
    let (status, json, text) = said(&["inspect", "--doctor"], folder.path());
    assert_eq!((status, json["ok"].as_bool()), (Some(1), Some(false)));
    assert_eq!(json["layers"][1]["findings"][0]["kind"], "zero_weights");
    assert!(text.contains("layer 2: error: expert 5: weights of zeros"), "{text}");
    assert!(text.contains("UNSOUND: every tensor is there, but 1 finding"), "{text}");
}

#[test]
fn warnings_count_where_that_is_asked_for() {
    let folder = spoiled(|name, bytes| {
        // half a projection
        if name == format!("{EXPERT}.up_proj.weight") {
            let half = bytes.len() / 2;
            bytes[..half].fill(0);
        }
    });
    for command in [vec!["check"], vec!["inspect", "--doctor"]] {
        let (status, json, text) = said(&command, folder.path());
        assert_eq!((status, json["ok"].as_bool()), (Some(0), Some(true)), "{text}");
        assert!(text.contains("warning: expert 5: rows of zeros"), "{text}");
        let strict = [&command[..], &["--strict"]].concat();
        let (status, json, text) = said(&strict, folder.path());
        assert_eq!((status, json["ok"].as_bool()), (Some(1), Some(false)), "{text}");
        assert_eq!(json["layers"][1]["findings"][0]["severity"], "warning");
    }
    let (_, json, _) = said(&["check"], folder.path());
    assert!(json["verdict"].as_str().unwrap().ends_with("; 1 warning"), "{}", json["verdict"]);
}

#[test]
fn a_file_that_ends_in_zeros_is_not_right() {
    let folder = spoiled(|_, _| {});
    let path = folder.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let length = bytes.len();
    bytes[length - 1001..].fill(0);
    std::fs::write(&path, bytes).unwrap();
    for command in [vec!["check"], vec!["inspect", "--doctor"]] {
        let (status, json, text) = said(&command, folder.path());
        assert_eq!((status, json["ok"].as_bool()), (Some(1), Some(false)), "{text}");
        assert_eq!(json["findings"][0]["kind"], "zero_tail", "{text}");
        assert!(text.contains("model.safetensors ends in"), "{text}");
    }
}

#[test]
fn a_checkpoint_of_zeros_is_not_right() {
    let folder = spoiled(|_, bytes| bytes.fill(0));
    let (status, json, text) = said(&["check"], folder.path());
    assert_eq!((status, json["ok"].as_bool()), (Some(1), Some(false)), "{text}");
    assert!(text.contains("WRONG: 2 of 2 MoE layers"), "{text}");
}
