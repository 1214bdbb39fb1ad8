//! What one MPI process does, by the name of a scenario: all checks, or one way to fail.

use std::time::Duration;

use moe_runner::comm::{At, Communicator, Step};
use moe_runner::{Error, Result};

use super::suite;

fn at(step: Step) -> At<'static> {
    At::new("model.layers.7.mlp", step)
}

/// "suite" runs every collective, and prints "N passed, M failed" on rank 0; "splits" forms and leaves
/// many groups; in the others, rank 1 fails in the way that they are named for.
pub(crate) fn run(comm: &dyn Communicator, scenario: &str) -> Result<()> {
    match scenario {
        "suite" => check(comm),
        "splits" => split_and_drop(comm),
        scenario => fail(comm, scenario),
    }
}

fn check(comm: &dyn Communicator) -> Result<()> {
    let mut tally = suite::run(comm, 1, 8)?;
    let odd = comm.rank() % 2;
    let half = comm.split(odd, comm.size() - comm.rank())?;
    let inner = suite::run(&*half, 2 + odd, 4)?;
    tally.passed += inner.passed;
    tally.failures.extend(inner.failures);
    let mut sums = [tally.passed as u64, tally.failures.len() as u64];
    comm.all_reduce(at(Step::Finish), &mut sums)?;
    if comm.rank() == 0 {
        let [passed, failed] = sums;
        println!("{} ranks, {}: {passed} passed, {failed} failed", comm.size(), comm.name());
    }
    suite::verdict(&tally)
}

fn split_and_drop(comm: &dyn Communicator) -> Result<()> {
    for round in 0..300 {
        let part = comm.split(comm.rank() % 2, 0)?;
        let inner = part.split(0, part.size() - part.rank())?;
        let mut sum = [1u64];
        inner.all_reduce(at(Step::Combine), &mut sum)?;
        part.barrier(at(Step::Dispatch))?;
        // in either order, with one that is still under way
        if round % 2 == 0 {
            drop(part);
        }
        assert_eq!(sum[0] as usize, inner.size());
    }
    if comm.rank() == 0 {
        println!("all groups left");
    }
    comm.barrier(at(Step::Finish))
}

fn fail(comm: &dyn Communicator, scenario: &str) -> Result<()> {
    let group = comm.split(0, 0)?;
    group.barrier(at(Step::Dispatch))?;
    if comm.rank() == 1 {
        match scenario {
            "returns" => return Ok(()),
            "panics" => panic!("deliberate panic"),
            "killed" => {
                let id = std::process::id().to_string();
                let _ = std::process::Command::new("kill").args(["-9", &id]).status();
            }
            // Until the others have long given up.
            "sleeps" => std::thread::sleep(Duration::from_secs(8)),
            "aborts" => comm.abort("out of memory"),
            "differs" => group.all_reduce(at(Step::Combine), &mut [1.0f32])?,
            "other thread" => {
                let refused = std::thread::scope(|scope| {
                    let call = || comm.barrier(at(Step::Combine)).map_err(|e| e.to_string());
                    scope.spawn(call).join()
                });
                if let Ok(Err(refused)) = refused {
                    comm.abort(&refused);
                }
            }
            _ => return Err(Error::input("scenario", format!("'{scenario}' is unknown"))),
        }
    }
    group.barrier(at(Step::Combine))?;
    comm.barrier(at(Step::Finish))
}
