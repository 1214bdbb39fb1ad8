//! What may not change a layer's output, or only in a known way, on one rank.

use std::sync::{Arc, OnceLock};

use moe_kernels::pool::Pool;
use moe_runner::experts::{Caps, Determinism};
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::router::LogicalId;
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, Options};
use moe_runner::spec::{IdleExperts, LayerSpec, RouterSpec, ScaleOn, WeightOn};
use moe_runner::weights::{FloatType, LoadedLayer, Matrix, random_layer};
use proptest::prelude::*;
use proptest::sample::select;

use super::doubles::desc;
use super::layers::{forward, kernels, nmse, options, plain, reported, rows, shared, variants};

const WIDTH: usize = 48;

/// Options on as many threads; the threads are started once.
fn threads(kernel: &str, threads: usize) -> Options {
    static POOLS: OnceLock<Vec<Arc<Pool>>> = OnceLock::new();
    static OPTIONS: OnceLock<Options> = OnceLock::new();
    let pools = POOLS.get_or_init(|| (1..=5).map(|n| Arc::new(Pool::new(n).unwrap())).collect());
    let options = OPTIONS.get_or_init(|| options(None, F32));
    Options { pool: pools[threads - 1].clone(), kernel: Some(kernel.into()), ..options.clone() }
}

fn on(layer: &LoadedLayer, kernel: &str) -> MoeRunner {
    MoeRunner::new(layer.ready(&threads(kernel, 2)).unwrap())
}

/// A layer with one option changed, and a kernel whose promise reaches `at_least`.
fn any_case(
    at_least: Determinism,
) -> impl Strategy<Value = ((&'static str, LayerSpec), &'static str, u64)> {
    let kernels: Vec<_> =
        kernels().into_iter().filter(|name| desc(name).determinism >= at_least).collect();
    (select(variants()), select(kernels), any::<u64>())
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() }
}

fn take(values: &[f32], order: &[usize]) -> Vec<f32> {
    order.iter().flat_map(|t| &values[t * WIDTH..][..WIDTH]).copied().collect()
}

proptest! {
    #![proptest_config(config())]

    /// Rows in any order, some of them only, some twice: each row's output is the same.
    #[test]
    fn other_rows_in_the_batch_change_no_bit(
        ((name, spec), kernel, seed) in any_case(Determinism::AnyBatch),
        order in prop::collection::vec(0usize..9, 1..12),
    ) {
        let layer = random_layer(&spec, FloatType::F32, seed).unwrap();
        let hidden = rows(F32, 9, WIDTH, seed);
        let mut runner = on(&layer, kernel);
        let all = forward(&mut runner, &hidden);
        let some = forward(&mut runner, &take(&hidden, &order));
        prop_assert_eq!(some, take(&all, &order), "{}, {}", name, kernel);
    }

    /// Any number of threads.
    #[test]
    fn threads_change_no_bit(
        ((name, spec), kernel, seed) in any_case(Determinism::AnyThreads),
        tokens in 1usize..40,
    ) {
        let layer = random_layer(&spec, FloatType::F32, seed).unwrap();
        let hidden = rows(F32, tokens, WIDTH, seed);
        let outputs = [1, 2, 3, 5].map(|n| {
            let ready = layer.ready(&threads(kernel, n)).unwrap();
            forward(&mut MoeRunner::new(ready), &hidden)
        });
        for output in &outputs[1..] {
            prop_assert_eq!(output, &outputs[0], "{}, {}", name, kernel);
        }
    }

    /// Any number of micro-batches, more than rows included.
    #[test]
    fn micro_batches_change_no_bit(
        ((name, spec), kernel, seed) in any_case(Determinism::AnyBatch),
        tokens in 0usize..9,
    ) {
        let layer = random_layer(&spec, FloatType::F32, seed).unwrap();
        let hidden = rows(F32, tokens, WIDTH, seed);
        let whole = forward(&mut on(&layer, kernel), &hidden);
        for n in 2..=4 {
            let mut runner = on(&layer, kernel).with_micro_batches(n);
            prop_assert_eq!(&forward(&mut runner, &hidden), &whole, "{}, {}, {}", name, kernel, n);
        }
    }

    /// Experts under other numbers, with their rows of the router.
    #[test]
    fn numbers_of_experts_change_no_bit(
        ((name, spec), kernel, seed) in any_case(Determinism::AnyBatch),
        order in Just((0..8).collect::<Vec<usize>>()).prop_shuffle(),
    ) {
        prop_assume!(spec.router.groups.is_none()); // groups are made of neighbours
        let layer = random_layer(&spec, FloatType::F32, seed).unwrap();
        let mut renamed = layer.clone();
        renamed.experts = order.iter().map(|old| layer.experts[*old].clone()).collect();
        let (gate, old) = (renamed.gate.as_mut().unwrap(), layer.gate.as_ref().unwrap());
        // identity, skip and shared experts stand after the others, and stay
        let full: Vec<usize> = order.iter().copied().chain(8..old.weight.rows()).collect();
        gate.weight = take_rows(&old.weight, &full);
        gate.bias = old.bias.as_ref().map(|bias| full.iter().map(|e| bias[*e]).collect());
        let hidden = rows(F32, 7, WIDTH, seed);
        let want = forward(&mut on(&layer, kernel), &hidden);
        let y = forward(&mut on(&renamed, kernel), &hidden);
        prop_assert_eq!(y, want, "{}, {}", name, kernel);
    }

    /// The router's weights times α: the routed output times α. A power of two is exact.
    #[test]
    fn linear_in_the_weights(
        ((name, spec), kernel, seed) in any_case(Determinism::None),
        alpha in select(vec![0.25f32, 0.3, 3.0, 4.0]),
    ) {
        let linear = spec.router.weight_on == WeightOn::Output
            && spec.shared.is_none()
            && spec.output_transform.is_linear()
            && !spec.output.bias
            && spec.output.norm.is_none();
        prop_assume!(linear);
        let scaled = |factor: f32| {
            let mut spec = spec.clone();
            spec.routed_scale.on = ScaleOn::Weights;
            spec.routed_scale.factor = factor;
            let layer = random_layer(&spec, FloatType::F32, seed).unwrap();
            forward(&mut on(&layer, kernel), &rows(F32, 7, WIDTH, seed))
        };
        let want: Vec<f32> = scaled(1.0).iter().map(|v| v * alpha).collect();
        let y = scaled(alpha);
        if alpha.log2().fract() == 0.0 {
            prop_assert_eq!(y, want, "{}, {}", name, kernel);
        } else {
            let want: Vec<f64> = want.iter().map(|v| f64::from(*v)).collect();
            prop_assert!(nmse(&y, &want) < 1e-12, "{}, {}", name, kernel);
        }
    }

    /// The chosen experts in another order: two are the same bits (addition commutes), more the same
    /// sum in another order.
    #[test]
    fn order_of_the_slots(seed in any::<u64>(), top_k in 2usize..6, turn in 1usize..6) {
        let spec = LayerSpec { router: RouterSpec::softmax(8, top_k, true), ..plain() };
        let layer = random_layer(&spec, FloatType::F32, seed).unwrap();
        let hidden = rows(F32, 5, WIDTH, seed);
        let first = |t: usize| seed.wrapping_add(t as u64) as usize;
        let given: Vec<LogicalId> =
            (0..5 * top_k).map(|i| LogicalId(((first(i / top_k) + i % top_k * 3) % 8) as u32)).collect();
        let mut turned = given.clone();
        turned.chunks_mut(top_k).for_each(|row| row.rotate_left(turn % top_k));
        for kernel in kernels().into_iter().filter(|name| !desc(name).caps.has(Caps::ROUTES)) {
            let [y, want] = [&turned, &given].map(|ids| given_ids(&mut on(&layer, kernel), &hidden, ids));
            if top_k == 2 {
                prop_assert_eq!(y, want);
            } else {
                let want: Vec<f64> = want.iter().map(|v| f64::from(*v)).collect();
                prop_assert!(nmse(&y, &want) < 1e-12, "{}", kernel);
            }
        }
    }

    /// Rows that chose nothing but skip experts have exactly the shared experts' output, or zero.
    #[test]
    fn rows_without_experts_have_the_shared_output(
        seed in any::<u64>(),
        kernel in select(kernels()),
        with_shared in any::<bool>(),
    ) {
        let mut spec = plain();
        spec.router.idle = Some(IdleExperts::Skip { count: 3 });
        spec.shared = with_shared.then(shared);
        let layer = random_layer(&spec, FloatType::F32, seed).unwrap();
        let hidden = rows(F32, 5, WIDTH, seed);
        let mut runner = on(&layer, kernel);
        // the skip experts' logits are the largest
        let logits: Vec<f32> = (0..5 * 11).map(|i| if i % 11 < 8 { 0.0 } else { 5.0 }).collect();
        let mut y = vec![f32::NAN; hidden.len()];
        let input =
            ForwardInput { router_logits: Some(&logits), ..ForwardInput::new(Rows::F32(&hidden)) };
        let (_, report) = reported(&mut runner, &input, &mut y);
        prop_assert!(report.routing.ids.iter().all(|id| id.index() >= 8));
        match report.shared {
            Some(shared) => prop_assert_eq!(&shared, &y),
            None => prop_assert!(y.iter().all(|v| *v == 0.0)),
        }
        prop_assert_eq!(with_shared, y.iter().any(|v| *v != 0.0));
    }
}

fn take_rows(matrix: &Matrix, order: &[usize]) -> Matrix {
    let mut values = vec![0.0; order.len() * matrix.cols()];
    for (row, old) in values.chunks_mut(matrix.cols()).zip(order) {
        matrix.decode_row(*old, row);
    }
    Matrix::from_f32(&values, [matrix.rows(), matrix.cols()]).unwrap()
}

/// The output for given experts.
fn given_ids(runner: &mut MoeRunner, hidden: &[f32], ids: &[LogicalId]) -> Vec<f32> {
    let mut y = vec![f32::NAN; hidden.len()];
    let input = ForwardInput { expert_ids: Some(ids), ..ForwardInput::new(Rows::F32(hidden)) };
    runner.forward(&input, RowsMut::F32(&mut y)).unwrap();
    y
}
