//! Ranks whose parts go through a link of their own, as they do through GPUs: here one that is slow to be
//! ready, gets parts in the order in which they were sent, loses them or fails.

#[path = "comm_suite/mod.rs"]
mod suite;

mod layers;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use layers::{options, rows, split, splits};
use moe_runner::comm::link::{Link, over};
use moe_runner::comm::{At, Communicator, Groups, Options, Step, threads_with};
use moe_runner::hidden::ActivationDtype::Bf16;
use moe_runner::runner::{Batch, forward_batch};
use moe_runner::spec::LayerSpec;
use moe_runner::weights::{FloatType, random_layer};
use moe_runner::{Error, Result};

const LONG: Duration = Duration::from_secs(600);
const SHORT: Duration = Duration::from_secs(1);

/// Parts in the order in which they were sent, by sender and receiver.
type Parts = HashMap<(usize, usize), VecDeque<Vec<u8>>>;

/// What is on its way.
#[derive(Default)]
struct Between {
    parts: Mutex<Parts>,
    aborts: AtomicUsize,
}

/// What a rank's link does wrong, and from which exchange on.
#[derive(Clone, Copy, PartialEq)]
enum Defect {
    None,
    Fails(usize, usize),
    Loses(usize, usize),
}

struct Double {
    rank: usize,
    between: Arc<Between>,
    defect: Defect,
    started: usize,
    /// Asked for whether it is ready.
    asked: usize,
    expected: VecDeque<Vec<(usize, usize)>>,
    arrived: Option<Vec<u8>>,
}

impl Link for Double {
    fn is_ready(&mut self) -> Result<bool> {
        self.asked += 1;
        Ok(self.asked.is_multiple_of(3))
    }

    fn start(&mut self, sends: &[(usize, &[u8])], receives: &[(usize, usize)]) -> Result<()> {
        assert!(self.asked.is_multiple_of(3), "it is not ready");
        self.asked += 1;
        self.started += 1;
        assert!(sends.iter().all(|(to, part)| *to != self.rank && !part.is_empty()));
        assert!(receives.iter().all(|(from, len)| *from != self.rank && *len > 0));
        match self.defect {
            Defect::Fails(rank, at) if (rank, at) == (self.rank, self.started) => {
                return Err(Error::Communication("a wire broke".into()));
            }
            Defect::Loses(rank, at) if rank == self.rank && self.started >= at => {}
            _ => {
                let mut parts = self.between.parts.lock().unwrap();
                for (to, part) in sends {
                    parts.entry((self.rank, *to)).or_default().push_back(part.to_vec());
                }
            }
        }
        self.expected.push_back(receives.to_vec());
        Ok(())
    }

    fn has_arrived(&mut self) -> Result<bool> {
        let Some(expected) = self.expected.front() else { return Ok(false) };
        if self.arrived.is_none() {
            let mut parts = self.between.parts.lock().unwrap();
            let here = |(from, _): &(usize, usize)| {
                parts.get(&(*from, self.rank)).is_some_and(|parts| !parts.is_empty())
            };
            if !expected.iter().all(here) {
                return Ok(false);
            }
            let mut all = Vec::new();
            for (from, len) in expected {
                let part = parts.get_mut(&(*from, self.rank)).unwrap().pop_front().unwrap();
                assert_eq!(part.len(), *len, "rank {from} sent another exchange's part");
                all.extend(part);
            }
            self.arrived = Some(all);
        }
        Ok(true)
    }

    fn take(&mut self, to: &mut [u8]) {
        to.copy_from_slice(&self.arrived.take().unwrap());
        self.expected.pop_front();
    }

    fn abort(&mut self) {
        self.between.aborts.fetch_add(1, Ordering::Relaxed);
    }
}

/// What each of `ranks` ranks makes of its end, and how many of their links were aborted.
fn run<T: Send>(
    ranks: usize,
    timeout: Duration,
    defect: Defect,
    rank: impl Fn(Arc<dyn Communicator>) -> Result<T> + Sync,
) -> (Vec<Result<T>>, usize) {
    let (between, work) = (Arc::<Between>::default(), &rank);
    let results = thread::scope(|scope| {
        let start = |control: Arc<dyn Communicator>| {
            let between = between.clone();
            scope.spawn(move || {
                let link = Double {
                    rank: control.rank(),
                    between,
                    defect,
                    started: 0,
                    asked: 0,
                    expected: VecDeque::new(),
                    arrived: None,
                };
                work(over(control, "double".into(), Box::new(link), Options { timeout }))
            })
        };
        let controls = threads_with(ranks, Options { timeout });
        let running: Vec<_> = controls.into_iter().map(start).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    (results, between.aborts.load(Ordering::Relaxed))
}

fn at(step: Step) -> At<'static> {
    At::new("model.layers.7.mlp", step)
}

#[test]
fn every_collective_equals_a_sequential_computation() {
    for ranks in [1, 2, 3, 5] {
        let (results, aborts) = run(ranks, LONG, Defect::None, |comm| {
            suite::verdict(&suite::run(&*comm, ranks, 6)?)?;
            let half = comm.split(comm.rank() % 2, comm.size() - comm.rank())?;
            suite::verdict(&suite::run(&*half, 6 + comm.rank() % 2, 3)?)
        });
        results.into_iter().for_each(|result| result.unwrap());
        assert_eq!(aborts, 0, "{ranks} ranks");
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
        let (results, _) = run(parallel.sizes.ranks(), LONG, Defect::None, |comm| {
            let groups = Groups::new(comm, parallel.sizes)?;
            let batch = Batch { hidden: &hidden, router_logits: None, input_ids: None };
            forward_batch(&layer, &options, &groups, &parallel, &batch, None)
        });
        for (rank, got) in results.into_iter().enumerate() {
            let got = got.unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(got.output, want.output, "{name}");
            // `want` is rank 0's
            assert!(rank > 0 || got.traffic == want.traffic, "{name}");
        }
    }
}

/// What a rank has begun reaches the others, also where it waits for nothing itself and goes.
#[test]
fn what_is_given_up_is_sent_all_the_same() {
    let (results, aborts) = run(3, LONG, Defect::None, |comm| {
        let mut send = comm.buffer::<u32>(3)?;
        send.fill(comm.rank() as u32);
        let pending = comm.start_all_to_all_v(at(Step::Dispatch), send, &[1, 1, 1])?;
        match comm.rank() {
            1 => Ok(Vec::new()),
            _ => Ok(pending.wait(&*comm)?.to_vec()),
        }
    });
    let got: Vec<Vec<u32>> = results.into_iter().map(|result| result.unwrap()).collect();
    assert_eq!(got, [vec![0, 1, 2], vec![], vec![0, 1, 2]]);
    assert_eq!(aborts, 0);
}

fn errors<T>((results, aborts): (Vec<Result<T>>, usize), count: usize, words: &[&str]) {
    let errors: Vec<String> =
        results.into_iter().filter_map(|result| Some(result.err()?.to_string())).collect();
    assert_eq!((errors.len(), aborts), (count, count), "{errors:?}");
    for word in words {
        assert!(errors.iter().all(|error| error.contains(word)), "no '{word}' in {errors:?}");
    }
}

fn two_rounds(comm: Arc<dyn Communicator>) -> Result<()> {
    comm.all_gather(at(Step::Dispatch), [comm.rank() as u64])?;
    comm.all_gather(at(Step::Combine), [comm.rank() as u64]).map(drop)
}

#[test]
fn a_link_that_fails_ends_all_ranks() {
    let ended = run(3, LONG, Defect::Fails(1, 2), two_rounds);
    errors(ended, 3, &["rank 1, last seen", "a wire broke", "'combine'", "model.layers.7.mlp"]);
}

#[test]
fn a_link_that_never_delivers_ends_who_waits_for_it() {
    let ended = run(2, SHORT, Defect::Loses(1, 2), two_rounds);
    errors(ended, 1, &["waited 1 s", "elements to or from rank 1", "'combine'"]);
}

#[test]
fn who_never_comes_or_means_something_else_is_named() {
    let ended = run(3, SHORT, Defect::None, |comm| {
        comm.all_gather(at(Step::Dispatch), [1u32])?;
        if comm.rank() == 1 {
            thread::sleep(3 * SHORT);
        }
        comm.all_gather(at(Step::Combine), [1u32]).map(drop)
    });
    let results: Vec<String> =
        ended.0.into_iter().map(|result| result.unwrap_err().to_string()).collect();
    for word in ["waited 1 s", "rank 1, last seen", "'dispatch'", "'combine'"] {
        assert!(results.iter().all(|error| error.contains(word)), "no '{word}' in {results:?}");
    }
    let ended = run(2, LONG, Defect::None, |comm| match comm.rank() {
        0 => comm.all_reduce(at(Step::Combine), &mut [1.0f32]),
        _ => comm.all_reduce(at(Step::Combine), &mut [half::bf16::ONE]),
    });
    errors(ended, 2, &["the dtypes differ", "bf16"]);
    let ended = run(2, LONG, Defect::None, |comm| {
        comm.all_reduce(at(Step::Combine), &mut vec![1.0f32; 1 + comm.rank()])
    });
    errors(ended, 2, &["the numbers of elements differ"]);
}
