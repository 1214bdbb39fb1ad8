//! The recorded cases: every layer, every token count, every kernel of this machine.

use std::path::{Path, PathBuf};

use crate::layers::{forward, nmse, runner, truth};
use crate::{kernels, sixteen_bit_kernels};
use moe_runner::checkpoint::{Checkpoint, architecture};
use moe_runner::doctor;
use moe_runner::hidden::ActivationDtype::{Bf16, F32};
use moe_runner::spec::ActivationFormat;
use moe_runner::weights::LoadedLayer;

/// The full set of cases where it stands beside the repository, else those in the repository.
fn golden() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = [here.join("../../../shared/golden"), here.join("tests/golden")];
    folders.into_iter().find(|folder| folder.is_dir()).expect("recorded cases")
}

/// Checkpoint and recorded tensors of all cases whose names begin with one of `prefixes`.
fn cases(prefixes: &[&str]) -> Vec<(String, Checkpoint, Checkpoint)> {
    let folder = golden();
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
            let recorded = Checkpoint::open_safetensors(case.join("golden.safetensors")).unwrap();
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

/// Whether rows are quantised, and a rounding may flip where sums differ in their last bits.
fn quantises_rows(layer: &LoadedLayer) -> bool {
    layer.experts.iter().any(|e| e.up.input.format() != ActivationFormat::Unquantised)
}

/// Rows of GGUF tensors, as the reference implementation decodes them: exactly.
#[test]
fn every_recorded_row_of_a_gguf_file_is_decoded_exactly() {
    let mut compared = 0;
    for (name, checkpoint, recorded) in cases(&["gguf_"]) {
        for layer in load(&checkpoint) {
            for (what, stack) in [("gate", 0), ("up", 1), ("down", 2)] {
                let tensor = format!("dequant.blk.{}.ffn_{what}_exps", layer.spec.index);
                let Some(rows) = recorded.tensor(&format!("{tensor}.rows")).unwrap() else {
                    continue;
                };
                let rows = rows.to_i64().unwrap();
                let expected = values(&recorded, &format!("{tensor}.values")).unwrap();
                let cols = expected.len() / rows.len();
                for (row, expected) in rows.iter().zip(expected.chunks_exact(cols)) {
                    let row = *row as usize;
                    let matrix = |e: usize| match stack {
                        0 => layer.experts[e].gate.clone().unwrap(),
                        1 => layer.experts[e].up.clone(),
                        _ => layer.experts[e].down.clone(),
                    };
                    let per_expert = matrix(0).rows();
                    let mut got = vec![f32::NAN; cols];
                    matrix(row / per_expert).decode_row(row % per_expert, &mut got);
                    let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&got), bits(expected), "{name} {tensor} row {row}");
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 50, "{compared}");
}

#[test]
fn nothing_is_wrong_with_the_recorded_checkpoints() {
    for (name, checkpoint, _) in cases(&["quant_", "gpt_oss_mxfp4", "gguf_"]) {
        for entry in architecture::layers(&checkpoint).unwrap() {
            assert_eq!(doctor::formats(&checkpoint, &entry), [], "{name}");
        }
    }
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
                for kernel in kernels(&layer) {
                    let y = forward(&mut runner(&layer, Some(kernel), F32), &x);
                    let error = nmse(&y, &out);
                    assert!(error <= bound, "{name} {at}, {kernel}: NMSE {error:e}");
                    let error = nmse(&y, &reference);
                    assert!(error <= own, "{name} {at}, {kernel} to reference: NMSE {error:e}");
                }
                // and with those that multiply in 16 bits, rows that are so
                let x: Vec<f32> = x.iter().map(|v| Bf16.round(*v)).collect();
                let reference = truth(&layer, &x);
                for kernel in sixteen_bit_kernels(&layer) {
                    let y = forward(&mut runner(&layer, Some(kernel.name), Bf16), &x);
                    let (error, bound) = (nmse(&y, &reference), kernel.bound(Bf16, quantised));
                    assert!(error <= bound, "{name} {at}, {}: NMSE {error:e}", kernel.name);
                }
                compared += 1;
            }
        }
        assert!(compared >= 3, "{name}: {compared}");
    }
}
