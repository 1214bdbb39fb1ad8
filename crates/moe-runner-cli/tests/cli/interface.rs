//! What all commands have in common: help, choices, errors, and lines that fit.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::files::{New, Values, write};
use crate::plan::sixty_layers;
use crate::{case, json, moe_runner, refused};

const COMMANDS: [&str; 8] =
    ["check", "run", "inspect", "explain", "bench", "plan", "report", "quantize"];

#[test]
fn without_arguments_the_commands_are_listed() {
    let output = moe_runner::<&str>([]);
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    for command in COMMANDS {
        assert!(text.contains(&format!("\n  {command} ")), "{command}: {text}");
    }
}

#[test]
fn help_fits_eighty_columns() {
    let acid = ["", "acid", "acid write", "acid read", "acid run", "acid ask", "acid self"];
    for command in COMMANDS.into_iter().chain(acid) {
        let args = command.split_whitespace().chain(["--help"]);
        let output = moe_runner(args);
        assert!(output.status.success());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        for line in text.lines() {
            assert!(
                line.chars().count() <= 80,
                "{command}: {} columns: {line}",
                line.chars().count()
            );
        }
        assert!(text.contains("Options:") || text.contains("options:"), "{text}");
    }
}

/// What can be named is in the help: all presets, and a number format for each kind.
#[test]
fn help_names_what_there_is() {
    let output = moe_runner(["bench", "--help"]);
    let help = String::from_utf8(output.stdout).unwrap();
    let stderr = refused(2, ["bench", "--preset", "none-such"]);
    let (_, names) = stderr.trim().split_once("there are ").unwrap();
    assert!(names.contains(", "), "{names}");
    for name in names.split(", ") {
        assert!(help.contains(name), "{name} is not in the help of bench");
    }
}

/// `--seed` of something that has nothing random would be a promise that nobody keeps.
#[test]
fn options_stand_where_they_act() {
    let case = case("qwen2_moe_f16");
    for (command, flag) in [
        ("inspect", "--threads"),
        ("inspect", "--kernel"),
        ("explain", "--seed"),
        ("run", "--seed"),
        ("plan", "--kernel"),
        ("quantize", "--dtype"),
    ] {
        let stderr = refused(2, [command.as_ref(), case.as_os_str(), flag.as_ref(), "1".as_ref()]);
        assert!(stderr.contains(flag), "{stderr}");
    }
}

/// One language: single layers, lists, ranges of what is there, all; under both names.
#[test]
fn layers_are_chosen_alike_everywhere() {
    let case = case("qwen2_moe_f16");
    let layers = |args: &[&str], key: &str| -> Vec<u64> {
        let mut all = vec![args[0].as_ref(), case.as_os_str(), "--json".as_ref()];
        all.extend(args[1..].iter().map(OsStr::new));
        let report = json(all);
        let layers = report["layers"].as_array().unwrap();
        layers.iter().map(|layer| layer[key].as_u64().unwrap()).collect()
    };
    // layer 1 is dense: a range passes over it
    for (choice, expected) in
        [("all", &[0, 2][..]), ("2", &[2]), ("0-2", &[0, 2]), ("1-9", &[2]), ("0,2", &[0, 2])]
    {
        for flag in ["--layers", "--layer"] {
            for command in [&["inspect"][..], &["explain"], &["plan", "--ranks", "2"]] {
                let args = [command, &[flag, choice]].concat();
                assert_eq!(layers(&args, "layer"), expected, "{args:?}");
            }
            let args = ["check", "--no-timing", "--tokens", "2", flag, choice];
            assert_eq!(layers(&args, "layer"), expected, "{args:?}");
        }
    }
    for command in ["inspect", "explain", "check"] {
        let args = [command.as_ref(), case.as_os_str(), "--layers".as_ref(), "5-9".as_ref()];
        assert!(refused(2, args).contains("layers 5-9: none is an MoE layer of"));
    }
}

/// A program that reads JSON reads it when something is wrong, too.
#[test]
fn errors_are_objects_too() {
    let case = case("qwen2_moe_f16");
    let error = |args: &[&OsStr], status: i32| {
        let mut args = args.to_vec();
        args.push("--json".as_ref());
        let output = moe_runner(args);
        assert_eq!(output.status.code(), Some(status));
        let object: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let error = object["error"].clone();
        // the same words as on standard error
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(stderr.contains(error["message"].as_str().unwrap()), "{stderr}");
        for cause in error["causes"].as_array().unwrap() {
            assert!(stderr.contains(cause.as_str().unwrap()), "{stderr}");
        }
        (error["kind"].as_str().unwrap().to_owned(), error["message"].as_str().unwrap().to_owned())
    };
    let path = case.as_os_str();
    let (kind, message) = error(&["inspect".as_ref(), "/no/such".as_ref()], 1);
    assert!(["io", "file"].contains(&&*kind) && message.contains("/no/such"), "{kind}: {message}");
    let (kind, message) = error(&["inspect".as_ref(), path, "--layers".as_ref(), "1".as_ref()], 2);
    assert_eq!(kind, "arguments");
    assert!(message.starts_with("layer 1 is no MoE layer"), "{message}");
    let (kind, message) = error(&["inspect".as_ref(), path, "--frobnicate".as_ref()], 2);
    assert_eq!(kind, "arguments");
    assert!(message.contains("--frobnicate") && !message.starts_with("error"), "{message}");
}

/// Keys of the whole report and of its layers: of the same type wherever they stand, and the checkpoint
/// under one name.
#[test]
fn a_key_means_the_same_everywhere() {
    let (case, folder) = (case("qwen2_moe_f16"), tempfile::tempdir().unwrap());
    let path = |name: &str| folder.path().join(name).into_os_string();
    let x: Vec<f32> = (0..3 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
    write(path("in").as_ref(), &[New::f32("hidden_states", &[3, 64], &x)]);
    let mut types = BTreeMap::new();
    for (command, flags) in [
        ("check", vec!["--tokens".into(), "2".into()]),
        ("inspect", vec![]),
        ("explain", vec![]),
        ("plan", vec!["--ranks".into(), "2".into()]),
        ("bench", vec!["--tokens".into(), "1".into()]),
        (
            "run",
            ["--layers", "all", "--input"]
                .map(Into::into)
                .into_iter()
                .chain([path("in"), "--output".into(), path("out")])
                .collect(),
        ),
        ("quantize", vec!["--format".into(), "fp8".into(), "--output".into(), path("copy")]),
    ] {
        let mut args =
            vec![OsString::from(command), case.clone().into_os_string(), "--json".into()];
        args.extend(flags);
        let report = json(args);
        assert!(report["checkpoint"].is_string() || command == "bench", "{command}");
        let layers = report["layers"].as_array().into_iter().flatten();
        for (key, value) in layers.chain([&report]).flat_map(|object| object.as_object().unwrap()) {
            let kind = match value {
                Value::Null => continue,
                Value::Bool(_) => "a truth value",
                Value::Number(_) => "a number",
                Value::String(_) => "a text",
                Value::Array(_) => "an array",
                Value::Object(_) => "an object",
            };
            let (known, by) = types.entry(key.clone()).or_insert((kind, command));
            assert_eq!(*known, kind, "'{key}' of {by} and of {command}");
        }
    }
}

/// Reports for people, at every width: no line is longer than the terminal but for a single word,
/// and no word is broken.
#[test]
fn lines_fit_and_words_stay_whole() {
    let (few, many) = (case("deepseek_v3_bf16"), tempfile::tempdir().unwrap());
    sixty_layers(many.path(), |_, _| true);
    let at = |case: &Path, command: &[&str], columns: Option<usize>| {
        let mut run = Command::new(env!("CARGO_BIN_EXE_moe-runner"));
        run.arg(command[0]).arg(case).args(&command[1..]).env_remove("COLUMNS");
        if let Some(columns) = columns {
            run.env("COLUMNS", columns.to_string());
        }
        let output = run.output().unwrap();
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let words = |text: &str| {
        // how long the rest will take is another number every time
        let cells = text.lines().flat_map(|line| line.split("  "));
        let cells = cells.filter(|cell| !cell.ends_with(" left"));
        let mut words: Vec<String> =
            cells.flat_map(str::split_whitespace).map(str::to_owned).collect();
        words.sort();
        words.dedup();
        words
    };
    let check = &["check", "--no-timing", "--tokens", "2", "--threads", "1"][..];
    for (case, command) in [
        (&*few, &["inspect"][..]),
        (&few, &["explain"]),
        (&few, &["plan", "--ranks", "4", "--redundant", "8"]),
        (&few, check),
        // a line for each layer
        (many.path(), &[check, &["--layers", "0-5"]].concat()),
    ] {
        let free = words(&at(case, command, None));
        for columns in [40, 60, 80, 120, 200] {
            let text = at(case, command, Some(columns));
            for line in text.lines() {
                let single = line.split_whitespace().count() == 1;
                let length = line.chars().count();
                assert!(
                    length <= columns || single,
                    "{command:?} {columns}: {length}: {line}\n{text}"
                );
            }
            assert_eq!(words(&text), free, "{command:?} at {columns}");
        }
    }
}

#[test]
fn hidden_states_come_from_standard_input() {
    let folder = tempfile::tempdir().unwrap();
    let (input, out) = (folder.path().join("in.safetensors"), folder.path().join("out"));
    let x: Vec<f32> = (0..3 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
    write(&input, &[New::f32("hidden_states", &[3, 64], &x)]);
    let mut child = Command::new(env!("CARGO_BIN_EXE_moe-runner"))
        .arg("run")
        .arg(case("qwen2_moe_f16"))
        .args(["--layers", "0", "--input", "-", "--output"])
        .arg(&out)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&std::fs::read(&input).unwrap()).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(Values::read(&out).shape("output"), [3, 64]);

    let nothing = Command::new(env!("CARGO_BIN_EXE_moe-runner"))
        .arg("run")
        .arg(case("qwen2_moe_f16"))
        .args(["--layers", "0", "--input", "-", "--output"])
        .arg(&out)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(nothing.status.code(), Some(1));
    // by the name that it has for the user
    assert_eq!(String::from_utf8_lossy(&nothing.stderr), "error: standard input: is empty\n");

    // a pipe of any name, such as a shell's <(...)
    if cfg!(target_os = "linux") {
        std::fs::remove_file(&out).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_moe-runner"))
            .arg("run")
            .arg(case("qwen2_moe_f16"))
            .args(["--layers", "0", "--input", "/proc/self/fd/0", "--output"])
            .arg(&out)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&std::fs::read(&input).unwrap()).unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!(Values::read(&out).shape("output"), [3, 64]);
    }
}

/// A misspelt word, and a number that is none: one line that says what would do.
#[test]
fn mistyped_words_are_answered_in_one_line() {
    let stderr = refused(2, ["chekc"]);
    let says = "unrecognized subcommand 'chekc'; a similar subcommand exists: 'check' (";
    assert!(stderr.contains(says), "{stderr}");
    for number in ["many", "-1"] {
        let stderr = refused(2, ["check", "--tokens", number]);
        assert!(stderr.contains("'--tokens <N>': is no whole number ("), "{stderr}");
    }
}

/// Commands that end in the middle say so as an object, too.
#[cfg(unix)]
#[test]
fn an_interruption_is_an_object_too() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_moe-runner"))
        .arg("run")
        .arg(case("qwen2_moe_f16"))
        .args(["--layers", "0", "--json", "--input", "-", "--output", "never"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // more than a pipe holds: once it is written, the reader is reading
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&[0; 1 << 21]).unwrap();
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "error: interrupted\n");
    let object: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(object["error"]["kind"], "interrupted");
    drop(stdin);
}

/// The layout of a Hugging Face cache: a snapshot of links, named by the main branch.
#[cfg(unix)]
#[test]
fn a_repository_of_a_hub_cache_is_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let repository = folder.path().join("models--qwen--tiny");
    let snapshot = repository.join("snapshots/0123abcd");
    let other = repository.join("snapshots/ffff");
    for path in [&snapshot, &other, &repository.join("blobs"), &repository.join("refs")] {
        std::fs::create_dir_all(path).unwrap();
    }
    for name in ["config.json", "model.safetensors"] {
        let blob = repository.join("blobs").join(name);
        std::fs::copy(case("qwen2_moe_f16").join(name), &blob).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{name}"), snapshot.join(name)).unwrap();
    }
    std::fs::write(repository.join("refs/main"), "0123abcd\n").unwrap();
    let report = json(["inspect".as_ref(), repository.as_os_str(), "--json".as_ref()]);
    assert_eq!(report["architecture"], "qwen2_moe");
}

/// The library is for programs that have no options of ours: what it says names none. The command adds them.
#[test]
fn messages_of_the_library_name_no_options() {
    let mut folders = vec![
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-runner/src"),
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-kernels/src"),
    ];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for item in std::fs::read_dir(folder).unwrap() {
            let path = item.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            if path.extension().is_none_or(|extension| extension != "rs") {
                continue;
            }
            files += 1;
            let text = std::fs::read_to_string(&path).unwrap();
            for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
                let code = line.split(" // ").next().unwrap();
                let option = |(at, _): (usize, &str)| {
                    code[at + 2..].starts_with(|c: char| c.is_ascii_lowercase())
                };
                assert!(!code.match_indices("--").any(option), "{}: {line}", path.display());
            }
        }
    }
    assert!(files > 100, "{files}");
}
