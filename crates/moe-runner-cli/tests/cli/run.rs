//! `run`, against recordings of the reference library.

use std::path::Path;

use safetensors::tensor::Dtype;
use tempfile::TempDir;

use crate::files::{New, Values, nmse, write};
use crate::{case, checkpoint, float_cases, json, moe_runner, name_of};

/// Runs every MoE layer of a case on the recorded inputs of `tokens` tokens.
fn run_all(case: &Path, tokens: &str, folder: &TempDir, flags: &[&str]) -> Values {
    let out = folder.path().join("out.safetensors");
    let mut args: Vec<std::ffi::OsString> = vec!["run".into(), checkpoint(case).into()];
    for arg in ["--layer", "all", "--input-name", &format!("t{tokens}.x"), "--threads", "2"] {
        args.push(arg.into());
    }
    args.extend(["--input".into(), case.join("golden.safetensors").into()]);
    args.extend(["--output".into(), out.clone().into()]);
    args.extend(flags.iter().map(Into::into));
    let output = moe_runner(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {stderr}", name_of(case));
    Values::read(&out)
}

fn layers(recorded: &Values) -> Vec<String> {
    let layers = recorded.names().into_iter().filter_map(|name| name.strip_suffix(".t7.out"));
    layers.map(str::to_owned).collect()
}

/// The ids and weights of each token, by id: the order of a token's experts carries no meaning.
fn choices(file: &Values, ids: &str, weights: &str) -> Vec<Vec<(u32, f64)>> {
    let k = file.shape(ids)[1];
    let rows = file.get(ids).chunks(k).zip(file.get(weights).chunks(k));
    let sorted = rows.map(|(ids, weights)| {
        let mut row: Vec<_> =
            ids.iter().map(|id| *id as u32).zip(weights.iter().copied()).collect();
        row.sort_by_key(|(id, _)| *id);
        row
    });
    sorted.collect()
}

#[test]
fn outputs_are_the_recorded_ones() {
    let folder = TempDir::new().unwrap();
    for case in float_cases() {
        let recorded = Values::read(&case.join("golden.safetensors"));
        for tokens in ["1", "7", "33"] {
            let out = run_all(&case, tokens, &folder, &["--dtype", "f32"]);
            for layer in layers(&recorded) {
                let what = format!("{} {layer} t{tokens}", name_of(&case));
                let golden = |name: &str| format!("{layer}.t{tokens}.{name}");
                let ours = |name: &str| format!("{layer}.{name}");
                let error = nmse(out.get(&ours("output")), recorded.get(&golden("out")));
                assert!(error <= 1e-10, "{what}: NMSE {error:e}");
                if recorded.has(&golden("router_logits")) {
                    let logits = recorded.get(&golden("router_logits"));
                    let error = nmse(out.get(&ours("router_logits")), logits);
                    assert!(error <= 1e-10, "{what}: logits, NMSE {error:e}");
                }
                let expected = choices(&recorded, &golden("topk_ids"), &golden("topk_weights"));
                let actual = choices(&out, &ours("topk_ids"), &ours("topk_weights"));
                assert_eq!(actual.len(), expected.len());
                for (actual, expected) in actual.iter().flatten().zip(expected.iter().flatten()) {
                    assert_eq!(actual.0, expected.0, "{what}: ids");
                    assert!((actual.1 - expected.1).abs() <= 1e-5, "{what}: weights");
                }
                // a recording without logits holds the sum of all branches alone
                if recorded.has(&golden("router_logits")) {
                    assert_eq!(
                        out.has(&ours("shared_output")),
                        recorded.has(&golden("shared_out")),
                        "{what}"
                    );
                }
                if recorded.has(&golden("shared_out")) {
                    let ours = out.get(&ours("shared_output"));
                    let error = nmse(ours, recorded.get(&golden("shared_out")));
                    assert!(error <= 1e-10, "{what}: shared experts, NMSE {error:e}");
                }
            }
        }
    }
}

#[test]
fn sixteen_bit_checkpoints_run_in_their_own_dtype() {
    let folder = TempDir::new().unwrap();
    let mut seen = 0;
    for case in float_cases() {
        let recorded = Values::read(&case.join("golden.safetensors"));
        let out = run_all(&case, "33", &folder, &[]);
        for layer in layers(&recorded) {
            let output = format!("{layer}.output");
            let bound = match out.dtype(&output) {
                Dtype::F32 => continue,
                Dtype::F16 => 1e-6,
                Dtype::BF16 => 1e-5,
                other => panic!("output is {other:?}"),
            };
            let error = nmse(out.get(&output), recorded.get(&format!("{layer}.t33.out")));
            assert!(error <= bound, "{} {layer}: NMSE {error:e}", name_of(&case));
            assert!(error > 1e-9, "{} {layer}: no trace of 16-bit rounding", name_of(&case));
            seen += 1;
        }
    }
    assert!(seen >= 8);
}

#[test]
fn one_layer_has_no_prefix() {
    let (case, folder) = (case("qwen2_moe_f16"), TempDir::new().unwrap());
    let out = folder.path().join("out.safetensors");
    let input = case.join("golden.safetensors");
    let report = json([
        "run".as_ref(),
        case.as_os_str(),
        "--layer".as_ref(),
        "2".as_ref(),
        "--input".as_ref(),
        input.as_os_str(),
        "--input-name".as_ref(),
        "layers.2.t7.x".as_ref(),
        "--output".as_ref(),
        out.as_os_str(),
        "--output-dtype".as_ref(),
        "f32".as_ref(),
        "--json".as_ref(),
    ]);
    let layer = &report["layers"][0];
    assert_eq!(layer["layer"], 2);
    assert_eq!(layer["tokens"], 7);
    assert!(layer["kernel"].as_str().unwrap().starts_with("cpu_"));
    assert!(layer["seconds"].as_f64().unwrap() > 0.0);
    assert!(layer["flops"].as_f64().unwrap() > 0.0);
    // no more than the layer has: experts, shared experts, gate
    let bytes = layer["bytes_weights_read"].as_u64().unwrap();
    assert!((1..=214_000).contains(&bytes), "{bytes}");
    let file = Values::read(&out);
    let names = ["output", "router_logits", "shared_output", "topk_ids", "topk_weights"];
    assert_eq!(file.names(), names);
    assert_eq!(file.dtype("output"), Dtype::F32);
    assert_eq!(file.dtype("topk_ids"), Dtype::I32);
    assert_eq!(file.shape("output"), [7, 64]);
    assert_eq!(file.shape("router_logits"), [7, 12]);
    assert_eq!(file.shape("topk_weights"), [7, 4]);
}

/// Logits in the file take the gate's place: with those of the recording reversed from expert to
/// expert, the experts are the mirrored ones.
#[test]
fn given_logits_replace_the_gate() {
    let (case, folder) = (case("qwen2_moe_f16"), TempDir::new().unwrap());
    let recorded = Values::read(&case.join("golden.safetensors"));
    let single = |values: &[f64]| values.iter().map(|v| *v as f32).collect::<Vec<f32>>();
    let x = single(recorded.get("layers.0.t7.x"));
    let logits: Vec<f32> = recorded
        .get("layers.0.t7.router_logits")
        .chunks(12)
        .flat_map(|row| row.iter().rev().map(|v| *v as f32))
        .collect();
    let (input, out) =
        (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    write(
        &input,
        &[New::f32("hidden_states", &[7, 64], &x), New::f32("router_logits", &[7, 12], &logits)],
    );
    let args = ["--layer", "0", "--json", "--input"].map(std::ffi::OsStr::new);
    let mut all = vec!["run".as_ref(), case.as_os_str()];
    all.extend(args);
    all.extend([input.as_os_str(), "--output".as_ref(), out.as_os_str()]);
    json(all);
    let mirrored = choices(&Values::read(&out), "topk_ids", "topk_weights");
    let expected = choices(&recorded, "layers.0.t7.topk_ids", "layers.0.t7.topk_weights");
    for (mirrored, expected) in mirrored.iter().zip(&expected) {
        for ((id, weight), (other, expected)) in mirrored.iter().zip(expected.iter().rev()) {
            assert_eq!(*id, 11 - other);
            assert!((weight - expected).abs() < 1e-5);
        }
    }
}

#[test]
fn zero_tokens_are_a_normal_empty_result() {
    let (case, folder) = (case("qwen2_moe_f16"), TempDir::new().unwrap());
    let (input, out) =
        (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    write(&input, &[New::f32("hidden_states", &[0, 64], &[])]);
    let report = json([
        "run".as_ref(),
        case.as_os_str(),
        "--layer".as_ref(),
        "all".as_ref(),
        "--json".as_ref(),
        "--input".as_ref(),
        input.as_os_str(),
        "--output".as_ref(),
        out.as_os_str(),
    ]);
    assert_eq!(report["layers"].as_array().unwrap().len(), 2);
    assert_eq!(report["layers"][1]["tokens"], 0);
    let file = Values::read(&out);
    assert_eq!(file.shape("layers.0.output"), [0, 64]);
    assert_eq!(file.shape("layers.2.topk_ids"), [0, 4]);
}

/// Of several processes one has the standard input: none waits for it, and nothing is written.
#[cfg(unix)]
#[test]
fn standard_input_is_not_for_several_processes() {
    use std::process::{Command, Stdio};
    if !crate::book::has_mpirun() {
        return eprintln!("SKIPPED: there is no mpirun (Debian: apt-get install openmpi-bin)");
    }
    let (case, folder) = (case("qwen2_moe_f16"), TempDir::new().unwrap());
    let out = folder.path().join("out.safetensors");
    let output = Command::new("mpirun")
        .args(["--allow-run-as-root", "--oversubscribe", "-n", "2"])
        .arg(env!("CARGO_BIN_EXE_moe-runner"))
        .arg("run")
        .arg(case)
        .args(["--layers", "0", "--comm", "mpi", "--dp", "2", "--input", "-", "--output"])
        .arg(&out)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(stderr.contains("only one process has the standard input"), "{stderr}");
    assert!(!out.exists());
}
