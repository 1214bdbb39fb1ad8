//! Defects that other runners still have (by their numbers in the behavioural specification, §1.12;
//! D1 is in `reduction`), each with the test that fails where it is put back.

use std::sync::Arc;

use moe_runner::comm::{Groups, Sizes, run_ranks};
use moe_runner::exchange::LocalExchange;
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::parallel::{ExchangeKind, Parallel, deal_rows, shard};
use moe_runner::router::LogicalId;
use moe_runner::runner::{
    ForwardInput, MoeRunner, MoeRunnerInterface, Options, QuantMethod, reference,
};
use moe_runner::shared_experts::SharedOrder;
use moe_runner::spec::{IdleExperts, LayerSpec, Selection};
use moe_runner::weights::{FloatType, LoadedLayer, random_layer};

use super::doubles::{CountingPool, Soiled, change_kernel, desc};
use super::layers::{
    forward, kernels, nmse, options, plain, reported, rows, runner, shared, truth, variants,
};

const WIDTH: usize = 48;

/// Rows differ between ranks: data parallel, prefill-context parallel, sequence parallel; naive and
/// all-to-all.
fn dispatching() -> Vec<Parallel> {
    let base = Sizes { expert_parallel: true, ..Sizes::default() };
    let mut all = Vec::new();
    for sizes in [
        Sizes { dp: 2, ..base },
        Sizes { pcp: 3, ..base },
        Sizes { tp: 2, dp: 2, ..base },
        Sizes { tp: 2, sequence_parallel: true, ..base },
    ] {
        for exchange in [ExchangeKind::Naive, ExchangeKind::AllToAll] {
            all.push(Parallel { sizes, exchange, ..Parallel::default() });
        }
    }
    all
}

/// All rows' outputs, over ranks, the inputs that belong to rows dealt with them; `padded` kernels.
fn over_ranks(
    layer: &LoadedLayer,
    parallel: &Parallel,
    hidden: &[f32],
    input_ids: Option<&[u32]>,
    expert_ids: Option<&[LogicalId]>,
    padded: bool,
) -> Vec<f32> {
    let options = options(Some("cpu_portable"), F32);
    let k = layer.spec.router.top_k;
    let deal = deal_rows(hidden.len() / WIDTH, parallel.sizes);
    let outputs = run_ranks(parallel.sizes.ranks(), |world| {
        let (rank, rows) = (world.rank(), &deal[world.rank()]);
        let groups = Groups::new(world.clone(), parallel.sizes)?;
        let mut runner = MoeRunner::on_rank(layer, &options, &groups, parallel)?;
        if padded {
            let map = Arc::new(parallel.placement.map(layer.experts.len(), parallel.sizes.ep())?);
            let share = shard(layer, parallel.sizes, rank, &map)?;
            let exchange =
                LocalExchange::of(map, rank, moe_runner::exchange::Completeness::Partial);
            let spare = QuantMethod {
                exchange: Box::new(exchange),
                ..share.quant_method(desc("cpu_portable"), &options)?
            };
            change_kernel(&mut runner, spare, |kernel| Box::new(Soiled(kernel)));
        }
        let mut out = vec![f32::NAN; rows.len() * WIDTH];
        let input = ForwardInput {
            input_ids: input_ids.map(|ids| &ids[rows.clone()]),
            expert_ids: expert_ids.map(|ids| &ids[rows.start * k..rows.end * k]),
            ..ForwardInput::new(Rows::F32(&hidden[rows.start * WIDTH..rows.end * WIDTH]))
        };
        runner.forward(&input, RowsMut::F32(&mut out))?;
        Ok(out)
    })
    .unwrap();
    let mut all = vec![f32::NAN; hidden.len()];
    for (rows, out) in deal.iter().zip(&outputs) {
        all[rows.start * WIDTH..rows.end * WIDTH].copy_from_slice(out);
    }
    all
}

/// D3: the identity experts' part was computed from dispatched or padded rows, and added to others.
#[test]
fn d3_identity_experts_see_their_own_rows() {
    for with_shared in [false, true] {
        let mut spec = plain();
        spec.router.idle = Some(IdleExperts::Identity { count: 3 });
        spec.shared = with_shared.then(shared);
        let layer = random_layer(&spec, FloatType::F32, 7).unwrap();
        let hidden = rows(F32, 11, WIDTH, 3);
        let reference = reference::layer(&layer, &hidden, None, None).unwrap();
        let idle = reference.routing.ids.iter().filter(|id| id.index() >= 8).count();
        assert!(idle > 3, "{idle} choices of identity experts");
        for kernel in kernels() {
            let error =
                nmse(&forward(&mut runner(&layer, Some(kernel), F32), &hidden), &reference.output);
            assert!(error <= 1e-11, "{kernel}: NMSE {error:e}");
        }
        for parallel in dispatching() {
            for padded in [false, true] {
                let y = over_ranks(&layer, &parallel, &hidden, None, None, padded);
                let error = nmse(&y, &reference.output);
                assert!(error <= 1e-11, "{parallel:?}, padded {padded}: NMSE {error:e}");
            }
        }
    }
}

/// D7: token ids stayed behind when rows were dispatched; a hash table was read at others' rows.
#[test]
fn d7_token_ids_go_with_their_rows() {
    let mut spec = plain();
    spec.router.selection = Selection::HashTable { vocabulary: 40 };
    let layer = random_layer(&spec, FloatType::F32, 7).unwrap();
    let hidden = rows(F32, 11, WIDTH, 3);
    let ids: Vec<u32> = (0..11).map(|t| t * 13 % 40).collect();
    let truth = reference::layer(&layer, &hidden, None, Some(&ids)).unwrap().output;
    for parallel in dispatching() {
        let y = over_ranks(&layer, &parallel, &hidden, Some(&ids), None, false);
        let error = nmse(&y, &truth);
        assert!(error <= 1e-11, "{parallel:?}: NMSE {error:e}");
    }
}

/// All rows choose experts of one rank; the others have none, and the rows' own rank may be among
/// those.
#[test]
fn all_rows_remote_and_ranks_without_rows() {
    let layer = random_layer(&plain(), FloatType::F32, 7).unwrap();
    let hidden = rows(F32, 7, WIDTH, 3);
    for expert in [0, 7] {
        let ids = [LogicalId(expert), LogicalId(expert ^ 1)].repeat(7);
        let input =
            ForwardInput { expert_ids: Some(&ids), ..ForwardInput::new(Rows::F32(&hidden)) };
        let mut want = vec![f32::NAN; hidden.len()];
        runner(&layer, Some("reference"), F32).forward(&input, RowsMut::F32(&mut want)).unwrap();
        let want: Vec<f64> = want.iter().map(|v| f64::from(*v)).collect();
        for parallel in dispatching() {
            let y = over_ranks(&layer, &parallel, &hidden, None, Some(&ids), false);
            let error = nmse(&y, &want);
            assert!(error <= 1e-11, "{parallel:?}, expert {expert}: NMSE {error:e}");
        }
    }
}

const ORDERS: [SharedOrder; 3] =
    [SharedOrder::NoOverlap, SharedOrder::DuringCombine, SharedOrder::SecondThread];

/// D4, D6, D9: shared experts that ran twice, or never: the order was decided again at every place
/// it mattered, or left to a kernel that did not know. They run exactly once in every order, with
/// every kind of kernel, whatever the number of tokens before: counted in the regions that run on their threads.
#[test]
fn d4_d6_d9_shared_experts_run_exactly_once() {
    let mut spec = plain();
    let logits = rows(F32, 9, 8, 1);
    let count = |spec: &LayerSpec, order, kernel: &str, tokens: &[usize]| -> Vec<usize> {
        let layer = random_layer(spec, FloatType::F32, 7).unwrap();
        let pool = Arc::new(CountingPool::default());
        let options = Options {
            pool: pool.clone(),
            kernel: Some("cpu_portable".into()),
            ..options(None, F32)
        };
        let mut runner = MoeRunner::new(layer.ready(&options).unwrap()).with_order(order);
        // the shared experts stay with the kernel whose regions are counted
        let method = layer.quant_method(desc(kernel), &options).unwrap();
        runner.replace_quant_method(QuantMethod { shared: None, ..method }).unwrap();
        let mut run = |tokens: usize| {
            let hidden = rows(F32, tokens, WIDTH, 3);
            let mut out = vec![f32::NAN; hidden.len()];
            let input = ForwardInput {
                router_logits: Some(&logits[..tokens * 8]),
                ..ForwardInput::new(Rows::F32(&hidden))
            };
            pool.take();
            runner.forward(&input, RowsMut::F32(&mut out)).unwrap();
            pool.take()
        };
        tokens.iter().map(|tokens| run(*tokens)).collect()
    };
    let tokens = [4, 1, 9, 9, 2];
    // the regions of a pass without them, for each kernel
    let kernels = ["cpu_portable", "reference", "reference_monolithic"];
    let without = kernels.map(|kernel| count(&spec, SharedOrder::None, kernel, &tokens));
    assert!(without.iter().all(|calls| calls[0] > 0 && *calls == [calls[0]; 5]), "{without:?}");
    // the shared experts' own: gather, first product, middle, second product; their sum, and its
    // part in the output
    const ONCE: usize = 6;
    spec.shared = Some(shared());
    for (kernel, without) in kernels.into_iter().zip(without) {
        for order in ORDERS {
            let calls = count(&spec, order, kernel, &tokens);
            assert_eq!(calls, [without[0] + ONCE; 5], "{kernel}, {order:?}");
        }
    }
}

/// The order of the shared experts changes no bit, with every kernel and every option.
#[test]
fn the_order_of_shared_experts_changes_no_bit() {
    for (name, spec) in variants() {
        let layer = random_layer(&spec, FloatType::F32, 7).unwrap();
        for kernel in kernels() {
            for tokens in [0, 5] {
                let hidden = rows(F32, tokens, WIDTH, 3);
                let outputs = ORDERS.map(|order| {
                    let mut runner = runner(&layer, Some(kernel), F32).with_order(order);
                    forward(&mut runner, &hidden)
                });
                assert_eq!(outputs[0], outputs[1], "{name}, {kernel}");
                assert_eq!(outputs[0], outputs[2], "{name}, {kernel}");
            }
        }
    }
}

/// D5: a copy of the gate's weights made at the first forward was stale after a reload. A layer made
/// ready again has the new gate; one that was ready keeps its own.
#[test]
fn d5_a_reloaded_gate_is_the_one_that_routes() {
    let mut layer = random_layer(&plain(), FloatType::F32, 7).unwrap();
    let hidden = rows(F32, 9, WIDTH, 3);
    let mut old = runner(&layer, None, F32);
    let before = forward(&mut old, &hidden);
    layer.gate = random_layer(&plain(), FloatType::F32, 8).unwrap().gate;
    let mut new = runner(&layer, None, F32);
    let after = forward(&mut new, &hidden);
    let reloaded = truth(&layer, &hidden);
    assert!(nmse(&after, &reloaded) <= 1e-11);
    assert!(nmse(&before, &reloaded) > 1e-2, "the new gate routes otherwise");
    assert_eq!(forward(&mut old, &hidden), before);
}

/// Zero tokens: a normal, empty pass, for every option and kernel, before and after others.
#[test]
fn zero_tokens_are_a_normal_pass() {
    for (name, spec) in variants() {
        let layer = random_layer(&spec, FloatType::F32, 7).unwrap();
        for kernel in kernels() {
            let mut runner = runner(&layer, Some(kernel), F32);
            let hidden = rows(F32, 3, WIDTH, 3);
            assert_eq!(forward(&mut runner, &[]), [] as [f32; 0], "{name}, {kernel}");
            let y = forward(&mut runner, &hidden);
            let input = ForwardInput::new(Rows::F32(&[]));
            let (done, report) = reported(&mut runner, &input, &mut []);
            assert_eq!((done.tokens, report.weight_bytes, report.flops), (0, 0, 0.0));
            assert!(report.router_logits.is_empty() && report.routing.ids.is_empty());
            assert_eq!(report.shared.map(|rows| rows.len()), spec.shared.as_ref().map(|_| 0));
            assert_eq!(forward(&mut runner, &hidden), y, "{name}, {kernel}");
        }
    }
}
