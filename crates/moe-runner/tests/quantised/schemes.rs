//! Every format in two architectures, against values computed in [`formats`](crate::formats).

use crate::formats::{self, FORMATS, Format, Store};
use crate::kernels;
use crate::layers::{forward, nmse, options, rows, runner, truth};
use crate::models::{Files, HIDDEN, MODELS, as_floats, matrices};
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::runner::MoeRunnerInterface;
use moe_runner::spec::ActivationFormat;
use serde_json::json;

/// Each stored value is the true one, rounded once; read whole, and through windows of columns
/// that begin and end anywhere.
#[test]
fn every_value_of_every_format_is_exact_in_every_window() {
    for model in MODELS {
        for (seed, format) in FORMATS.iter().enumerate() {
            let files = Files::new(model, format, seed as u64);
            let layer =
                files.load().unwrap_or_else(|e| panic!("{} {}: {e}", model.name, format.name));
            for (name, matrix) in matrices(model, &layer) {
                let expected: Vec<f32> = files.values[&name].iter().map(|v| *v as f32).collect();
                let cols = matrix.cols();
                let mut row = vec![f32::NAN; cols];
                for (n, expected) in expected.chunks_exact(cols).enumerate() {
                    matrix.decode_row(n, &mut row);
                    assert_eq!(row, expected, "{} {}: {name} row {n}", model.name, format.name);
                }
                for (start, end) in
                    [(0, 1), (1, 2), (3, 64), (15, 17), (31, cols), (32, 64), (47, 82)]
                {
                    let window = matrix.cols_of(start..end).unwrap();
                    let mut part = vec![f32::NAN; end - start];
                    for n in [0, 1, matrix.rows() - 1] {
                        window.decode_row(n, &mut part);
                        let whole = &expected[n * cols + start..n * cols + end];
                        assert_eq!(part, whole, "{}: {name} row {n}, {start}..{end}", format.name);
                    }
                }
            }
        }
    }
}

/// Down projections in a scheme of their own: each group with its own format, an exception with its
/// own bits.
#[test]
fn every_value_is_exact_where_modules_have_schemes_of_their_own() {
    let compressed = json!({"quant_method": "compressed-tensors", "format": "mixed-precision",
    "ignore": ["lm_head", "re:.*gate$"],
    "config_groups": {
        "group_0": {"targets": ["Linear"], "format": "float-quantized",
            "weights": {"type": "float", "num_bits": 8, "strategy": "channel"}},
        "group_1": {"targets": ["re:.*w2$"], "format": "pack-quantized",
            "weights": {"type": "int", "num_bits": 8, "strategy": "group", "group_size": 32,
                "symmetric": false}},
    }});
    let gptq = json!({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": true,
        "sym": false, "dynamic": {"+:.*w2$": {"bits": 8}}});
    let cases: [(_, Store, Store); 2] = [
        (compressed, formats::fp8_channel, formats::int8_packed),
        (gptq, formats::gptq4_v1, formats::gptq8_v1),
    ];
    let model = &MODELS[0];
    for (config, most, down) in cases {
        let store = |module: &str| if module.ends_with("w2") { down } else { most };
        let files = Files::mixed(model, config, store, 5);
        let layer = files.load().unwrap();
        for (name, matrix) in matrices(model, &layer) {
            let mut row = vec![f32::NAN; matrix.cols()];
            for (n, expected) in files.values[&name].chunks_exact(matrix.cols()).enumerate() {
                let expected: Vec<f32> = expected.iter().map(|v| *v as f32).collect();
                matrix.decode_row(n, &mut row);
                assert_eq!(row, expected, "{name} row {n}: {}", matrix.describe());
            }
        }
    }
}

#[test]
fn every_format_runs_with_every_kernel_as_the_same_floats_do() {
    for model in MODELS {
        for (seed, format) in FORMATS.iter().enumerate() {
            let files = Files::new(model, format, 100 + seed as u64);
            let layer = files.load().unwrap();
            let quantised = layer.experts[0].up.input.format() != ActivationFormat::Unquantised;
            assert_eq!(quantised, format.activations, "{}", format.name);
            let hidden = rows(F32, 5, HIDDEN, 3);
            let expected = truth(&as_floats(&layer, &files, model), &hidden);
            assert!(expected.iter().all(|v| v.is_finite()), "{}", format.name);
            let bound = if format.activations { 1e-4 } else { 1e-11 };
            for kernel in kernels(&layer) {
                let y = forward(&mut runner(&layer, Some(kernel), F32), &hidden);
                let error = nmse(&y, &expected);
                let place = format!("{} {} {kernel}", model.name, format.name);
                assert!(error <= bound, "{place}: NMSE {error:e}");
            }
        }
    }
}

/// A runner whose method is swapped is one that was built with the new method: for every pair of
/// formats, and back.
#[test]
fn any_method_can_replace_any_other() {
    let model = &MODELS[1];
    let load = |format: &Format| Files::new(model, format, 11).load().unwrap();
    let hidden = rows(F32, 3, HIDDEN, 4);
    let options = options(None, F32);
    // all layers have the gate and the shared expert of the first: those are not the method's
    let first = load(&FORMATS[0]);
    let layers: Vec<_> = FORMATS
        .iter()
        .map(|format| {
            let mut layer = first.clone();
            layer.experts = load(format).experts;
            layer
        })
        .collect();
    let fresh: Vec<Vec<f32>> =
        layers.iter().map(|layer| forward(&mut runner(layer, None, F32), &hidden)).collect();
    for (from, layer) in layers.iter().enumerate() {
        let mut swapped = runner(layer, None, F32);
        for (to, other) in layers.iter().enumerate() {
            let kernel = other.choose(&options).unwrap().kernel;
            let method = other.quant_method(kernel, &options).unwrap();
            let old = swapped.replace_quant_method(method).unwrap();
            let names = format!("{} to {}", FORMATS[from].name, FORMATS[to].name);
            assert_eq!(forward(&mut swapped, &hidden), fresh[to], "{names}");
            swapped.replace_quant_method(old).unwrap();
            assert_eq!(forward(&mut swapped, &hidden), fresh[from], "{names}, and back");
        }
    }
}

#[test]
fn formats_are_described_with_their_sizes() {
    for (name, expected) in [
        ("fp8 tensor", "fp8 (tensor)"),
        ("fp8 block", "fp8 (block of 32x64)"),
        ("int4 zeros", "int4 (group of 32, zero points)"),
        ("mlx 3 bit", "int3 (group of 32, minima)"),
        ("int4 act-order", "int4 (group of 32) in act-order"),
        ("nvfp4", "nvfp4"),
    ] {
        let format = FORMATS.iter().find(|format| format.name == name).unwrap();
        let layer = Files::new(&MODELS[0], format, 1).load().unwrap();
        assert_eq!(layer.experts[3].down.describe(), expected);
    }
}
