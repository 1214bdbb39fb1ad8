//! The exchanges by themselves, with experts that are numbers: the order of sums, sizes, waiting,
//! threads, and places beyond 32 bits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use moe_kernels::pool::{Inline, Pool, ThreadPool};
use moe_runner::Result;
use moe_runner::comm::{Communicator, Options, run_ranks, run_ranks_with, single};
use moe_runner::exchange::{
    AllToAllExchange, BatchedExchange, Completeness, DispatchedRows, Exchange, ExpertMap,
    GatherExchange, LocalExchange, LocalRows, SlotRows, Wire,
};
use moe_runner::hidden::ActivationDtype::{Bf16, F16, F32};
use moe_runner::plan::Plan;
use moe_runner::router::{LogicalId, Routing};

const LAYER: &str = "model.layers.0.mlp";

/// A slot's row: what the expert makes of the token's row.
type Expert<'a> = &'a (dyn Fn(LogicalId, &[f32], &mut [f32]) + Sync);

fn routing(top_k: usize, ids: &[u32], weights: Vec<f32>) -> Routing {
    Routing::from_parts(top_k, ids.iter().copied().map(LogicalId).collect(), weights).unwrap()
}

/// The rows of all places, as the experts of this rank make them.
fn computed(
    exchange: (&ExpertMap, usize),
    dispatched: DispatchedRows<'_>,
    (plan, width): (&mut Plan, usize),
    expert: Expert<'_>,
) -> Vec<f32> {
    let held = exchange.0.held_by(exchange.1);
    plan.build(dispatched.ids, dispatched.top_k, held.len()).unwrap();
    let mut values = vec![f32::NAN; plan.slots_planned() * width];
    for (place, slot) in plan.planned().iter().enumerate() {
        let row = &dispatched.hidden[plan.row(*slot) * width..][..width];
        expert(held[plan.expert(place)], row, &mut values[place * width..][..width]);
    }
    values
}

/// All steps of one pass.
fn through(
    exchange: &mut dyn Exchange,
    rows: LocalRows<'_>,
    pool: &dyn ThreadPool,
    expert: Expert<'_>,
) -> Result<Vec<f32>> {
    exchange.start_dispatch(0, rows, pool)?;
    let (map, rank) = exchange.map();
    let (map, mut plan) = (map.clone(), Plan::default());
    let dispatched = exchange.finish_dispatch(0, rows, pool)?;
    let values = computed((&map, rank), dispatched, (&mut plan, rows.width), expert);
    let slots =
        SlotRows { values: &values, width: rows.width, places: plan.places(), weighted: false };
    exchange.start_combine(0, slots, pool)?;
    let mut out = vec![f32::NAN; rows.tokens() * rows.width];
    exchange.finish_combine(0, rows, slots, &mut out, pool)?;
    Ok(out)
}

/// Every kind of exchange over `group`, each with whole experts, with `wire`.
fn exchanges(group: &Arc<dyn Communicator>, experts: u32, wire: Wire) -> Vec<Box<dyn Exchange>> {
    let ranks = group.size();
    let of = |rank| (0..experts).filter(|e| *e as usize % ranks == rank).map(LogicalId).collect();
    let by_rank: Vec<Vec<LogicalId>> = (0..ranks).map(of).collect();
    let map = Arc::new(ExpertMap::new(experts as usize, &by_rank).unwrap());
    let one = Arc::new(ExpertMap::one_rank(experts as usize));
    let all_to_all = || AllToAllExchange::new(LAYER, group.clone(), map.clone(), None, wire);
    let gather = || {
        let of = (map.clone(), group.rank());
        GatherExchange::new(LAYER, group.clone(), of, Completeness::Complete, wire)
    };
    let same_rows = Some(group.clone());
    vec![
        Box::new(LocalExchange::of(one, 0, Completeness::Complete)),
        Box::new(all_to_all()),
        Box::new(gather()),
        Box::new(AllToAllExchange::new(LAYER, group.clone(), map.clone(), same_rows, wire)),
        Box::new(BatchedExchange::new(Box::new(all_to_all()), None)),
        Box::new(BatchedExchange::new(Box::new(gather()), Some(2200))),
    ]
}

/// Every copy of every expert has a number of its own, which leads back to the expert.
#[test]
fn numbers_of_copies_lead_back_to_their_experts() {
    let by_rank = [&[3, 0][..], &[1, 3, 2], &[], &[0, 3]];
    let by_rank = by_rank.map(|ids| ids.iter().copied().map(LogicalId).collect());
    let map = ExpertMap::new(4, &by_rank).unwrap();
    let mut numbers = Vec::new();
    for id in (0..4).map(LogicalId) {
        for copy in map.copies(id) {
            assert_eq!(map.logical_of(map.physical(*copy)), id);
            numbers.push(map.physical(*copy).0);
        }
    }
    numbers.sort_unstable();
    assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6]);
}

/// 1 + 2⁻²⁴ + 2⁻²⁴ is 1 from left to right, and 1 + 2⁻²³ from right to left. The naive exchange adds
/// each rank's slots first, so it is held to the order where one rank has all experts.
#[test]
fn slots_are_added_in_their_order() {
    const SMALL: f32 = 1.0 / (1 << 24) as f32;
    let table = [1.0, SMALL, SMALL, 1.0];
    let expert: Expert = &|id, _, out| out.fill(table[id.0 as usize]);
    let routing = routing(3, &[0, 1, 2, 1, 2, 3], vec![1.0; 6]);
    let hidden = [0.5; 6];
    let want = [0x3f80_0000, 0x3f80_0001];
    let check = |exchange: &mut dyn Exchange| {
        let rows = LocalRows::new(&hidden, 3, &routing);
        let out = through(exchange, rows, &Inline, expert)?;
        let got: Vec<u32> = out.chunks(3).map(|row| row[1].to_bits()).collect();
        assert_eq!(got, want, "{exchange:?}");
        Ok(())
    };
    let wire = Wire::exact(F32, false);
    for mut exchange in exchanges(&single(), 4, wire) {
        check(&mut *exchange).unwrap();
    }
    run_ranks(4, |group| {
        let mut all = exchanges(group, 4, wire);
        // the second naive one is the batched
        drop(all.remove(5));
        drop(all.remove(2));
        all.iter_mut().try_for_each(|exchange| check(&mut **exchange))
    })
    .unwrap();
}

/// Rows, sums and bits are the same for any number of threads, in every wire format.
#[test]
fn threads_change_no_bit() {
    let (tokens, width, experts) = (700, 96, 8);
    let at = |i: usize, of: u32| (i as u32).wrapping_mul(2_654_435_769) >> 8 & (of - 1);
    let hidden: Vec<f32> =
        (0..tokens * width).map(|i| at(i, 1 << 12) as f32 / 512.0 - 4.0).collect();
    let ids: Vec<u32> = (0..tokens).flat_map(|t| [at(t, 4), 4 + at(t + 9, 4)]).collect();
    let weights = (0..2 * tokens).map(|i| at(i, 1 << 10) as f32 / 700.0).collect();
    let routing = routing(2, &ids, weights);
    let expert: Expert = &|id, row, out| {
        out.iter_mut().zip(row).for_each(|(out, x)| *out = x * (id.0 as f32 + 0.3));
    };
    let run = |pool: &(dyn ThreadPool + Sync), wire| {
        run_ranks(3, |group| {
            let rows = LocalRows::new(&hidden, width, &routing);
            let all = exchanges(group, experts, wire);
            all.into_iter().map(|mut e| through(&mut *e, rows, pool, expert)).collect()
        })
        .unwrap()
    };
    let pool = Pool::new(3).unwrap();
    for dtype in [F32, Bf16, F16] {
        let wire = Wire::exact(dtype, false);
        let (one, many): (Vec<Vec<Vec<f32>>>, _) = (run(&Inline, wire), run(&pool, wire));
        assert_eq!(one, many, "{dtype:?}");
        if dtype == F32 {
            // all experts on one rank, or each row where its experts are: the same numbers
            for rank in &one {
                assert!([1, 3, 4].iter().all(|exchange| rank[*exchange] == rank[0]));
            }
        }
    }
}

/// The first rank starts, and only then the second one comes: a start that waits would never end.
#[test]
fn starts_do_not_wait() {
    let options = Options { timeout: Duration::from_secs(20) };
    for kind in [1, 2, 3, 4, 5] {
        let started = [AtomicBool::new(false), AtomicBool::new(false)];
        let routing = routing(1, &[0, 1], vec![1.0; 2]);
        let first = |step: usize, rank: usize| {
            let since = Instant::now();
            while rank == 1 && !started[step].load(Ordering::Acquire) {
                assert!(since.elapsed() < Duration::from_secs(10), "step {step} waits");
                std::thread::yield_now();
            }
        };
        run_ranks_with(2, options, |group| {
            let mut exchange = exchanges(group, 2, Wire::exact(F32, false)).remove(kind);
            let rows = LocalRows::new(&[1.0, 2.0], 1, &routing);
            first(0, group.rank());
            exchange.start_dispatch(0, rows, &Inline)?;
            started[0].store(true, Ordering::Release);
            let (map, mut plan) = (exchange.map().0.clone(), Plan::default());
            let dispatched = exchange.finish_dispatch(0, rows, &Inline)?;
            let expert: Expert = &|_, row, out| out.copy_from_slice(row);
            let values = computed((&map, group.rank()), dispatched, (&mut plan, 1), expert);
            let places = plan.places();
            let slots = SlotRows { values: &values, width: 1, places, weighted: false };
            first(1, group.rank());
            exchange.start_combine(0, slots, &Inline)?;
            started[1].store(true, Ordering::Release);
            let mut out = [0.0; 2];
            exchange.finish_combine(0, rows, slots, &mut out, &Inline)?;
            // what all ranks with the same rows hold once, ranks with rows of their own hold once too
            assert_eq!(out, [1.0, 2.0], "{exchange:?}");
            Ok(())
        })
        .unwrap();
    }
}

/// Ranks that do not agree on the wire format: what comes is no rows, and says so.
#[test]
fn bytes_that_are_no_rows_are_refused() {
    for kind in [1, 2] {
        let routing = routing(1, &[0, 1], vec![1.0; 2]);
        let error = run_ranks(2, |group| {
            let wire = Wire::exact([F32, F16][group.rank()], false);
            let mut exchange = exchanges(group, 2, wire).remove(kind);
            let rows = LocalRows::new(&[1.0; 6], 3, &routing);
            through(&mut *exchange, rows, &Inline, &|_, row, out| out.copy_from_slice(row))
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("which are no rows of") && error.contains(LAYER), "{error}");
    }
}

/// One expert that gets every row of a batch asks for no more memory than there are slots.
#[test]
fn a_hot_expert_takes_no_room_for_the_others() {
    let (tokens, width) = (64, 5);
    let routing = routing(1, &[7; 64], vec![1.0; tokens]);
    let hidden = vec![1.0; tokens * width];
    let rows = LocalRows::new(&hidden, width, &routing);
    let mut exchange = BatchedExchange::new(Box::new(LocalExchange::new(256)), None);
    exchange.start_dispatch(0, rows, &Inline).unwrap();
    let dispatched = exchange.finish_dispatch(0, rows, &Inline).unwrap();
    assert_eq!(dispatched.hidden.len(), tokens * width);
    // with a capacity the shape is fixed, and known before
    let mut exchange = BatchedExchange::new(Box::new(LocalExchange::new(256)), Some(64));
    let stated = exchange.workspace_bytes(tokens, 1, width);
    exchange.start_dispatch(0, rows, &Inline).unwrap();
    let dispatched = exchange.finish_dispatch(0, rows, &Inline).unwrap();
    assert_eq!(dispatched.hidden.len(), 256 * 64 * width);
    assert!(stated >= size_of_val(dispatched.hidden), "{stated}");
}

/// Rows whose offset passes 2³² elements, in memory of which only what is touched exists.
#[test]
fn places_beyond_32_bits() {
    const WIDTH: usize = 1 << 16;
    const FAR: usize = (1 << 16) + 1;
    let len = (FAR + 1) * WIDTH * size_of::<f32>();
    let mut map = memmap2::MmapOptions::new().len(len).no_reserve_swap().map_anon().unwrap();
    let values: &mut [f32] = bytemuck::cast_slice_mut(&mut map);
    values[..WIDTH].fill(1.0);
    values[FAR * WIDTH..].fill(0.5);
    let routing = routing(2, &[0, 1], vec![1.0, 4.0]);
    let hidden = vec![0.0; WIDTH];
    let rows = LocalRows::new(&hidden, WIDTH, &routing);
    let places = [0, FAR as u32];
    let slots = SlotRows { values, width: WIDTH, places: &places, weighted: false };
    for pool in [&Inline as &dyn ThreadPool, &Pool::new(2).unwrap()] {
        let mut exchange = LocalExchange::new(2);
        exchange.start_dispatch(0, rows, pool).unwrap();
        exchange.start_combine(0, slots, pool).unwrap();
        let mut out = vec![0.0; WIDTH];
        exchange.finish_combine(0, rows, slots, &mut out, pool).unwrap();
        assert!(out.iter().all(|v| *v == 3.0), "{}", out[0]);
    }
}
