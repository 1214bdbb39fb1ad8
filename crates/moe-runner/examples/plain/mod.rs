//! The plain way to move bytes between ranks, what the exchanges are measured against, and the
//! clock that both are measured with.

use std::ffi::{c_int, c_void};
use std::time::{Duration, SystemTime};

use libloading::Library;
use moe_runner::Result;
use moe_runner::comm::{At, Communicator, Step};

/// Times of what all ranks do together, from the start of the first to the end of the last: with
/// more ranks than cores they take turns, and a rank's own time would leave out the others'.
#[derive(Default)]
pub(super) struct Times {
    /// Start and end of each repeat, in nanoseconds since 1970, which ranks of one machine share.
    spans: Vec<u64>,
}

impl Times {
    /// Runs `work` once all ranks are here, and returns when all have done it: what comes next must
    /// not keep a rank that still works from its core.
    pub(super) fn measure<T>(
        &mut self,
        comm: &dyn Communicator,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let now = || SystemTime::UNIX_EPOCH.elapsed().unwrap_or(Duration::ZERO).as_nanos() as u64;
        comm.barrier(at())?;
        let begin = now();
        let done = work()?;
        self.spans.extend([begin, now()]);
        comm.barrier(at())?;
        Ok(done)
    }

    /// Microseconds of each repeat but the first `warm_up`, sorted. All ranks call this together.
    pub(super) fn sorted(self, comm: &dyn Communicator, warm_up: usize) -> Result<Vec<f64>> {
        let all = comm.all_gather_in_place(at(), &self.spans)?;
        let time = |i: usize| {
            let begin = all.iter().map(|spans| spans[2 * i]).min().unwrap_or(0);
            let end = all.iter().map(|spans| spans[2 * i + 1]).max().unwrap_or(0);
            end.saturating_sub(begin) as f64 / 1e3
        };
        let mut times: Vec<f64> = (warm_up..self.spans.len() / 2).map(time).collect();
        times.sort_by(f64::total_cmp);
        Ok(times)
    }
}

fn at() -> At<'static> {
    At::new("bench", Step::Setup)
}

/// A plain all-to-all.
pub(super) enum Plain {
    /// Threads: each rank copies as many bytes as it would receive, between buffers of its own.
    Copy,
    /// Processes: the library's `MPI_Alltoallv`.
    Mpi(PlainMpi),
}

impl Plain {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Copy => "memcpy",
            Self::Mpi(_) => "MPI_Alltoallv",
        }
    }

    /// `sent` and `received` bytes to and from each rank, at the starts of the buffers.
    pub(super) fn all_to_all_v(
        &self,
        (source, sent): (&[u8], &[usize]),
        (target, received): (&mut [u8], &[usize]),
    ) {
        match self {
            Self::Copy => {
                let len = received.iter().sum::<usize>().min(source.len());
                target[..len].copy_from_slice(&source[..len]);
            }
            Self::Mpi(mpi) => mpi.all_to_all_v((source, sent), (target, received)),
        }
    }
}

/// The library that `mpi::open` has opened, called directly. Open MPI only.
pub(super) struct PlainMpi {
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
    pub(super) fn find() -> Self {
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

    fn all_to_all_v(
        &self,
        (source, sent): (&[u8], &[usize]),
        (target, received): (&mut [u8], &[usize]),
    ) {
        let (sent, sent_at) = layout(sent, source.len());
        let (received, received_at) = layout(received, target.len());
        // SAFETY: the parts lie in the buffers; all ranks make this call, with matching counts.
        let code = unsafe {
            (self.all_to_all_v)(
                source.as_ptr().cast(),
                sent.as_ptr(),
                sent_at.as_ptr(),
                self.byte,
                target.as_mut_ptr().cast(),
                received.as_ptr(),
                received_at.as_ptr(),
                self.byte,
                self.world,
            )
        };
        assert_eq!(code, 0, "MPI_Alltoallv");
    }
}

/// Counts and offsets as MPI takes them, of parts that fit `room` bytes.
fn layout(counts: &[usize], room: usize) -> (Vec<c_int>, Vec<c_int>) {
    let mut end = 0;
    let offsets = counts.iter().map(|count| {
        let start = end;
        end += count;
        start as c_int
    });
    let offsets = offsets.collect();
    assert!(end <= room.min(c_int::MAX as usize), "parts of {end} bytes in a buffer of {room}");
    (counts.iter().map(|count| *count as c_int).collect(), offsets)
}
