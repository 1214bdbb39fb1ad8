//! Kernels that multiply in 16 bits: each in its own dtype, on every option of a layer.

mod layers;

use layers::{forward, nmse, options, plain, rows, runner, truth, variants};
use moe_kernels::pool::Pool;
use moe_runner::experts::{Arithmetic, Determinism, KERNELS, KernelDesc};
use moe_runner::hidden::ActivationDtype::{self, Bf16, F32};
use moe_runner::oracle::Machine;
use moe_runner::runner::{MoeRunner, Options};
use moe_runner::weights::{FloatType, random_layer};
use proptest::prelude::*;
use proptest::sample::select;

/// Those that this machine can run, with the dtype that they take.
fn kernels() -> Vec<(&'static KernelDesc, ActivationDtype)> {
    let features = Machine::detect().features;
    let able = KERNELS.iter().filter(|kernel| {
        kernel.arithmetic == Arithmetic::Bf16 && features.contains(kernel.target.features())
    });
    able.map(|kernel| (*kernel, Bf16)).collect()
}

#[test]
fn every_option_stays_within_the_bound() {
    for (kernel, dtype) in kernels() {
        for (name, spec) in variants() {
            let layer = random_layer(&spec, FloatType::Bf16, 5).unwrap();
            let mut runner = runner(&layer, Some(kernel.name), dtype);
            for tokens in [1, 7, 33] {
                let hidden = rows(dtype, tokens, spec.dims.hidden, tokens as u64);
                let error = nmse(&forward(&mut runner, &hidden), &truth(&layer, &hidden));
                let bound = kernel.bound(dtype, false);
                assert!(error <= bound, "{name}, {}, {tokens}: NMSE {error:e}", kernel.name);
            }
        }
    }
}

/// What the kernel cannot hold exactly it does not take.
#[test]
fn other_layers_are_refused() {
    for (kernel, dtype) in kernels() {
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
        for (kernel, dtype) in kernels() {
            prop_assert_eq!(kernel.determinism, Determinism::AnyBatch);
            let layer = random_layer(&spec, FloatType::Bf16, seed).unwrap();
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
            prop_assert_eq!(some, take(&all), "{}, {}", name, kernel.name);
        }
    }
}
