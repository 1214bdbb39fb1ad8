//! `plan`: balance, bytes and traffic of a split that nobody has run.

use std::path::Path;

use moe_runner::router::{LogicalId, Routing, Trace};
use moe_runner::spec::RouterSpec;

use crate::files::{New, Values, write};
use crate::{case, cases, checkpoint, json, moe_runner, name_of, refused};

fn plan(case: &Path, flags: &[&str]) -> serde_json::Value {
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
    assert_eq!((&planned["load_from"], &planned["tokens"]), (&"trace".into(), &100.into()));
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

/// Floats stay what they are; what only `cuda_f32` takes is decoded, four bytes a weight.
#[test]
fn a_plan_for_gpus_counts_weights_as_they_hold_them() {
    let weights = |plan: &serde_json::Value, split: usize| {
        plan["splits"][split]["cost"]["weight_bytes_max"].as_f64().unwrap()
    };
    let on_sm90 = ["--ranks", "2", "--device", "cuda", "--machine", "sm90"];
    for (name, times) in [("deepseek_v3_bf16", 1.0), ("quant_qwen3_moe_int8_channel", 4.0)] {
        let case = case(name);
        let (host, gpus) = (plan(&case, &["--ranks", "2"]), plan(&case, &on_sm90));
        assert_eq!(gpus["gpus"], serde_json::json!({"machine": "sm90"}), "{name}");
        assert!(host.get("gpus").is_none() && host["layers"][0].get("kernel").is_none());
        for layer in gpus["layers"].as_array().unwrap() {
            assert!(layer["kernel"].as_str().unwrap().starts_with("cuda_"), "{layer}");
        }
        for split in 0..6 {
            let ratio = weights(&gpus, split) / weights(&host, split);
            // scales are no longer there
            assert!(ratio <= times && ratio > 0.5 * times, "{name}, split {split}: {ratio}");
        }
    }
}

#[test]
fn plans_that_cannot_be_are_refused() {
    let case = case("deepseek_v3_bf16");
    for (flags, what) in [
        (&["--ranks", "2", "--machine", "sm90"][..], "needs --device cuda"),
        (&["--ranks", "2", "--device", "cuda", "--machine", "sm91"], "sm90"),
        (&["--ranks", "0"], "must be 1 to"),
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

/// What `run` saves, what it writes, and what was recorded say the same of the load; all tokens count.
#[test]
fn a_plan_takes_the_load_from_a_run() {
    let (case, folder) = (case("qwen2_moe_f16"), tempfile::tempdir().unwrap());
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (input, out, routing) = (path("in"), path("out"), path("routing"));
    let x: Vec<f32> = (0..1500 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
    write(input.as_ref(), &[New::f32("hidden_states", &[1500, 64], &x)]);
    let mut args = vec!["run".as_ref(), case.as_os_str()];
    let flags =
        ["--layers", "all", "--input", &input, "--output", &out, "--save-routing", &routing];
    args.extend(flags.iter().map(std::ffi::OsStr::new));
    args.push("--json".as_ref());
    json(args);
    let of = |file: &str| plan(&case, &["--ranks", "3", "--redundant", "3", "--trace", file]);
    let saved = of(&routing);
    assert_eq!((&saved["load_from"], &saved["tokens"]), (&"trace".into(), &1500.into()));
    let (mut written, saved_trace) = (of(&out), Trace::load(routing.as_ref()).unwrap());
    assert_eq!(written, saved);
    assert_eq!(saved_trace.layers().len(), 2);
    assert_eq!(saved_trace.layers()[0].calls(), [1500]);

    // traffic is of the same tokens as the balance: half of them are another load
    written =
        plan(&case, &["--ranks", "3", "--redundant", "3", "--trace", &out, "--tokens", "750"]);
    assert_eq!(written["tokens"], 750);
    let busiest =
        |plan: &serde_json::Value| plan["splits"][4]["cost"]["busiest_rank_bytes"].as_u64();
    assert!(busiest(&written) < busiest(&saved));

    // recorded batches are calls
    let golden = case.join("golden.safetensors");
    assert_eq!(of(golden.to_str().unwrap())["tokens"], 1 + 7 + 33);

    let args =
        ["plan".as_ref(), case.as_os_str(), "--ranks".as_ref(), "2".as_ref(), "--trace".as_ref()];
    let stderr = refused(1, args.into_iter().chain([std::ffi::OsStr::new(&input)]));
    assert!(stderr.contains("not a routing trace: its metadata have no"), "{stderr}");

    // of other layers
    write(input.as_ref(), &[New::i64("layers.7.topk_ids", &[1, 4], &[0, 1, 2, 3])]);
    let stderr = refused(1, args.into_iter().chain([std::ffi::OsStr::new(&input)]));
    assert!(stderr.contains("'layers.7.topk_ids', and nothing of the chosen layers"), "{stderr}");

    // of another model: by the file's name
    let other = crate::case("olmoe_f16");
    let args =
        ["plan".as_ref(), other.as_os_str(), "--ranks".as_ref(), "2".as_ref(), "--trace".as_ref()];
    let stderr = refused(1, args.into_iter().chain([std::ffi::OsStr::new(&routing)]));
    assert!(stderr.starts_with(&format!("error: {routing}: layer ")), "{stderr}");
}

/// A plan's placement can be run, and changes no bit.
#[test]
fn a_balanced_placement_runs() {
    let (case, folder) = (case("qwen2_moe_f16"), tempfile::tempdir().unwrap());
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (input, file) = (path("in"), path("plan.json"));
    let x: Vec<f32> = (0..9 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
    write(input.as_ref(), &[New::f32("hidden_states", &[9, 64], &x)]);
    let planned = plan(&case, &["--ranks", "2", "--redundant", "4"]);
    std::fs::write(&file, planned.to_string()).unwrap();
    let run = |out: &str, flags: &[&str]| {
        let mut args = vec!["run".as_ref(), case.as_os_str()];
        let all = ["--layers", "all", "--input", &input, "--output", out];
        args.extend(all.iter().chain(flags).map(std::ffi::OsStr::new));
        moe_runner(args)
    };
    let (one, two) = (path("one"), path("two"));
    assert!(run(&one, &[]).status.success());
    let placed = run(&two, &["--dp", "2", "--ep", "--placement", &file]);
    assert!(placed.status.success(), "{}", String::from_utf8_lossy(&placed.stderr));
    for name in ["layers.0.output", "layers.2.output"] {
        assert_eq!(Values::read(one.as_ref()).get(name), Values::read(two.as_ref()).get(name));
    }
    for (flags, says) in [
        (&["--placement", &*file][..], "needs --ep"),
        (&["--dp", "3", "--ep", "--placement", &file], "on 2 ranks; there are 3"),
        (&["--dp", "2", "--ep", "--placement", "spiral"], "is neither linear, nor round-robin"),
        (&["--dp", "2", "--ep", "--placement", &input], "is not what `plan --json` writes"),
        (
            &["--dp", "2", "--ep", "--placement", &file, "--output", &file],
            "cannot be used multiple",
        ),
    ] {
        let output = run(&two, flags);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && stderr.contains(says), "{stderr}");
    }
    assert!(
        String::from_utf8_lossy(&run(&file, &["--dp", "2", "--ep", "--placement", &file]).stderr)
            .contains("is the file of --placement")
    );
}

/// A checkpoint of sixty layers of one shape, with those of its tensors that are kept.
pub(crate) fn sixty_layers(folder: &Path, keeps: impl Fn(usize, &str) -> bool) {
    let (layers, hidden, experts) = (60, 16usize, 4usize);
    let config = format!(
        r#"{{"model_type": "olmoe", "hidden_size": {hidden}, "intermediate_size": 8,
        "num_experts": {experts}, "num_experts_per_tok": 2, "num_hidden_layers": {layers},
        "torch_dtype": "float32"}}"#
    );
    std::fs::write(folder.join("config.json"), config).unwrap();
    let mut names = Vec::new();
    for layer in 0..layers {
        let block = format!("model.layers.{layer}.mlp");
        let mut add = |name: String, shape: [usize; 2]| {
            if keeps(layer, &name) {
                names.push((format!("{block}.{name}"), shape));
            }
        };
        add("gate.weight".into(), [experts, hidden]);
        for e in 0..experts {
            add(format!("experts.{e}.gate_proj.weight"), [8, hidden]);
            add(format!("experts.{e}.up_proj.weight"), [8, hidden]);
            add(format!("experts.{e}.down_proj.weight"), [hidden, 8]);
        }
    }
    let tensors: Vec<New> = names
        .iter()
        .map(|(name, shape)| New::f32(name, shape, &waves(shape[0] * shape[1])))
        .collect();
    write(&folder.join("model.safetensors"), &tensors);
}

fn waves(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 0.7).sin()).collect()
}

/// Sixty layers of one shape are a line, not sixty.
#[test]
fn many_equal_layers_are_summarised() {
    let folder = tempfile::tempdir().unwrap();
    sixty_layers(folder.path(), |_, _| true);
    let input = folder.path().join("in.safetensors");
    write(&input, &[New::f32("hidden_states", &[2, 16], &waves(2 * 16))]);
    let out = folder.path().join("out.safetensors");
    let lines = |args: &[&str]| {
        let mut all = vec![args[0].as_ref(), folder.path().as_os_str()];
        all.extend(args[1..].iter().map(std::ffi::OsStr::new));
        let output = moe_runner(all);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("0-59"), "{text}");
        text.lines().count()
    };
    assert!(lines(&["plan", "--ranks", "2"]) < 30);
    assert!(lines(&["inspect"]) < 30);
    assert!(lines(&["explain"]) < 60);
    let (input, out) = (input.to_str().unwrap(), out.to_str().unwrap());
    assert!(lines(&["run", "--layers", "all", "--input", input, "--output", out]) < 8);
    let copies = tempfile::tempdir().unwrap();
    let copy = copies.path().join("copy");
    let copy = copy.to_str().unwrap();
    assert!(lines(&["quantize", "--format", "fp8", "--output", copy]) < 12);
}

/// Nor are sixty layers that all lack something: a few are told in full, the others counted.
#[test]
fn many_layers_that_lack_something_are_summarised() {
    let folder = tempfile::tempdir().unwrap();
    sixty_layers(folder.path(), |layer, name| layer == 30 || !name.starts_with("experts.3."));
    let output = moe_runner(["inspect".as_ref(), folder.path().as_os_str()]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.lines().count() < 50, "{text}");
    assert!(text.contains("\nlayer 2: missing: model.layers.2.mlp.experts.3.up_proj"), "{text}");
    // 56 layers, three projections each
    let counted = "\nlayers 3-29, 31-59: 168 missing (--json lists all)\n";
    assert!(text.contains(counted), "{text}");
    // what is not there is in no other format than the rest
    assert!(!text.contains("another format"), "{text}");
    assert!(text.contains("INCOMPLETE: 59 of 60 MoE layers cannot be loaded"), "{text}");
}

/// Collectives take their latency and their bytes at the link's rate, whether it is given or measured; without a link
/// there is no time.
#[test]
fn a_link_says_how_long_collectives_take() {
    let case = case("deepseek_v3_bf16");
    let flags = ["--ranks", "4", "--layer", "1", "--link", "2,50"];
    let layer = ["--ranks", "4", "--layer", "1"];
    let given = plan(&case, &flags);
    assert_eq!((&given["link"]["gbps"], &given["link"]["measured"]), (&2.0.into(), &().into()));
    for split in given["splits"].as_array().unwrap() {
        let cost = &split["cost"];
        let number = |name: &str| cost[name].as_f64().unwrap();
        // the busiest rank takes part in as many collectives as the others
        let least = number("busiest_rank_bytes") / 2e9;
        let want = least + number("collectives") * 50e-6;
        assert!((number("predicted_s") - want).abs() < 1e-9, "{split}");
    }
    assert!(plan(&case, &layer)["splits"][0]["cost"]["predicted_s"].is_null());
    let measured = plan(&case, &[&layer[..], &["--measure"]].concat());
    assert_eq!(
        (&measured["link"]["measured"], &measured["link"]["between"]),
        (&4.into(), &"threads".into())
    );
    assert!(measured["link"]["gbps"].as_f64() > Some(0.0), "{measured}");
    assert!(measured["splits"][4]["cost"]["predicted_s"].as_f64() > Some(0.0), "{measured}");

    let mut args = vec!["plan".as_ref(), case.as_os_str()];
    args.extend(flags.iter().map(std::ffi::OsStr::new));
    let text = String::from_utf8(moe_runner(&args).stdout).unwrap();
    assert!(text.contains("2.0 GB/s a rank") && text.contains("predictions"), "{text}");
    *args.last_mut().unwrap() = "fast".as_ref();
    let message = refused(2, args);
    assert!(message.contains("no rate and latency"), "{message}");
}

/// Where rows stay on GPUs, what is counted is the way that they would go: written into each other's memory on one machine,
/// sent between several; without GPUs to compute on, they pass through the processor.
#[test]
fn a_plan_for_gpus_counts_the_way_that_rows_would_go() {
    let case = case("qwen2_moe_f16");
    let flags = ["--ranks", "4", "--comm", "nccl", "--tokens", "40"];
    let gpus = ["--device", "cuda", "--machine", "sm90"];
    let of = |more: &[&str]| {
        let all = plan(&case, &[&flags[..], more].concat());
        let splits = all["splits"].as_array().unwrap();
        let split = |name: &str| splits.iter().find(|split| split["name"] == name).unwrap();
        (split("DP + EP")["cost"].clone(), split("EP")["cost"].clone())
    };
    let layers = json(["inspect".as_ref(), case.as_os_str(), "--json".as_ref()]);
    let layers = layers["layers"].as_array().unwrap().len() as u64;
    let (one, same_rows) = of(&gpus);
    assert_eq!(
        (&one["between_gpus"], &same_rows["between_gpus"]),
        (&"one-sided".into(), &().into())
    );
    // there and back
    assert_eq!(one["collectives"], 2 * layers);
    let (two, _) = of(&[&gpus[..], &["--nodes", "2"]].concat());
    // and the counts before
    assert_eq!(
        (&two["between_gpus"], &two["collectives"]),
        (&"counts first".into(), &(3 * layers).into())
    );
    let (host, _) = of(&[]);
    assert_eq!((&host["between_gpus"], &host["collectives"]), (&().into(), &(2 * layers).into()));
    // a row's ids and weights travel along with it through the host; what it is to others is told to all, one-sided
    let sent = [&one, &two, &host].map(|cost| cost["sent_by_collective"]["all-to-all-v"].as_f64());
    assert!(sent.iter().all(|sent| *sent > Some(0.0)) && sent[0] != sent[1], "{sent:?}");
    let mut args = vec!["plan".as_ref(), case.as_os_str()];
    args.extend(flags.iter().chain(&gpus).map(std::ffi::OsStr::new));
    let text = String::from_utf8(moe_runner(&args).stdout).unwrap();
    assert!(text.contains("one-sided, if they reach each other's memory"), "{text}");
}
