//! Who reduces: exactly one all-reduce of the routed part, by the combine or by the runner,
//! whatever was swapped, with shared experts or without.

use std::sync::Arc;

use moe_runner::comm::{Groups, Kind, Sizes, run_ranks};
use moe_runner::exchange::{Completeness, Exchange, ExpertMap, LocalExchange};
use moe_runner::experts::{BuiltKernel, build};
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::parallel::{ExchangeKind, Parallel, deal_rows, shard};
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, QuantMethod};
use moe_runner::spec::{LayerSpec, RmsNorm, Transform, TransformStep};
use moe_runner::weights::{FloatType, LoadedLayer, random_layer};

use super::doubles::{Reducing, desc};
use super::layers::{nmse, options, plain, rows, shared, truth};

const WIDTH: usize = 48;

/// How the routed experts execute on a tensor-parallel rank.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Method {
    /// Whole experts; the combine leaves parts.
    Partial,
    /// Whole experts; the combine sums.
    Complete,
}

fn method(layer: &LoadedLayer, groups: &Groups, map: &Arc<ExpertMap>, how: Method) -> QuantMethod {
    let rank = groups.world.rank();
    let share = shard(layer, groups.sizes, rank, map).unwrap();
    let exchange: Box<dyn Exchange> = match how {
        Method::Partial if groups.sizes.ranks() == 1 => {
            Box::new(LocalExchange::of(map.clone(), rank, Completeness::Complete))
        }
        Method::Partial => Box::new(LocalExchange::of(map.clone(), rank, Completeness::Partial)),
        // the expert-parallel group has a traffic counter of its own
        Method::Complete => Box::new(Reducing::new(map.clone(), rank, groups.ep.clone())),
    };
    let kernel = build(desc("cpu_portable"), share.expert_set(), F32).unwrap();
    QuantMethod { kernel, exchange, shared: None }
}

/// Outputs, completeness and all-reduces in the tensor-parallel group of a pass with each of
/// `methods` in turn, by rank.
fn passes(
    layer: &LoadedLayer,
    tp: usize,
    reduce_results: bool,
    methods: &[Method],
    hidden: &[f32],
) -> Vec<Vec<(Vec<f32>, bool, u64)>> {
    let sizes = Sizes { tp, expert_parallel: true, ..Sizes::default() };
    let parallel = Parallel { sizes, exchange: ExchangeKind::Naive, ..Parallel::default() };
    let options = options(Some("cpu_portable"), F32);
    run_ranks(tp, |world| {
        let groups = Groups::new(world.clone(), sizes)?;
        let map = Arc::new(parallel.placement.map(layer.experts.len(), sizes.ep())?);
        let mut runner =
            MoeRunner::on_rank(layer, &options, &groups, &parallel)?.reduce_results(reduce_results);
        let mut all = Vec::new();
        for how in methods {
            runner.replace_quant_method(method(layer, &groups, &map, *how))?;
            let before = groups.tp.traffic().read();
            let mut out = vec![f32::NAN; hidden.len()];
            let result =
                runner.forward(&ForwardInput::new(Rows::F32(hidden)), RowsMut::F32(&mut out))?;
            let complete = result.complete;
            let calls = groups.tp.traffic().read().since(&before).of(Kind::AllReduce).calls;
            all.push((out, complete, calls));
        }
        Ok(all)
    })
    .unwrap()
}

/// Without and with shared experts, without and with a transform that needs the complete sum.
fn layers() -> Vec<(&'static str, LoadedLayer, bool, bool)> {
    let norm = RmsNorm { eps: 1e-6, unit_offset: false, scale_first: false };
    let not_linear = Transform { steps: vec![TransformStep::RmsNorm(norm)] };
    let make = |name, shared, output_transform: Transform| {
        let transforms = !output_transform.is_identity();
        let has_shared = Option::is_some(&shared);
        let spec = LayerSpec { shared, output_transform, ..plain() };
        (name, random_layer(&spec, FloatType::F32, 4).unwrap(), has_shared, transforms)
    };
    vec![
        make("routed", None, Transform::default()),
        make("routed and shared", Some(shared()), Transform::default()),
        make("routed, transformed", None, not_linear.clone()),
        make("routed, transformed, and shared", Some(shared()), not_linear),
    ]
}

/// Defect: "output is reduced" was computed when the runner was made, and was stale after the quant
/// method was replaced. Both ways, and back again.
#[test]
fn a_replaced_quant_method_decides_who_reduces() {
    use Method::{Complete, Partial};
    let hidden = rows(F32, 7, WIDTH, 2);
    for (name, layer, shared, transforms) in layers() {
        let truth = truth(&layer, &hidden);
        for rank in passes(&layer, 2, true, &[Partial, Complete, Partial, Complete], &hidden) {
            for (how, (out, complete, calls)) in [Partial, Complete].iter().cycle().zip(rank) {
                let error = nmse(&out, &truth);
                assert!(error <= 1e-11, "{name}, {how:?}: NMSE {error:e}");
                assert!(complete);
                // routed: by the combine or by the runner, once; shared: with it, or by itself
                let routed = u64::from(*how == Partial);
                let separately = u64::from(shared && (*how == Complete || transforms));
                assert_eq!(calls, routed + separately, "{name}, {how:?}");
            }
        }
    }
}

/// Defect: the shared output was asserted to be there before anyone asked whether the layer has
/// one. Absence is a normal case, for every way of reducing and any number of ranks.
#[test]
fn absent_shared_output_is_a_normal_case() {
    for (name, layer, shared, transforms) in layers() {
        for (tp, how) in
            [1, 2, 4].into_iter().flat_map(|tp| [(tp, Method::Partial), (tp, Method::Complete)])
        {
            for tokens in [0, 5] {
                let hidden = rows(F32, tokens, WIDTH, 2);
                let truth = truth(&layer, &hidden);
                for rank in passes(&layer, tp, true, &[how], &hidden) {
                    let (out, complete, calls) = &rank[0];
                    let error = nmse(out, &truth);
                    assert!(error <= 1e-11, "{name}, tp {tp}, {how:?}: NMSE {error:e}");
                    assert!(*complete);
                    let routed = u64::from(how == Method::Partial);
                    let separately = u64::from(shared && (how == Method::Complete || transforms));
                    let want = if tp == 1 { 0 } else { routed + separately };
                    assert_eq!(*calls, want, "{name}, tp {tp}, {how:?}");
                }
            }
        }
    }
}

/// Under sequence parallelism every rank has rows of its own: nothing is reduced over the
/// tensor-parallel group, with shared experts or without.
#[test]
fn sequence_parallel_ranks_reduce_nothing() {
    let hidden = rows(F32, 7, WIDTH, 2);
    for (name, layer, ..) in layers() {
        let truth = truth(&layer, &hidden);
        for (tp, exchange) in [2, 4]
            .into_iter()
            .flat_map(|tp| [(tp, ExchangeKind::Naive), (tp, ExchangeKind::AllToAll)])
        {
            let sizes =
                Sizes { tp, expert_parallel: true, sequence_parallel: true, ..Sizes::default() };
            let parallel = Parallel { sizes, exchange, ..Parallel::default() };
            let options = options(None, F32);
            let deal = deal_rows(7, sizes);
            let outputs = run_ranks(tp, |world| {
                let groups = Groups::new(world.clone(), sizes)?;
                let mut runner = MoeRunner::on_rank(&layer, &options, &groups, &parallel)?;
                let mine = &deal[world.rank()];
                let mine = &hidden[mine.start * WIDTH..mine.end * WIDTH];
                let mut out = vec![f32::NAN; mine.len()];
                let before = groups.tp.traffic().read();
                let input = ForwardInput::new(Rows::F32(mine));
                assert!(runner.forward(&input, RowsMut::F32(&mut out))?.complete);
                let traffic = groups.tp.traffic().read().since(&before);
                assert_eq!(traffic.of(Kind::AllReduce).calls, 0, "{name}, {exchange:?}");
                Ok(out)
            });
            let error = nmse(&outputs.unwrap().concat(), &truth);
            assert!(error <= 1e-11, "{name}, tp {tp}, {exchange:?}: NMSE {error:e}");
        }
    }
}

/// Defect D1: the caller asks to reduce by itself, but a step of the layer needs the complete sum;
/// the caller then reduced again. The output says whether it is complete; whoever trusts it gets
/// the truth, with no reduction too many.
#[test]
fn a_caller_that_reduces_is_told_whether_to() {
    let hidden = rows(F32, 7, WIDTH, 2);
    for (name, layer, shared, transforms) in layers() {
        let truth = truth(&layer, &hidden);
        for how in [Method::Partial, Method::Complete] {
            let ranks = passes(&layer, 2, false, &[how], &hidden);
            let (out, complete, calls) = &ranks[0][0];
            let must_be_complete = transforms || how == Method::Complete;
            assert_eq!(*complete, must_be_complete, "{name}, {how:?}");
            let y: Vec<f32> = match complete {
                true => out.clone(),
                false => out.iter().zip(&ranks[1][0].0).map(|(a, b)| a + b).collect(),
            };
            let error = nmse(&y, &truth);
            assert!(error <= 1e-11, "{name}, {how:?}: NMSE {error:e}");
            let routed = u64::from(how == Method::Partial && transforms);
            let separately = u64::from(shared && must_be_complete);
            assert_eq!(*calls, routed + separately, "{name}, {how:?}");
        }
    }
}

/// A kernel that routes by itself has summed all experts: it cannot stand for a part.
#[test]
fn a_kernel_that_routes_by_itself_is_refused_a_share() {
    let layer = random_layer(&plain(), FloatType::F32, 4).unwrap();
    let sizes = Sizes { tp: 2, ..Sizes::default() };
    let map = Arc::new(ExpertMap::one_rank(8));
    let share = shard(&layer, sizes, 0, &map).unwrap();
    let options = options(None, F32);
    let mut runner = MoeRunner::new(layer.ready(&options).unwrap());
    let kernel = build(desc("reference_monolithic"), share.expert_set(), F32).unwrap();
    assert!(matches!(kernel, BuiltKernel::Monolithic(_)));
    let exchange = Box::new(LocalExchange::of(map, 0, Completeness::Partial));
    let error =
        runner.replace_quant_method(QuantMethod { kernel, exchange, shared: None }).unwrap_err();
    assert!(error.to_string().contains("slices of 20"), "{error}");
}
