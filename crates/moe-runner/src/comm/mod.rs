//! Ranks that work on one layer together: who they are, and how they exchange rows.
//!
//! A [`Communicator`] is one rank's end of a group. Every collective is built on one primitive,
//! the *exchange*: each rank hands one part of its elements to every rank and gets one part from
//! every rank. An implementation provides that primitive (and groups, and failure); the
//! collectives, their checks and their arithmetic are the same code for all of them, so that
//! ranks as threads and ranks as MPI processes give the same bits.
//!
//! * [`single`]: one rank; every collective is a copy.
//! * [`threads`], [`run_ranks`]: the ranks are threads of this process (the embedded default).
//! * [`mpi`]: the ranks are processes, on one machine or many; the library is opened at run time.
//! * [`link`], `nccl` (feature `cuda`): over any of these, what ranks exchange goes another way, such as
//!   through a GPU each.
//! * [`tcp`]: the same over plain connections, for processes that are told where to meet.
//!
//! **Order of sums.** Contributions are added in rank order, in f32 for bf16 and f16, and rounded
//! once. A result depends on the number of ranks and their contributions, on nothing else.
//!
//! **Failure.** A collective returns, on every rank, within the time-out ([`Options::timeout`],
//! 60 s unless set): with its result, or with an [`Error::Communication`](crate::Error) that names
//! the rank at fault, and the layer and step it was last seen at. That covers ranks that return
//! early, panic, report an error ([`Communicator::abort`]), call another collective or the same one
//! with other lengths, or never arrive. After a failure the group and all groups split from it or
//! beside it are poisoned: every later call fails at once with the first cause.
//!
//! ```
//! use moe_runner::comm::{At, Step, run_ranks};
//!
//! let sums = run_ranks(4, |comm| {
//!     let mut x = vec![comm.rank() as f32; 3];
//!     comm.all_reduce(At::new("model.layers.0.mlp", Step::ReduceOutput), &mut x)?;
//!     Ok(x)
//! })?;
//! assert!(sums.iter().all(|x| x == &[6.0, 6.0, 6.0]));
//! # Ok::<(), moe_runner::Error>(())
//! ```

mod buffers;
mod collectives;
mod groups;
mod head;
pub mod link;
mod message;
#[cfg(all(unix, feature = "mpi"))]
pub mod mpi;
#[cfg(feature = "cuda")]
pub mod nccl;
#[cfg(feature = "cuda")]
mod peers;
#[cfg(feature = "cuda")]
pub(crate) mod shared;
mod single;
mod sync;
pub mod tcp;
mod threads;
mod traffic;
pub mod watch;

pub use buffers::Buffers;
pub use collectives::{Pending, all_reduce_sent};
pub(crate) use collectives::{copy, share};
pub use groups::{Groups, Sizes};
pub use head::{At, Head, Kind, Place, Step};
pub use message::{Dtype, Element, Message, Outgoing, Part, Received, Sum};
pub use single::single;
pub use threads::{run_ranks, run_ranks_with, threads, threads_with};
pub use traffic::{Count, Traffic, TrafficCounter};

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// One rank's end of a group of ranks.
///
/// The collectives are methods of `dyn Communicator` (`all_reduce`
/// and its neighbours); this trait is what an implementation provides. All ranks of a group call
/// the same collectives in the same order. Several exchanges of a group may be under way.
pub trait Communicator: Send + Sync {
    /// This rank, in `0..size`.
    fn rank(&self) -> usize;

    /// The number of ranks in the group.
    fn size(&self) -> usize;

    /// "single", "threads", "tcp", or the library's name and version.
    fn name(&self) -> String;

    /// Starts one exchange: hands out this rank's parts, returns without waiting for others.
    ///
    /// The collectives are built on this; call those instead.
    fn start(&self, head: Head, message: Arc<Message>) -> Result<Flight>;

    /// The subgroup of the ranks that passed the same `color`, ordered by `key`, then by rank. All
    /// ranks of this group call it together.
    fn split(&self, color: usize, key: usize) -> Result<Arc<dyn Communicator>>;

    /// Tells all ranks, of this group and of those related to it by `split`, that this one cannot
    /// go on: their calls end with `reason`. Does not wait.
    fn abort(&self, reason: &str);

    /// The first failure, if one is known by now: for a rank that waits for something else than an
    /// exchange. Does not wait.
    fn check(&self) -> Result<()>;

    /// The way between the memories of the ranks' GPUs, where there is one.
    #[cfg(feature = "cuda")]
    fn peers(&self) -> Option<peers::Peers> {
        None
    }

    /// What this rank has sent and received in this group.
    fn traffic(&self) -> &TrafficCounter;

    /// Messages that this rank has used, to be used again.
    fn buffers(&self) -> &Arc<Buffers>;
}

/// An exchange under way, as this rank sees it.
#[derive(Clone, Copy, Debug)]
pub struct Underway {
    /// Its number, as the group counts.
    pub number: u64,
    /// Which collective, where in the model.
    pub head: Head,
    /// When this rank began to wait for it.
    pub since: Option<Instant>,
}

/// The exchanges of one rank in one group, of which several may be under way.
pub trait Exchanges: Send + Sync {
    /// True once every rank's part is there. Moves the exchange on; waits with `block`, else never.
    ///
    /// # Errors
    /// A rank that does not arrive, has failed, or is in another collective.
    fn arrive(&self, exchange: &mut Underway, block: bool) -> Result<bool>;

    /// Adds this rank's parts to `parts`, in rank order. All are there.
    fn take(&self, exchange: &Underway, parts: &mut Vec<Part>);

    /// This rank needs the exchange no more, whether it has taken its parts or not. The others get
    /// theirs all the same.
    fn finish(&self, exchange: &Underway);
}

/// An exchange under way. Dropping it gives up this rank's received parts, not those of others.
pub struct Flight {
    exchange: Underway,
    exchanges: Arc<dyn Exchanges>,
}

impl Flight {
    /// The exchange `number` of `exchanges`, which ends when this is dropped.
    pub fn new(number: u64, head: Head, exchanges: Arc<dyn Exchanges>) -> Self {
        Self { exchange: Underway { number, head, since: None }, exchanges }
    }

    fn arrive(&mut self, block: bool) -> Result<bool> {
        self.exchanges.arrive(&mut self.exchange, block)
    }

    fn take(&self, parts: &mut Vec<Part>) {
        self.exchanges.take(&self.exchange, parts);
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.exchanges.finish(&self.exchange);
    }
}

/// How a group is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How long a rank waits for the others in one collective before it fails. It must cover the
    /// largest difference in time between ranks, e.g. of loading weights. 60 s by default.
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(60) }
    }
}

/// "rank 3 last seen at layer 'x', step combine (all-to-all)".
pub(crate) fn sighting(rank: usize, seen: Option<&Head>) -> String {
    match seen {
        Some(head) => format!("rank {rank}, last seen in {head}"),
        None => format!("rank {rank}, which took part in no collective"),
    }
}

/// The error of a group, as seen by `rank`.
pub(crate) fn failure(rank: usize, cause: &str) -> Error {
    Error::Communication(format!("rank {rank}: {cause}"))
}
