//! Experts move from GPU to GPU while a layer is served.

use std::sync::Arc;

use moe_runner::Result;
use moe_runner::comm::{Groups, run_ranks};
use moe_runner::exchange::ExpertMap;
use moe_runner::parallel::Parallel;
use moe_runner::parallel::balance::{Loads, rebalance};
use moe_runner::random::Random;
use moe_runner::router::LogicalId;
use moe_runner::runner::MoeRunner;
use moe_runner::spec::{Activation, LayerSpec};
use moe_runner::weights::{FloatType, random_layer};

use crate::{Batch, between, layers, rank, ways};

/// Every expert on one to three ranks, at places in any order, now and then twice on one; in every third placement the
/// first rank has none.
fn placements(experts: usize, ranks: usize, count: usize, seed: u64) -> Vec<Arc<ExpertMap>> {
    let random = &mut Random::new(seed);
    (0..count)
        .map(|number| {
            let least = usize::from(number % 3 == 2 && ranks > 1);
            let mut held = vec![Vec::new(); ranks];
            let mut ids: Vec<u32> = (0..experts as u32).collect();
            for left in (1..ids.len()).rev() {
                ids.swap(left, random.bits() as usize % (left + 1));
            }
            for id in ids {
                for _ in 0..1 + random.bits() as usize % 3 {
                    let rank = least + random.bits() as usize % (ranks - least);
                    held[rank].push(LogicalId(id));
                }
            }
            Arc::new(ExpertMap::new(experts, &held).unwrap())
        })
        .collect()
}

fn specs() -> Vec<LayerSpec> {
    let mut biased = layers::plain();
    biased.expert.bias = true;
    biased.expert.activation = Activation::ClampedSwiglu { alpha: 1.702, beta: 1.0, limit: 0.7 };
    let mut plain = layers::plain();
    plain.expert.gated = false;
    plain.router.top_k = 3;
    vec![layers::plain(), biased, plain]
}

/// Before a move, while it is under way, and after it: the bits of one rank, over every way between GPUs, and as many slots
/// of each expert counted as were chosen.
#[test]
fn no_bit_changes_while_experts_move() {
    let (mut copies, mut empty, mut passes) = (0, 0, 0);
    for (number, spec) in specs().into_iter().enumerate() {
        let float = [FloatType::F32, FloatType::Bf16][number % 2];
        let layer = &random_layer(&spec, float, number as u64 + 5).unwrap();
        let (experts, k) = (spec.router.experts, spec.router.top_k);
        for ranks in [2, 3, 4] {
            let maps = &placements(experts, ranks, 5, ranks as u64);
            // ragged, and ranks without rows
            let batches: Vec<Vec<Batch>> = [[5, 12, 2, 7], [0, 3, 0, 1]]
                .iter()
                .map(|tokens| {
                    let of = |rank: usize| Batch::new(layer, tokens[rank], 10 + rank as u64);
                    (0..ranks).map(of).collect()
                })
                .collect();
            for way in ways(k) {
                let (batches, between) = (&batches, &between(layer, ranks, way, 1));
                let parallel =
                    Parallel { sizes: layers::sizes(1, ranks, 1, true), ..Parallel::default() };
                let done = run_ranks(ranks, |world| {
                    let (me, groups) = (world.rank(), Groups::new(world.clone(), parallel.sizes)?);
                    let mut runner = rank(layer, world, &maps[0], between)?;
                    runner.count_load(true)?;
                    let mut counts = [0, 0];
                    for (at, map) in maps.iter().enumerate().skip(1) {
                        let old = &maps[at - 1];
                        let mut load = vec![0_u64; experts];
                        let mut pass =
                            |runner: &mut MoeRunner, which: usize, map: &ExpertMap| -> Result<()> {
                                let batch = &batches[which][me];
                                assert!(batch.forward(runner)? == batch.output, "{way:?}, {map:?}");
                                for (slot, id) in batch.ids.iter().enumerate() {
                                    load[*id as usize] += 1;
                                    let id = LogicalId(*id as u32);
                                    let home = map.home(id, slot / k).unwrap();
                                    counts[0] += usize::from(home != map.copies(id)[0]);
                                }
                                Ok(())
                            };
                        pass(&mut runner, 0, old)?;
                        runner.start_move(map)?;
                        pass(&mut runner, 1, old)?;
                        pass(&mut runner, 0, old)?;
                        runner.finish_move(&groups, &parallel)?;
                        let (now, _) = runner.method().exchange.map();
                        assert_eq!(now, &**map);
                        pass(&mut runner, 1, map)?;
                        pass(&mut runner, 0, map)?;
                        assert_eq!(runner.take_load()?, load, "{way:?}, {map:?}");
                        counts[1] += usize::from(map.held_by(me).is_empty());
                    }
                    Ok(counts)
                })
                .unwrap();
                copies += done.iter().map(|counts| counts[0]).sum::<usize>();
                empty += done.iter().map(|counts| counts[1]).sum::<usize>();
                passes += 1;
            }
        }
    }
    // slots were served by other copies than the first, and ranks held nothing
    assert!(copies > 1000 && empty > 10 && passes == 27, "{copies}, {empty}, {passes}");
}

/// The load that GPUs count is what the placement follows: it gets better, and the sum stays what it was.
#[test]
fn a_placement_follows_the_load_that_gpus_count() {
    let layer = &random_layer(&layers::plain(), FloatType::F32, 3).unwrap();
    let batches: Vec<Batch> = (0..4).map(|rank| Batch::new(layer, 12, 30 + rank)).collect();
    let held = |experts: [u32; 3]| experts.map(LogicalId).to_vec();
    let first = [[0, 1, 0], [2, 3, 2], [4, 5, 4], [6, 7, 6]].map(held);
    let first = &Arc::new(ExpertMap::new(8, &first).unwrap());
    for way in ways(2) {
        let between = &between(layer, 4, way, 1);
        let parallel = Parallel { sizes: layers::sizes(1, 4, 1, true), ..Parallel::default() };
        run_ranks(4, |world| {
            let groups = Groups::new(world.clone(), parallel.sizes)?;
            let mut runner = rank(layer, world, first, between)?;
            runner.count_load(true)?;
            let batch = &batches[world.rank()];
            assert!(batch.forward(&mut runner)? == batch.output);
            let mut loads = Loads::new(8, runner.take_load()?)?;
            loads.all_reduce(&**world)?;
            assert_eq!(loads.layer(0).iter().sum::<u64>(), 4 * 12 * 2);
            let loads: Vec<f64> = loads.layer(0).iter().map(|count| *count as f64).collect();
            let new = rebalance(&loads, first, 1, 1)?;
            assert!(new.after > new.before, "{} to {}", new.before, new.after);
            runner.start_move(&Arc::new(new.map))?;
            runner.finish_move(&groups, &parallel)?;
            assert!(batch.forward(&mut runner)? == batch.output);
            Ok(())
        })
        .unwrap();
    }
}

/// Kernels of the processor count what they route, and have their own way of moving experts.
#[test]
fn the_processor_counts_and_refuses_to_move_what_no_gpu_holds() {
    let layer = &random_layer(&layers::plain(), FloatType::F32, 3).unwrap();
    let mut runner = layers::runner(layer, None, moe_runner::hidden::ActivationDtype::F32);
    assert!(runner.take_load().unwrap_err().to_string().contains("nobody counts"));
    runner.count_load(true).unwrap();
    let batch = Batch::new(layer, 9, 1);
    for _ in 0..2 {
        batch.forward(&mut runner).unwrap();
    }
    let mut load = vec![0; 8];
    batch.ids.iter().for_each(|id| load[*id as usize] += 2);
    assert_eq!(runner.take_load().unwrap(), load);
    assert_eq!(runner.take_load().unwrap(), vec![0; 8]);
    let error = runner.start_move(&Arc::new(ExpertMap::one_rank(8))).unwrap_err().to_string();
    assert!(error.contains("do not stay on GPUs"), "{error}");
}
