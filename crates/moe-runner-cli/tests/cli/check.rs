//! `check`: it passes what is right, and notices what is wrong.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::files::{New, Values, write};
use crate::{case, cases, checkpoint, json, moe_runner, name_of, refused};

/// The status and the JSON of `check`.
fn check(path: &Path, flags: &[&OsStr]) -> (Option<i32>, Value) {
    let mut args = vec!["check".as_ref(), path.as_os_str(), "--json".as_ref()];
    args.extend(["--tokens", "8", "--no-timing"].map(OsStr::new));
    args.extend(flags);
    let output = moe_runner(args);
    let report = serde_json::from_slice(&output.stdout);
    (
        output.status.code(),
        report.unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr))),
    )
}

#[test]
fn without_a_checkpoint_it_checks_its_own() {
    let report = json(["check", "--json"]);
    assert_eq!(report["ok"], true);
    assert_eq!(report["layers"].as_array().unwrap().len(), 2);
    assert!(report["machine"]["read_gbps"].as_f64().unwrap() > 0.0);
    for layer in report["layers"].as_array().unwrap() {
        assert!(layer["nmse"].as_f64().unwrap() <= layer["bound"].as_f64().unwrap());
        assert_eq!(layer["recorded"].as_array().unwrap().len(), 3);
        // every slot of the 32 tokens stands in the load
        let load = layer["load"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap());
        assert_eq!(load.sum::<u64>(), 32 * layer["top_k"].as_u64().unwrap());
        assert!(layer["speed"][0]["limit_share"].as_f64().unwrap() > 0.0);
    }
    let acid = report["acid"].as_array().unwrap();
    assert!(acid.len() == 7 && acid.iter().all(|line| line["ok"] == true), "{acid:#?}");
    let text = moe_runner(["check"]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("RIGHT: all 2 MoE layers"), "{text}");
    assert!(text.contains("The acid test finds all 7 architectures right"), "{text}");
    assert!(!text.contains('\x1b'), "no colour where no terminal is");
}

#[test]
fn recorded_cases_are_right() {
    for case in cases() {
        let recorded = case.join("golden.safetensors");
        let flags = ["--against".as_ref(), recorded.as_os_str()];
        let (status, report) = check(&checkpoint(&case), &flags);
        assert_eq!(status, Some(0), "{}: {}", name_of(&case), report["verdict"]);
        for layer in report["layers"].as_array().unwrap() {
            assert!(layer["recorded"].as_array().unwrap().len() >= 3, "{}", name_of(&case));
        }
    }
}

/// The recording is spoiled in one way; the verdict names it.
#[test]
fn a_recording_that_differs_is_noticed() {
    let (case, folder) = (case("qwen2_moe_f16"), TempDir::new().unwrap());
    let recorded = Values::read(&case.join("golden.safetensors"));
    let f32s = |name: &str| -> Vec<f32> { recorded.get(name).iter().map(|v| *v as f32).collect() };
    let path = folder.path().join("recorded.safetensors");
    let verdict = |out: &[f32], ids: &[i64], weights: &[f32]| {
        write(
            &path,
            &[
                New::f32("layers.0.t7.x", &[7, 64], &f32s("layers.0.t7.x")),
                New::f32("layers.0.t7.out", &[7, 64], out),
                New::i64("layers.0.t7.topk_ids", &[7, 4], ids),
                New::f32("layers.0.t7.topk_weights", &[7, 4], weights),
            ],
        );
        let (status, report) = check(&case, &["--against".as_ref(), path.as_os_str()]);
        (status, report["verdict"].as_str().unwrap().to_owned())
    };
    let ids: Vec<i64> = recorded.get("layers.0.t7.topk_ids").iter().map(|v| *v as i64).collect();
    let (out, weights) = (f32s("layers.0.t7.out"), f32s("layers.0.t7.topk_weights"));
    assert_eq!(verdict(&out, &ids, &weights).0, Some(0));

    // a shared expert at 0.99
    let shared = f32s("layers.0.t7.shared_out");
    let less: Vec<f32> = out.iter().zip(&shared).map(|(y, s)| y - 0.01 * s).collect();
    let (status, text) = verdict(&less, &ids, &weights);
    assert_eq!(status, Some(1));
    assert!(text.contains("recorded t7: NMSE"), "{text}");
    // of which no routed expert has the blame
    assert!(!text.contains("expert"), "{text}");

    // an expert that adds too much, for its weight, to all of its tokens
    let mut one: Vec<f32> = out.clone();
    for (slot, id) in ids.iter().enumerate().filter(|(_, id)| **id == ids[0]) {
        let (token, weight) = (slot / 4, weights[slot]);
        assert!(weight > 0.0, "expert {id}");
        one[token * 64..][..64].iter_mut().for_each(|y| *y += 0.1 * weight);
    }
    let (_, text) = verdict(&one, &ids, &weights);
    assert!(text.ends_with(&format!(", expert {}", ids[0])), "{text}");

    let mut other = ids.clone();
    other[0] = (0..12).find(|id| !ids[..4].contains(id)).unwrap();
    assert!(verdict(&out, &other, &weights).1.contains("other experts"));

    let mut swapped = weights.clone();
    swapped.swap(0, 1);
    assert!(verdict(&out, &ids, &swapped).1.contains("weights differ"));

    // what is no number is within no bound, whichever of both it is
    let spoiled = |values: &[f32], at: usize| -> Vec<f32> {
        let mut values = values.to_vec();
        values[at] = f32::NAN;
        values
    };
    let (status, text) = verdict(&spoiled(&out, 70), &ids, &weights);
    assert!(status == Some(1) && text.contains("recorded t7: NMSE NaN"), "{text}");
    for at in [0, 27] {
        let (status, text) = verdict(&out, &ids, &spoiled(&weights, at));
        assert!(status == Some(1) && text.contains("weights differ by NaN"), "{text}");
    }
    // nothing was asked for, and something came
    let (status, text) = verdict(&vec![0.0; out.len()], &ids, &weights);
    assert!(status == Some(1) && text.contains("NMSE inf"), "{text}");
}

/// What `run` writes can be checked again later, with the hidden states it had.
#[test]
fn an_earlier_run_is_a_recording() {
    let (case, folder) = (case("qwen2_moe_f16"), TempDir::new().unwrap());
    let (input, out) =
        (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    let x: Vec<f32> = (0..5 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
    write(&input, &[New::f32("hidden_states", &[5, 64], &x)]);
    for layers in ["all", "2"] {
        json([
            "run".as_ref(),
            case.as_os_str(),
            "--layer".as_ref(),
            layers.as_ref(),
            "--json".as_ref(),
            "--input".as_ref(),
            input.as_os_str(),
            "--output".as_ref(),
            out.as_os_str(),
        ]);
        let flags = |input: &'static str| ["--layers", layers, "--against", input].map(OsStr::new);
        let mut args = flags("")[..3].to_vec();
        args.extend([out.as_os_str(), "--input".as_ref(), input.as_os_str()]);
        let (status, report) = check(&case, &args);
        assert_eq!(status, Some(0), "{}", report["verdict"]);
        assert_eq!(report["layers"][0]["recorded"][0]["ids_equal"], true);
    }
    // without the hidden states there is nothing to run
    let args = ["check".as_ref(), case.as_os_str(), "--layers".as_ref(), "2".as_ref()];
    let mut args = args.to_vec();
    args.extend(["--against".as_ref(), out.as_os_str()]);
    assert!(refused(1, args).contains("--input"));
}

/// A layer that routes by token id: the ids stand beside the recorded hidden states, or in `--input`;
/// without them nothing can be compared, and others route otherwise.
#[test]
fn recordings_of_a_layer_that_routes_by_token() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    let config = r#"{"model_type": "deepseek_v4", "num_hidden_layers": 1, "hidden_size": 8,
        "num_experts_per_tok": 2, "hidden_act": "silu", "n_routed_experts": 4,
        "moe_intermediate_size": 4, "num_hash_layers": 1, "vocab_size": 5,
        "scoring_func": "sqrtsoftplus"}"#;
    let model = path("model");
    std::fs::create_dir(&model).unwrap();
    std::fs::write(model.join("config.json"), config).unwrap();
    let values = |len: usize, seed: f32| -> Vec<f32> {
        (0..len).map(|i| ((i as f32 + seed) * 0.7).sin()).collect()
    };
    let names: Vec<(String, [usize; 2])> = ["experts.0", "experts.1", "experts.2", "experts.3"]
        .into_iter()
        .chain(["shared_experts"])
        .flat_map(|expert| {
            let of = move |w: &str, shape| (format!("layers.0.ffn.{expert}.{w}.weight"), shape);
            [of("w1", [4, 8]), of("w3", [4, 8]), of("w2", [8, 4])]
        })
        .chain([("layers.0.ffn.gate.weight".to_owned(), [4, 8])])
        .collect();
    let weights = names.iter().enumerate();
    let mut tensors: Vec<New> = weights
        .map(|(i, (name, [rows, cols]))| {
            New::f32(name, &[*rows, *cols], &values(rows * cols, i as f32))
        })
        .collect();
    let table = [0, 1, 1, 2, 2, 3, 3, 0, 0, 2];
    tensors.push(New::i64("layers.0.ffn.gate.tid2eid", &[5, 2], &table));
    write(&model.join("model.safetensors"), &tensors);

    let hidden = || New::f32("hidden_states", &[3, 8], &values(24, 0.5));
    let ids = |ids: &[i64]| New::i64("input_ids", &[3], ids);
    write(&path("in"), &[hidden(), ids(&[4, 0, 2])]);
    let (input, out) = (path("in"), path("out"));
    let run = ["run".as_ref(), model.as_os_str(), "--layers".as_ref(), "0".as_ref()];
    let to = ["--input".as_ref(), input.as_os_str(), "--output".as_ref(), out.as_os_str()];
    json(run.into_iter().chain(to).chain(["--json".as_ref()]));
    let output = Values::read(&out);
    let output: Vec<f32> = output.get("output").iter().map(|v| *v as f32).collect();
    let output = || New::f32("output", &[3, 8], &output);

    let recorded = path("recorded");
    let args = ["--layers".as_ref(), "0".as_ref(), "--against".as_ref(), recorded.as_os_str()];
    write(&recorded, &[hidden(), ids(&[4, 0, 2]), output()]);
    assert_eq!(check(&model, &args).0, Some(0));
    write(&recorded, &[hidden(), ids(&[4, 1, 2]), output()]);
    let (status, report) = check(&model, &args);
    assert_eq!(status, Some(1), "{}", report["verdict"]);
    // the ids are in the input, and nowhere
    write(&recorded, &[hidden(), output()]);
    let beside = args.iter().copied().chain(["--input".as_ref(), input.as_os_str()]);
    assert_eq!(check(&model, &beside.collect::<Vec<_>>()).0, Some(0));
    let mut all = vec!["check".as_ref(), model.as_os_str()];
    all.extend(args);
    assert!(refused(1, all).contains("there is no input_ids [3] beside"));
}

/// One weight of one expert is not a number.
#[test]
fn a_weight_that_is_no_number_is_named() {
    let folder = TempDir::new().unwrap();
    let case = case("qwen2_moe_f16");
    for entry in std::fs::read_dir(&case).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let path = folder.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let tensor = "model.layers.2.mlp.experts.5.down_proj";
    let start = header[format!("{tensor}.weight")]["data_offsets"][0].as_u64().unwrap() as usize;
    // f16 NaN
    bytes[8 + length + start..][..2].copy_from_slice(&[0x00, 0x7e]);
    std::fs::write(&path, bytes).unwrap();
    let (status, report) = check(folder.path(), &[]);
    assert_eq!(status, Some(1));
    assert_eq!(report["layers"][0]["ok"], true);
    assert_eq!(report["layers"][1]["ok"], false);
    let problem = report["layers"][1]["problems"][0].as_str().unwrap();
    assert!(problem.contains(tensor) && problem.contains("NaN"), "{problem}");
}

#[test]
fn every_kernel_is_held_to_the_same_bounds() {
    let explained = json(["explain".as_ref(), case("deepseek_v2").as_os_str(), "--json".as_ref()]);
    let able = explained["layers"][0]["able"].as_array().unwrap();
    for kernel in able.iter().map(|kernel| kernel["kernel"].as_str().unwrap()) {
        let (status, report) = check(&case("deepseek_v2"), &["--kernel".as_ref(), kernel.as_ref()]);
        assert_eq!(status, Some(0), "{kernel}: {}", report["verdict"]);
        assert_eq!(report["layers"][0]["kernel"], kernel);
    }
    assert!(able.len() >= 2);
}

/// A kernel by name is the one that is checked, within its own bounds, in every dtype.
#[test]
fn emulated_hardware_is_checked_within_its_own_bounds() {
    let nvfp4 = checkpoint(&case("quant_qwen3_moe_nvfp4"));
    for dtype in ["f32", "f16", "bf16"] {
        let flags = ["--kernel", "emulation_nvfp4", "--dtype", dtype].map(OsStr::new);
        let (status, report) = check(&nvfp4, &flags);
        assert_eq!(status, Some(0), "{dtype}: {report}");
        assert_eq!(report["layers"][0]["kernel"], "emulation_nvfp4");
    }
}

/// A layer that is split over ranks is held to the same bounds, recordings included.
#[test]
fn split_layers_are_held_to_the_same_bounds() {
    for (name, flags) in [
        ("deepseek_v2", &["--tp", "2"][..]),
        ("deepseek_v2", &["--dp", "2", "--ep"]),
        ("quant_qwen3_moe_fp8_channel", &["--dp", "2", "--tp", "2", "--ep", "--dbo", "2"]),
    ] {
        let case = case(name);
        let recorded = case.join("golden.safetensors");
        let mut args: Vec<&OsStr> = flags.iter().map(OsStr::new).collect();
        args.extend(["--against".as_ref(), recorded.as_os_str()]);
        let (status, report) = check(&case, &args);
        assert_eq!(status, Some(0), "{name} {flags:?}: {}", report["verdict"]);
        assert_eq!(report["split"]["dp"], if flags[0] == "--dp" { 2 } else { 1 });
        for layer in report["layers"].as_array().unwrap() {
            assert!(layer["nmse"].as_f64().unwrap() <= layer["bound"].as_f64().unwrap());
            assert_eq!(layer["ids_equal"], true);
            assert!(layer["recorded"].as_array().unwrap().len() >= 3);
        }
    }
    // one rank says nothing of ranks
    let (_, report) = check(&case("deepseek_v2"), &[]);
    assert!(report.get("split").is_none());
}

/// What ranks send shows in the report: each of two ranks sends its part of a token's sum, 64 f32.
#[test]
fn what_ranks_send_is_reported() {
    let case = case("deepseek_v2");
    let report = json([
        "check".as_ref(),
        case.as_os_str(),
        "--tp".as_ref(),
        "2".as_ref(),
        "--json".as_ref(),
    ]);
    for layer in report["layers"].as_array().unwrap() {
        for speed in layer["speed"].as_array().unwrap() {
            assert_eq!(speed["bytes_moved_per_token"], 2.0 * 64.0 * 4.0, "{speed}");
        }
    }
}

#[test]
fn more_tokens_than_memory_are_refused() {
    let case = case("deepseek_v2");
    let tokens = (usize::MAX / 2).to_string();
    let args = [
        "check".as_ref(),
        case.as_os_str(),
        "--no-timing".as_ref(),
        "--tokens".as_ref(),
        tokens.as_ref(),
    ];
    assert!(refused(1, args).contains("out of memory"));
}

/// An expert of the checkpoint differs from the original's: the report names it, whatever experts its
/// tokens share with it.
#[test]
fn the_worst_expert_is_the_one_that_has_the_fault() {
    let case = case("qwen2_moe_f16");
    for faulty in [3, 8] {
        let folder = TempDir::new().unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(case.join(name), folder.path().join(name)).unwrap();
        }
        let path = folder.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let tensor = format!("model.layers.2.mlp.experts.{faulty}.down_proj.weight");
        let range: Vec<usize> =
            serde_json::from_value(header[tensor]["data_offsets"].clone()).unwrap();
        for value in bytes[8 + length + range[0]..8 + length + range[1]].chunks_exact_mut(2) {
            let old = half::f16::from_le_bytes([value[0], value[1]]).to_f32();
            value.copy_from_slice(&half::f16::from_f32(old * 1.1).to_le_bytes());
        }
        std::fs::write(&path, bytes).unwrap();
        let flags = ["--layers", "2", "--tokens", "24", "--no-timing", "--json", "--against"];
        let mut args = vec!["check".as_ref(), folder.path().as_os_str()];
        args.extend(flags.map(OsStr::new));
        args.push(case.as_os_str());
        let report = json(args);
        let layer = &report["layers"][0];
        assert_eq!(layer["original_worst_expert"]["index"], faulty, "{layer}");
        assert_eq!(layer["inputs"], "random");
    }
}

/// Before the first layer is checked, and not after the last.
#[test]
fn a_file_without_recordings_is_refused_at_once() {
    let (case, folder) = (case("qwen2_moe_f16"), TempDir::new().unwrap());
    let path = folder.path().join("in.safetensors");
    write(&path, &[New::f32("hidden_states", &[1, 64], &[0.5; 64])]);
    let args = ["check".as_ref(), case.as_os_str(), "--against".as_ref(), path.as_os_str()];
    let output = moe_runner(args);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("no recorded output of a checked layer"), "{stderr}");
}

/// With a recording of the model, everything is measured on its hidden states.
#[test]
fn recorded_inputs_are_used_where_there_are_any() {
    let case = case("qwen2_moe_f16");
    let recorded = case.join("golden.safetensors");
    let flags =
        ["--against".as_ref(), case.as_os_str(), "--against".as_ref(), recorded.as_os_str()];
    let (status, report) = check(&case, &flags);
    assert_eq!(status, Some(0), "{report}");
    for layer in report["layers"].as_array().unwrap() {
        assert_eq!(layer["inputs"], "recorded as t33");
        assert_eq!(layer["original_nmse"], 0.0);
        assert_eq!(layer["tokens"], 8);
        // of which of both checkpoints they are, nobody knows
        assert!(layer["recorded"].as_array().unwrap().is_empty());
    }
    let twice = ["check".as_ref(), case.as_os_str(), "--against".as_ref(), case.as_os_str()];
    let twice = twice.iter().chain(&flags[..2]);
    assert!(refused(2, twice).contains("not two of a kind"));
}

/// The last line speaks of the worst of all comparisons: here a recording that is near its bound.
#[test]
fn the_verdict_is_of_the_worst_comparison() {
    let (case, folder) = (case("qwen2_moe_f16"), TempDir::new().unwrap());
    let recorded = Values::read(&case.join("golden.safetensors"));
    let f32s = |name: &str| -> Vec<f32> { recorded.get(name).iter().map(|v| *v as f32).collect() };
    let path = folder.path().join("recorded.safetensors");
    // 0.09 % of a length: NMSE 8.1e-7, of 1e-6
    let out: Vec<f32> = f32s("layers.2.t7.out").iter().map(|v| v * 1.0009).collect();
    let x = f32s("layers.2.t7.x");
    let tensors =
        [New::f32("layers.2.late.x", &[7, 64], &x), New::f32("layers.2.late.out", &[7, 64], &out)];
    write(&path, &tensors);
    let flags = ["--dtype", "f16", "--against"].map(OsStr::new);
    let (status, report) = check(&case, &[&flags[..], &[path.as_os_str()]].concat());
    let layer = &report["layers"][1];
    let of_recording = &layer["recorded"][0];
    if of_recording["bound"] == 1e-6 {
        assert_eq!(status, Some(0), "{report}");
        let verdict = report["verdict"].as_str().unwrap();
        assert!(verdict.contains("worst: late of layer 2, NMSE 8."), "{verdict}");
    } else {
        // inputs that f16 does not hold are compared in f32
        assert!(report["verdict"].as_str().unwrap().contains("recorded late"), "{report}");
    }
}

/// Each layer is on standard output when it is done; interrupted, what is known is.
#[cfg(unix)]
#[test]
fn layers_are_shown_as_they_are_done() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("in.safetensors");
    // the second layer, in float64 on one thread, is far from done when the first one's lines are read
    let (few, many) = (vec![0.5; 2 * 64], vec![0.5; 100_000 * 64]);
    write(
        &path,
        &[
            New::f32("layers.0.hidden_states", &[2, 64], &few),
            New::f32("layers.2.hidden_states", &[100_000, 64], &many),
        ],
    );
    let mut child = Command::new(env!("CARGO_BIN_EXE_moe-runner"))
        .arg("check")
        .arg(case("qwen2_moe_f16"))
        .args(["--no-timing", "--threads", "1", "--kernel", "reference"])
        .args(["--tokens", "100000", "--input"])
        .arg(&path)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("layer 0") {
        line.clear();
        assert!(out.read_line(&mut line).unwrap() > 0, "the first layer is shown");
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(rest.contains("INTERRUPTED"), "{rest}");
    let mut errors = String::new();
    child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    assert_eq!(errors, "", "the verdict says it");
}

/// Interrupted while it waits for its input, it says how much is not checked.
#[cfg(unix)]
#[test]
fn what_is_known_is_an_object_too() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_moe-runner"))
        .arg("check")
        .arg(case("qwen2_moe_f16"))
        .args(["--no-timing", "--threads", "1", "--json", "--input", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // more than a pipe holds: once it is written, the reader is reading
    child.stdin.as_mut().unwrap().write_all(&[0; 1 << 21]).unwrap();
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let mut rest = String::new();
    child.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let report: Value = serde_json::from_str(&rest).unwrap();
    assert_eq!((&report["ok"], &report["unchecked"]), (&false.into(), &2.into()), "{report}");
}

/// Where the report cannot be written, nothing is right, and nothing is left.
#[cfg(unix)]
#[test]
fn a_report_that_nobody_gets_is_no_success() {
    let temporary = TempDir::new().unwrap();
    let mut check = Command::new(env!("CARGO_BIN_EXE_moe-runner"));
    check.args(["check", "--no-timing", "--threads", "1"]).env("TMPDIR", temporary.path());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = check.stdout(writer).output().unwrap();
    // as shells have it for a broken pipe
    assert_eq!(output.status.code(), Some(141));
    assert!(output.stderr.is_empty());
    if cfg!(target_os = "linux") {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = check.stdout(full).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(stderr.contains("cannot write to standard output"), "{stderr}");
    }
    assert_eq!(std::fs::read_dir(temporary.path()).unwrap().count(), 0, "what was unpacked");
}
