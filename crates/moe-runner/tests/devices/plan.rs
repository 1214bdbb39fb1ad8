//! Bytes and collectives between GPUs, as predicted and as counted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use moe_runner::comm::run_ranks;
use moe_runner::exchange::one_sided::{Meeting, Places, Side};
use moe_runner::exchange::resident::{ResidentWire, Room};
use moe_runner::exchange::{BetweenGpus, ExpertMap};
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::parallel::cost::Pass;
use moe_runner::parallel::links::LinkSpeed;
use moe_runner::parallel::{ExchangeKind, Parallel, Placement, deal_rows};
use moe_runner::router::LogicalId;
use moe_runner::spec::WeightOn;
use moe_runner::weights::{FloatType, random_layer};

use crate::host_gpus::Own;
use crate::host_gpus::put::{Memory, Put, Waits};
use crate::host_gpus::small::Held;
use crate::{Batch, MOST, between, layers, rank, ways};

#[test]
fn every_byte_between_gpus_is_predicted() {
    let mut spec = layers::plain();
    spec.router.top_k = 3;
    let layer = &random_layer(&spec, FloatType::F32, 3).unwrap();
    let (width, k) = (spec.dims.routed_hidden, spec.router.top_k);
    let wire = ResidentWire { row: 4 * width, output: 4 * width };
    for ranks in [2, 3, 4] {
        let held = |rank: usize| {
            let ids = (0..8).filter(|id| id % ranks == rank || *id < 2);
            ids.map(|id| LogicalId(id as u32)).collect()
        };
        let copied: Vec<Vec<LogicalId>> = (0..ranks).map(held).collect();
        let maps = [Placement::Linear.map(8, ranks).unwrap(), ExpertMap::new(8, &copied).unwrap()];
        for (map, tokens) in maps.iter().flat_map(|map| [0, 1, 7, 24].map(|tokens| (map, tokens))) {
            let whole = Batch::new(layer, tokens, tokens as u64);
            let ids: Vec<LogicalId> = whole.ids.iter().map(|id| LogicalId(*id as u32)).collect();
            for (way, lanes) in ways(k).into_iter().flat_map(|way| [1, 2, 3].map(|n| (way, n))) {
                let sizes = layers::sizes(1, ranks, 1, true);
                let parallel = Parallel { sizes, micro_batches: lanes, ..Parallel::default() };
                let deal = deal_rows(tokens, sizes);
                let mut between = between(layer, ranks, way, lanes);
                // known to all: what hosts tell each other is not the GPUs'
                let most = deal.iter().map(std::iter::ExactSizeIterator::len).max();
                between.waits = Waits { most, ..Waits::default() };
                let (between, map) = (&between, &Arc::new(map.clone()));
                let counted = run_ranks(ranks, |world| {
                    let rows = deal[world.rank()].clone();
                    let slots = rows.start * k..rows.end * k;
                    let own = Batch {
                        hidden: whole.hidden[rows.start * width..rows.end * width].to_vec(),
                        ids: whole.ids[slots.clone()].to_vec(),
                        weights: whole.weights[slots].to_vec(),
                        output: Vec::new(),
                    };
                    let mut runner = rank(layer, world, map, between)?;
                    let before = world.traffic().read();
                    own.forward(&mut runner)?;
                    Ok(world.traffic().read().since(&before))
                })
                .unwrap();
                let pass = Pass::new(layer, F32, &parallel, map).unwrap().on_gpus(wire, way);
                let place = format!("{ranks} ranks, {tokens} tokens, {way:?}, {lanes} lanes");
                assert_eq!(counted, pass.traffic(&ids), "{place}");
            }
        }
    }
}

/// What would run is one decision, of the runner and the plan.
#[test]
fn which_way_rows_go_is_decided_once() {
    let spec = layers::plain();
    let of = |parallel: &Parallel, reach: bool| parallel.between_gpus(&spec, reach).unwrap();
    let sizes = layers::sizes(1, 4, 1, true);
    let plain = Parallel { sizes, ..Parallel::default() };
    let eight = Room { slots: 8, rows: 8 };
    let room = Some(eight);
    assert_eq!(of(&plain, true), Some(BetweenGpus::OneSided));
    assert_eq!(of(&plain, false), Some(BetweenGpus::Counted));
    assert_eq!(of(&Parallel { one_sided: false, ..plain }, true), Some(BetweenGpus::Counted));
    let with_room = of(&Parallel { room, ..plain }, true);
    assert_eq!(with_room, Some(BetweenGpus::WithRoom(eight)));
    // also in micro-batches
    let halves = Parallel { micro_batches: 2, ..plain };
    assert_eq!((of(&halves, true), of(&halves, false)), (of(&plain, true), of(&plain, false)));
    // more ranks than a word has bits, the same rows on several ranks, slices, sums over ranks, and what was asked for
    let many = Parallel { sizes: layers::sizes(1, 33, 1, true), ..plain };
    assert_eq!(of(&many, true), Some(BetweenGpus::Counted));
    for parallel in [
        Parallel { sizes: layers::sizes(2, 2, 1, true), ..plain },
        Parallel { sizes: layers::sizes(1, 4, 1, false), ..plain },
        Parallel { sizes: layers::sizes(1, 1, 1, true), ..plain },
        Parallel { exchange: ExchangeKind::Naive, ..plain },
        Parallel { keeps_rows: false, ..plain },
    ] {
        assert_eq!(of(&parallel, true), None, "{parallel:?}");
    }
    let (mut narrow, mut input) = (spec.clone(), spec.clone());
    narrow.dims.routed_hidden = 12;
    input.router.weight_on = WeightOn::Input;
    for spec in [narrow, input] {
        assert_eq!(plain.between_gpus(&spec, true).unwrap(), None);
    }
}

/// A link is measured by what would go over it: rows that are put, and a meeting.
#[test]
fn a_link_is_measured_by_puts_and_a_meeting() {
    let (ranks, width) = (3, 64);
    let map = &Placement::Linear.map(ranks, ranks).unwrap();
    let most = MOST * 100;
    let all = &Memory::all(ranks, 1, most, (width, ranks - 1));
    let speeds = run_ranks(ranks, |group| {
        let me = group.rank();
        let held = Held(map.held_by(me));
        let to: Vec<u32> = (0..ranks as u32).filter(|rank| *rank as usize != me).collect();
        LinkSpeed::measure_with(&**group, |bytes| {
            // as many bytes as there is room for
            let rows = bytes.div_ceil(4 * width).min(most);
            let (x, ids) = (vec![1.0; rows * width], to.repeat(rows));
            let weights = vec![1.0; ids.len()];
            let (x, ids, weights) = (&x[..], &ids[..], &weights[..]);
            let own = Own { group, map, width, top_k: ranks - 1, x, ids, weights };
            let mut put = Put::new(own, &held, all);
            let places = Places { ranks, most: rows, top_k: ranks - 1 };
            let start = Instant::now();
            put.put_rows(0, places)?;
            put.meet(0, Meeting::Rows)?;
            let rows = 4 * (width + 1) * rows;
            assert!(put.moved[0].0 >= rows, "{:?}", put.moved);
            Ok(start.elapsed().max(Duration::from_nanos(1)))
        })
    })
    .unwrap();
    assert!(speeds.iter().all(|speed| *speed == speeds[0]), "{speeds:?}");
    assert!(speeds[0].gbps > 0.0 && speeds[0].latency_us > 0.0, "{speeds:?}");
}
