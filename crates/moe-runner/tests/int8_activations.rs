//! Rows quantised to INT8 where the checkpoint leaves them as they are: the layer, the reference and the
//! kernels that multiply integers.

mod layers;

use std::path::Path;

use layers::{forward, nmse, options, plain, rows, runner, truth};
use moe_kernels::numerics::ggml::BlockType;
use moe_kernels::numerics::quantise::Qdq;
use moe_runner::checkpoint::{Checkpoint, architecture};
use moe_runner::experts::cpu::{CPU_AVX2_Q8, CPU_AVX512_VNNI, CPU_AVX512_VNNI_Q8};
use moe_runner::experts::{Caps, KERNELS, KernelDesc};
use moe_runner::hidden::ActivationDtype::{Bf16, F16, F32};
use moe_runner::oracle::{Machine, Request, failing_conditions};
use moe_runner::spec::{ActivationFormat, Dims, Granularity, LayerSpec};
use moe_runner::weights::{
    ActivationQuant, Element, FloatType, LoadedLayer, RandomFormat, RandomScaled, ScaleType,
    random_layer,
};

/// The preferred one first.
const Q8: [&KernelDesc; 2] = [&CPU_AVX512_VNNI_Q8, &CPU_AVX2_Q8];

/// Rows of whole blocks of every type, and shared experts.
fn spec() -> LayerSpec {
    let dims = Dims { hidden: 512, routed_hidden: 512, intermediate: 256 };
    let shared = moe_runner::spec::SharedSpec { intermediate: 256, ..layers::shared() };
    LayerSpec { dims, shared: Some(shared), ..plain() }
}

fn scaled(element: Element, scales: ScaleType, size: usize) -> RandomFormat {
    let (granularity, block) = match size {
        0 => (Granularity::Channel, [0, 0]),
        size => (Granularity::Group, [1, size]),
    };
    RandomFormat::Scaled(RandomScaled { element, scales, granularity, block, input: None })
}

/// Formats of integers, and columns of a row that share a scale.
fn formats() -> Vec<(RandomFormat, usize)> {
    let mut all = vec![
        (scaled(Element::Int8, ScaleType::F32, 0), 256),
        (scaled(Element::Uint4, ScaleType::Bf16, 128), 128),
        (scaled(Element::Uint4, ScaleType::F16, 32), 32),
        (scaled(Element::E2m1, ScaleType::E8m0, 32), 32),
        (scaled(Element::E2m1, ScaleType::E4m3, 16), 32),
        (scaled(Element::E2m3, ScaleType::E8m0, 32), 32),
        (scaled(Element::Uint3, ScaleType::F16, 64), 64),
        (scaled(Element::Uint8, ScaleType::F32, 64), 64),
    ];
    let blocks = BlockType::ALL.into_iter().filter(|block| {
        // their random scales are those of formats with scales of their own
        !matches!(block, BlockType::Nvfp4 | BlockType::Iq1M)
    });
    all.extend(blocks.map(|block| {
        let ternary = matches!(block, BlockType::Tq1_0 | BlockType::Tq2_0);
        (RandomFormat::Ggml(block), if ternary { 256 } else { 32 })
    }));
    all
}

fn runs_here(kernel: &KernelDesc) -> bool {
    Machine::detect().features.contains(kernel.target.features())
}

/// The output in integers is the reference's, which quantises the same rows: far nearer than the
/// quantisation itself is to the layer as it was.
#[test]
fn every_format_is_near_the_reference_that_quantises_too() {
    for (format, size) in formats() {
        let plain = random_layer(&spec(), format, 5).unwrap();
        let layer = plain.clone().with_int8_activations().unwrap();
        for expert in layer.experts.iter().chain(&layer.shared.as_ref().unwrap().experts) {
            for matrix in [expert.gate.as_ref().unwrap(), &expert.up, &expert.down] {
                let wanted = ActivationQuant::Quantised(Qdq::Int8Group { size });
                assert_eq!(matrix.input, wanted, "{format:?}");
            }
        }
        let hidden = rows(F32, 9, 512, 3);
        let want = truth(&layer, &hidden);
        let before = truth(&plain, &hidden);
        let narrow: Vec<f32> = want.iter().map(|v| *v as f32).collect();
        let cost = nmse(&narrow, &before);
        assert!((1e-5..1e-3).contains(&cost), "{format:?}: quantising costs {cost:e}");
        for kernel in KERNELS.iter().filter(|kernel| runs_here(kernel)) {
            let able = failing_conditions(kernel, &Request::of(&layer, F32), &Machine::detect());
            if !able.is_empty() || kernel.caps.has(Caps::BY_NAME_ONLY) {
                continue;
            }
            let error = nmse(&forward(&mut runner(&layer, Some(kernel.name), F32), &hidden), &want);
            assert!(error <= 1e-6, "{format:?}, {}: NMSE {error:e}", kernel.name);
        }
        if let Some(best) = Q8.into_iter().find(|kernel| runs_here(kernel)) {
            // bytes have a kernel that more processors have
            let chosen = runner(&layer, None, F32).choice().kernel.name;
            let bytes = plain.experts[0].up.format().to_string().starts_with("int8");
            let vnni = bytes && runs_here(&CPU_AVX512_VNNI);
            let want = if vnni { CPU_AVX512_VNNI.name } else { best.name };
            assert_eq!(chosen, want, "{format:?}");
        }
    }
}

/// Activations of 16 bits, and few or many rows: within the bound.
#[test]
fn every_dtype_is_within_the_bound() {
    for (format, _) in formats() {
        let layer = random_layer(&spec(), format, 6).unwrap().with_int8_activations().unwrap();
        for (dtype, tokens) in [(Bf16, 1), (F16, 40)] {
            let hidden = rows(dtype, tokens, 512, tokens as u64);
            let want = truth(&layer, &hidden);
            for kernel in Q8.into_iter().filter(|kernel| runs_here(kernel)) {
                let got = forward(&mut runner(&layer, Some(kernel.name), dtype), &hidden);
                let error = nmse(&got, &want);
                let bound = kernel.bound(dtype, true);
                assert!(error <= bound, "{format:?}, {dtype:?}, {}: {error:e}", kernel.name);
            }
        }
    }
}

/// Nobody gets them who has not asked: without the option the kernels refuse, named or not, and say why.
#[test]
fn they_are_never_chosen_silently() {
    let machine = Machine { features: CPU_AVX512_VNNI_Q8.target.features(), ..Machine::detect() };
    for (format, _) in formats() {
        let layer = random_layer(&plain_of_blocks(), format, 1).unwrap();
        let options =
            moe_runner::runner::Options { machine: machine.clone(), ..options(None, F32) };
        let choice = layer.choose(&options).unwrap();
        for kernel in Q8 {
            assert_ne!(choice.kernel.name, kernel.name, "{format:?}");
            let rejected =
                choice.rejected.iter().find(|one| one.kernel.name == kernel.name).unwrap();
            let text = rejected.to_string();
            assert!(text.contains("does not take activations as unquantised"), "{text}");
            let named = Some(kernel.name.into());
            let named = moe_runner::runner::Options { kernel: named, ..options.clone() };
            assert!(layer.choose(&named).is_err());
        }
    }
}

fn plain_of_blocks() -> LayerSpec {
    LayerSpec { shared: None, ..spec() }
}

/// Floats have no integers to multiply, and what a checkpoint quantises stays as it says.
#[test]
fn other_layers_stay_what_they_are() {
    let refused = |layer: LoadedLayer| layer.with_int8_activations().unwrap_err().to_string();
    for float in [FloatType::F32, FloatType::Bf16] {
        let text = refused(random_layer(&plain(), float, 1).unwrap());
        assert!(text.contains("no weights whose rows could be quantised"), "{text}");
    }
    let mut format = scaled(Element::Int8, ScaleType::F32, 0);
    if let RandomFormat::Scaled(scaled) = &mut format {
        scaled.input = Some(Qdq::Int8Token);
    }
    refused(random_layer(&plain(), format, 1).unwrap());
    // floats beside integers: only these have quantised rows
    let mut layer = random_layer(&plain(), scaled(Element::Int8, ScaleType::F32, 0), 1).unwrap();
    let floats = random_layer(&plain(), FloatType::Bf16, 1).unwrap();
    layer.experts[0].up = floats.experts[0].up.clone();
    let layer = layer.with_int8_activations().unwrap();
    let format = |expert: usize| {
        let expert = &layer.experts[expert];
        [expert.gate.as_ref().unwrap(), &expert.up, &expert.down]
            .map(|matrix| matrix.input.format())
    };
    let (none, group) = (ActivationFormat::Unquantised, ActivationFormat::Int8Group);
    assert_eq!((format(0), format(1)), ([none, none, group], [group; 3]));
}

/// The recorded GGUF files: the reference with the same quantiser, and what llama.cpp's own rows of 8 bits
/// would be about as far from.
#[test]
fn recorded_gguf_files() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = [here.join("../../../shared/golden"), here.join("tests/golden")];
    let folder = folders.into_iter().find(|folder| folder.is_dir()).expect("recorded cases");
    let mut compared = 0;
    for case in std::fs::read_dir(folder).unwrap() {
        let case = case.unwrap().path();
        let name = case.file_name().unwrap().to_str().unwrap().to_owned();
        let floats = ["_f32", "_f16", "_bf16"].iter().any(|float| name.ends_with(float));
        if !name.starts_with("gguf_") || floats {
            continue;
        }
        let checkpoint = Checkpoint::open(case.join("model.gguf")).unwrap();
        let recorded = Checkpoint::open_safetensors(case.join("golden.safetensors")).unwrap();
        for entry in architecture::layers(&checkpoint).unwrap() {
            let layer = LoadedLayer::load(&checkpoint, &entry).unwrap();
            let layer = layer.with_int8_activations().unwrap();
            let kernels = Q8.into_iter().filter(|kernel| runs_here(kernel));
            let mut runners: Vec<_> =
                kernels.map(|kernel| runner(&layer, Some(kernel.name), F32)).collect();
            let prefix = format!("layers.{}.", entry.spec.index);
            let inputs = recorded
                .names()
                .filter(|name| name.strip_prefix(&prefix).is_some_and(|name| name.ends_with(".x")));
            for input in inputs {
                let values = |name: &str| recorded.tensor(name).unwrap().unwrap().to_f32().unwrap();
                let hidden = values(input);
                let want = truth(&layer, &hidden);
                let out = values(&format!("{}.out", input.strip_suffix(".x").unwrap()));
                let out: Vec<f64> = out.into_iter().map(f64::from).collect();
                for runner in &mut runners {
                    let got = forward(runner, &hidden);
                    let error = nmse(&got, &want);
                    assert!(error <= 1e-5, "{name}, {input}: NMSE {error:e}");
                    let cost = nmse(&got, &out);
                    assert!((1e-7..1e-3).contains(&cost), "{name}, {input}: costs {cost:e}");
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 0 || !runs_here(&CPU_AVX2_Q8));
}
