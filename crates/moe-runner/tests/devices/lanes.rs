//! Micro-batches: the rows of one are on their way while another's experts work.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use moe_runner::Error;
use moe_runner::comm::run_ranks;
use moe_runner::exchange::BetweenGpus;
use moe_runner::parallel::Placement;
use moe_runner::runner::Timeline;
use moe_runner::weights::{FloatType, random_layer};

use crate::host_gpus::put::Waits;
use crate::{Batch, between, layers, rank, ways};

#[test]
fn micro_batches_give_the_same_bits() {
    let layer = &random_layer(&layers::plain(), FloatType::F32, 3).unwrap();
    for ranks in [1, 2, 4] {
        let map = &Arc::new(Placement::RoundRobin.map(8, ranks).unwrap());
        for (way, lanes) in ways(2).into_iter().flat_map(|way| [1, 2, 3, 5].map(|n| (way, n))) {
            let between = &between(layer, ranks, way, lanes);
            // passes of all sizes, in which some ranks have no rows in some micro-batches, or in any
            let passes = [[5, 12, 2, 7], [0, 3, 0, 1], [1, 0, 0, 0], [12; 4], [0; 4], [4, 1, 8, 2]];
            let batch = |rank: usize, tokens: usize| Batch::new(layer, tokens, 10 + rank as u64);
            let batches: Vec<Vec<Batch>> = passes
                .iter()
                .map(|tokens| (0..ranks).map(|rank| batch(rank, tokens[rank])).collect())
                .collect();
            run_ranks(ranks, |world| {
                let mut runner = rank(layer, world, map, between)?;
                for (pass, batches) in batches.iter().cycle().take(18).enumerate() {
                    let batch = &batches[world.rank()];
                    let out = batch.forward(&mut runner)?;
                    assert!(
                        out == batch.output,
                        "pass {pass}, {ranks} ranks, {way:?}, {lanes} lanes"
                    );
                }
                Ok(())
            })
            .unwrap();
        }
    }
}

/// No rank's experts begin before every rank puts the rows of both micro-batches, and no sum before the experts of both:
/// they would wait for ever if one micro-batch had to be through before the next.
#[test]
fn rows_are_on_their_way_while_the_other_half_is_computed() {
    ways(2).into_iter().for_each(overlaps);
}

fn overlaps(way: BetweenGpus) {
    let layer = &random_layer(&layers::plain(), FloatType::F32, 3).unwrap();
    let (ranks, lanes) = (3, 2);
    let map = &Arc::new(Placement::Linear.map(8, ranks).unwrap());
    let batches: Vec<Batch> = (0..ranks).map(|rank| Batch::new(layer, 9, rank as u64)).collect();
    let before = {
        let (put, computed) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let all = move |count: &AtomicUsize| {
            let since = Instant::now();
            while count.load(Ordering::Acquire) < ranks * lanes {
                if since.elapsed() > Duration::from_secs(20) {
                    return Err(Error::Communication("the other half is not on its way".into()));
                }
                std::thread::yield_now();
            }
            Ok(())
        };
        move |step: &'static str, _| match step {
            "dispatch" => {
                put.fetch_add(1, Ordering::AcqRel);
                Ok(())
            }
            "experts" => {
                computed.fetch_add(1, Ordering::AcqRel);
                all(&put)
            }
            "combine" => all(&computed),
            _ => Ok(()),
        }
    };
    let mut between = between(layer, ranks, way, lanes);
    between.waits = Waits { before: Arc::new(before), ..Waits::default() };
    let (between, origin) = (&between, Instant::now());
    let spans = run_ranks(ranks, |world| {
        let mut runner = rank(layer, world, map, between)?.with_timeline(Timeline::since(origin));
        let batch = &batches[world.rank()];
        assert!(batch.forward(&mut runner)? == batch.output);
        Ok(runner.timeline().spans().to_vec())
    })
    .unwrap_or_else(|error| panic!("{way:?}: {error}"));
    for spans in spans.into_iter().filter(|_| way == BetweenGpus::OneSided) {
        let of = |what: &str, lane: usize| {
            let mut all = spans.iter().filter(|span| (span.what, span.lane) == (what, Some(lane)));
            let span = *all.next().unwrap_or_else(|| panic!("no {what} of {lane}: {spans:?}"));
            assert!(all.next().is_none() && span.start <= span.end);
            span
        };
        // every step of both, on the common clock, between begin and end of the pass
        let whole = spans.iter().find(|span| span.what == "layer").unwrap();
        for lane in 0..lanes {
            for what in ["dispatch", "wait for dispatch", "experts", "wait for combine", "combine"]
            {
                let span = of(what, lane);
                assert!(
                    whole.start <= span.start && span.end <= whole.end,
                    "{span:?} of {whole:?}"
                );
            }
        }
        assert!(of("dispatch", 1).end <= of("experts", 0).start);
        assert!(of("experts", 1).end <= of("combine", 0).start);
    }
}
