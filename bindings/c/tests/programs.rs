//! Programs in C and C++ that use the library through its header, compiled and run: plainly, with
//! AddressSanitizer, and under valgrind, as far as this machine has them.

use std::path::{Path, PathBuf};
use std::process::Command;

use moe_runner::checkpoint::Checkpoint;

const CASE: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../crates/moe-runner/tests/golden/gpt_oss");
const LAYER: usize = 1;

/// What the programs read, as raw little-endian numbers, in a folder.
struct Inputs {
    folder: tempfile::TempDir,
    tokens: usize,
    top_k: usize,
    hidden: usize,
    intermediate: usize,
    experts: usize,
}

impl Inputs {
    fn write() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let case = Path::new(CASE);
        let recorded = Checkpoint::open_safetensors(case.join("golden.safetensors")).unwrap();
        let weights = Checkpoint::open_safetensors(case.join("model.safetensors")).unwrap();
        let write = |name: &str, bytes: &[u8]| {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        };
        let of_call = |name: &str| recorded.require(&format!("layers.{LAYER}.t7.{name}")).unwrap();
        let of_layer = |name: &str| {
            weights.require(&format!("model.layers.{LAYER}.mlp.experts.{name}")).unwrap()
        };
        write("x", &of_call("x").bytes);
        write("out", &of_call("out").bytes);
        let weights = of_call("topk_weights");
        write("weights", &weights.bytes);
        let ids = of_call("topk_ids");
        let ids = ids.bytes.chunks_exact(8);
        let ids = ids.map(|id| i64::from_le_bytes(id.try_into().unwrap()) as i32);
        write("ids", &ids.flat_map(i32::to_le_bytes).collect::<Vec<u8>>());
        let (gate_up, down) = (of_layer("gate_up_proj"), of_layer("down_proj"));
        write("gate_up", &gate_up.bytes);
        write("down", &down.bytes);
        for name in ["gate_up_proj_bias", "down_proj_bias"] {
            // bf16 is the upper half of f32
            let bias = of_layer(name);
            let wide = bias.bytes.chunks_exact(2).flat_map(|b| [0, 0, b[0], b[1]]);
            write(&name.replace("_proj", ""), &wide.collect::<Vec<u8>>());
        }
        let [tokens, top_k] = weights.shape[..] else { panic!("weights") };
        let [experts, intermediate, hidden] = down.shape[..] else { panic!("down") };
        Self { folder, tokens, top_k, hidden, intermediate, experts }
    }

    fn arguments(&self, program: &str) -> Vec<String> {
        let numbers: &[usize] = match program {
            "layer.c" => &[self.tokens, self.top_k, self.hidden, self.intermediate, self.experts],
            _ => &[self.tokens, self.hidden],
        };
        let folder = self.folder.path().to_str().unwrap();
        let mut all = vec![CASE.to_owned(), LAYER.to_string(), folder.to_owned()];
        all.extend(numbers.iter().map(usize::to_string));
        all
    }
}

/// Where cargo puts the libraries for tests: beside this one.
fn libraries() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().to_owned()
}

fn exists(tool: &str) -> bool {
    let there = Command::new(tool).arg("--version").output().is_ok();
    if !there {
        eprintln!("skipped: {tool} is not here");
    }
    there
}

fn must(command: &mut Command) {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{out}{err}");
}

/// Compiles `program`, and runs it: with the shared or the static library, as `runner` says.
fn run(program: &str, shared: bool, flags: &[&str], runner: &[&str]) {
    let compiler = if program.ends_with(".c") { "cc" } else { "c++" };
    let standard = if program.ends_with(".c") { "-std=c99" } else { "-std=c++17" };
    if !exists(compiler) || !runner.first().is_none_or(|tool| exists(tool)) {
        return;
    }
    let (inputs, libraries) = (Inputs::write(), libraries());
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let binary = inputs.folder.path().join("program");
    let mut compile = Command::new(compiler);
    compile
        .args([standard, "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-g"])
        .args(flags)
        .arg("-I")
        .arg(here.join("include"))
        .arg(here.join("tests/programs").join(program))
        .arg("-o")
        .arg(&binary);
    match shared {
        true => {
            compile.arg("-L").arg(&libraries).arg("-lmoe_runner_c");
            compile.arg(format!("-Wl,-rpath,{}", libraries.display()));
        }
        false => {
            compile.arg(libraries.join("libmoe_runner_c.a"));
        }
    }
    must(compile.args(["-lm", "-lpthread", "-ldl"]));
    let mut words = runner.iter().map(|word| (*word).to_owned());
    let mut command = match words.next() {
        Some(tool) => Command::new(tool),
        None => Command::new(&binary),
    };
    command.args(words);
    if !runner.is_empty() {
        command.arg(&binary);
    }
    must(command.args(inputs.arguments(program)));
}

const PROGRAMS: [&str; 2] = ["layer.c", "pool.cpp"];

#[test]
fn with_the_shared_library() {
    PROGRAMS.iter().for_each(|program| run(program, true, &[], &[]));
}

#[test]
fn with_the_static_library() {
    PROGRAMS.iter().for_each(|program| run(program, false, &[], &[]));
}

#[test]
fn with_address_sanitizer() {
    PROGRAMS.iter().for_each(|program| run(program, false, &["-fsanitize=address,undefined"], &[]));
}

/// Nothing is read that was not written, and nothing leaks.
#[test]
fn under_valgrind() {
    let runner = [
        "valgrind",
        "--quiet",
        "--error-exitcode=9",
        "--leak-check=full",
        "--show-leak-kinds=definite",
        "--errors-for-leak-kinds=definite",
    ];
    PROGRAMS.iter().for_each(|program| run(program, true, &[], &runner));
}
