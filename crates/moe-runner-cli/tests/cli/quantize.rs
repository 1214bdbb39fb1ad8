//! `quantize`, then `check`: the copy is right, and as far from the original as its format.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{case, json, refused};

const FORMATS: [&str; 6] = ["fp8", "fp8-block", "int8", "w4a16", "nvfp4a16", "mxfp4"];

fn quantize(checkpoint: &Path, format: &str, output: &Path) -> Value {
    let flags = ["--format", format, "--json", "--output"].map(OsStr::new);
    let mut args = vec!["quantize".as_ref(), checkpoint.as_os_str()];
    args.extend(flags);
    args.push(output.as_os_str());
    json(args)
}

fn check(checkpoint: &Path, against: &Path) -> Value {
    let mut args = vec!["check".as_ref(), checkpoint.as_os_str(), "--against".as_ref()];
    args.push(against.as_os_str());
    args.extend(["--json", "--tokens", "16", "--no-timing"].map(OsStr::new));
    json(args)
}

/// A checkpoint whose sizes all groups divide.
fn original(folder: &Path) -> std::path::PathBuf {
    // what another format's recorded case decodes to would do as well; random weights are enough
    let (hidden, intermediate, experts) = (256usize, 128usize, 8usize);
    let config = format!(
        r#"{{"model_type": "olmoe", "hidden_size": {hidden}, "intermediate_size": {intermediate},
        "num_experts": {experts}, "num_experts_per_tok": 2, "num_hidden_layers": 2, "torch_dtype": "float32"}}"#
    );
    let path = folder.join("original");
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("config.json"), config).unwrap();
    let mut state = 1u64;
    let mut tensors = Vec::new();
    for layer in 0..2 {
        let block = format!("model.layers.{layer}.mlp");
        let mut add = |name: String, rows: usize, cols: usize| {
            let values = (0..rows * cols).flat_map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                // three uniform numbers: a bell
                let uniform = |shift: u32| ((state >> shift) & 0x3ff) as f32 / 1024.0 - 0.5;
                ((uniform(20) + uniform(32) + uniform(44)) * 0.1).to_le_bytes()
            });
            tensors.push((name, vec![rows, cols], values.collect::<Vec<u8>>()));
        };
        add(format!("{block}.gate.weight"), experts, hidden);
        for e in 0..experts {
            add(format!("{block}.experts.{e}.gate_proj.weight"), intermediate, hidden);
            add(format!("{block}.experts.{e}.up_proj.weight"), intermediate, hidden);
            add(format!("{block}.experts.{e}.down_proj.weight"), hidden, intermediate);
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(
            safetensors::Dtype::F32,
            shape.clone(),
            bytes.as_slice(),
        );
        (name.as_str(), view.unwrap())
    });
    safetensors::serialize_to_file(views, None, &path.join("model.safetensors")).unwrap();
    path
}

#[test]
fn the_copy_is_right_and_near_its_original() {
    let folder = tempfile::tempdir().unwrap();
    let original = original(folder.path());
    // itself, it is no distance from
    let same = check(&original, &original);
    assert!(same["layers"].as_array().unwrap().iter().all(|layer| layer["original_nmse"] == 0.0));

    for format in FORMATS {
        let output = folder.path().join(format);
        let report = quantize(&original, format, &output);
        let errors = report["errors"].as_array().unwrap();
        assert_eq!(errors.len(), 6, "{format}: two layers of three projections");
        let weights =
            errors.iter().map(|error| error["nmse"].as_f64().unwrap()).fold(0.0, f64::max);
        // 8 bits or 4: what a bell-shaped weight loses in them
        let expected = match format {
            "fp8" | "fp8-block" => 2e-4..2e-3,
            "int8" => 1e-5..5e-4,
            _ => 2e-3..2e-2,
        };
        assert!(expected.contains(&weights), "{format}: weights' NMSE {weights}");
        let bytes = |key: &str| report[key].as_u64().unwrap() as f64;
        let least = if matches!(format, "fp8" | "fp8-block" | "int8") { 3.5 } else { 6.0 };
        assert!(bytes("bytes_before") / bytes("bytes_after") > least, "{format}: {report}");

        let checked = check(&output, &original);
        assert_eq!(checked["ok"], true, "{format}: {checked}");
        for layer in checked["layers"].as_array().unwrap() {
            // three products, each with errors of its weights; rows in 8 bits have errors too
            let rows = if least < 6.0 { 1e-3 } else { 0.0 };
            let nmse = layer["original_nmse"].as_f64().unwrap();
            let expected = weights / 2.0..10.0 * weights + rows;
            assert!(expected.contains(&nmse), "{format}: {nmse}, weights {weights}");
        }
    }
    // further than another of the same model: no layer of this shape
    let args = ["check".as_ref(), original.as_os_str(), "--no-timing".as_ref()];
    let other = case("olmoe_f16");
    let output =
        crate::moe_runner(args.into_iter().chain(["--against".as_ref(), other.as_os_str()]));
    assert_eq!(output.status.code(), Some(1));
}

/// An empty folder that one stands in is a place for a checkpoint.
#[test]
fn the_current_folder_is_an_output() {
    let (original_in, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let original = original(original_in.path());
    let output = Command::new(env!("CARGO_BIN_EXE_moe-runner"))
        .args(["quantize".as_ref(), original.as_os_str()])
        .args(["--format", "fp8", "--output", "."])
        .current_dir(place.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    json(["inspect".as_ref(), place.path().as_os_str(), "--json".as_ref()]);
}

/// Whenever it is killed, there is a whole checkpoint or none.
#[test]
fn killed_it_leaves_nothing_that_opens() {
    let folder = tempfile::tempdir().unwrap();
    let original = original(folder.path());
    let mut interrupted = 0;
    for delay in [0, 2, 5, 10, 20, 40] {
        let place = tempfile::tempdir().unwrap();
        let output = place.path().join("out");
        let mut child = Command::new(env!("CARGO_BIN_EXE_moe-runner"))
            .args([
                "quantize".as_ref(),
                original.as_os_str(),
                "--output".as_ref(),
                output.as_os_str(),
            ])
            .args(["--format", "nvfp4a16", "--threads", "1", "--max-shard-size", "100KB"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let started = Instant::now();
        let begun = || std::fs::read_dir(place.path()).unwrap().next().is_some();
        while !begun() && started.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(delay));
        let _ = child.kill();
        child.wait().unwrap();
        for entry in std::fs::read_dir(place.path()).unwrap() {
            let path = entry.unwrap().path();
            if path == output {
                json(["inspect".as_ref(), path.as_os_str(), "--json".as_ref()]);
            } else {
                interrupted += 1;
                let stderr = refused(1, ["inspect".as_ref(), path.as_os_str()]);
                assert!(stderr.contains(": holds "), "{stderr}");
            }
        }
    }
    assert!(interrupted > 0, "every run was done before it was killed");
}

/// A later run for the same output says what a killed one left, and removes it.
#[test]
fn leftovers_of_a_killed_run_are_told_of_and_removed() {
    let folder = tempfile::tempdir().unwrap();
    let original = original(folder.path());
    let place = tempfile::tempdir().unwrap();
    let output = place.path().join("out");
    let mut child = begun(&original, &output, place.path());
    // SIGKILL: nothing can be said or cleaned
    let _ = child.kill();
    child.wait().unwrap();
    if output.exists() {
        return; // it was faster
    }
    let left = std::fs::read_dir(place.path()).unwrap().next().unwrap().unwrap().path();
    let report = quantize(&original, "fp8", &output);
    let left = serde_json::json!([{"path": left, "removed": true}]);
    assert_eq!(report["leftovers"], left);
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1, "the new checkpoint alone");
}

/// Ctrl-C, and the signal that `kill` and schedulers send: nothing is left.
#[cfg(unix)]
#[test]
fn interrupted_it_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let original = original(folder.path());
    let mut interrupted = 0;
    for signal in ["-INT", "-TERM"] {
        let place = tempfile::tempdir().unwrap();
        let output = place.path().join("out");
        let mut child = begun(&original, &output, place.path());
        Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        let status = child.wait().unwrap();
        if output.exists() {
            continue; // it was faster
        }
        assert_eq!(status.code(), Some(130), "{signal}");
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0, "{signal}");
        interrupted += 1;
    }
    assert!(interrupted > 0, "every run was done before it was interrupted");
}

/// A disk that is full in the middle of a file (here: a limit on the size of files).
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let original = original(folder.path());
    let place = tempfile::tempdir().unwrap();
    let output = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 100; exec \"$@\"", "sh"])
        .args([
            env!("CARGO_BIN_EXE_moe-runner").as_ref(),
            "quantize".as_ref(),
            original.as_os_str(),
        ])
        .args(["--format", "fp8", "--output"])
        .arg(place.path().join("out"))
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("cannot write"), "{stderr}");
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);
}

/// On a terminal there is a bar, with how fast it goes and how long it will take; elsewhere there is none.
#[cfg(target_os = "linux")]
#[test]
fn progress_has_a_rate_and_the_time_left() {
    let folder = tempfile::tempdir().unwrap();
    let original = original(folder.path());
    let run = |output: &str| {
        let output = folder.path().join(output);
        format!(
            "{} quantize {} --format nvfp4a16 --threads 1 --output {}",
            env!("CARGO_BIN_EXE_moe-runner"),
            original.display(),
            output.display()
        )
    };
    // a terminal of its own
    let on_a_terminal = |command: &str| {
        let shown = Command::new("script").args(["-qec", command, "/dev/null"]).output().ok()?;
        Some(String::from_utf8_lossy(&shown.stdout).into_owned())
    };
    let Some(shown) = on_a_terminal(&run("a")) else {
        eprintln!("script is not here: skipped");
        return;
    };
    assert!(shown.contains("B/s, ") && shown.contains("s left"), "{shown}");
    // nobody knows how long it takes before anything is done
    let check = format!("{} check {}", env!("CARGO_BIN_EXE_moe-runner"), original.display());
    let shown = on_a_terminal(&check).unwrap();
    let bars: Vec<_> = shown.split('\r').filter(|bar| bar.contains(" 0/")).collect();
    assert!(!bars.is_empty() && bars.iter().all(|bar| !bar.contains("left")), "{shown}");
    let piped = Command::new("sh").args(["-c", &run("b")]).output().unwrap();
    assert!(piped.status.success());
    assert!(piped.stderr.is_empty(), "{}", String::from_utf8_lossy(&piped.stderr));
}

/// A run that has begun to write.
fn begun(original: &Path, output: &Path, place: &Path) -> std::process::Child {
    let child = Command::new(env!("CARGO_BIN_EXE_moe-runner"))
        .args(["quantize".as_ref(), original.as_os_str(), "--output".as_ref(), output.as_os_str()])
        .args(["--format", "nvfp4a16", "--threads", "1", "--max-shard-size", "100KB"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    let begun = || {
        let first = std::fs::read_dir(place).unwrap().next();
        first.is_some_and(|item| {
            std::fs::read_dir(item.unwrap().path()).is_ok_and(|i| i.count() > 1)
        })
    };
    while !begun() && started.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

/// What is there is not replaced, and the way to do so is named; `-` is not taken for a folder.
#[test]
fn an_output_that_is_there_is_refused_with_the_option() {
    let folder = tempfile::tempdir().unwrap();
    let original = original(folder.path());
    let there = folder.path().join("there");
    std::fs::create_dir(&there).unwrap();
    std::fs::write(there.join("config.json"), "{}").unwrap();
    let args = |output: &Path| -> Vec<std::ffi::OsString> {
        let (from, to) = (original.clone().into(), output.into());
        vec!["quantize".into(), from, "--format".into(), "fp8".into(), "--output".into(), to]
    };
    let stderr = refused(1, args(&there));
    assert!(stderr.contains("name another folder, or overwrite it: --overwrite"), "{stderr}");
    assert!(refused(2, args(Path::new("-"))).contains("--output -: standard output has"));
}

#[test]
fn arguments_that_cannot_be_used() {
    let case = case("olmoe_f16");
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let says = |status: i32, flags: &[&str], wanted: &str| {
        let mut args = vec!["quantize".as_ref(), case.as_os_str(), "--output".as_ref()];
        args.push(output.as_os_str());
        args.extend(flags.iter().map(OsStr::new));
        let stderr = refused(status, args);
        assert!(stderr.contains(wanted), "{stderr}\n  should say: {wanted}");
        assert!(!output.exists());
    };
    says(2, &[], "--format");
    says(2, &["--format", "int3"], "no such format; there are fp8, fp8-block, int8, w4a16");
    says(2, &["--format", "w4a16", "--group-size", "0"], "must be at least 1");
    says(2, &["--format", "fp8", "--group-size", "32"], "only w4a16 has a choice");
    says(2, &["--format", "fp8", "--max-shard-size", "5 parsecs"], "sizes are like 5GB");
    says(1, &["--format", "w4a16"], "has 64 columns, which groups of 128 (w4a16) do not divide");
    says(1, &["--format", "fp8", "--ignore", "re:.*"], "nothing to quantise");
    says(
        1,
        &["--format", "fp8", "--ignore", "re:.*attention"],
        "'re:.*attention' is the name of no",
    );
    says(1, &["--format", "fp8", "--ignore", "model.layers.0.mlp.experts.99"], "matches none");
}
