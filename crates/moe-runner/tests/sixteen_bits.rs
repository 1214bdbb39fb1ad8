//! Kernels that multiply in 16 and 8 bits: each in its own dtype and formats, on every option of a layer.

mod layers;

use layers::{forward, nmse, options, plain, rows, runner, truth, variants};
use moe_kernels::numerics::quantise::{GroupScale, Qdq};
use moe_kernels::pool::Pool;
use moe_runner::experts::{Arithmetic, Determinism, KERNELS, KernelDesc};
use moe_runner::hidden::ActivationDtype::{self, Bf16, F16, F32};
use moe_runner::oracle::Machine;
use moe_runner::runner::{MoeRunner, Options};
use moe_runner::spec::Granularity;
use moe_runner::weights::{
    Element, FloatType, RandomFormat, RandomScaled, ScaleType, random_layer,
};
use proptest::prelude::*;
use proptest::sample::select;

/// Weights with a scale for so many rows and columns, rows quantised so.
fn scaled(element: Element, block: [usize; 2], input: Qdq) -> RandomFormat {
    let granularity = match block {
        [_, 0] => Granularity::Channel,
        [1, _] => Granularity::Group,
        _ => Granularity::Block,
    };
    let scales = if element == Element::E2m1 { ScaleType::E8m0 } else { ScaleType::F32 };
    let input = Some(input);
    RandomFormat::Scaled(RandomScaled { element, scales, granularity, block, input })
}

/// Those that this machine can run, with the dtypes and formats that they take, and whether rows are
/// quantised.
fn kernels() -> Vec<(&'static KernelDesc, ActivationDtype, RandomFormat, bool)> {
    let fp8_group = Qdq::Fp8Group { size: 32, scale: GroupScale::F32 };
    let integers = [
        scaled(Element::Int8, [1, 0], Qdq::Int8Token),
        scaled(Element::Int8, [1, 32], Qdq::Int8Group { size: 32 }),
        scaled(Element::Int8, [1, 0], Qdq::Int8Static { scale: 0.02 }),
    ];
    let others = [
        scaled(Element::E4m3, [1, 0], Qdq::Fp8Token),
        scaled(Element::E4m3, [32, 32], fp8_group),
        scaled(Element::Uint4, [1, 32], Qdq::Int8Token),
        scaled(Element::E2m1, [1, 32], Qdq::Mxfp4),
    ];
    let features = Machine::detect().features;
    let mut all = Vec::new();
    for kernel in KERNELS.iter().filter(|kernel| features.contains(kernel.target.features())) {
        match kernel.arithmetic {
            Arithmetic::Bf16 => {
                all.push((*kernel, Bf16, FloatType::Bf16.into(), false));
                let quantised = integers.iter().chain(&others);
                all.extend(quantised.map(|format| (*kernel, Bf16, *format, true)));
            }
            Arithmetic::Int8 => {
                let dtypes = [F32, Bf16, F16].into_iter();
                all.extend(dtypes.zip(integers).map(|(dtype, of)| (*kernel, dtype, of, true)));
            }
            _ => {}
        }
    }
    all
}

#[test]
fn every_option_stays_within_the_bound() {
    for (kernel, dtype, format, quantised) in kernels() {
        for (name, spec) in variants() {
            let layer = random_layer(&spec, format, 5).unwrap();
            let mut runner = runner(&layer, Some(kernel.name), dtype);
            for tokens in [1, 7, 33] {
                let hidden = rows(dtype, tokens, spec.dims.hidden, tokens as u64);
                let error = nmse(&forward(&mut runner, &hidden), &truth(&layer, &hidden));
                let bound = kernel.bound(dtype, quantised);
                let what = format!("{name}, {}, {format:?}, {tokens}", kernel.name);
                assert!(error <= bound, "{what}: NMSE {error:e}");
            }
        }
    }
}

/// Integers have exact sums: a layer has the same bits whatever multiplies them.
#[test]
fn integers_have_the_same_bits_with_every_kernel() {
    for (name, spec) in variants() {
        let layer = random_layer(&spec, scaled(Element::Int8, [1, 0], Qdq::Int8Token), 6).unwrap();
        let hidden = rows(Bf16, 9, spec.dims.hidden, 2);
        let mut seen: Vec<(&str, Vec<f32>)> = Vec::new();
        for (kernel, ..) in kernels() {
            if seen.iter().all(|(known, _)| *known != kernel.name) {
                let out = forward(&mut runner(&layer, Some(kernel.name), Bf16), &hidden);
                seen.push((kernel.name, out));
            }
        }
        // shared experts of a layer may come without quantised rows; these do not
        for pair in seen.windows(2) {
            assert!(pair[0].1 == pair[1].1, "{name}: {} and {}", pair[0].0, pair[1].0);
        }
    }
}

/// What the kernel cannot hold exactly it does not take.
#[test]
fn other_layers_are_refused() {
    let sixteen =
        kernels().into_iter().filter(|(kernel, ..)| kernel.arithmetic == Arithmetic::Bf16);
    for (kernel, dtype, ..) in sixteen {
        let refused = |float, dtype| {
            let layer = random_layer(&plain(), float, 3).unwrap();
            layer.ready(&options(Some(kernel.name), dtype)).unwrap_err().to_string()
        };
        for (float, dtype, reason) in [
            (FloatType::F32, dtype, "cannot read f32 weights"),
            (FloatType::F16, dtype, "cannot read f16 weights"),
            (FloatType::Bf16, F32, "does not take f32 hidden states"),
        ] {
            let text = refused(float, dtype);
            assert!(text.contains(reason) && !text.contains(';'), "{text}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 32,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Rows in any order, some of them only, some twice, on any number of threads.
    #[test]
    fn neither_other_rows_nor_threads_change_a_bit(
        (name, spec) in select(variants()),
        seed: u64,
        threads in 1usize..4,
        order in prop::collection::vec(0usize..9, 1..12),
    ) {
        for (kernel, dtype, format, _) in kernels() {
            prop_assert_eq!(kernel.determinism, Determinism::AnyBatch);
            let layer = random_layer(&spec, format, seed).unwrap();
            let hidden = rows(dtype, 9, spec.dims.hidden, seed);
            let on = |threads: usize| {
                let options = options(Some(kernel.name), dtype);
                let pool = std::sync::Arc::new(Pool::new(threads).unwrap());
                MoeRunner::new(layer.ready(&Options { pool, ..options }).unwrap())
            };
            let all = forward(&mut on(2), &hidden);
            let take = |values: &[f32]| -> Vec<f32> {
                let width = spec.dims.hidden;
                order.iter().flat_map(|t| &values[t * width..][..width]).copied().collect()
            };
            let some = forward(&mut on(threads), &take(&hidden));
            prop_assert_eq!(some, take(&all), "{}, {}, {:?}", name, kernel.name, format);
        }
    }
}
