//! Everything that can be wrong with what the command is given: status 1 or 2, and one clear line.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
#[cfg(unix)]
use std::{process::Command, process::Stdio, time::Duration};

use safetensors::tensor::Dtype;
use tempfile::TempDir;

use crate::files::{New, Values, write};
use crate::{case, refused};

/// A copy of a recorded checkpoint to spoil, and a good input for it.
struct Bench {
    folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self::of("qwen2_moe_f16")
    }

    fn of(name: &str) -> Self {
        let folder = TempDir::new().unwrap();
        for entry in std::fs::read_dir(case(name)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
        let bench = Self { folder };
        bench.input(&[New::f32("hidden_states", &[2, 64], &[0.5; 128])]);
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn input(&self, tensors: &[New]) {
        write(&self.path("in.safetensors"), tensors);
    }

    /// `run` on the checkpoint, with flags that may replace its own.
    fn run(&self, layer: &str, flags: &[&str]) -> Vec<OsString> {
        let mut args: Vec<OsString> = vec!["run".into(), self.folder.path().into()];
        args.extend(["--layer".into(), layer.into(), "--input".into()]);
        args.extend([self.path("in.safetensors").into(), "--output".into()]);
        args.push(self.path("out.safetensors").into());
        args.extend(flags.iter().map(Into::into));
        args
    }

    /// `run` is refused with this status, its message says this, and no output file appears.
    fn refuses(&self, status: i32, says: &str) {
        let stderr = refused(status, self.run("0", &[]));
        assert!(stderr.contains(says), "{stderr:?} should say {says:?}");
        assert!(!self.path("out.safetensors").exists());
    }

    fn spoil_config(&self, from: &str, to: &str) {
        let path = self.path("config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(path, text.replace(from, to)).unwrap();
    }

    /// Replaces an element of a tensor.
    fn spoil_weight(&self, tensor: &str, element: usize, with: &[u8]) {
        let path = self.path("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let start = header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
        let at = 8 + length + start + element * with.len();
        bytes[at..at + with.len()].copy_from_slice(with);
        std::fs::write(&path, bytes).unwrap();
    }

    /// Rewrites the safetensors header; the data stay.
    fn spoil_header(&self, change: impl Fn(&mut serde_json::Map<String, serde_json::Value>)) {
        let path = self.path("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        change(&mut header);
        let header = serde_json::to_vec(&header).unwrap();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header);
        file.extend(&bytes[8 + length..]);
        std::fs::write(path, file).unwrap();
    }
}

const EXPERT: &str = "model.layers.0.mlp.experts.3.up_proj.weight";

#[test]
fn the_bench_is_good_until_it_is_spoiled() {
    let bench = Bench::new();
    let output = crate::moe_runner(bench.run("0", &[]));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty(), "no progress where no terminal is");
}

#[test]
fn spoiled_files() {
    let spoil = |change: &dyn Fn(&[u8]) -> Vec<u8>, says: &str| {
        let bench = Bench::new();
        let path = bench.path("model.safetensors");
        std::fs::write(&path, change(&std::fs::read(&path).unwrap())).unwrap();
        bench.refuses(1, says);
    };
    spoil(&|_| Vec::new(), "model.safetensors");
    spoil(&|bytes| bytes[..7].to_vec(), "model.safetensors");
    spoil(&|bytes| bytes[..bytes.len() / 2].to_vec(), "model.safetensors");
    spoil(&|_| vec![0xa5; 4096], "model.safetensors");
    // a header as long as it can say
    spoil(&|bytes| [&[0xff; 8], &bytes[8..]].concat(), "model.safetensors");
    // a header of brackets
    let deep = "[".repeat(100_000);
    spoil(&|_| [&100_000u64.to_le_bytes()[..], deep.as_bytes()].concat(), "model.safetensors");
}

#[test]
fn spoiled_headers() {
    let spoil = |change: &dyn Fn(&mut serde_json::Value), says: &str| {
        let bench = Bench::new();
        bench.spoil_header(|header| change(&mut header[EXPERT]));
        bench.refuses(1, says);
    };
    spoil(&|tensor| tensor["dtype"] = "F99".into(), EXPERT);
    spoil(&|tensor| tensor["dtype"] = "I16".into(), EXPERT);
    spoil(&|tensor| tensor["shape"] = serde_json::json!([64, 40]), EXPERT);
    spoil(&|tensor| tensor["shape"] = serde_json::json!([40, -64]), "model.safetensors");
    spoil(&|tensor| tensor["shape"] = serde_json::json!([u64::MAX, u64::MAX]), "model.safetensors");
    spoil(&|tensor| tensor["data_offsets"] = serde_json::json!([0, 5120]), "model.safetensors");
    spoil(
        &|tensor| tensor["data_offsets"] = serde_json::json!([1u64 << 60, (1u64 << 60) + 5120]),
        "model.safetensors",
    );
    let bench = Bench::new();
    bench.spoil_header(|header| {
        let tensor = header.remove(EXPERT).unwrap();
        header.insert("model.layers.0.mlp.other.weight".into(), tensor);
    });
    bench.refuses(1, EXPERT);
}

#[test]
fn spoiled_configs() {
    let spoil = |from: &str, to: &str, says: &str| {
        let bench = Bench::new();
        bench.spoil_config(from, to);
        bench.refuses(1, says);
    };
    spoil("\"num_experts_per_tok\": 4", "\"num_experts_per_tok\": 13", "top-k is 13");
    spoil("\"num_experts_per_tok\": 4", "\"num_experts_per_tok\": 0", "top-k");
    spoil("\"num_experts\": 12", "\"num_experts\": -12", "num_experts");
    spoil("\"num_experts\": 12", "\"num_experts\": 1e300", "num_experts");
    spoil("\"num_experts\": 12", "\"num_experts\": 4000000000000", "num_experts");
    spoil("\"num_experts\": 12", "\"num_experts\": \"many\"", "num_experts");
    spoil("\"hidden_size\": 64", "\"hidden_size\": 128", "shape");
    spoil("\"hidden_size\": 64", "\"hidden_size\": 0", "hidden");
    // experts that no layer of the configuration has, not a model without MoE layers
    let dense = "\"mlp_only_layers\": [\n    0,\n    1,\n    2\n  ]";
    spoil("\"mlp_only_layers\": [\n    1\n  ]", dense, "layer 0");
    let text = |text: &str, says: &str| {
        let bench = Bench::new();
        std::fs::write(bench.path("config.json"), text).unwrap();
        bench.refuses(1, says);
    };
    text("", "config.json");
    text("{", "config.json");
    text("[]", "config.json");
    text("{\"model_type\": \"no_such_model\"}", "no_such_model");
    text("{\"model_type\": \"Qwen3_MOE\"}", "the nearest by name are qwen3_moe, ");
    text("{}", "'model_type': is missing");
    text(&"{\"a\":".repeat(100_000), "config.json");
    let bench = Bench::new();
    std::fs::remove_file(bench.path("config.json")).unwrap();
    bench.refuses(1, "config.json");
}

#[test]
fn spoiled_gguf_files() {
    let bytes = std::fs::read(case("gguf_qwen3moe_bf16").join("model.gguf")).unwrap();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.gguf");
    let mut absurd = bytes.clone();
    // the number of tensors
    absurd[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    for content in [&[][..], &bytes[..10], &bytes[..bytes.len() / 3], b"GGUF garbage", &absurd] {
        std::fs::write(&path, content).unwrap();
        for command in ["inspect", "explain"] {
            let stderr = refused(1, [command.as_ref(), path.as_os_str()]);
            assert!(stderr.contains("model.gguf"), "{stderr}");
        }
    }
}

#[test]
fn spoiled_inputs() {
    let bench = Bench::new();
    let nan = [&[0.5; 100][..], &[f32::NAN; 28]].concat();
    bench.input(&[New::f32("hidden_states", &[2, 64], &nan)]);
    bench.refuses(1, "row 1, column 36");
    bench.input(&[New::f32("hidden_states", &[2, 32], &[0.5; 64])]);
    bench.refuses(1, "[2, 32]");
    bench.input(&[New::f32("hidden_states", &[128], &[0.5; 128])]);
    bench.refuses(1, "[128]");
    bench.input(&[New::f32("other", &[2, 64], &[0.5; 128])]);
    bench.refuses(1, "'hidden_states'");
    bench.input(&[New::i64("hidden_states", &[2, 64], &[1; 128])]);
    bench.refuses(1, "I64");
    let f64 =
        New { name: "hidden_states", dtype: Dtype::F64, shape: vec![1, 64], bytes: vec![0; 512] };
    bench.input(&[f64]);
    bench.refuses(1, "F64");
    let logits = |values: &[f32], shape: &[usize]| {
        let hidden = New::f32("hidden_states", &[2, 64], &[0.5; 128]);
        bench.input(&[hidden, New::f32("router_logits", shape, values)]);
    };
    logits(&[0.5; 26], &[2, 13]);
    bench.refuses(1, "[2, 13]");
    logits(&[f32::NAN; 24], &[2, 12]);
    bench.refuses(1, "in.safetensors");
    for content in [&b""[..], b"garbage garbage"] {
        std::fs::write(bench.path("in.safetensors"), content).unwrap();
        bench.refuses(1, "in.safetensors");
    }
    std::fs::remove_file(bench.path("in.safetensors")).unwrap();
    bench.refuses(1, "in.safetensors");
}

#[test]
fn arguments_that_cannot_be_used() {
    let bench = Bench::new();
    for (layer, flags, says) in [
        ("1", &[][..], "layer 1 is no MoE layer"),
        ("-1", &[], "--layer"),
        ("x", &[], "--layer"),
        ("0", &["--kernel", "fastest"], "there are cpu_amx_bf16"),
        ("0", &["--dtype", "fp8"], "auto, f32, bf16 and f16"),
        ("0", &["--device", "tpu"], "cuda"),
        ("0", &["--threads", "0"], "--threads"),
        ("0", &["--threads", "1000000"], "--threads"),
        ("0", &["--comm", "pigeon"], "--comm"),
        ("0", &["--no-such-flag"], "--no-such-flag"),
    ] {
        let stderr = refused(2, bench.run(layer, flags));
        assert!(stderr.contains(says), "{stderr:?} should say {says:?}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
    refused(2, ["no-such-command"]);
    refused(2, ["run"]);
    assert!(!bench.path("out.safetensors").exists());
}

/// These name something that exists; that it cannot be used here is the run's failure.
#[test]
fn a_named_kernel_or_device_is_refused_not_replaced() {
    let bench = Bench::new();
    // what is missing, in one line: the driver or, on a machine that has one, so many GPUs
    let stderr = refused(1, bench.run("0", &["--device", "cuda:99"]));
    let says =
        ["no NVIDIA driver: libcuda.so.1 is not on this machine", "GPU 99: the driver shows"];
    assert!(says.iter().any(|says| stderr.contains(says)), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    let stderr = refused(1, bench.run("0", &["--device", "cuda", "--kernel", "cpu_portable"]));
    assert!(stderr.contains("runs on cpu"), "{stderr}");
}

#[test]
fn an_output_that_cannot_be_written() {
    let bench = Bench::new();
    let mut args = bench.run("0", &[]);
    let last = args.len() - 1;
    let folder = TempDir::new().unwrap();
    for place in [bench.path("no/such/folder/out.safetensors"), folder.path().to_owned()] {
        args[last] = place.clone().into();
        let stderr = refused(1, args.clone());
        assert!(stderr.contains(&*place.to_string_lossy()), "{stderr}");
    }
}

/// Every file is tried before anything is computed: nothing is written where one of them cannot be, and
/// a device is not replaced by a file.
#[test]
fn outputs_are_tried_before_the_first_product() {
    let bench = Bench::new();
    for flag in ["--save-routing", "--trace"] {
        let folder = bench.folder.path().to_owned();
        let mut places = vec![(1, folder.join("no/such/file"), "cannot write")];
        if cfg!(unix) {
            places.push((1, "/dev/null".into(), "is no regular file"));
        }
        places.push((2, "-".into(), "standard output has the report; name another"));
        for (status, place, says) in places {
            let mut args = bench.run("0", &[]);
            args.extend([flag.into(), place.clone().into()]);
            let stderr = refused(status, args);
            assert!(stderr.contains(says), "{stderr:?} should say {says:?}");
            assert!(stderr.contains(&*place.to_string_lossy()), "{stderr}");
            assert!(!stderr.contains("partial"), "names of our own: {stderr}");
            assert!(!bench.path("out.safetensors").exists(), "{flag} {place:?}");
        }
    }
    let mut args = bench.run("0", &[]);
    *args.last_mut().unwrap() = "-".into();
    assert!(refused(2, args).contains("--output -: standard output has the report"));
}

/// Whatever name it has: links, other spellings of the path, a name that is not there yet.
#[test]
fn an_output_that_is_read() {
    let bench = Bench::new();
    std::fs::write(bench.path("tokenizer.json"), "{}").unwrap();
    std::fs::create_dir(bench.path("sub")).unwrap();
    let links = TempDir::new().unwrap();
    let link = links.path().join("link.safetensors");
    std::fs::hard_link(bench.path("model.safetensors"), &link).unwrap();
    #[cfg(unix)]
    let symbolic = {
        let symbolic = links.path().join("in");
        std::os::unix::fs::symlink(bench.path("in.safetensors"), &symbolic).unwrap();
        symbolic
    };
    let before: Vec<_> = files_of(bench.folder.path());
    let refuses = |flag: &str, place: &Path, says: &str| {
        let mut args = bench.run("0", &[]);
        match flag {
            "--output" => *args.last_mut().unwrap() = place.into(),
            _ => args.extend([flag.into(), place.into()]),
        }
        let stderr = refused(2, args);
        assert!(stderr.contains(flag) && stderr.contains(says), "{stderr:?} should say {says:?}");
        assert!(files_of(bench.folder.path()) == before, "{flag} {place:?}");
    };
    for flag in ["--output", "--trace"] {
        refuses(flag, &bench.path("in.safetensors"), "is the file of --input");
        refuses(flag, &bench.path("sub/../in.safetensors"), "is the file of --input");
        #[cfg(unix)]
        refuses(flag, &symbolic, "is the file of --input");
        refuses(flag, &bench.path("model.safetensors"), "is a file of the checkpoint");
        refuses(flag, &link, "is a file of the checkpoint");
        refuses(flag, &bench.path("config.json"), "is a file of the checkpoint");
        refuses(flag, &bench.path("tokenizer.json"), "is a file of the checkpoint");
        refuses(flag, bench.folder.path(), "is the checkpoint itself");
        // a reader of this folder would take it for the index, or for a shard
        let index = bench.path("model.safetensors.index.json");
        refuses(flag, &index, "would be taken for a part of the checkpoint");
        let shard = bench.path("model-00002-of-00002.safetensors");
        refuses(flag, &shard, "would be taken for a part of the checkpoint");
    }
    refuses("--trace", &bench.path("sub/../out.safetensors"), "is the file of --output too");
    // nor a part of another checkpoint, nor what would make one of a folder
    let other = Bench::new();
    let files = files_of(other.folder.path());
    for name in ["config.json", "model.safetensors"] {
        refuses("--output", &other.path(name), "is a part of the checkpoint in its folder");
    }
    refuses(
        "--trace",
        &other.path("tokenizer.json"),
        "would be taken for a part of the checkpoint",
    );
    assert!(files_of(other.folder.path()) == files);
    for name in ["config.json", "out.gguf"] {
        refuses("--output", &links.path().join(name), "would be taken for a checkpoint");
    }
}

/// A picture is written where nothing of the checkpoint is.
#[test]
fn a_picture_that_is_a_part_of_the_checkpoint() {
    let bench = Bench::new();
    let folder = TempDir::new().unwrap();
    let link = folder.path().join("link.svg");
    std::fs::hard_link(bench.path("model.safetensors"), &link).unwrap();
    let before = files_of(bench.folder.path());
    for place in [bench.path("model.safetensors"), bench.path("config.json"), link] {
        let stderr = refused(
            2,
            [
                "bench".as_ref(),
                bench.folder.path().as_os_str(),
                "--tokens".as_ref(),
                "1".as_ref(),
                "--svg".as_ref(),
                place.as_os_str(),
            ],
        );
        assert!(stderr.contains("--svg") && stderr.contains("the checkpoint"), "{stderr}");
        assert!(files_of(bench.folder.path()) == before, "{place:?}");
    }
}

/// A pipe is read once: asking whether an output is the same file waits for no other writer.
#[cfg(unix)]
#[test]
fn a_named_pipe_is_an_input() {
    let bench = Bench::new();
    let pipe = bench.path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let mut args = bench.run("0", &[]);
    let input = args.iter().position(|arg| arg == "--input").unwrap();
    args[input + 1] = pipe.clone().into();
    let mut run = Command::new(env!("CARGO_BIN_EXE_moe-runner"))
        .args(&args)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let bytes = std::fs::read(bench.path("in.safetensors")).unwrap();
    std::fs::write(&pipe, bytes).unwrap();
    for _ in 0..600 {
        if let Some(status) = run.try_wait().unwrap() {
            assert!(status.success() && bench.path("out.safetensors").exists());
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    run.kill().unwrap();
    panic!("it waits");
}

/// The files of a folder, with their contents.
fn files_of(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = std::fs::read_dir(folder).unwrap().map(|item| item.unwrap().path());
    let mut files: Vec<_> = paths
        .filter(|path| path.is_file())
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

/// An output with NaN or infinity is an error that says where it comes from.
#[test]
fn an_output_that_is_no_number() {
    // one weight of the expert is NaN (f16); the router sends the token there
    let bench = Bench::new();
    let flags = ["--dtype", "f32", "--allow-non-finite"];
    let good = crate::moe_runner(bench.run("0", &flags));
    assert!(good.status.success());
    let chosen = Values::read(&bench.path("out.safetensors")).get("topk_ids")[0] as usize;
    std::fs::remove_file(bench.path("out.safetensors")).unwrap();
    let tensor = format!("model.layers.0.mlp.experts.{chosen}.down_proj.weight");
    bench.spoil_weight(&tensor, 40 + 7, &[0x00, 0x7e]);
    bench.refuses(1, "layer 0: output[0, 1] is NaN");
    bench.refuses(1, &format!("token 0, expert {chosen}: "));
    bench.refuses(1, &format!("'{tensor}' in model.safetensors has NaN at row 1, column 7"));
    bench.refuses(1, "--allow-non-finite writes it");
    assert!(crate::moe_runner(bench.run("0", &flags)).status.success());
    assert!(Values::read(&bench.path("out.safetensors")).get("output")[1].is_nan());

    // finite rows and weights whose products are not
    let bench = Bench::new();
    bench.input(&[New::f32("hidden_states", &[2, 64], &[[0.5; 64], [1e38; 64]].concat())]);
    let stderr = refused(1, bench.run("0", &["--dtype", "f32"]));
    assert!(stderr.contains("layer 0: output[1, 0] is"), "{stderr}");
    assert!(stderr.contains("beyond f32") && stderr.contains("expert"), "{stderr}");

    // a product of gate and up that is not, although each of them is
    let bench = Bench::new();
    bench.input(&[New::f32("hidden_states", &[1, 64], &[6e37; 64])]);
    let stderr = refused(1, bench.run("0", &["--dtype", "f32"]));
    assert!(stderr.contains("'model.layers.0.mlp."), "{stderr}");

    // a value that f32 holds, and f16 does not
    bench.input(&[New::f32("hidden_states", &[1, 64], &[3e4; 64])]);
    let flags = ["--dtype", "f32", "--output-dtype", "f16"];
    let stderr = refused(1, bench.run("0", &flags));
    assert!(stderr.contains("which f16 cannot hold"), "{stderr}");
    assert!(!bench.path("out.safetensors").exists());
    let allowed = [&flags[..], &["--allow-non-finite"]].concat();
    assert!(crate::moe_runner(bench.run("0", &allowed)).status.success());
}

/// Weights of all kinds that are no numbers: the tensor is named, whatever it is for.
#[test]
fn weights_that_are_no_numbers_are_named() {
    const F16: &[u8] = &[0x00, 0x7e];
    const BF16: &[u8] = &[0xc0, 0x7f];
    let at = "layers.0.mlp";
    for (case, tensor, nan, place) in [
        ("qwen2_moe_f16", format!("model.{at}.shared_expert_gate.weight"), F16, "at 7"),
        ("qwen2_moe_f16", format!("model.{at}.gate.weight"), F16, "at row 0, column 7"),
        ("gpt_oss", format!("model.{at}.experts.down_proj_bias"), BF16, "at 7"),
        (
            "nemotron_h_latent",
            "backbone.layers.0.mixer.fc1_latent_proj.weight".into(),
            &f32::NAN.to_le_bytes(),
            "at row 0, column 7",
        ),
    ] {
        let bench = Bench::of(case);
        let waves: Vec<f32> = (0..64 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
        bench.input(&[New::f32("hidden_states", &[64, 64], &waves)]);
        bench.spoil_weight(&tensor, 7, nan);
        bench.refuses(1, &format!("'{tensor}' in model.safetensors has NaN {place}"));
        bench.refuses(1, "layer 0: ");
    }
    // a number of the input that the activations' dtype turns into infinity
    let bench = Bench::new();
    bench.input(&[New::f32("hidden_states", &[2, 64], &[[0.5; 64], [7e4; 64]].concat())]);
    bench.refuses(1, "row 1, column 0 is 7e4, which f16 cannot hold; --dtype f32 holds it");
}

#[test]
fn a_checkpoint_that_is_not_there() {
    for command in ["inspect", "explain"] {
        let stderr = refused(1, [command, "/no/such/checkpoint"]);
        assert!(stderr.contains("/no/such/checkpoint"), "{stderr}");
    }
    let empty = TempDir::new().unwrap();
    refused(1, ["inspect".as_ref(), empty.path().as_os_str()]);
    let path: &Path = empty.path();
    std::fs::write(path.join("config.json"), "{\"model_type\": \"qwen2_moe\"}").unwrap();
    // what the configuration alone tells can be told, but there is nothing to check
    refused(1, ["check".as_ref(), path.as_os_str()]);
    let config = path.join("config.json");
    let stderr = refused(1, ["check".as_ref(), config.as_os_str()]);
    assert!(stderr.contains("name the folder that holds it"), "{stderr}");
    // a folder of models, and one of a GGUF file beside something else
    let models = TempDir::new().unwrap();
    std::fs::create_dir(models.path().join("tiny")).unwrap();
    std::fs::copy(&config, models.path().join("tiny/config.json")).unwrap();
    let stderr = refused(1, ["inspect".as_ref(), models.path().as_os_str()]);
    assert!(stderr.contains("; a folder in it, 'tiny', has a config.json: name that"), "{stderr}");
    let hub = TempDir::new().unwrap();
    std::fs::create_dir_all(hub.path().join("models--org--tiny/snapshots/0123")).unwrap();
    let stderr = refused(1, ["inspect".as_ref(), hub.path().as_os_str()]);
    assert!(stderr.contains("'models--org--tiny', is a model of a hub's cache: name"), "{stderr}");
    let gguf = case("gguf_qwen3moe_bf16");
    let stderr = refused(1, ["inspect".as_ref(), gguf.as_os_str()]);
    assert!(stderr.contains("no config.json") && stderr.contains("'model.gguf'"), "{stderr}");
}

/// A file of other names: those that could be meant are offered.
#[test]
fn tensors_that_could_be_meant_are_named() {
    let bench = Bench::new();
    let (narrow, wide) = (vec![0.5; 6], vec![0.5; 128]);
    let names = ["a", "b", "c", "d", "e", "f", "g"];
    let mut tensors: Vec<New> = names.map(|name| New::f32(name, &[2, 3], &narrow)).into();
    tensors.push(New::f32("z", &[2, 64], &wide));
    bench.input(&tensors);
    bench.refuses(1, "no tensor 'hidden_states'; of the shape [tokens, 64] it holds z; name one");
    tensors.pop();
    bench.input(&tensors);
    bench.refuses(1, "none has the shape [tokens, 64]: it holds a, b, c, d, e, f, …");
}

/// Names in a file may hold anything; an error stays one line.
#[test]
fn a_name_with_line_breaks_moves_no_cursor() {
    let bench = Bench::new();
    bench.input(&[New::f32("a\nb\x1b[2J", &[1, 1], &[1.0])]);
    let stderr = refused(1, bench.run("0", &[]));
    assert!(!stderr.contains('\x1b') && stderr.lines().count() == 1, "{stderr:?}");
}

/// A file that claims more rows than memory holds, with a hole in place of the rows.
#[test]
fn more_rows_than_memory_are_refused() {
    let bench = Bench::new();
    let bytes = 1_u64 << 40;
    let header = format!(
        r#"{{"hidden_states":{{"dtype":"F32","shape":[{},64],"data_offsets":[0,{bytes}]}}}}"#,
        bytes / 256
    );
    let mut start = (header.len() as u64).to_le_bytes().to_vec();
    start.extend(header.into_bytes());
    let path = bench.path("in.safetensors");
    std::fs::write(&path, &start).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    if let Err(error) = file.set_len(start.len() as u64 + bytes) {
        eprintln!("SKIPPED: this file system has no files of 1 TiB with holes: {error}");
        return;
    }
    bench.refuses(1, "out of memory");
    let args: Vec<OsString> = vec![
        "check".into(),
        bench.folder.path().into(),
        "--no-timing".into(),
        "--input".into(),
        path.into(),
    ];
    let stderr = refused(1, args);
    assert!(stderr.contains("out of memory: 'hidden_states' [4294967296, 64]"), "{stderr}");
}
