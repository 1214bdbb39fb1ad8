//! The recorded cases: every layer, every token count, every kernel of this machine.

use std::path::PathBuf;

use crate::layers::{forward, nmse, runner, truth};
use moe_runner::checkpoint::{Checkpoint, architecture};
use moe_runner::experts::KERNELS;
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::spec::ActivationFormat;
use moe_runner::weights::LoadedLayer;

/// The folder of cases; `None`, loudly, where it is not there.
fn golden() -> Option<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden");
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("SKIPPED: no recorded cases at {}", folder.display());
    None
}

/// Checkpoint and recorded tensors of all cases whose names begin with one of `prefixes`.
fn cases(prefixes: &[&str]) -> Vec<(String, Checkpoint, Checkpoint)> {
    let Some(folder) = golden() else { return Vec::new() };
    let mut names: Vec<String> = std::fs::read_dir(folder.clone())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)))
        .collect();
    names.sort();
    assert!(!names.is_empty());
    names
        .into_iter()
        .map(|name| {
            let case = folder.join(&name);
            let gguf = case.join("model.gguf");
            let model = if gguf.is_file() { gguf } else { case.clone() };
            let recorded = Checkpoint::open_safetensors(&case.join("golden.safetensors")).unwrap();
            (name, Checkpoint::open(&model).unwrap(), recorded)
        })
        .collect()
}

fn values(recorded: &Checkpoint, name: &str) -> Option<Vec<f32>> {
    recorded.tensor(name).unwrap().map(|tensor| tensor.to_f32().unwrap())
}

fn load(checkpoint: &Checkpoint) -> Vec<LoadedLayer> {
    let entries = architecture::layers(checkpoint).unwrap();
    entries.iter().map(|entry| LoadedLayer::load(checkpoint, entry).unwrap()).collect()
}

fn kernels() -> Vec<&'static str> {
    let isas = moe_runner::oracle::Machine::detect().isas;
    KERNELS.iter().filter(|k| isas.contains(&k.isa)).map(|k| k.name).collect()
}

/// Whether rows are quantised, and a rounding may flip where sums differ in their last bits.
fn quantises_rows(layer: &LoadedLayer) -> bool {
    layer.experts.iter().any(|e| e.up.input.format() != ActivationFormat::Unquantised)
}

#[test]
fn every_case_equals_its_recorded_outputs_with_every_kernel() {
    for (name, checkpoint, recorded) in cases(&["quant_", "gpt_oss_mxfp4", "gguf_"]) {
        let mut compared = 0;
        for layer in load(&checkpoint) {
            let quantised = quantises_rows(&layer);
            for tokens in [1, 7, 33] {
                let at = format!("layers.{}.t{tokens}", layer.spec.index);
                let x = values(&recorded, &format!("{at}.x")).unwrap();
                let fake = values(&recorded, &format!("{at}.out_fakequant"));
                assert_eq!(fake.is_some(), quantised, "{name} {at}");
                let out = fake.or_else(|| values(&recorded, &format!("{at}.out"))).unwrap();
                let out: Vec<f64> = out.into_iter().map(f64::from).collect();
                let bound = if quantised { 1e-4 } else { 1e-10 };
                let reference = truth(&layer, &x);
                let narrow: Vec<f32> = reference.iter().map(|v| *v as f32).collect();
                let error = nmse(&narrow, &out);
                assert!(error <= bound, "{name} {at}, reference: NMSE {error:e}");
                // against the reference, which rounds at the same points, it is closer still
                let own = if quantised { 1e-4 } else { 1e-11 };
                for kernel in kernels() {
                    let y = forward(&mut runner(&layer, Some(kernel), F32), &x);
                    let error = nmse(&y, &out);
                    assert!(error <= bound, "{name} {at}, {kernel}: NMSE {error:e}");
                    let error = nmse(&y, &reference);
                    assert!(error <= own, "{name} {at}, {kernel} to reference: NMSE {error:e}");
                }
                compared += 1;
            }
        }
        assert!(compared >= 3, "{name}: {compared}");
    }
}
