//! Ranks with a GPU each, connected by NCCL: over NVLink where there is some, else PCIe or a network.
//!
//! What ranks exchange goes from the host to the GPU, from GPU to GPU, and back to the host:
//!
//! ```text
//! host → GPU ⇒ sends and receives between pairs, one group of calls an exchange ⇒ GPU → host
//! ```
//! Rows that stay in the GPUs' memory go another way, straight from one to the other: [`Peers`]. Where all ranks' GPUs
//! reach each other's memory, of one machine, they can also write into it ([`Peers::reaches`]).
//!
//! NCCL is opened at run time (`libnccl.so.2`, 2.14 or newer), and never waited for: its communicators
//! are polled, and ended (`ncclCommAbort`) where a rank has failed or time is up.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use moe_cuda::{Gpu, Nccl, NcclId, NcclLink, NcclPeers};

use super::link::{self, Link};
use super::peers::{Direct, Reach, SETUP, error};
use super::{Communicator, Options, failure};
use crate::{Error, Result};

pub use super::peers::{Peers, Shared};

/// The group of the ranks of `control`, each with GPU `gpu` of its own, connected by NCCL. All ranks call
/// this together. Where the environment has `NCCL_LIBRARY`, that file is the library.
///
/// # Errors
/// In one line, on every rank, within the time-out: no library, no such GPU, a GPU that two ranks want,
/// libraries of different versions, ranks that NCCL cannot connect.
pub fn open(control: Arc<dyn Communicator>, gpu: usize) -> Result<Arc<dyn Communicator>> {
    let library = std::env::var_os("NCCL_LIBRARY").map(PathBuf::from);
    open_with(control, gpu, Options::default(), library.as_deref())
}

/// [`open`] with options, and with the NCCL library at `library` instead of the one that is found.
///
/// # Errors
/// As [`open`].
pub fn open_with(
    control: Arc<dyn Communicator>,
    gpu: usize,
    options: Options,
    library: Option<&Path>,
) -> Result<Arc<dyn Communicator>> {
    let joined = join(&control, gpu, options, library).inspect_err(|error| {
        // the others would wait for this rank
        control.abort(&error.to_string());
    });
    let (name, rank_link, peers, reach) = joined?;
    let direct = Arc::new(Direct::new(peers, options.timeout, reach)?);
    Ok(link::over_gpus(control, name, Box::new(rank_link), options, direct))
}

fn join(
    control: &Arc<dyn Communicator>,
    gpu: usize,
    options: Options,
    library: Option<&Path>,
) -> Result<(String, NcclLink, NcclPeers, Option<Reach>)> {
    let (rank, ranks) = (control.rank(), control.size());
    let nccl = Nccl::open(library).map_err(error)?;
    let gpu = Gpu::new(gpu).map_err(error)?;
    let (major, minor, patch) = nccl.version();
    let version = [major, minor, patch].iter().fold(0, |all, part| all << 16 | u64::from(*part));
    let [low, high] = gpu.uuid().map_err(error)?;
    let all = control.all_gather(SETUP, [version, low, high])?;
    agree(rank, &all)?;
    let meet = || {
        let mut id = NcclId([0; NcclId::LEN]);
        if rank == 0 {
            id = nccl.new_id().map_err(error)?;
        }
        control.broadcast(SETUP, 0, &mut id.0)?;
        Ok::<_, Error>(id)
    };
    let until_ready = |ready: &mut dyn FnMut() -> moe_cuda::Result<bool>| {
        let since = Instant::now();
        while !ready().map_err(error)? {
            control.check()?;
            if since.elapsed() >= options.timeout {
                let waited = options.timeout.as_secs_f32();
                let cause = format!("waited {waited} s for NCCL to connect {ranks} ranks");
                return Err(failure(rank, &cause));
            }
            thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    };
    let mut link = NcclLink::begin(&nccl, &gpu, meet()?, rank, ranks).map_err(error)?;
    until_ready(&mut || link.is_ready()).inspect_err(|_| link.abort())?;
    let mut peers = NcclPeers::begin(&nccl, &gpu, meet()?, rank, ranks).map_err(error)?;
    until_ready(&mut || peers.is_ready()).inspect_err(|_| peers.abort())?;
    let reach = Reach::new(&**control, &gpu)?;
    Ok((format!("NCCL {major}.{minor}.{patch} over {}", control.name()), link, peers, reach))
}

/// Whether all ranks have the same library, and each a GPU of its own. `all` has three numbers a rank.
fn agree(rank: usize, all: &[u64]) -> Result<()> {
    let of = |rank: usize| &all[3 * rank..][..3];
    let (ranks, name) = (all.len() / 3, |version: u64| {
        format!("{}.{}.{}", version >> 32, version >> 16 & 0xffff, version & 0xffff)
    });
    for other in 1..ranks {
        let (first, version) = (of(0)[0], of(other)[0]);
        if first != version {
            let (first, version) = (name(first), name(version));
            let cause = format!("rank 0 has NCCL {first}, rank {other} has NCCL {version}");
            return Err(failure(rank, &cause));
        }
        if let Some(same) = (0..other).find(|before| of(*before)[1..] == of(other)[1..]) {
            let cause =
                format!("ranks {same} and {other} have the same GPU; NCCL needs one for each");
            return Err(failure(rank, &cause));
        }
    }
    Ok(())
}

impl Link for NcclLink {
    fn is_ready(&mut self) -> Result<bool> {
        NcclLink::is_ready(self).map_err(error)
    }

    fn start(&mut self, sends: &[(usize, &[u8])], receives: &[(usize, usize)]) -> Result<()> {
        NcclLink::start(self, sends, receives).map_err(error)
    }

    fn has_arrived(&mut self) -> Result<bool> {
        NcclLink::has_arrived(self).map_err(error)
    }

    fn take(&mut self, to: &mut [u8]) {
        NcclLink::take(self, to);
    }

    fn abort(&mut self) {
        NcclLink::abort(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_with_other_libraries_or_the_same_gpu_are_told() {
        let version = |minor: u64| 2 << 32 | minor << 16 | 5;
        assert!(agree(0, &[version(27), 1, 2, version(27), 1, 3]).is_ok());
        let error = agree(1, &[version(27), 1, 2, version(26), 1, 3]).unwrap_err().to_string();
        assert!(error.contains("rank 0 has NCCL 2.27.5, rank 1 has NCCL 2.26.5"), "{error}");
        let all = [version(27), 1, 2, version(27), 1, 3, version(27), 1, 2];
        let error = agree(1, &all).unwrap_err().to_string();
        assert!(error.contains("ranks 0 and 2 have the same GPU"), "{error}");
    }
}
