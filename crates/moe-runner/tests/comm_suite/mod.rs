//! Every collective against a sequential computation, on any group: the ranks' contributions follow
//! from a seed, so that each rank can compute what all of them should get.

use std::fmt::Debug;

use half::{bf16, f16};
use moe_runner::comm::{At, Communicator, Element, Kind, Received, Step, Sum, all_reduce_sent};
use moe_runner::{Error, Result};

/// Checks made and failed.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failures: Vec<String>,
}

impl Tally {
    fn equal<T: PartialEq + Debug>(&mut self, what: &str, got: &T, want: &T) {
        if got == want {
            self.passed += 1;
        } else {
            let (mut got, mut want) = (format!("{got:?}"), format!("{want:?}"));
            got.truncate(200);
            want.truncate(200);
            self.failures.push(format!("{what}: got {got}, want {want}"));
        }
    }
}

/// An element that a hash determines, and that can be compared bit by bit.
pub(crate) trait Sample: Element {
    fn sample(hash: u64) -> Self;
    fn bits(self) -> u64;
}

/// Values from 2^-8 to 2^8, both signs: sums depend on their order.
fn float(hash: u64) -> f32 {
    let mantissa = 1.0 + (hash >> 40) as f32 / (1u64 << 24) as f32;
    let sign = if hash & 1 == 0 { 1.0 } else { -1.0 };
    sign * mantissa * ((hash >> 1 & 15) as f32 - 8.0).exp2()
}

macro_rules! sample {
    ($($type:ty: $make:expr, $bits:expr;)*) => {$(
        impl Sample for $type {
            fn sample(hash: u64) -> Self {
                $make(hash)
            }
            fn bits(self) -> u64 {
                $bits(self)
            }
        }
    )*};
}

sample! {
    f32: float, |x: f32| u64::from(x.to_bits());
    bf16: |hash| bf16::from_f32(float(hash)), |x: bf16| u64::from(x.to_bits());
    f16: |hash| f16::from_f32(float(hash)), |x: f16| u64::from(x.to_bits());
    u8: |hash| hash as u8, u64::from;
    u32: |hash| hash as u32, u64::from;
    u64: |hash| hash, |x| x;
}

/// splitmix64 of several words.
pub(crate) fn hash(words: &[usize]) -> u64 {
    words.iter().fold(0x9e37_79b9_7f4a_7c15, |state, &word| {
        let mut z = (state ^ word as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    })
}

/// A length for a group of `ranks`: zero, one, a few, or many; the truth costs ranks² of that.
fn length(ranks: usize, words: &[usize]) -> usize {
    let h = hash(words) as usize;
    match h % 5 {
        0 => 0,
        1 => 1,
        2 => h / 5 % 9,
        _ => h / 5 % (10_000 / ranks.pow(2)).clamp(20, 2500),
    }
}

fn values<T: Sample>(words: [usize; 3], len: usize) -> Vec<T> {
    (0..len).map(|i| T::sample(hash(&[words[0], words[1], words[2], i]))).collect()
}

fn bits<T: Sample>(values: &[T]) -> Vec<u64> {
    values.iter().map(|x| x.bits()).collect()
}

fn at(step: Step) -> At<'static> {
    At::new("suite", step)
}

/// Runs every collective on `comm`, `rounds` times with lengths and elements from `seed`.
pub(crate) fn run(comm: &dyn Communicator, seed: usize, rounds: usize) -> Result<Tally> {
    let mut tally = Tally::default();
    for round in 0..rounds {
        let key = hash(&[seed, round]) as usize;
        move_elements::<f32>(comm, key, &mut tally)?;
        move_elements::<bf16>(comm, key + 1, &mut tally)?;
        move_elements::<f16>(comm, key + 2, &mut tally)?;
        move_elements::<u8>(comm, key + 3, &mut tally)?;
        move_elements::<u32>(comm, key + 4, &mut tally)?;
        move_elements::<u64>(comm, key + 5, &mut tally)?;
        sum_elements::<f32>(comm, key + 6, &mut tally, |x| x, |x| x)?;
        sum_elements::<bf16>(comm, key + 7, &mut tally, |x| x.to_f32(), bf16::from_f32)?;
        sum_elements::<f16>(comm, key + 8, &mut tally, |x| x.to_f32(), f16::from_f32)?;
        count_traffic(comm, key + 9, &mut tally)?;
        comm.barrier(at(Step::Finish))?;
    }
    overlap(comm, seed, &mut tally)?;
    Ok(tally)
}

fn move_elements<T: Sample>(comm: &dyn Communicator, key: usize, tally: &mut Tally) -> Result<()> {
    let (n, me, name) = (comm.size(), comm.rank(), T::DTYPE);

    let counts: Vec<usize> = (0..n).map(|rank| length(n, &[key, rank])).collect();
    let gathered = comm.all_gather_v(at(Step::Dispatch), values::<T>([key, me, 0], counts[me]))?;
    let want: Vec<_> = (0..n).map(|r| bits(&values::<T>([key, r, 0], counts[r]))).collect();
    tally.equal(&format!("all-gather-v {name}"), &parts(&gathered), &want);

    let len = counts[0];
    let gathered = comm.all_gather(at(Step::Balance), values::<T>([key, me, 1], len))?;
    let want: Vec<T> = (0..n).flat_map(|r| values([key, r, 1], len)).collect();
    tally.equal(&format!("all-gather {name}"), &bits(&gathered), &bits(&want));

    let sent =
        |from: usize, to: usize| values::<T>([key, from, 2 + to], length(n, &[key, from, to]));
    let (data, counts) = to_all(n, |to| sent(me, to));
    let received = comm.all_to_all_v(at(Step::Combine), data, &counts)?;
    let want: Vec<_> = (0..n).map(|from| bits(&sent(from, me))).collect();
    tally.equal(&format!("all-to-all-v {name}"), &parts(&received), &want);

    let root = key % n;
    let mut data = values::<T>([key, me, 9000], len);
    comm.broadcast(at(Step::Setup), root, &mut data)?;
    let want = values::<T>([key, root, 9000], len);
    tally.equal(&format!("broadcast {name}"), &bits(&data), &bits(&want));
    Ok(())
}

/// The parts for all ranks, one after the other, and their lengths.
fn to_all<T: Sample>(ranks: usize, part: impl Fn(usize) -> Vec<T>) -> (Vec<T>, Vec<usize>) {
    let parts: Vec<Vec<T>> = (0..ranks).map(part).collect();
    (parts.concat(), parts.iter().map(Vec::len).collect())
}

/// What came from each rank.
fn parts<T: Sample>(received: &Received<T>) -> Vec<Vec<u64>> {
    received.iter().map(bits).collect()
}

fn sum_elements<T: Sample + Sum>(
    comm: &dyn Communicator,
    key: usize,
    tally: &mut Tally,
    widen: impl Fn(T) -> f32,
    narrow: impl Fn(f32) -> T,
) -> Result<()> {
    let (n, me, name) = (comm.size(), comm.rank(), T::DTYPE);
    let summed = |what: usize, len: usize| -> Vec<T> {
        let all: Vec<Vec<T>> = (0..n).map(|rank| values([key, rank, what], len)).collect();
        let sum = |i: usize| all[1..].iter().fold(widen(all[0][i]), |sum, x| sum + widen(x[i]));
        (0..len).map(|i| narrow(sum(i))).collect()
    };

    let len = length(n, &[key]);
    let mut data = values::<T>([key, me, 0], len);
    comm.all_reduce(at(Step::ReduceOutput), &mut data)?;
    tally.equal(&format!("all-reduce {name}"), &bits(&data), &bits(&summed(0, len)));

    let len = length(n, &[key, 1]);
    let part = comm.reduce_scatter(at(Step::Combine), values::<T>([key, me, 1], len * n))?;
    let want = &summed(1, len * n)[me * len..][..len];
    tally.equal(&format!("reduce-scatter {name}"), &bits(&part), &bits(want));

    let counts: Vec<usize> = (0..n).map(|rank| length(n, &[key, 2, rank])).collect();
    let total = counts.iter().sum();
    let mine = values::<T>([key, me, 2], total);
    let part = comm.reduce_scatter_v(at(Step::Balance), mine, &counts)?;
    let start = counts[..me].iter().sum::<usize>();
    let want = &summed(2, total)[start..][..counts[me]];
    tally.equal(&format!("reduce-scatter-v {name}"), &bits(&part), &bits(want));
    Ok(())
}

/// The counters against the bytes that each collective should move.
fn count_traffic(comm: &dyn Communicator, key: usize, tally: &mut Tally) -> Result<()> {
    let (n, me) = (comm.size(), comm.rank());
    let before = comm.traffic().read();

    let rows = |from: usize, to: usize| length(n, &[key, from, to]);
    let (data, counts) = to_all(n, |to| vec![0u32; rows(me, to)]);
    comm.all_to_all_v(at(Step::Dispatch), &data, &counts)?;
    comm.all_to_all_v(at(Step::Dispatch), &data, &counts)?;
    let len = length(n, &[key]);
    comm.all_gather_v(at(Step::Dispatch), vec![1u64; me + len])?;
    comm.all_reduce(at(Step::ReduceOutput), &mut vec![0f32; len])?;
    comm.barrier(at(Step::Finish))?;

    let traffic = comm.traffic().read().since(&before);
    let others = || (0..n).filter(|&rank| rank != me);
    let triple = |kind| {
        let count = traffic.of(kind);
        (count.calls, count.sent, count.received)
    };
    let moved = |f: &dyn Fn(usize) -> usize| others().map(f).sum::<usize>() as u64;
    let want = (2, moved(&|to| 8 * rows(me, to)), moved(&|from| 8 * rows(from, me)));
    tally.equal("traffic of all-to-all-v", &triple(Kind::AllToAllV), &want);
    let want = (1, moved(&|_| 8 * (me + len)), moved(&|from| 8 * (from + len)));
    tally.equal("traffic of all-gather-v", &triple(Kind::AllGatherV), &want);
    tally.equal("traffic of barrier", &triple(Kind::Barrier), &(1, 0, 0));
    let reduced = traffic.of(Kind::AllReduce);
    let want = (1, all_reduce_sent(n, me, len, 4) as u64);
    tally.equal("traffic of all-reduce", &(reduced.calls, reduced.sent), &want);
    Ok(())
}

/// Several all-to-alls under way at once, ended in another order than begun, polled, or dropped.
fn overlap(comm: &dyn Communicator, key: usize, tally: &mut Tally) -> Result<()> {
    let (n, me) = (comm.size(), comm.rank());
    let sent = |what: usize, from: usize, to: usize| {
        // One of them large enough that no library buffers it.
        let len = if what == 1 { 200_000 / n } else { length(n, &[key, what, from, to]) };
        values::<u32>([key, from * n + to, what], len)
    };
    let start = |what| {
        let (data, counts) = to_all(n, |to| sent(what, me, to));
        let mut send = comm.buffer(data.len())?;
        send.copy_from_slice(&data);
        comm.start_all_to_all_v(at(Step::Dispatch), send, &counts)
    };
    let (first, mut second, third, dropped) = (start(0)?, start(1)?, start(2)?, start(3)?);
    drop(dropped);
    let mut sum = [1.0f32];
    comm.all_reduce(at(Step::ReduceShared), &mut sum)?;
    tally.equal("all-reduce between start and wait", &sum, &[n as f32]);
    let third = third.wait(comm)?;
    while !second.poll()? {
        std::thread::yield_now();
    }
    for (what, received) in [(2, third), (1, second.wait(comm)?), (0, first.wait(comm)?)] {
        let want: Vec<_> = (0..n).map(|from| bits(&sent(what, from, me))).collect();
        tally.equal(&format!("overlapping all-to-all-v {what}"), &parts(&received), &want);
    }
    Ok(())
}

/// An error if a check failed.
pub(crate) fn verdict(tally: &Tally) -> Result<()> {
    match &tally.failures[..] {
        [] => Ok(()),
        failures => Err(Error::Communication(failures.join("\n"))),
    }
}
