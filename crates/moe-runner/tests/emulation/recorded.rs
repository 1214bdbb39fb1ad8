//! Recorded checkpoints through the emulation kernels: alone, and split over ranks.

use std::path::Path;

use moe_runner::checkpoint::{Checkpoint, architecture};
use moe_runner::hidden::ActivationDtype::{self, Bf16, F16, F32};
use moe_runner::oracle::{self, Machine, Request};
use moe_runner::parallel::Parallel;
use moe_runner::weights::LoadedLayer;

use crate::layers::{forward, nmse, options, runner, split, splits, truth};

/// The first MoE layer of a case, its recorded input of 33 rows, and the recorded output.
fn recorded(name: &str) -> (LoadedLayer, Vec<f32>, Vec<f64>) {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let checkpoint = Checkpoint::open(&case).unwrap();
    let recordings = Checkpoint::open_safetensors(case.join("golden.safetensors")).unwrap();
    let entry = architecture::layers(&checkpoint).unwrap().remove(0);
    let tensor = |what: &str| {
        let name = format!("layers.{}.t33.{what}", entry.spec.index);
        recordings.tensor(&name).unwrap().map(|tensor| tensor.to_f32().unwrap())
    };
    let out = tensor("out_fakequant").or_else(|| tensor("out")).unwrap();
    let layer = LoadedLayer::load(&checkpoint, &entry).unwrap();
    (layer, tensor("x").unwrap(), out.into_iter().map(f64::from).collect())
}

const CASES: [(&str, &str); 4] = [
    ("quant_qwen3_moe_nvfp4", "emulation_nvfp4"),
    ("quant_qwen3_moe_nvfp4_modelopt", "emulation_nvfp4"),
    ("quant_qwen3_moe_mxfp4", "emulation_ocp_mx"),
    ("gpt_oss_mxfp4", "emulation_ocp_mx"),
];

/// In f32 nothing is rounded but sums. In 16 bits every intermediate result is, and quantised values
/// flip: the error is that of the arithmetic which is emulated, and not the kernel's own.
#[test]
fn recorded_outputs_within_the_bounds_of_each_dtype() {
    for (name, kernel) in CASES {
        let (layer, x, out) = recorded(name);
        let quantised = kernel == "emulation_nvfp4";
        let reference = truth(&layer, &x);
        for (dtype, bound) in [
            (F32, 1e-12),
            (F16, if quantised { 3e-4 } else { 3e-7 }),
            (Bf16, if quantised { 2e-3 } else { 3e-5 }),
        ] {
            assert!(bound <= crate::kernel(kernel).bound(dtype, quantised));
            let y = forward(&mut runner(&layer, Some(kernel), dtype), &x);
            let (own, recorded) = (nmse(&y, &reference), nmse(&y, &out));
            assert!(own <= bound, "{name} {dtype:?}: NMSE {own:e} to the reference");
            assert!(recorded <= bound.max(1e-10), "{name} {dtype:?}: NMSE {recorded:e}");
            assert!(dtype == F32 || own > 0.0, "{name} {dtype:?}: nothing was rounded");
        }
    }
}

/// Weights are applied once, before the rounding, whatever brings the rows back: whole experts on
/// other ranks give the same bits; parts of sums, their own rounding.
#[test]
fn every_split_gives_the_same() {
    let bound = |dtype: ActivationDtype| if dtype == F32 { 1e-12 } else { 1e-5 };
    for (name, kernel) in CASES {
        let (layer, x, _) = recorded(name);
        let x = &x[..9 * layer.spec.dims.hidden];
        for dtype in [F32, Bf16] {
            let options = options(Some(kernel), dtype);
            let one = forward(&mut runner(&layer, Some(kernel), dtype), x);
            let wide: Vec<f64> = one.iter().map(|v| f64::from(*v)).collect();
            let mut ran = 0;
            for (split_name, parallel) in splits() {
                let at = format!("{name} {dtype:?} {split_name}");
                let done = match split(&layer, &options, &parallel, x) {
                    Ok(done) => done,
                    // a slice that is no whole number of blocks, a layer that cannot be cut so
                    Err(error) if error.to_string().contains("multiple") => continue,
                    Err(moe_runner::Error::Spec { .. }) => continue,
                    Err(error) => panic!("{at}: {error}"),
                };
                ran += 1;
                let Parallel { sizes, exchange, .. } = parallel;
                let whole =
                    sizes.expert_parallel && exchange != moe_runner::parallel::ExchangeKind::Naive;
                if whole && layer.shared.is_none() {
                    assert_eq!(done.output, one, "{at}");
                }
                let error = nmse(&done.output, &wide);
                assert!(error <= bound(dtype), "{at}: NMSE {error:e}");
            }
            assert!(ran >= 8, "{name} {dtype:?}: {ran} splits");
        }
    }
}

#[test]
fn by_name_alone() {
    let (layer, ..) = recorded("quant_qwen3_moe_nvfp4");
    let request = Request::of(&layer, Bf16);
    let kernels = moe_runner::experts::KERNELS;
    let choice = oracle::select(kernels, &request, &Machine::detect()).unwrap();
    assert!(choice.kernel.name.starts_with("cpu_"), "{}", choice.kernel.name);
    assert!(choice.able.iter().any(|(kernel, _)| kernel.name == "emulation_nvfp4"));
    let named = Request { kernel: Some("emulation_nvfp4".into()), ..request };
    let choice = oracle::select(kernels, &named, &Machine::detect()).unwrap();
    assert_eq!(choice.kernel.name, "emulation_nvfp4");
}
