//! Batches and values beyond the sizes of a first try: more slots than 16 bits count, offsets beyond
//! 32 bits, rows between the products beyond the range of f16.

mod layers;

use layers::{forward, kernels_for, nmse, options, plain, rows, runner, truth};
use moe_kernels::arena::Arena;
use moe_runner::experts::{self, BuiltKernel, ExpertCall, ExpertSet};
use moe_runner::hidden::ActivationDtype::{self, Bf16, F16, F32};
use moe_runner::plan::{NO_EXPERT, Plan};
use moe_runner::router::LocalId;
use moe_runner::spec::{Dims, RoutedScale, RouterSpec, ScaleOn};
use moe_runner::weights::{FloatType, random_layer};

/// 560,000 slots, bit for bit what smaller batches give.
#[test]
fn more_slots_than_16_bits_count() {
    const WIDTH: usize = 8;
    let mut spec = plain();
    spec.dims = Dims { hidden: WIDTH, routed_hidden: WIDTH, intermediate: WIDTH };
    spec.router = RouterSpec::softmax(16, 8, true);
    let layer = random_layer(&spec, FloatType::F32, 3).unwrap();
    let hidden = rows(F32, 70_000, WIDTH, 4);
    let mut runner = runner(&layer, None, F32);
    let all = forward(&mut runner, &hidden);
    for (part, want) in hidden.chunks(1000 * WIDTH).zip(all.chunks(1000 * WIDTH)) {
        assert!(forward(&mut runner, part) == want);
    }
}

/// A million and a half elements of rows before the products, and between them: the last rows are what
/// the reference makes of them alone.
#[test]
fn the_last_rows_of_a_long_batch_are_right() {
    const TOKENS: usize = 1500;
    const LAST: usize = 20;
    for (hidden, intermediate) in [(1024, 8), (8, 1024)] {
        let mut spec = plain();
        spec.dims = Dims { hidden, routed_hidden: hidden, intermediate };
        spec.router = RouterSpec::softmax(1, 1, true);
        let layer = random_layer(&spec, FloatType::F32, 9).unwrap();
        let batch = rows(F32, TOKENS, hidden, 10);
        let all = forward(&mut runner(&layer, None, F32), &batch);
        let from = (TOKENS - LAST) * hidden;
        let error = nmse(&all[from..], &truth(&layer, &batch[from..]));
        assert!(error <= 1e-11, "H {hidden}, I {intermediate}: NMSE {error:e}");
    }
}

/// The one row of a batch that has an expert lies beyond 2³² elements, in memory of which only what
/// is touched exists.
#[test]
fn rows_beyond_32_bits() {
    const WIDTH: usize = 1 << 16;
    const FAR: usize = (1 << 16) + 1;
    let mut spec = plain();
    spec.dims = Dims { hidden: WIDTH, routed_hidden: WIDTH, intermediate: 2 };
    spec.router = RouterSpec::softmax(1, 1, true);
    let layer = random_layer(&spec, FloatType::F32, 5).unwrap();
    let row = rows(F32, 1, WIDTH, 6);
    let len = (FAR + 1) * WIDTH * size_of::<f32>();
    let mut map = memmap2::MmapOptions::new().len(len).no_reserve_swap().map_anon().unwrap();
    let far: &mut [f32] = bytemuck::cast_slice_mut(&mut map);
    far[FAR * WIDTH..].copy_from_slice(&row);
    for kernel in kernels_for(&layer).into_iter().filter(|name| name.starts_with("cpu")) {
        let options = options(Some(kernel), F32);
        let desc = *experts::KERNELS.iter().find(|known| known.name == kernel).unwrap();
        let set = ExpertSet {
            spec: &spec.expert,
            weight_on: spec.router.weight_on,
            experts: &layer.experts,
        };
        let BuiltKernel::Modular(built) = experts::build(desc, set, F32).unwrap() else {
            panic!("'{kernel}' routes by itself")
        };
        let run = |rows: &[f32], ids: &[LocalId]| {
            let mut plan = Plan::default();
            plan.build(ids, 1, 1).unwrap();
            let mut out = vec![f32::NAN; WIDTH];
            let call = ExpertCall {
                rows,
                plan: &plan,
                weights: &vec![1.0; ids.len()],
                out: &mut out,
                quantised: false,
                row_max: None,
                pool: &*options.pool,
                arena: &mut Arena::default(),
            };
            built.forward(call).unwrap();
            out
        };
        let mut ids = vec![NO_EXPERT; FAR + 1];
        ids[FAR] = LocalId(0);
        assert!(run(far, &ids) == run(&row, &[LocalId(0)]), "{kernel}");
    }
}

/// Rows between the two products of a million and more: kept in f32 by every kernel for floats, also
/// where activations are f16, and so finite and right in every dtype.
#[test]
fn values_between_the_products_beyond_the_range_of_f16() {
    let mut spec = plain();
    spec.routed_scale = RoutedScale { factor: 1e-5, on: ScaleOn::Weights };
    let loud = |dtype: ActivationDtype| -> Vec<f32> {
        rows(F32, 9, 48, 7).into_iter().map(|x| dtype.round(1000.0 * x)).collect()
    };
    for (dtype, float, bound) in
        [(F32, FloatType::F32, 1e-11), (Bf16, FloatType::Bf16, 1e-5), (F16, FloatType::F16, 1e-6)]
    {
        let layer = random_layer(&spec, float, 8).unwrap();
        let hidden = loud(dtype);
        let truth = truth(&layer, &hidden);
        // what the experts return is this over the factor: far beyond 65,504, as is what they sum
        let largest = truth.iter().fold(0.0f64, |max, v| v.abs().max(max)) / 1e-5;
        assert!(largest > 10.0 * 65_504.0, "{largest:e}");
        for kernel in kernels_for(&layer) {
            let got = forward(&mut runner(&layer, Some(kernel), dtype), &hidden);
            let error = nmse(&got, &truth);
            assert!(error <= bound, "{kernel}, {dtype:?}: NMSE {error:e}");
        }
    }
}
