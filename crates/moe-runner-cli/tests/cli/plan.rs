//! `plan`: balance, bytes and traffic of a split that nobody has run.

use moe_runner::router::{LogicalId, Routing, Trace};
use moe_runner::spec::RouterSpec;

use crate::{case, cases, checkpoint, json, moe_runner, name_of, refused};

fn plan(case: &std::path::Path, flags: &[&str]) -> serde_json::Value {
    let mut args = vec!["plan".as_ref(), case.as_os_str(), "--json".as_ref()];
    args.extend(flags.iter().map(std::ffi::OsStr::new));
    json(args)
}

#[test]
fn a_plan_tells_what_every_split_costs() {
    let case = case("deepseek_v3_bf16");
    let all = plan(&case, &["--ranks", "4", "--nodes", "2", "--redundant", "8"]);
    for layer in all["layers"].as_array().unwrap() {
        assert!(layer["balance_after"].as_f64() > layer["balance_before"].as_f64(), "{layer}");
        assert_eq!((&layer["experts_per_rank"], &layer["redundant"]), (&6.into(), &8.into()));
        let mut placed: Vec<u64> = layer["placement"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|rank| rank.as_array().unwrap().iter().map(|id| id.as_u64().unwrap()))
            .collect();
        assert_eq!(placed.len(), 24);
        placed.sort_unstable();
        placed.dedup();
        assert_eq!(placed, (0..16).collect::<Vec<_>>());
    }
    let splits = all["splits"].as_array().unwrap();
    let names: Vec<&str> = splits.iter().map(|split| split["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["TP", "EP", "EP, naive", "DP", "DP + EP", "DP + EP, naive"]);
    // TP: one all-reduce a layer of the batch's f32 outputs; each of n ranks sends (n-1)/n twice
    let hidden =
        json(["inspect".as_ref(), case.as_os_str(), "--json".as_ref()])["layers"][0]["hidden"]
            .as_f64()
            .unwrap();
    let cost = &splits[0]["cost"];
    assert_eq!(cost["sent_bytes_per_token"].as_f64(), Some(2.0 * 2.0 * 3.0 * hidden * 4.0));
    assert_eq!(cost["collectives"], 2);
}

/// Tokens that all choose the same two experts of one rank: half of the load can move away.
#[test]
fn a_plan_takes_the_load_from_a_trace() {
    let case = case("qwen2_moe_f16");
    let inspected = json(["inspect".as_ref(), case.as_os_str(), "--json".as_ref()]);
    let layer = &inspected["layers"][0];
    let spec: RouterSpec = serde_json::from_value(layer["spec"]["router"].clone()).unwrap();
    let ids = (0..100).flat_map(|_| (0..spec.top_k as u32).map(LogicalId)).collect();
    let routing = Routing::from_parts(spec.top_k, ids, vec![1.0; 100 * spec.top_k]).unwrap();
    let mut trace = Trace::new();
    trace.record(layer["name"].as_str().unwrap(), &spec, &routing).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("trace.safetensors");
    trace.save(&file).unwrap();

    let flags = ["--trace", file.to_str().unwrap(), "--ranks", "2", "--layer"];
    let index = layer["layer"].to_string();
    let planned = plan(&case, &[&flags[..], &[&index]].concat());
    assert_eq!((&planned["load"], &planned["tokens"]), (&"trace".into(), &100.into()));
    let layer = &planned["layers"][0];
    assert_eq!(
        (layer["balance_before"].as_f64(), layer["balance_after"].as_f64()),
        (Some(0.5), Some(1.0))
    );

    let other = inspected["layers"][1]["layer"].to_string();
    let mut args = vec!["plan".as_ref(), case.as_os_str()];
    args.extend(flags.iter().map(std::ffi::OsStr::new));
    args.push(other.as_ref());
    let message = refused(1, args);
    assert!(message.contains("has no layer"), "{message}");
}

#[test]
fn every_recorded_checkpoint_can_be_planned_for() {
    for case in cases() {
        let path = checkpoint(&case);
        let output =
            moe_runner(["plan".as_ref(), path.as_os_str(), "--ranks".as_ref(), "3".as_ref()]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{}: {stderr}", name_of(&case));
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(stdout.contains("DP + EP, naive"), "{}: {stdout}", name_of(&case));
    }
}

#[test]
fn plans_that_cannot_be_are_refused() {
    let case = case("deepseek_v3_bf16");
    for (flags, what) in [
        (&["--ranks", "0"][..], "must be 1 to"),
        (&["--ranks", "4", "--nodes", "3"], "must divide"),
        (&["--ranks", "4", "--redundant", "1"], "4 redundant ones would"),
        (&["--ranks", "4", "--redundant", "4000"], "hold all 16 experts"),
        (&["--ranks", "2", "--tokens", "0"], "at least one"),
        (&["--ranks", "2", "--layer", "77"], "no MoE layer"),
    ] {
        let mut args = vec!["plan".as_ref(), case.as_os_str()];
        args.extend(flags.iter().map(std::ffi::OsStr::new));
        let message = refused(2, args);
        assert!(message.contains(what), "{message}");
    }
}
