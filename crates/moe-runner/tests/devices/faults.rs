//! A rank that dies, errs, sleeps or leaves in the middle of a one-sided exchange ends every other one with an error that
//! names the rank, the layer and the step; nobody waits for ever.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use moe_runner::comm::{Options, run_ranks_with};
use moe_runner::exchange::BetweenGpus::OneSided;
use moe_runner::parallel::Placement;
use moe_runner::weights::{FloatType, random_layer};
use moe_runner::{Error, Result};

use crate::host_gpus::put::Waits;
use crate::{Batch, between, layers, rank};

/// Long enough for a loaded machine to get through a healthy pass, short enough for a test.
const TIMEOUT: Duration = Duration::from_millis(1500);

const LAYERS: &[&str] = &["model.layers.0.mlp", "model.layers.1.mlp"];

/// Two layers on four ranks, one after the other; before `step` of the second, rank 2 does `what`. Returns what the others
/// say. `graph`: nobody tells the others how many rows there are.
fn second_layer(
    (step, lanes, graph): (&'static str, usize, bool),
    what: impl Fn() -> Result<()> + Send + Sync + 'static,
) -> Vec<String> {
    let layer = &random_layer(&layers::plain(), FloatType::F32, 1).unwrap();
    let map = &Arc::new(Placement::Linear.map(8, 4).unwrap());
    let batch = &Batch::new(layer, 5, 3);
    let between = between(layer, 4, OneSided, lanes);
    let most = graph.then_some(5);
    let waits = Waits { timeout: TIMEOUT, layers: LAYERS, most, ..Waits::default() };
    let (seen, what) = (Mutex::new(Vec::new()), Arc::new(what));
    let ended = run_ranks_with(4, Options { timeout: TIMEOUT }, |world| {
        let (me, what) = (world.rank(), what.clone());
        let of_layer = |layer: usize| {
            let (what, once) = (what.clone(), AtomicBool::new(layer == 1 && me == 2));
            let before = move |now: &'static str, _| {
                let now = now == step && once.swap(false, Ordering::Relaxed);
                if now { what() } else { Ok(()) }
            };
            Waits { layer, before: Arc::new(before), ..waits.clone() }
        };
        for number in 0..2 {
            let between = crate::Between { waits: of_layer(number), ..between.clone() };
            let mut runner = rank(layer, world, map, &between)?;
            match batch.forward(&mut runner) {
                Ok(out) => assert!(out == batch.output && number == 0, "rank {me} came through"),
                Err(error) => {
                    if me != 2 {
                        seen.lock().unwrap().push(error.to_string());
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    });
    assert!(ended.is_err());
    seen.into_inner().unwrap()
}

/// All others name the rank, the layer, the step, and what else they know.
fn expect_named(seen: &[String], step: &str, cause: &str) {
    assert_eq!(seen.len(), 3, "{seen:?}");
    for error in seen {
        for word in ["rank 2, last seen", "model.layers.1.mlp", step, cause] {
            assert!(error.contains(word), "no {word} in {error}");
        }
    }
}

/// Before rows are put, and before this rank says that outputs have been; in one micro-batch and in two.
const WHERE: [(&str, usize); 3] = [("dispatch", 1), ("wait for combine", 1), ("experts", 2)];

#[test]
fn a_rank_that_panics() {
    for (step, lanes) in WHERE {
        let seen = second_layer((step, lanes, false), || panic!("a bug in rank 2"));
        expect_named(&seen, "'dispatch'", "a bug in rank 2");
    }
}

#[test]
fn a_rank_that_fails() {
    for (step, lanes) in WHERE {
        let failed = || Err(Error::Device("out of memory".into()));
        expect_named(&second_layer((step, lanes, false), failed), "'dispatch'", "out of memory");
    }
}

/// Its signals say where it came to last.
#[test]
fn a_rank_that_sleeps() {
    for graph in [false, true] {
        for (step, lanes) in WHERE {
            let seen = second_layer((step, lanes, graph), || {
                std::thread::sleep(2 * TIMEOUT);
                Ok(())
            });
            let (waits, was) = match (step, lanes) {
                ("dispatch", _) => {
                    ("in layer 'model.layers.1.mlp', step 'dispatch'", "0.mlp', step 'combine'")
                }
                // of two micro-batches, it has put the rows of both, and met over the first
                ("experts", _) => ("in layer 'model.layers.1.mlp'", "last seen at"),
                _ => ("in layer 'model.layers.1.mlp', step 'combine'", "1.mlp', step 'dispatch'"),
            };
            expect_named(&seen, waits, was);
            assert!(seen.iter().all(|error| error.contains("waited 1.5 s for rank 2")), "{seen:?}");
        }
    }
}

/// A rank that goes without a word is missed where it is waited for, even where no host expects it.
#[test]
fn a_rank_that_never_comes() {
    let layer = &random_layer(&layers::plain(), FloatType::F32, 1).unwrap();
    let map = &Arc::new(Placement::Linear.map(8, 4).unwrap());
    let batch = &Batch::new(layer, 5, 3);
    let mut between = between(layer, 4, OneSided, 1);
    between.waits = Waits { timeout: TIMEOUT, most: Some(5), ..Waits::default() };
    let (between, seen) = (&between, Mutex::new(Vec::new()));
    let _ = run_ranks_with(4, Options { timeout: TIMEOUT }, |world| {
        let mut runner = rank(layer, world, map, between)?;
        if world.rank() == 2 {
            return Ok(());
        }
        let error = batch.forward(&mut runner).expect_err("a pass without rank 2 cannot end well");
        seen.lock().unwrap().push(error.to_string());
        Err(error)
    });
    let seen = seen.into_inner().unwrap();
    assert_eq!(seen.len(), 3);
    let wanted = "waited 1.5 s for rank 2, which came to no meeting, in layer 'model.layers.0.mlp', \
                  step 'dispatch'";
    assert!(seen.iter().all(|error| error.contains(wanted)), "{seen:?}");
}
