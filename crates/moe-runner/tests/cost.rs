//! The collectives of a forward pass, as predicted and as counted.

mod layers;

use std::sync::Arc;
use std::time::Duration;

use layers::{options, plain, rows, shared, splits, variants};
use moe_kernels::numerics::quantise::Qdq;
use moe_runner::comm::tcp::{self, Rendezvous};
use moe_runner::comm::{self, Groups, Traffic, run_ranks};
use moe_runner::exchange::resident::ResidentWire;
use moe_runner::exchange::{BetweenGpus, ExpertMap};
use moe_runner::hidden::ActivationDtype::{self, Bf16, F32};
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::parallel::balance::{Topology, initial};
use moe_runner::parallel::cost::{Pass, bytes_of, weight_bytes};
use moe_runner::parallel::links::LinkSpeed;
use moe_runner::parallel::{ExchangeKind, Parallel, deal_rows};
use moe_runner::router::LogicalId;
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, Report};
use moe_runner::spec::{IdleExperts, RmsNorm, TransformStep};
use moe_runner::weights::{ActivationQuant, FloatType, LoadedLayer, random_layer};

const WIDTH: usize = 48;

/// What every rank of a real pass counted, in all groups, and what the tokens chose.
fn counted(
    layer: &LoadedLayer,
    (dtype, kernel): (ActivationDtype, Option<&str>),
    parallel: &Parallel,
    map: &Arc<ExpertMap>,
    hidden: &[f32],
) -> moe_runner::Result<(Vec<Traffic>, Vec<LogicalId>)> {
    let options = options(kernel, dtype);
    let deal = deal_rows(hidden.len() / WIDTH, parallel.sizes);
    let k = layer.spec.router.top_k;
    let ranks = run_ranks(parallel.sizes.ranks(), |world| {
        let groups = Groups::new(world.clone(), parallel.sizes)?;
        let read = || {
            let all = [&groups.world, &groups.ep, &groups.rows, &groups.tp];
            all.iter().fold(Traffic::default(), |sum, group| sum.plus(&group.traffic().read()))
        };
        let rows = deal[world.rank()].clone();
        let hidden = &hidden[rows.start * WIDTH..rows.end * WIDTH];
        let mut out = vec![0.0; hidden.len()];
        let mut runner = MoeRunner::on_rank_with(layer, &options, &groups, parallel, map.clone())?;
        let before = read();
        let input = ForwardInput::new(Rows::F32(hidden));
        let mut report = Report::default();
        runner.forward_reporting(&input, RowsMut::F32(&mut out), Some(&mut report))?;
        Ok((read().since(&before), report.routing.ids))
    })?;
    let mut ids = vec![LogicalId(0); hidden.len() / WIDTH * k];
    let mut traffic = Vec::new();
    for (rows, (counts, chosen)) in deal.into_iter().zip(ranks) {
        ids[rows.start * k..rows.end * k].copy_from_slice(&chosen);
        traffic.push(counts);
    }
    Ok((traffic, ids))
}

fn check(layer: &LoadedLayer, dtype: ActivationDtype, kernel: Option<&str>, redundant: bool) {
    let experts = layer.spec.router.experts;
    for (name, parallel) in splits() {
        let sizes = parallel.sizes;
        let map = match (sizes.use_ep(), redundant) {
            (false, true) => continue,
            (false, false) => ExpertMap::one_rank(experts),
            (true, false) => parallel.placement.map(experts, sizes.ep()).unwrap(),
            (true, true) => {
                let slots = experts.div_ceil(sizes.ep()) + 1;
                let ranks = sizes.ep();
                initial(experts, Topology { ranks, slots, groups: 1, nodes: 1 }).unwrap()
            }
        };
        let map = Arc::new(map);
        for tokens in [0, 1, 7, 40] {
            let hidden = rows(dtype, tokens, WIDTH, tokens as u64);
            let Ok((counts, ids)) = counted(layer, (dtype, kernel), &parallel, &map, &hidden)
            else {
                assert!(layer.spec.expert.norm.is_some() && sizes.moe_tp() > 1, "{name}");
                break;
            };
            let pass = Pass::new(layer, dtype, &parallel, &map).unwrap();
            for (rank, (got, want)) in counts.iter().zip(pass.traffic(&ids)).enumerate() {
                assert_eq!(*got, want, "{}: {name}, {tokens} tokens, rank {rank}", layer.spec.name);
            }
        }
    }
}

#[test]
fn every_collective_of_every_split_is_predicted() {
    // every way in which a layer's steps change what is reduced
    for option in [
        "plain",
        "latent",
        "latent with norm",
        "output transform that is no sum",
        "expert norm",
        "skip experts",
        "identity experts",
        "scale on output",
        "shared",
        "shared with norms",
        "output norm",
    ] {
        let (_, mut spec) = variants().into_iter().find(|(name, _)| *name == option).unwrap();
        spec.name = option.into();
        check(&random_layer(&spec, FloatType::F32, 11).unwrap(), F32, None, false);
    }
}

/// Kimi-K3's experts stand between projections to a narrower width, with a norm before the second: what is
/// reduced before the norm is as wide as the experts' rows, not as the layer's.
#[test]
fn with_a_norm_between_experts_and_a_wider_layer() {
    let (_, mut spec) = variants().into_iter().find(|(name, _)| *name == "latent").unwrap();
    let norm = RmsNorm { eps: 1e-6, unit_offset: false, scale_first: false };
    spec.output_transform.steps.insert(0, TransformStep::RmsNorm(norm));
    check(&random_layer(&spec, FloatType::F32, 11).unwrap(), F32, None, false);
}

#[test]
fn with_copies_of_experts_and_16_bit_rows() {
    let layer = random_layer(&plain(), FloatType::Bf16, 11).unwrap();
    check(&layer, Bf16, None, true);
}

#[test]
fn with_scales_of_whole_rows_that_slices_agree_on() {
    // slots of idle experts have no row
    for idle in [None, Some(IdleExperts::Skip { count: 3 })] {
        let mut spec = plain();
        spec.shared = Some(shared());
        spec.router.idle = idle;
        let mut layer = random_layer(&spec, FloatType::F32, 11).unwrap();
        let shared = layer.shared.as_mut().unwrap();
        for expert in layer.experts.iter_mut().chain(&mut shared.experts) {
            expert.down.input = ActivationQuant::Quantised(Qdq::Int8Token);
        }
        check(&layer, F32, Some("reference"), false);
    }
}

#[test]
fn rows_go_once_to_each_rank_that_has_one_of_their_experts() {
    let layer = random_layer(&plain(), FloatType::F32, 1).unwrap();
    let sizes = layers::sizes(1, 2, 1, true);
    let parallel = Parallel { sizes, exchange: ExchangeKind::AllToAll, ..Parallel::default() };
    let map = parallel.placement.map(8, 2).unwrap();
    let pass = Pass::new(&layer, F32, &parallel, &map).unwrap();
    // rank 0: both experts here; both there. rank 1: one here, one there
    let ids = [0, 3, 4, 5, 7, 0, 6, 4].map(LogicalId);
    assert_eq!(pass.rows_sent(&ids), [[1, 1], [1, 2]]);
    let row = 2 * 8 + WIDTH * 4;
    let sent: Vec<u64> = pass.traffic(&ids).iter().map(|t| t.total().sent).collect();
    // a row there and the results of its two slots back from rank 1; one and one from rank 0
    assert_eq!(sent, [(row + WIDTH * 4) as u64, (row + 2 * WIDTH * 4) as u64]);
}

#[test]
fn bytes_of_weights_add_up() {
    let mut spec = plain();
    spec.shared = Some(shared());
    let layer = random_layer(&spec, FloatType::Bf16, 1).unwrap();
    let expert = 3 * 48 * 40 * 2;
    assert_eq!(bytes_of(&layer.experts), 8 * expert);
    let all = layer.shared.as_ref().map(|s| bytes_of(&s.experts)).unwrap();
    let one = ExpertMap::one_rank(8);
    for (sizes, map, routed, shared) in [
        (layers::sizes(4, 1, 1, false), &one, [2 * expert; 4], all / 4),
        (layers::sizes(1, 4, 1, false), &one, [2 * expert; 4], all),
        (
            layers::sizes(1, 4, 1, true),
            &initial(8, Topology { ranks: 4, slots: 3, groups: 1, nodes: 1 }).unwrap(),
            [3 * expert; 4],
            all,
        ),
    ] {
        let parallel = Parallel { sizes, ..Parallel::default() };
        let bytes = weight_bytes(&layer, &parallel, map).unwrap();
        assert!(bytes.iter().zip(routed).all(|(b, r)| b.routed == r && b.shared == shared));
    }
    // eight experts on three ranks
    let parallel = Parallel { sizes: layers::sizes(1, 3, 1, true), ..Parallel::default() };
    let map = parallel.placement.map(8, 3).unwrap();
    let bytes = weight_bytes(&layer, &parallel, &map).unwrap();
    let routed: Vec<usize> = bytes.iter().map(|bytes| bytes.routed).collect();
    assert_eq!(routed, [3 * expert, 3 * expert, 2 * expert]);
}

/// Exchanges that take a latency, and their bytes at a rate: both are found, as the slowest rank sees them.
#[test]
fn a_link_of_known_speed_is_found_to_have_it() {
    for (ranks, slower) in [(2, 1.0), (2, 3.0), (5, 1.0), (5, 3.0)] {
        let speeds = run_ranks(ranks, |world| {
            let slower = if world.rank() == ranks - 1 { slower } else { 1.0 };
            // of exchanges that take their time, half of it and twice as long, the median counts
            let mut times = [slower, slower / 2.0, slower * 2.0].into_iter().cycle();
            LinkSpeed::measure_with(&**world, |bytes| {
                let sent = (bytes * (ranks - 1)) as f64;
                let time = times.next().unwrap() * (100e-6 + sent / 4e9);
                Ok(Duration::from_secs_f64(time))
            })
        });
        for LinkSpeed { latency_us, gbps } in speeds.unwrap() {
            assert!((latency_us / (slower * 100.0) - 1.0).abs() < 1e-3, "{ranks}: {latency_us}");
            assert!((gbps * slower / 4.0 - 1.0).abs() < 1e-3, "{ranks}: {gbps}");
        }
    }
}

/// A link is measured over whatever connects the ranks, the same on each; and takes a latency for every collective
/// and its bytes at a rate.
#[test]
fn links_are_measured_and_predict_a_time() {
    let speeds = run_ranks(3, |world| LinkSpeed::measure(&**world)).unwrap();
    assert!(speeds.iter().all(|speed| *speed == speeds[0]), "{speeds:?}");
    assert!(speeds[0].gbps.is_finite() && speeds[0].gbps > 0.0, "{speeds:?}");
    assert!(speeds[0].latency_us > 0.0, "{speeds:?}");

    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap().to_string();
    drop(free);
    let speeds = std::thread::scope(|scope| {
        let start = |rank| {
            let at = Rendezvous { address: address.clone(), rank, ranks: 2 };
            scope.spawn(move || LinkSpeed::measure(&*tcp::open(&at, comm::Options::default())?))
        };
        [start(0), start(1)].map(|rank| rank.join().unwrap().unwrap())
    });
    assert!(speeds[0] == speeds[1] && speeds[0].gbps > 0.0, "{speeds:?}");
    let error = LinkSpeed::measure(&*comm::single()).unwrap_err().to_string();
    assert!(error.contains("one rank has none"), "{error}");

    let spec = plain();
    let layer = random_layer(&spec, FloatType::F32, 5).unwrap();
    let ids: Vec<LogicalId> = (0..64).map(|slot| LogicalId(slot % 8)).collect();
    let parallel = Parallel { sizes: layers::sizes(1, 4, 1, true), ..Parallel::default() };
    let map = parallel.placement.map(8, 4).unwrap();
    let pass = Pass::new(&layer, F32, &parallel, &map).unwrap();
    let link = LinkSpeed { latency_us: 10.0, gbps: 2.0 };
    let mut uneven = [0; 2];
    // and where all rows go to one rank, which gets more than it sends
    for ids in [&ids, &vec![LogicalId(0); 64]] {
        for traffic in pass.traffic(ids) {
            let total = traffic.total();
            let want = 2.0 * 10e-6 + total.sent.max(total.received) as f64 / 2e9;
            assert!((link.seconds(&traffic) - want).abs() < 1e-12, "{traffic:?}");
            uneven[0] += usize::from(total.sent < total.received);
            uneven[1] += usize::from(total.sent > total.received);
        }
    }
    assert!(uneven.iter().all(|ranks| *ranks > 0), "{uneven:?}");
    // what stays on GPUs: every row once to each other rank, its slots, and an output for each
    let wire = ResidentWire { row: 100, output: 1000 };
    let between = pass.on_gpus(wire, BetweenGpus::Counted).traffic(&ids);
    let sums = between.iter().fold(Traffic::default(), |sum, traffic| sum.plus(traffic)).total();
    assert_eq!((sums.calls, sums.sent), (4 * 3, sums.received));
    let rows: usize = pass
        .rows_sent(&ids)
        .iter()
        .enumerate()
        .map(|(from, to)| {
            to.iter()
                .enumerate()
                .filter(|(rank, _)| *rank != from)
                .map(|(_, rows)| rows)
                .sum::<usize>()
        })
        .sum();
    let far = ids
        .iter()
        .enumerate()
        .filter(|(slot, id)| {
            let home = map.home(**id, slot / 2 % 8).unwrap().rank;
            home != slot / 2 / 8
        })
        .count();
    let counts = 4 * 3 * 2 * 4 * 4;
    assert_eq!(sums.sent as usize, counts + rows * 100 + far * (8 + 1000));
}
