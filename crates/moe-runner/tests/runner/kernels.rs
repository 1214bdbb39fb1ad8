//! Every modular kernel on every shape of work: ids that repeat, are remote or absent, experts with
//! all rows or none, sizes that fill no tile.

use moe_kernels::arena::Arena;
use moe_kernels::pool::Inline;
use moe_runner::experts::{BuiltKernel, Caps, ExpertCall, build, reference};
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::parallel::Parallel;
use moe_runner::plan::{NO_EXPERT, NO_PLACE, Plan};
use moe_runner::router::{LocalId, LogicalId};
use moe_runner::runner::{ForwardInput, MoeRunnerInterface};
use moe_runner::spec::{Dims, Granularity, LayerSpec, RouterSpec, WeightOn};
use moe_runner::weights::{
    Element, FloatType, LoadedLayer, RandomFormat, RandomScaled, ScaleType, random_layer,
};

use super::doubles::desc;
use super::layers::{kernels, nmse, options, plain, rows, runner, shared, sizes, split};

const NONE: u32 = NO_EXPERT.0;

fn layer(experts: usize, hidden: usize, intermediate: usize) -> LoadedLayer {
    let dims = Dims { hidden, routed_hidden: hidden, intermediate };
    let router = RouterSpec::softmax(experts, 1, true);
    let mut spec = LayerSpec { dims, router, ..plain() };
    spec.expert.bias = true;
    random_layer(&spec, FloatType::Bf16, 9).unwrap()
}

fn modular() -> Vec<&'static str> {
    kernels().into_iter().filter(|name| !desc(name).caps.has(Caps::ROUTES)).collect()
}

/// Runs `kernel` on `ids` `[T, k]` and compares every slot with the float64 expert; slots without an
/// expert here have no row.
fn check(kernel: &str, layer: &LoadedLayer, ids: &[u32], top_k: usize, weight_on: WeightOn) {
    let what = format!("{kernel}, {:?}, ids {ids:?}, {weight_on:?}", layer.spec.dims);
    let (experts, width) = (layer.experts.len(), layer.spec.dims.routed_hidden);
    let ids: Vec<LocalId> = ids.iter().copied().map(LocalId).collect();
    let x = rows(F32, ids.len() / top_k, width, 5);
    let weights: Vec<f32> = (0..ids.len()).map(|slot| 0.25 + slot as f32 / 16.0).collect();
    let mut plan = Plan::default();
    plan.build(&ids, top_k, experts).unwrap();
    let set = moe_runner::experts::ExpertSet { weight_on, ..layer.expert_set() };
    let BuiltKernel::Modular(built) = build(desc(kernel), set, F32).unwrap() else {
        panic!("{kernel} routes by itself")
    };
    let mut out = vec![f32::NAN; plan.slots_planned() * width];
    let call = ExpertCall {
        rows: &x,
        plan: &plan,
        weights: &weights,
        out: &mut out,
        quantised: false,
        row_max: None,
        pool: &Inline,
        arena: &mut Arena::default(),
    };
    built.forward(call).unwrap();
    for (slot, (id, place)) in ids.iter().zip(plan.places()).enumerate() {
        let Some(weights_of) = layer.experts.get(id.index()) else {
            assert_eq!(*place, NO_PLACE, "{what}: slot {slot} has no expert here");
            continue;
        };
        let y = &out[*place as usize * width..][..width];
        let factor = match weight_on {
            WeightOn::Input => f64::from(weights[slot]),
            WeightOn::Output => 1.0,
        };
        let row = &x[slot / top_k * width..][..width];
        let row = row.iter().map(|v| f64::from(*v) * factor).collect();
        let want =
            reference::expert(weights_of, layer.spec.expert.activation, None, &[row]).concat();
        let error = nmse(y, &want);
        assert!(error <= 1e-11, "{what}: slot {slot}: NMSE {error:e}");
    }
}

#[test]
fn every_kernel_takes_any_ids() {
    let five = layer(5, 48, 40);
    for kernel in modular() {
        for (ids, top_k) in [
            (vec![], 2),                           // no rows
            (vec![3], 1),                          // one row
            (vec![4, 0, 2, 1, 3, 3], 2),           // in no order
            (vec![2, 2, 1, 1, 0, 0], 2),           // twice the same
            (vec![NONE, 1, NONE, NONE, 5, 77], 2), // not here, beyond the last
            (vec![NONE; 6], 3),                    // nothing here at all
            (vec![4; 70], 1),                      // one has everything, four have nothing
            (vec![0, 1, 2, 3, 4, 0, 1, 2], 8),     // more choices than experts
        ] {
            check(kernel, &five, &ids, top_k, WeightOn::Output);
            if top_k == 1 {
                check(kernel, &five, &ids, top_k, WeightOn::Input);
            }
        }
    }
}

#[test]
fn every_kernel_takes_any_sizes() {
    for kernel in modular() {
        for (experts, hidden, intermediate) in
            [(1, 1, 1), (3, 33, 17), (33, 31, 65), (7, 129, 5), (2, 16, 32)]
        {
            let layer = layer(experts, hidden, intermediate);
            let ids: Vec<u32> = (0..3 * experts as u32).map(|i| i * 2 % experts as u32).collect();
            check(kernel, &layer, &ids, 3, WeightOn::Output);
        }
    }
}

/// Through the runner: given ids that repeat within a token and leave experts without rows.
#[test]
fn given_ids_may_repeat_and_leave_experts_idle() {
    let mut spec = plain();
    spec.shared = Some(shared());
    let layer = random_layer(&spec, FloatType::F32, 1).unwrap();
    let hidden = rows(F32, 3, 48, 2);
    let ids = [7, 7, 0, 7, 7, 0].map(LogicalId);
    let mut outputs = Vec::new();
    for kernel in modular() {
        let mut out = vec![f32::NAN; hidden.len()];
        let input =
            ForwardInput { expert_ids: Some(&ids), ..ForwardInput::new(Rows::F32(&hidden)) };
        let mut runner = runner(&layer, Some(kernel), F32);
        runner.forward(&input, RowsMut::F32(&mut out)).unwrap();
        outputs.push(out.iter().map(|v| f64::from(*v)).collect::<Vec<_>>());
        assert!(nmse(&out, &outputs[0]) <= 1e-11, "{kernel}");
    }
}

/// A kernel that takes a width between the products in multiples alone is asked with what a rank has of it.
#[test]
fn a_ranks_slice_must_be_a_width_that_the_kernel_takes() {
    let mut spec = plain();
    spec.dims = Dims { hidden: 64, routed_hidden: 64, intermediate: 96 };
    let block = (Granularity::Group, [1, 32]);
    let mxfp4 = RandomScaled {
        element: Element::E2m1,
        scales: ScaleType::E8m0,
        granularity: block.0,
        block: block.1,
        input: None,
    };
    let layer = random_layer(&spec, RandomFormat::Scaled(mxfp4), 9).unwrap();
    let options = options(Some("emulation_ocp_mx"), F32);
    let hidden = rows(F32, 3, 64, 5);
    let over = |ranks| {
        let parallel = Parallel { sizes: sizes(ranks, 1, 1, false), ..Parallel::default() };
        split(&layer, &options, &parallel, &hidden)
    };
    over(1).unwrap();
    over(3).unwrap();
    let error = over(2).unwrap_err().to_string();
    assert!(error.contains("needs an intermediate size in multiples of 32; it is 48"), "{error}");
}
