//! An all-to-all against the plain way to move the same bytes, in one run.
//!
//! `comm_bench` runs two ranks as threads, against a copy of all bytes that a rank receives.
//! `mpirun -n N comm_bench mpi` runs processes, against the library's own `MPI_Alltoallv`. Each
//! line: the bytes from each rank to each (itself included), and median times.

use std::ffi::{c_int, c_void};
use std::time::Instant;

use libloading::Library;
use moe_runner::Result;
use moe_runner::comm::{At, Communicator, Parts, Step, mpi, run_ranks};

fn main() -> Result<()> {
    if std::env::args().nth(1).as_deref() == Some("mpi") {
        let comm = mpi::open()?;
        let plain = PlainMpi::find();
        let call = |source: &[u8], target: &mut [u8]| plain.all_to_all(comm.size(), source, target);
        return bench(&*comm, "MPI_Alltoallv", call);
    }
    let copy = |source: &[u8], target: &mut [u8]| target.copy_from_slice(source);
    run_ranks(2, |comm| bench(&**comm, "copy", copy)).map(drop)
}

fn bench(
    comm: &dyn Communicator,
    name: &str,
    mut plain: impl FnMut(&[u8], &mut [u8]),
) -> Result<()> {
    let n = comm.size();
    if comm.rank() == 0 {
        println!("{n} ranks, {}", comm.name());
        println!("{:>12} {:>14} {:>14} {:>8}", "bytes/peer", "all-to-all", name, "ratio");
    }
    for bytes in [16, 4 << 10, 64 << 10, 1 << 20, 8 << 20] {
        let rounds = (256 << 20) / bytes / n;
        let rounds = rounds.clamp(30, 1000);
        let mut parts = Parts::new(vec![1u8; bytes * n], vec![bytes; n])?;
        let mut times = [Vec::new(), Vec::new()];
        let source = parts.data().to_vec();
        let mut target = source.clone();
        for _ in 0..rounds {
            comm.barrier(at())?;
            let begin = Instant::now();
            plain(std::hint::black_box(&source), &mut target);
            std::hint::black_box(&target);
            times[1].push(begin.elapsed());
            comm.barrier(at())?;
            let begin = Instant::now();
            parts = comm.all_to_all_v(at(), parts)?;
            times[0].push(begin.elapsed());
        }
        let [exchange, plain] = times.map(|mut times| {
            times.sort();
            times[times.len() / 2].as_secs_f64() * 1e6
        });
        if comm.rank() == 0 {
            println!("{bytes:>12} {exchange:>11.1} µs {plain:>11.1} µs {:>8.2}", exchange / plain);
        }
    }
    Ok(())
}

/// The library that `mpi::open` has opened, called directly. Open MPI only.
struct PlainMpi {
    world: usize,
    byte: usize,
    all_to_all_v: AllToAllV,
}

type AllToAllV = unsafe extern "C" fn(
    *const c_void,
    *const c_int,
    *const c_int,
    usize,
    *mut c_void,
    *const c_int,
    *const c_int,
    usize,
    usize,
) -> c_int;

impl PlainMpi {
    fn find() -> Self {
        // SAFETY: the library is open already; names and types are those of Open MPI.
        unsafe {
            let library = Library::new("libmpi.so.40").expect("the comparison needs Open MPI");
            let handle = |name: &str| {
                let symbol = library.get::<*const c_void>(name).expect("a handle of Open MPI");
                symbol.try_as_raw_ptr().map_or(0, |address| address as usize)
            };
            Self {
                world: handle("ompi_mpi_comm_world"),
                byte: handle("ompi_mpi_byte"),
                all_to_all_v: *library.get("MPI_Alltoallv").expect("MPI_Alltoallv"),
            }
        }
    }

    fn all_to_all(&self, ranks: usize, source: &[u8], target: &mut [u8]) {
        let bytes = (source.len() / ranks) as c_int;
        let counts = vec![bytes; ranks];
        let offsets: Vec<c_int> = (0..ranks as c_int).map(|rank| rank * bytes).collect();
        let (counts, offsets) = (counts.as_ptr(), offsets.as_ptr());
        let (from, to) = (source.as_ptr().cast(), target.as_mut_ptr().cast());
        // SAFETY: both buffers have `ranks` parts of `bytes` bytes; all ranks make this call.
        unsafe {
            (self.all_to_all_v)(
                from, counts, offsets, self.byte, to, counts, offsets, self.byte, self.world,
            );
        }
    }
}

fn at() -> At<'static> {
    At::new("bench", Step::Dispatch)
}
