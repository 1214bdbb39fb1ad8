//! Ranks that meet over TCP: every collective, every split of a layer, and every way not to come, to
//! leave or to fail. Ranks are threads here, each with connections of its own, but where one is killed.

#[path = "comm_suite/scenario.rs"]
mod scenario;
#[path = "comm_suite/mod.rs"]
mod suite;

mod layers;

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use layers::{options, rows, split, splits};
use moe_runner::Result;
use moe_runner::comm::tcp::{self, Rendezvous};
use moe_runner::comm::{At, Communicator, Groups, Options, Step};
use moe_runner::hidden::ActivationDtype::Bf16;
use moe_runner::runner::{Batch, forward_batch};
use moe_runner::spec::LayerSpec;
use moe_runner::weights::{FloatType, random_layer};

const SCENARIO: &str = "COMM_TCP_TEST_SCENARIO";
/// Where nothing should be waited for.
const LONG: Duration = Duration::from_secs(600);
const SHORT: Duration = Duration::from_secs(1);

/// A port that is free now.
fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

fn open(
    address: &str,
    rank: usize,
    ranks: usize,
    timeout: Duration,
) -> Result<Arc<dyn Communicator>> {
    let at = Rendezvous { address: address.to_owned(), rank, ranks };
    tcp::open(&at, Options { timeout })
}

/// What each of `ranks` ranks, on a thread of its own, makes of its end.
fn run<T: Send>(
    ranks: usize,
    timeout: Duration,
    rank: impl Fn(Arc<dyn Communicator>) -> Result<T> + Sync,
) -> Vec<Result<T>> {
    let (address, work) = (free_address(), &rank);
    thread::scope(|scope| {
        let address = &address;
        let start = |rank| scope.spawn(move || work(open(address, rank, ranks, timeout)?));
        let running: Vec<_> = (0..ranks).map(start).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn every_collective_equals_a_sequential_computation() {
    for ranks in [1, 2, 5] {
        for result in run(ranks, LONG, |comm| scenario::run(&*comm, "suite")) {
            result.unwrap();
        }
    }
}

#[test]
fn groups_come_and_go() {
    for result in run(3, LONG, |comm| scenario::run(&*comm, "splits")) {
        result.unwrap();
    }
}

/// The same bits as with ranks that share memory.
#[test]
fn every_split_of_a_layer_gives_the_bits_of_ranks_as_threads() {
    let options = options(None, Bf16);
    let spec = LayerSpec { shared: Some(layers::shared()), ..layers::plain() };
    let layer = random_layer(&spec, FloatType::Bf16, 11).unwrap();
    let hidden = rows(Bf16, 7, spec.dims.hidden, 3);
    for (name, parallel) in splits() {
        let want = split(&layer, &options, &parallel, &hidden).unwrap();
        let results = run(parallel.sizes.ranks(), LONG, |comm| {
            let groups = Groups::new(comm, parallel.sizes)?;
            let batch = Batch { hidden: &hidden, router_logits: None, input_ids: None };
            forward_batch(&layer, &options, &groups, &parallel, &batch, None)
        });
        for got in results {
            let got = got.unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(got.output, want.output, "{name}");
        }
    }
}

fn at(step: Step) -> At<'static> {
    At::new("model.layers.7.mlp", step)
}

/// All errors, each of which must contain all of `words`.
fn assert_errors(results: Vec<Result<()>>, count: usize, words: &[&str]) {
    let errors: Vec<String> =
        results.into_iter().filter_map(|result| Some(result.err()?.to_string())).collect();
    assert_eq!(errors.len(), count, "{errors:?}");
    for word in words {
        assert!(errors.iter().all(|error| error.contains(word)), "no '{word}' in {errors:?}");
    }
}

#[test]
fn a_rank_that_never_arrives_is_named_by_all_others() {
    let results = run(3, SHORT, |comm| {
        comm.barrier(at(Step::Dispatch))?;
        if comm.rank() == 1 {
            thread::sleep(3 * SHORT);
        }
        comm.barrier(at(Step::Combine))
    });
    assert_errors(results, 3, &["waited 1 s", "rank 1, last seen", "'dispatch'", "'combine'"]);
}

#[test]
fn a_rank_that_leaves_is_named_at_once() {
    let results = run(3, LONG, |comm| scenario::run(&*comm, "returns"));
    assert_errors(results, 2, &["rank 1, last seen", "'dispatch'", "left", "'combine'"]);
}

#[test]
fn failures_are_told_to_all() {
    let results = run(3, LONG, |comm| scenario::run(&*comm, "aborts"));
    assert_errors(results, 3, &["rank 1, last seen", "gave up: out of memory"]);
    let results = run(3, LONG, |comm| scenario::run(&*comm, "differs"));
    assert_errors(results, 3, &["different collectives", "barrier", "all-reduce"]);
}

#[test]
fn ranks_that_have_lost_one_know_it_without_an_exchange() {
    let results = run(2, LONG, |comm| {
        comm.barrier(at(Step::Setup))?;
        comm.check()?;
        if comm.rank() == 1 {
            comm.abort("no more");
            return comm.check();
        }
        let start = Instant::now();
        while start.elapsed() < LONG {
            comm.check()?;
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    });
    assert_errors(results, 2, &["rank 1, last seen", "gave up: no more"]);
}

/// Not a test: what a process of its own does.
#[test]
#[ignore = "started by another test"]
fn process() {
    let given = std::env::var(SCENARIO).expect("started by another test");
    let (rank, address) = given.split_once('@').unwrap();
    let rank = rank.parse().unwrap();
    let result = open(address, rank, 3, LONG).and_then(|comm| scenario::run(&*comm, "killed"));
    if let Err(error) = result {
        println!("ERROR {error}");
    }
}

#[test]
#[cfg(unix)]
fn a_killed_process_is_named_at_once() {
    let address = free_address();
    let start = |rank: usize| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "process", "--ignored", "--nocapture", "--quiet"])
            .env(SCENARIO, format!("{rank}@{address}"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let processes: Vec<_> = (0..3).map(start).collect();
    let said: Vec<String> = processes
        .into_iter()
        .map(|process| {
            let output = process.wait_with_output().unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        })
        .collect();
    for (rank, said) in said.iter().enumerate().filter(|(rank, _)| *rank != 1) {
        for word in ["ERROR ", "rank 1, last seen", "'dispatch'", "was lost", "'combine'"] {
            assert!(said.contains(word), "rank {rank}, no '{word}' in: {said}");
        }
    }
}

/// What ranks say that come as told, each `(rank, ranks)`.
fn come(who: &[(usize, usize)], timeout: Duration) -> Vec<String> {
    let address = free_address();
    thread::scope(|scope| {
        let address = &address;
        let start = |(rank, ranks)| {
            scope.spawn(move || {
                let result = open(address, rank, ranks, timeout).map(drop);
                result.map_or_else(|error| error.to_string(), |()| "well".to_owned())
            })
        };
        let running: Vec<_> = who.iter().copied().map(start).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn all_say(said: &[String], words: &[&str]) {
    for word in words {
        assert!(said.iter().all(|said| said.contains(word)), "no '{word}' in {said:?}");
    }
}

#[test]
fn who_does_not_come_is_named() {
    all_say(
        &come(&[(0, 3), (1, 3)], SHORT),
        &["rendezvous at 127.0.0.1:", "waited 1 s for rank 2"],
    );
    all_say(&come(&[(1, 2)], SHORT), &["rank 1", "waited 1 s for rank 0", "cannot be reached"]);
}

#[test]
fn who_expects_something_else_is_told() {
    let said = come(&[(0, 2), (1, 3)], LONG);
    all_say(&said, &["rank 1 expects 3 ranks, rank 0 expects 2"]);
    let said = come(&[(0, 3), (1, 3), (1, 3)], LONG);
    all_say(&said, &["two processes came as rank 1"]);
    all_say(&come(&[(2, 2)], LONG), &["2 is none of 2 ranks"]);
    let error = open("nowhere", 0, 2, LONG).err().unwrap().to_string();
    assert!(error.contains("no address of the form HOST:PORT"), "{error}");
}

/// They hold up nobody, whatever they say.
#[test]
fn strangers_are_let_stand() {
    let address = free_address();
    thread::scope(|scope| {
        let address = &address;
        let ranks: Vec<_> = [0, 1]
            .map(|rank| {
                scope.spawn(move || {
                    if rank == 1 {
                        let connect = || TcpStream::connect(address.as_str());
                        let start = Instant::now();
                        let mut silent = connect();
                        while silent.is_err() && start.elapsed() < LONG {
                            silent = connect();
                        }
                        let mut talker = connect().unwrap();
                        talker.write_all(&[b'x'; 400]).unwrap();
                        let comm = open(address, rank, 2, LONG)?;
                        drop(silent);
                        return comm.barrier(at(Step::Setup));
                    }
                    open(address, rank, 2, LONG)?.barrier(at(Step::Setup))
                })
            })
            .into_iter()
            .collect();
        ranks.into_iter().for_each(|rank| rank.join().unwrap().unwrap());
    });
}
