//! A checkpoint as mlx-lm writes it, against what MLX computed (`scripts/mlx/record.py`).

use std::path::{Path, PathBuf};

use crate::formats::FORMATS;
use crate::kernels;
use crate::layers::{forward, nmse, runner, truth};
use crate::models::{Files, MODELS, matrices};
use moe_runner::checkpoint::{Checkpoint, architecture};
use moe_runner::doctor;
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::weights::LoadedLayer;
use serde_json::json;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/quantised/mlx")
}

/// Router, experts, shared expert and its gate are quantised, each layer in another mode. The
/// configuration names modules of the first layers alone; what is stored, the tensors tell.
#[test]
fn every_layer_computes_what_mlx_computes() {
    let checkpoint = Checkpoint::open(folder()).unwrap();
    let recorded = Checkpoint::open_safetensors(folder().join("recorded.safetensors")).unwrap();
    let recorded = |name: &str| recorded.tensor(name).unwrap().unwrap().to_f32().unwrap();
    let mut formats = Vec::new();
    for entry in architecture::layers(&checkpoint).unwrap() {
        let layer = LoadedLayer::load(&checkpoint, &entry).unwrap();
        assert_eq!(doctor::formats(&checkpoint, &entry), [], "{}", entry.spec.name);
        let index = entry.spec.index;
        let x = recorded(&format!("layers.{index}.x"));
        let want: Vec<f64> =
            recorded(&format!("layers.{index}.out")).into_iter().map(f64::from).collect();
        let reference: Vec<f32> = truth(&layer, &x).iter().map(|v| *v as f32).collect();
        let error = nmse(&reference, &want);
        assert!(error <= 1e-10, "layer {index}, reference: NMSE {error:e}");
        for kernel in kernels(&layer) {
            let error = nmse(&forward(&mut runner(&layer, Some(kernel), F32), &x), &want);
            assert!(error <= 1e-10, "layer {index}, {kernel}: NMSE {error:e}");
        }
        formats.push(layer.experts[1].down.describe());
    }
    let int = |bits| format!("int{bits} (group of 32, minima)");
    let fp: [String; 2] = ["mxfp8".into(), "nvfp4".into()];
    assert_eq!(formats, [[3, 4, 5, 6, 8].map(int).to_vec(), fp.to_vec()].concat());
}

/// A shared expert that is as wide as the routed ones stands behind them in the same stacks, in copies of
/// MiniMax-M3 by mlx-vlm.
#[test]
fn shared_experts_may_stand_behind_the_routed_ones() {
    const BLOCK: &str = "model.layers.0.mlp";
    for name in ["mlx 4 bit", "mlx mxfp8"] {
        let format = FORMATS.iter().find(|format| format.name == name).unwrap();
        let apart = Files::new(&MODELS[1], format, 5);
        let mut files = Files::new(&MODELS[1], format, 5);
        files.tensors.retain(|name, _| !name.contains("experts."));
        let experts = [0, 1, 2, 3].map(|e| format!("experts.{e}")).into_iter();
        let experts: Vec<String> = experts.chain(["shared_experts".into()]).collect();
        for projection in ["gate_proj", "up_proj", "down_proj"] {
            for ending in [".weight", ".scales", ".biases"] {
                let of =
                    |expert| apart.tensors.get(&format!("{BLOCK}.{expert}.{projection}{ending}"));
                let Some(tensors) = experts.iter().map(of).collect::<Option<Vec<_>>>() else {
                    continue;
                };
                let shape = [&[experts.len()], &tensors[0].1[..]].concat();
                let bytes = tensors.iter().flat_map(|tensor| tensor.2.clone()).collect();
                let part = (ending, tensors[0].0, shape, bytes);
                files.put(&format!("{BLOCK}.switch_mlp.{projection}"), part);
            }
        }
        let (apart, together) = (apart.load().unwrap(), files.load().unwrap());
        let (apart, together) = (matrices(&MODELS[1], &apart), matrices(&MODELS[1], &together));
        assert_eq!(apart.len(), 15);
        for ((name, apart), (_, together)) in apart.into_iter().zip(together) {
            let [mut a, mut b] = [0, 1].map(|_| vec![f32::NAN; apart.cols()]);
            for row in 0..apart.rows() {
                apart.decode_row(row, &mut a);
                together.decode_row(row, &mut b);
                assert_eq!(a, b, "{name} row {row}");
            }
        }
    }
}

/// Where the tensors do not say what they are, they are refused by name, however absurd the configuration.
#[test]
fn sizes_that_do_not_fit_are_refused() {
    let format = FORMATS.iter().find(|format| format.name == "mlx 4 bit").unwrap();
    let up = "model.layers.0.block_sparse_moe.experts.1.w3";
    for (options, says) in [
        (json!({"bits": 4, "group_size": 1 << 30}), "groups of 1073741824"),
        (json!({"bits": 4, "group_size": 1}), "has shape [96, 1], the layer needs [96, 128]"),
        (json!({"bits": 8, "group_size": 32}), "has shape [96, 16], the layer needs [96, 32]"),
        (json!({"bits": 4, "group_size": 64}), "has shape [96, 1], the layer needs [96, 2]"),
    ] {
        let mut files = Files::new(&MODELS[0], format, 5);
        files.config["quantization_config"] = options;
        // half a scale for each group
        for ending in [".scales", ".biases"] {
            let tensor = files.tensors.get_mut(&format!("{up}{ending}")).unwrap();
            (tensor.1, tensor.2) = (vec![96, 1], vec![0; 96 * 2]);
        }
        files.tensors.remove(&format!("{up}.biases"));
        let error = files.load().unwrap_err().to_string();
        assert!(error.contains(up) && error.contains(says), "{error}");
    }
}

/// A model that was quantised already keeps the configuration of its origin in the copy that MLX makes.
#[test]
fn mlx_is_what_the_file_says_beside_another_method() {
    let copy = tempfile::tempdir().unwrap();
    let config = std::fs::read_to_string(folder().join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
    std::fs::write(copy.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(folder().join("model.safetensors"), copy.path().join("model.safetensors"))
        .unwrap();
    let checkpoint = Checkpoint::open(copy.path()).unwrap();
    for entry in architecture::layers(&checkpoint).unwrap() {
        LoadedLayer::load(&checkpoint, &entry).unwrap();
    }
}
