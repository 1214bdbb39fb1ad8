//! An all-to-all against the plain way to move the same bytes, in one run.
//!
//! `comm_bench [RANKS]` runs ranks as threads (2 unless given), against a copy of all bytes that a
//! rank receives; `mpirun -n N comm_bench mpi` runs processes, against the library's own
//! `MPI_Alltoallv`. Each line: the bytes from each rank to each (itself included), and the median
//! times from the first rank's start to the last rank's end.
//!
//! The all-to-all ends with the parts in this rank's memory: MPI leaves them there; from threads each
//! rank reads them where they lie, as the exchanges of rows do, here with a copy.
//!
//! Threads have one more column: the copy by all ranks at once, each from where the others have
//! just written. What the caches charge for that no exchange can avoid; on some machines, and in
//! some of a virtual machine's placements, it is several times a copy within one core's cache.

#[path = "plain/mod.rs"]
mod plain;

use std::hint::black_box;
use std::sync::RwLock;

use moe_runner::Result;
use moe_runner::comm::{At, Communicator, Step, mpi, run_ranks};
use plain::{Plain, PlainMpi, Times};

/// Repeats that are not counted.
const WARM_UP: usize = 5;

fn main() -> Result<()> {
    let arg = std::env::args().nth(1);
    if arg.as_deref() == Some("mpi") {
        let comm = mpi::open()?;
        return bench(&*comm, &Plain::Mpi(PlainMpi::find()), None);
    }
    let ranks = arg.and_then(|arg| arg.parse().ok()).unwrap_or(2);
    let shared: Vec<_> = (0..ranks).map(|_| RwLock::new(Vec::new())).collect();
    run_ranks(ranks, |comm| bench(&**comm, &Plain::Copy, Some(&shared))).map(drop)
}

fn bench(comm: &dyn Communicator, plain: &Plain, shared: Option<&[RwLock<Vec<u8>>]>) -> Result<()> {
    let n = comm.size();
    if comm.rank() == 0 {
        let from_others = if shared.is_some() { "   from others    ratio" } else { "" };
        println!("{n} ranks, {}", comm.name());
        println!(
            "{:>12} {:>14} {:>14} {:>8}{from_others}",
            "bytes/peer",
            "all-to-all",
            plain.name(),
            "ratio"
        );
    }
    for bytes in [16, 4 << 10, 64 << 10, 1 << 20, 8 << 20] {
        let rounds = ((256 << 20) / bytes / n).clamp(30, 1000);
        let counts = vec![bytes; n];
        let source = vec![1u8; bytes * n];
        let mut target = source.clone();
        let mut times = [(); 3].map(|()| Times::default());
        for round in 0..rounds + WARM_UP {
            times[1].measure(comm, || {
                plain.all_to_all_v((black_box(&source), &counts), (&mut target, &counts));
                black_box(&target);
                Ok(())
            })?;
            let mut send = comm.buffer(bytes * n)?;
            send.fill(round as u8);
            times[0].measure(comm, || {
                let received = comm.start_all_to_all_v(at(), send, &counts)?.wait(comm)?;
                if shared.is_some() {
                    for (from, to) in received.iter().zip(target.chunks_exact_mut(bytes)) {
                        to.copy_from_slice(from);
                    }
                }
                Ok(())
            })?;
            let Some(shared) = shared else { continue };
            shared[comm.rank()].write().expect("no rank panics").resize(bytes * n, 0);
            shared[comm.rank()].write().expect("no rank panics").fill(round as u8);
            times[2].measure(comm, || {
                for (from, to) in shared.iter().zip(target.chunks_exact_mut(bytes)) {
                    let from = from.read().expect("no rank panics");
                    to.copy_from_slice(&from[comm.rank() * bytes..][..bytes]);
                }
                Ok(())
            })?;
        }
        let [exchange, plain, from_others] = times;
        let median = |times: Times| -> Result<f64> {
            let times = times.sorted(comm, WARM_UP)?;
            Ok(times.get(times.len() / 2).copied().unwrap_or(f64::NAN))
        };
        let (exchange, plain) = (median(exchange)?, median(plain)?);
        let from_others = if shared.is_some() { median(from_others)? } else { 0.0 };
        if comm.rank() == 0 {
            print!("{bytes:>12} {exchange:>11.1} µs {plain:>11.1} µs {:>8.2}", exchange / plain);
            match shared {
                Some(_) => println!("{from_others:>11.1} µs {:>8.2}", exchange / from_others),
                None => println!(),
            }
        }
    }
    Ok(())
}

fn at() -> At<'static> {
    At::new("bench", Step::Dispatch)
}
