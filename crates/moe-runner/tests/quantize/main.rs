//! Quantised copies of checkpoints: what is written is what an independent computation of each
//! format gives, loads, and is all there or not at all.
#![allow(missing_docs)]

mod codes;
mod files;
mod place;
mod refused;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use moe_runner::checkpoint::architecture::{self, LayerEntry};
use moe_runner::checkpoint::{Checkpoint, Container, Dtype, NewTensor, Tensor, write_safetensors};
use moe_runner::quantize::{Format, Options, Progress, Summary, quantize};
use moe_runner::weights::{Expert, LoadedLayer, Matrix};

const FORMATS: [Format; 6] = [
    Format::Fp8,
    Format::Fp8Block,
    Format::Int8,
    Format::W4a16 { group: 4 },
    Format::Nvfp4a16,
    Format::Mxfp4,
];

fn options(format: Format) -> Options {
    Options { format, ignore: Vec::new(), max_shard_bytes: 5 << 30, overwrite: false, threads: 2 }
}

/// The recorded checkpoints of floats, as folders.
fn float_cases() -> Vec<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = [here.join("../../../shared/golden"), here.join("tests/golden")];
    let folder = folders.iter().find(|folder| folder.is_dir()).expect("recorded cases");
    let entries = std::fs::read_dir(folder).unwrap();
    let mut cases: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("config.json").exists())
        .filter(|path| {
            let config = std::fs::read_to_string(path.join("config.json")).unwrap();
            !config.contains("quantization_config")
        })
        .collect();
    cases.sort();
    assert!(cases.len() >= 8, "{cases:?}");
    cases
}

/// A checkpoint of floats whose sizes all groups divide: H = 256, I = 128. It is what a quantised
/// one decodes to, each scaled so that no weight is exact in any format.
fn large_case() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let quantised = case("quant_qwen3_moe_fp8_channel");
    let checkpoint = Checkpoint::open(&quantised).unwrap();
    let config = std::fs::read_to_string(quantised.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config.as_object_mut().unwrap().remove("quantization_config");
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let mut tensors: Vec<(NewTensor, Vec<u8>)> = Vec::new();
    for name in checkpoint.names().filter(|name| !name.contains(".experts.")) {
        let Tensor { name, dtype, shape, bytes, .. } = checkpoint.require(name).unwrap();
        tensors.push((NewTensor { name, dtype, shape }, bytes.to_vec()));
    }
    for (entry, layer) in load(&quantised) {
        for (e, expert) in layer.experts.iter().enumerate() {
            for (projection, matrix) in projections(expert) {
                let bytes = values(matrix).into_iter().enumerate().flat_map(|(i, value)| {
                    half::bf16::from_f32(value * (1.0 + i as f32 * 1e-5)).to_le_bytes()
                });
                let name = format!("{}.experts.{e}.{projection}_proj.weight", entry.spec.name);
                let shape = vec![matrix.rows(), matrix.cols()];
                let tensor = NewTensor { name, dtype: Dtype::Bf16, shape };
                tensors.push((tensor, bytes.collect()));
            }
        }
    }
    let norm = NewTensor { name: "norm.weight".into(), dtype: Dtype::Bf16, shape: vec![256] };
    tensors.push((norm, vec![0; 512]));
    let borrowed = tensors.iter().map(|(tensor, bytes)| (tensor.clone(), bytes.as_slice()));
    write_safetensors(&folder.path().join("model.safetensors"), &[], borrowed).unwrap();
    folder
}

/// One of the repository's cases.
fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// Quantises into `folder/out`.
fn write(case: &Path, folder: &Path, options: &Options) -> moe_runner::Result<Summary> {
    let checkpoint = Checkpoint::open(case)?;
    quantize(&checkpoint, &folder.join("out"), options, &mut go_on)
}

/// Progress that nobody watches.
fn go_on(_: Progress<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn load(path: &Path) -> Vec<(LayerEntry, LoadedLayer)> {
    let checkpoint = Checkpoint::open(path).unwrap();
    assert_eq!(checkpoint.container(), Container::Safetensors);
    let layers = architecture::layers(&checkpoint).unwrap();
    layers
        .into_iter()
        .map(|entry| {
            let layer = LoadedLayer::load(&checkpoint, &entry).unwrap_or_else(|e| panic!("{e}"));
            (entry, layer)
        })
        .collect()
}

fn values(matrix: &Matrix) -> Vec<f32> {
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    for (row, out) in values.chunks_exact_mut(matrix.cols()).enumerate() {
        matrix.decode_row(row, out);
    }
    values
}

/// Gate, up and down of an expert.
fn projections(expert: &Expert) -> Vec<(&'static str, &Matrix)> {
    let gate = expert.gate.iter().map(|gate| ("gate", gate));
    gate.chain([("up", &expert.up), ("down", &expert.down)]).collect()
}

/// Names of the files of a folder, sorted.
fn listing(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
