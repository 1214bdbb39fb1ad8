//! Experts move between ranks while a layer is served: the load drifts, the placement follows, and
//! the output stays what one rank computes.

mod layers;

use std::sync::Arc;

use layers::{nmse, options, plain, shared, sizes};
use moe_kernels::numerics::quantise::Qdq;
use moe_runner::comm::{At, Groups, Kind, Sizes, Step, run_ranks};
use moe_runner::exchange::ExpertMap;
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::parallel::balance::{LoadWindow, Topology, initial, rebalance};
use moe_runner::parallel::rebalance::{move_experts, transfers};
use moe_runner::parallel::{ExchangeKind, Parallel, deal_rows, shard};
use moe_runner::random::Random;
use moe_runner::router::{LogicalId, Routing};
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, Report};
use moe_runner::spec::{
    Correction, Dims, Granularity, GroupFill, GroupScore, Groups as RouterGroups, LayerSpec,
    RouterSpec, Score,
};
use moe_runner::weights::{
    ActivationQuant, Codes, Element, Expert, FloatType, LoadedLayer, Matrix, Packing, ScaleType,
    Scales, Zeros, random_layer,
};
use moe_runner::{Error, Result};

/// Hidden states and logits of one step, of all ranks' rows.
struct Batch {
    hidden: Vec<f32>,
    logits: Vec<f32>,
}

/// In round r a few experts are wanted most: others in each round.
fn batch(spec: &LayerSpec, tokens: usize, round: usize) -> Batch {
    let random = &mut Random::new(round as u64 + 100);
    let (logits, experts) = (spec.router.logits(), spec.router.experts);
    let hot: Vec<usize> = (0..experts / 4).map(|_| random.bits() as usize % experts).collect();
    let logits = (0..tokens * logits)
        .map(|i| random.normal() as f32 + if hot.contains(&(i % logits)) { 2.0 } else { 0.0 })
        .collect();
    let hidden = (0..tokens * spec.dims.hidden).map(|_| random.normal() as f32).collect();
    Batch { hidden, logits }
}

/// The output of `rows`, and what the router chose for them.
fn run(
    runner: &mut MoeRunner,
    batch: &Batch,
    rows: std::ops::Range<usize>,
) -> Result<(Vec<f32>, Routing)> {
    let (h, l) = (runner.spec().dims.hidden, runner.spec().router.logits());
    let hidden = &batch.hidden[rows.start * h..rows.end * h];
    let input = ForwardInput {
        router_logits: Some(&batch.logits[rows.start * l..rows.end * l]),
        ..ForwardInput::new(Rows::F32(hidden))
    };
    let mut out = vec![f32::NAN; hidden.len()];
    let mut report = Report::default();
    let done = runner.forward_reporting(&input, RowsMut::F32(&mut out), Some(&mut report))?;
    let (scale, routing) = (done.output_scale, report.routing);
    out.iter_mut().for_each(|v| *v *= scale);
    Ok((out, routing))
}

/// What one rank saw in one round.
struct Round {
    /// This rank's rows, before the experts moved and after.
    outputs: [Vec<f32>; 2],
    balances: [f64; 2],
    moved: usize,
    bytes: u64,
}

/// Serves `rounds` batches on every rank: each batch once, then the experts move, then once more.
fn serve(
    layer: &LoadedLayer,
    parallel: &Parallel,
    topology: Topology,
    (tokens, rounds): (usize, usize),
    kernel: Option<&str>,
) -> Result<Vec<Vec<Round>>> {
    let options = options(kernel, F32);
    let spec = &layer.spec;
    let experts = spec.router.experts;
    let deal = deal_rows(tokens, parallel.sizes);
    run_ranks(parallel.sizes.ranks(), |world| {
        let rank = world.rank();
        let groups = Groups::new(world.clone(), parallel.sizes)?;
        let mut map = Arc::new(initial(experts, topology)?);
        let mut held = shard(layer, parallel.sizes, rank, &map)?.experts;
        let mut runner = MoeRunner::on_rank_with(layer, &options, &groups, parallel, map.clone())?;
        let mut window = LoadWindow::new(1, experts, 2)?;
        let mut all = Vec::new();
        for round in 0..rounds {
            let batch = batch(spec, tokens, round);
            let (before, routing) = run(&mut runner, &batch, deal[rank].clone())?;
            window.record(0, &routing)?;
            let mut loads = window.loads();
            loads.all_reduce(&*groups.world)?;
            window.advance();
            let loads: Vec<f64> = loads.layer(0).iter().map(|n| *n as f64).collect();
            let new = rebalance(&loads, &map, topology.groups, topology.nodes)?;
            let moved = transfers(&map, &new.map)?.len();
            let traffic = groups.world.traffic().read();
            held = move_experts(&*groups.world, &spec.name, (&map, &new.map), &held)?;
            let bytes = groups.world.traffic().read().since(&traffic).of(Kind::AllToAllV).received;
            map = Arc::new(new.map);
            runner.replace_experts(&held, map.clone(), &options, &groups, parallel)?;
            let (after, _) = run(&mut runner, &batch, deal[rank].clone())?;
            all.push(Round {
                outputs: [before, after],
                balances: [new.before, new.after],
                moved,
                bytes,
            });
        }
        Ok(all)
    })
}

/// The rounds of all ranks: every output is that of one rank; with `exact`, bit by bit.
fn check(
    layer: &LoadedLayer,
    parallel: &Parallel,
    ranks: &[Vec<Round>],
    tokens: usize,
    (kernel, exact): (Option<&str>, bool),
) {
    let h = layer.spec.dims.hidden;
    let mut one = layers::runner(layer, kernel, F32);
    let deal = deal_rows(tokens, parallel.sizes);
    for round in 0..ranks[0].len() {
        let batch = batch(&layer.spec, tokens, round);
        let (want, _) = run(&mut one, &batch, 0..tokens).unwrap();
        for (rank, rounds) in ranks.iter().enumerate() {
            let want = &want[deal[rank].start * h..deal[rank].end * h];
            let [before, after] = &rounds[round].outputs;
            let truth: Vec<f64> = want.iter().map(|v| f64::from(*v)).collect();
            if exact {
                assert_eq!(before, want, "round {round}, rank {rank}: before");
                assert_eq!(after, want, "round {round}, rank {rank}: after");
            }
            assert!(nmse(before, &truth) < 1e-11, "round {round}, rank {rank}: before");
            assert!(nmse(after, &truth) < 1e-11, "round {round}, rank {rank}: after");
        }
        let moved: usize = ranks[0][round].moved;
        let received: u64 = ranks.iter().map(|rounds| rounds[round].bytes).sum();
        let expert = layer.experts[0].to_bytes().len() as u64 + 8;
        assert_eq!(received, moved as u64 * expert, "round {round}: bytes of {moved} experts");
    }
}

/// Loads that drift: in every round something moves, and the balance gets better.
fn check_balance(ranks: &[Vec<Round>]) {
    for (number, round) in ranks[0].iter().enumerate() {
        let [before, after] = round.balances;
        assert!(after > before && round.moved > 0, "round {number}: {before} to {after}");
    }
}

fn four_ranks() -> Vec<(Parallel, bool)> {
    let with = |sizes, exchange| Parallel { sizes, exchange, ..Parallel::default() };
    let sequence = Sizes { sequence_parallel: true, ..sizes(2, 2, 1, true) };
    vec![
        // sums over ranks (naive) take their parts in another order; nothing else differs
        (with(sizes(1, 4, 1, true), ExchangeKind::AllToAll), true),
        (with(sizes(2, 2, 1, true), ExchangeKind::AllToAll), true),
        (with(sequence, ExchangeKind::AllToAll), true),
        (with(sizes(4, 1, 1, true), ExchangeKind::AllToAll), true),
        (Parallel { micro_batches: 2, ..with(sizes(1, 4, 1, true), ExchangeKind::Auto) }, true),
        (with(sizes(1, 4, 1, true), ExchangeKind::Naive), false),
        (with(sizes(4, 1, 1, true), ExchangeKind::Naive), false),
        (with(sizes(2, 2, 1, true), ExchangeKind::Naive), false),
    ]
}

#[test]
fn outputs_stay_the_same_while_experts_move_between_four_ranks() {
    let mut spec = plain();
    spec.expert.bias = true;
    let layer = random_layer(&spec, FloatType::Bf16, 3).unwrap();
    // eight experts and four copies more
    let topology = Topology { ranks: 4, slots: 3, groups: 1, nodes: 1 };
    for (parallel, exact) in four_ranks() {
        let (tokens, rounds) = (37, 4);
        let ranks = serve(&layer, &parallel, topology, (tokens, rounds), None).unwrap();
        check(&layer, &parallel, &ranks, tokens, (None, exact));
        check_balance(&ranks);
    }
}

/// The same for weights of 8 bits with scales, multiplied with rows of 8 bits.
#[test]
fn quantised_experts_move_as_they_are_stored() {
    let mut layer = random_layer(&plain(), FloatType::F32, 3).unwrap();
    let random = &mut Random::new(4);
    let mut quantised = |shape: [usize; 2]| {
        let [rows, cols] = shape;
        // without the sign bit's NaN and the other one
        let codes: Vec<u8> = (0..rows * cols).map(|_| random.bits() as u8 & 0xb7).collect();
        let scales: Vec<u8> = (0..rows * cols.div_ceil(16))
            .flat_map(|_| (0.02 * random.unit() as f32).to_le_bytes())
            .collect();
        let scales =
            Scales::new(scales.into(), ScaleType::F32, Granularity::Group, [1, 16], shape).unwrap();
        let packing = (Element::E4m3, Packing::Rows);
        let codes = Codes::new(packing, codes.into(), shape, scales, Zeros::None, None).unwrap();
        Matrix::new(codes).with_input(ActivationQuant::Quantised(Qdq::Fp8Token))
    };
    let Dims { hidden, intermediate, .. } = layer.spec.dims;
    for expert in &mut layer.experts {
        expert.gate = Some(quantised([intermediate, hidden]));
        expert.up = quantised([intermediate, hidden]);
        expert.down = quantised([hidden, intermediate]);
    }
    let topology = Topology { ranks: 4, slots: 3, groups: 1, nodes: 1 };
    let parallel = Parallel { sizes: sizes(1, 4, 1, true), ..Parallel::default() };
    let kernel = Some("reference");
    let ranks = serve(&layer, &parallel, topology, (37, 2), kernel).unwrap();
    check(&layer, &parallel, &ranks, 37, (kernel, true));
    check_balance(&ranks);
    // 8 bits a weight and a scale for 16 of them: no f32 values travel
    let bytes = layer.experts[0].to_bytes().len();
    assert!(bytes < 3 * hidden * intermediate * 5 / 4 + 400, "{bytes}");
}

/// 64 ranks on 8 nodes; 256 experts in 8 groups, each token in 4 of them, and one more copy on
/// every rank; a shared expert.
#[test]
fn sixty_four_ranks() {
    let mut spec = LayerSpec {
        dims: Dims { hidden: 16, routed_hidden: 16, intermediate: 16 },
        router: RouterSpec {
            score: Score::Sigmoid,
            correction: Correction::OnScore,
            groups: Some(RouterGroups {
                count: 8,
                keep: 4,
                score: GroupScore::TopTwoSum,
                fill: GroupFill::NegativeInfinity,
            }),
            ..RouterSpec::softmax(256, 8, true)
        },
        shared: Some(shared()),
        ..plain()
    };
    spec.routed_scale.factor = 2.5;
    let layer = random_layer(&spec, FloatType::Bf16, 8).unwrap();
    let topology = Topology { ranks: 64, slots: 5, groups: 8, nodes: 8 };
    let parallel = Parallel { sizes: sizes(1, 64, 1, true), ..Parallel::default() };
    let (tokens, rounds) = (150, 2);
    let ranks = serve(&layer, &parallel, topology, (tokens, rounds), None).unwrap();
    check(&layer, &parallel, &ranks, tokens, (None, true));
    check_balance(&ranks);
}

#[test]
fn a_rank_without_its_experts_ends_the_move_on_all() {
    let layer = random_layer(&plain(), FloatType::F32, 3).unwrap();
    let ids = |ids: &[u32]| ids.iter().copied().map(LogicalId).collect::<Vec<_>>();
    let old = ExpertMap::new(2, &[ids(&[0]), ids(&[1])]).unwrap();
    let new = ExpertMap::new(2, &[ids(&[1]), ids(&[0])]).unwrap();
    let outcome = run_ranks(2, |comm| {
        let mine: &[Expert] = match comm.rank() {
            0 => &layer.experts[..1],
            _ => &[],
        };
        let moved = move_experts(&**comm, "model.layers.7.mlp", (&old, &new), mine);
        let Err(Error::Communication(message) | Error::Input { reason: message, .. }) = moved
        else {
            panic!("{moved:?}");
        };
        match comm.rank() {
            0 => assert!(message.contains("rank 1") && message.contains("layers.7"), "{message}"),
            _ => assert!(message.contains("0 experts on rank 1"), "{message}"),
        }
        // nobody goes on with a placement that not all have
        assert!(comm.barrier(At::new("", Step::Finish)).is_err());
        Ok(())
    });
    assert!(outcome.is_ok(), "{outcome:?}");
}
