//! Ranks as threads: every collective against a sequential computation, and every way to fail.

#[path = "comm_suite/mod.rs"]
mod suite;

use std::sync::{Barrier, Mutex};
use std::time::Duration;

use moe_runner::comm::{
    At, Communicator, Options, Step, run_ranks, run_ranks_with, single, threads_with,
};
use moe_runner::{Error, Result};

fn at(step: Step) -> At<'static> {
    At::new("model.layers.7.mlp", step)
}

#[test]
fn every_collective_equals_a_sequential_computation() {
    for n in [1, 2, 3, 4, 7] {
        let tallies = run_ranks(n, |comm| suite::run(&**comm, n, 12)).unwrap();
        for tally in tallies {
            suite::verdict(&tally).unwrap();
            assert!(tally.passed > 400, "{}", tally.passed);
        }
    }
}

#[test]
fn a_single_rank_needs_no_one() {
    suite::verdict(&suite::run(&*single(), 1, 12).unwrap()).unwrap();
}

#[test]
fn sixty_four_ranks_run_on_any_machine() {
    let tallies = run_ranks(64, |comm| suite::run(&**comm, 64, 1)).unwrap();
    tallies.iter().for_each(|tally| suite::verdict(tally).unwrap());
}

#[test]
fn split_groups_work_and_count_by_themselves() {
    let tallies = run_ranks(6, |comm| {
        // Even ranks, and odd ranks in reverse order.
        let odd = comm.rank() % 2;
        let half = comm.split(odd, if odd == 1 { 6 - comm.rank() } else { 0 })?;
        let members = half.all_gather(at(Step::Setup), vec![comm.rank() as u32])?;
        assert_eq!(members, [[0, 2, 4], [5, 3, 1]][odd]);
        assert_eq!(members[half.rank()], comm.rank() as u32);
        let pair = half.split(usize::from(half.rank() == 2), 0)?;
        assert_eq!(pair.size(), [2, 2, 1][half.rank()]);
        suite::verdict(&suite::run(&*pair, 5, 1)?)?;
        suite::run(&*half, 6 + odd, 3)
    })
    .unwrap();
    tallies.iter().for_each(|tally| suite::verdict(tally).unwrap());
}

/// What each of `n` ranks ends with when they run `rank`, which must fail on all that return.
fn causes(
    n: usize,
    timeout: Duration,
    rank: impl Fn(&dyn Communicator) -> Result<()> + Sync,
) -> Vec<String> {
    let texts = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for comm in threads_with(n, Options { timeout }) {
            let (rank, texts) = (&rank, &texts);
            scope.spawn(move || match rank(&*comm) {
                Ok(()) => {}
                Err(Error::Communication(text)) => texts.lock().unwrap().push(text),
                Err(other) => panic!("{other}"),
            });
        }
    });
    texts.into_inner().unwrap()
}

fn assert_all_contain(texts: &[String], ranks: usize, words: &[&str]) {
    assert_eq!(texts.len(), ranks, "{texts:?}");
    for text in texts {
        for word in words {
            assert!(text.contains(word), "no '{word}' in: {text}");
        }
    }
}

const LONG: Duration = Duration::from_secs(600);

#[test]
fn a_rank_that_returns_early_is_named_at_once() {
    let texts = causes(4, LONG, |comm| {
        comm.barrier(at(Step::Dispatch))?;
        if comm.rank() == 2 {
            return Ok(());
        }
        comm.barrier(at(Step::Combine))?;
        unreachable!()
    });
    let words = [
        "rank 2",
        "last seen in barrier",
        "model.layers.7.mlp",
        "'dispatch'",
        "left;",
        "'combine'",
    ];
    assert_all_contain(&texts, 3, &words);
}

#[test]
fn a_rank_that_never_arrives_is_named_after_the_timeout() {
    let others_ended = Barrier::new(3);
    let texts = causes(3, Duration::from_millis(200), |comm| {
        comm.barrier(at(Step::Dispatch))?;
        if comm.rank() == 1 {
            others_ended.wait();
            // Too late: the group is poisoned, and this does not wait.
            return comm.barrier(at(Step::Combine));
        }
        let result = comm.barrier(at(Step::Combine));
        others_ended.wait();
        result
    });
    let words =
        ["waited 0.2 s in barrier", "for rank 1", "'combine'", "last seen in", "'dispatch'"];
    assert_all_contain(&texts, 3, &words);
}

#[test]
fn a_rank_that_was_never_seen_is_named() {
    let other_ended = Barrier::new(2);
    let texts = causes(2, Duration::from_millis(100), |comm| {
        let result = if comm.rank() == 0 { comm.barrier(at(Step::Combine)) } else { Ok(()) };
        other_ended.wait();
        result
    });
    assert_all_contain(&texts, 1, &["rank 1, which took part in no collective"]);
}

#[test]
fn polling_times_out_too() {
    let options = Options { timeout: Duration::from_millis(100) };
    let mut comms = threads_with(2, options);
    let _absent = comms.pop();
    let send = comms[0].buffer::<u8>(2).unwrap();
    let mut pending = comms[0].start_all_to_all_v(at(Step::Dispatch), send, &[1, 1]).unwrap();
    let error = loop {
        match pending.poll() {
            Ok(done) => assert!(!done),
            Err(error) => break error.to_string(),
        }
        std::thread::yield_now();
    };
    assert!(error.contains("for rank 1"), "{error}");
    // Poisoned from now on, with the same cause.
    let again = comms[0].barrier(at(Step::Finish)).unwrap_err().to_string();
    assert_eq!(again, error);
}

#[test]
fn a_panic_is_the_result_of_the_run_and_wakes_the_others() {
    let ended = Mutex::new(0);
    let error = run_ranks_with(4, Options { timeout: LONG }, |comm| -> Result<()> {
        comm.barrier(at(Step::Setup))?;
        let group = comm.split(0, 0)?;
        if comm.rank() == 3 {
            panic!("deliberate panic of a test");
        }
        let error = group.barrier(at(Step::Combine)).unwrap_err();
        *ended.lock().unwrap() += 1;
        Err(error)
    })
    .unwrap_err()
    .to_string();
    assert_eq!(*ended.lock().unwrap(), 3);
    assert!(error.contains("rank 3") && error.contains("deliberate panic"), "{error}");
}

#[test]
fn a_panic_outside_run_ranks_is_named() {
    let texts = std::panic::catch_unwind(|| {
        causes(2, LONG, |comm| {
            if comm.rank() == 1 {
                std::panic::resume_unwind(Box::new("quiet"));
            }
            let error = comm.barrier(at(Step::Combine)).unwrap_err().to_string();
            assert!(error.contains("rank 1") && error.contains("panicked"), "{error}");
            std::panic::resume_unwind(Box::new("seen"));
        })
    });
    assert!(texts.is_err());
}

#[test]
fn the_error_of_a_ranks_own_code_is_the_result_and_ends_the_others() {
    let others = Mutex::new(Vec::new());
    let error = run_ranks_with(3, Options { timeout: LONG }, |comm| {
        if comm.rank() == 1 {
            return Err(Error::input("hidden states", "a row too few"));
        }
        let error = comm.barrier(at(Step::Combine)).unwrap_err();
        others.lock().unwrap().push(error.to_string());
        Err::<(), _>(error)
    })
    .unwrap_err();
    assert!(matches!(error, Error::Input { .. }), "{error}");
    assert_all_contain(&others.into_inner().unwrap(), 2, &["rank 1", "a row too few"]);
}

#[test]
fn different_collectives_are_an_error_on_every_rank() {
    let texts = causes(3, LONG, |comm| match comm.rank() {
        1 => comm.all_reduce(at(Step::Combine), &mut [1.0f32]),
        _ => comm.barrier(at(Step::Combine)),
    });
    assert_all_contain(&texts, 3, &["different collectives", "all-reduce", "barrier", "rank 1"]);
}

#[test]
fn different_layers_or_steps_are_an_error_on_every_rank() {
    let texts = causes(2, LONG, |comm| {
        let step = [Step::Dispatch, Step::Combine][comm.rank()];
        comm.barrier(at(step))
    });
    assert_all_contain(&texts, 2, &["different collectives", "'dispatch'", "'combine'"]);
}

#[test]
fn different_lengths_dtypes_and_roots_are_errors() {
    let texts = causes(3, LONG, |comm| {
        comm.all_reduce(at(Step::Combine), &mut vec![1.0f32; 3 + comm.rank() / 2])
    });
    assert_all_contain(&texts, 3, &["numbers of elements differ", "rank 2"]);
    let texts = causes(2, LONG, |comm| match comm.rank() {
        0 => comm.all_gather(at(Step::Combine), vec![1.0f32]).map(drop),
        _ => comm.all_gather(at(Step::Combine), vec![1u8]).map(drop),
    });
    assert_all_contain(&texts, 2, &["dtypes differ"]);
    let texts = causes(2, LONG, |comm| comm.broadcast(at(Step::Setup), comm.rank(), &mut [1u8]));
    assert_all_contain(&texts, 2, &["root ranks differ"]);
    // Equal totals, other parts: found where the sum is made, and told to all by the next call.
    let texts = causes(2, LONG, |comm| {
        let counts = [[1, 3], [2, 2]][comm.rank()];
        comm.reduce_scatter_v(at(Step::Combine), vec![1.0f32; 4], &counts)?;
        comm.barrier(at(Step::Finish))
    });
    assert_all_contain(&texts, 2, &["elements instead of"]);
}

#[test]
fn what_a_rank_cannot_do_ends_the_others() {
    let texts = causes(2, LONG, |comm| match comm.rank() {
        0 => comm.reduce_scatter(at(Step::Combine), vec![1.0f32; 3]).map(drop),
        _ => comm.reduce_scatter(at(Step::Combine), vec![1.0f32; 4]).map(drop),
    });
    assert_all_contain(&texts, 2, &["reduce-scatter of 3 elements over 2 ranks"]);
    let texts = causes(2, LONG, |comm| {
        let counts = if comm.rank() == 0 { vec![1, 1] } else { vec![2] };
        comm.all_to_all_v(at(Step::Combine), vec![0u8; 2], &counts).map(drop)
    });
    assert_all_contain(&texts, 2, &["do not fit 2 ranks"]);
    let texts =
        causes(2, LONG, |comm| comm.broadcast(at(Step::Setup), 2 + comm.rank(), &mut [1u8]));
    assert_all_contain(&texts, 2, &["broadcast from rank"]);
}

#[test]
fn abort_ends_the_calls_of_related_groups() {
    let texts = causes(3, LONG, |comm| {
        let pair = comm.split(usize::from(comm.rank() == 2), 0)?;
        if comm.rank() == 2 {
            comm.abort("out of memory");
            return comm.barrier(at(Step::Finish));
        }
        while pair.barrier(at(Step::Combine)).is_ok() {}
        comm.barrier(at(Step::Finish))
    });
    assert_all_contain(&texts, 3, &["rank 2", "gave up: out of memory"]);
}
