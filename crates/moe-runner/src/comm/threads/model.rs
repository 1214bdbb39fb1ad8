//! Ranks that are threads under the model checker: every order in which they can meet, up to a bound
//! on preemptions. `RUSTFLAGS="--cfg loom" cargo test -p moe-runner --lib threads::model`

use std::sync::Arc;
use std::time::Duration;

use loom::thread;

use super::threads_with;
use crate::Result;
use crate::comm::{At, Communicator, Options, Step};

/// Longer than any model runs: time does not pass in it.
const OPTIONS: Options = Options { timeout: Duration::from_secs(3600) };

/// Runs `rank` on each of `ranks` threads.
fn check(
    ranks: usize,
    preemptions: usize,
    rank: impl Fn(Arc<dyn Communicator>) + Send + Sync + Copy + 'static,
) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(move || {
        let mut comms = threads_with(ranks, OPTIONS);
        let last = comms.pop().unwrap();
        let others: Vec<_> =
            comms.into_iter().map(|comm| thread::spawn(move || rank(comm))).collect();
        rank(last);
        others.into_iter().for_each(|other| other.join().unwrap());
    });
}

fn at(step: Step) -> At<'static> {
    At::new("model", step)
}

fn sum(comm: &dyn Communicator, step: Step) -> Result<u64> {
    let mut sum = [comm.rank() as u64 + 1];
    comm.all_reduce(at(step), &mut sum)?;
    Ok(sum[0])
}

/// Every rank gets what the others sent, round after round: no wake-up is lost, and no message comes
/// back to its sender while somebody may read it.
#[test]
fn rounds_follow_one_another() {
    check(2, 3, |comm| {
        for _ in 0..2 {
            assert_eq!(sum(&*comm, Step::Combine).unwrap(), 3);
        }
    });
}

#[test]
fn three_ranks_meet() {
    check(3, 2, |comm| assert_eq!(sum(&*comm, Step::Combine).unwrap(), 6));
}

/// Two exchanges under way, ended in the other order; one is given up.
#[test]
fn exchanges_overlap() {
    check(2, 2, |comm| {
        let send = |value: u8| {
            let mut send = comm.buffer(2).unwrap();
            send.fill(value);
            comm.start_all_to_all_v(at(Step::Dispatch), send, &[1, 1]).unwrap()
        };
        let (first, given_up, second) = (send(1), send(9), send(2));
        drop(given_up);
        for (pending, value) in [(second, 2), (first, 1)] {
            let received = pending.wait(&*comm).unwrap();
            assert!(received.iter().all(|part| part == [value]));
        }
    });
}

/// A rank that gives up ends the others, wherever they are.
#[test]
fn a_failure_wakes_those_who_wait() {
    check(2, 3, |comm| match comm.rank() {
        0 => comm.abort("no more"),
        _ => {
            let error = sum(&*comm, Step::Combine).unwrap_err().to_string();
            assert!(error.contains("no more") || error.contains("left"), "{error}");
        }
    });
}

/// A rank that leaves is missed at once.
#[test]
fn a_rank_that_leaves_is_missed() {
    check(2, 3, |comm| {
        if comm.rank() == 1 {
            let error = sum(&*comm, Step::Combine).unwrap_err().to_string();
            assert!(error.contains("rank 0") && error.contains("left"), "{error}");
        }
    });
}

/// All members of a split find the same group.
#[test]
fn groups_split() {
    check(2, 2, |comm| {
        let group = comm.split(0, 1 - comm.rank()).unwrap();
        assert_eq!(group.rank(), 1 - comm.rank());
        assert_eq!(sum(&*group, Step::Combine).unwrap(), 3);
    });
}
