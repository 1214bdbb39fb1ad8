//! `acid`: checkpoints for any engine, and what its log-probabilities mean.

use crate::{json, moe_runner, refused};

fn said(name: &str) -> String {
    format!("{}/../moe-acid/tests/said/{name}.json", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn every_kernel_of_this_program_is_right_in_every_form() {
    for kernel in ["auto", "reference"] {
        let said = json(["acid", "run", "--json", "--kernel", kernel, "--threads", "2"]);
        assert_eq!(said["ok"], true, "{said:#}");
        // seven checkpoints in six forms, gpt-oss in three
        assert_eq!(said["checkpoints"].as_array().unwrap().len(), 7 * 6 - 3);
    }
}

#[test]
fn a_written_checkpoint_is_one_that_every_command_reads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let args = ["acid", "write", path, "--family", "mixtral,llama4", "--form", "bf16", "--json"];
    let written = json(args);
    let written = written["written"].as_array().unwrap();
    assert_eq!(written.len(), 2);
    for checkpoint in written {
        let inspected = json(["inspect", checkpoint.as_str().unwrap(), "--json"]);
        assert_eq!(inspected["layers"].as_array().unwrap().len(), 1);
    }
    assert!(refused(2, args).contains("is there already"));
    assert!(refused(2, ["acid", "write", path, "--family", "bert"]).contains("mixtral"));
}

#[test]
fn a_verdict_decides_the_status_and_names_the_fault() {
    let (right, faulty) = (said("mixtral-f32"), said("mixtral-f32-swap"));
    assert_eq!(json(["acid", "read", &right, "--json"])["ok"], true);
    let output = moe_runner(["acid", "read", &right, &faulty]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("gate and up swapped") && text.contains("right"), "{text}");
    assert!(text.contains("transformers"), "{text}");
    let table = moe_runner(["acid", "read", &faulty, "--table"]);
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(text.contains("read (expected)"), "{text}");
    let other = env!("CARGO_MANIFEST_DIR").to_owned() + "/Cargo.toml";
    assert!(refused(1, ["acid", "read", &other]).contains("is not what an engine said"));
}

#[test]
fn every_known_mistake_is_named() {
    let proof = json(["acid", "self", "--json"]);
    assert_eq!(proof["ok"], true, "{proof:#}");
    assert!(proof["mistakes"].as_u64() > Some(80), "{proof:#}");
    assert_eq!(proof["mistakes"], proof["named"]);
}
