//! How fast ranks reach each other: measured, and what the collectives of a pass take by it.

#[cfg(feature = "cuda")]
mod gpus;

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::comm::{At, Communicator, Step, Traffic};
use crate::{Error, Result};

/// Bytes to each other rank whose time is all latency.
const SMALL: usize = 8;

/// Bytes to each other rank whose time is hardly any latency, unless the link is so slow that fewer will do.
const LARGE: [usize; 2] = [1 << 20, 16 << 20];

/// Exchanges that are timed, of each size.
const RUNS: usize = 15;

/// A run longer than this is not made larger.
const LONG: Duration = Duration::from_millis(50);

const LINKS: At<'static> = At { layer: "the links", step: Step::Setup };

/// What one collective takes: a latency, and the bytes that a rank sends or receives (the larger of the two) at a
/// rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkSpeed {
    /// Microseconds of an exchange without content.
    pub latency_us: f64,
    /// 10⁹ bytes a second that a rank sends, and receives at the same time.
    pub gbps: f64,
}

impl LinkSpeed {
    /// Between the ranks of `group`, as the slowest of them sees it: exchanges of all with all, small ones and large
    /// ones, the median of several. All ranks call this together.
    ///
    /// # Errors
    /// [`Error::Input`] for one rank; [`Error::Communication`] for one that does not come.
    pub fn measure(group: &dyn Communicator) -> Result<Self> {
        Self::measure_with(group, |bytes| {
            let (ranks, me) = (group.size(), group.rank());
            let counts: Vec<usize> =
                (0..ranks).map(|rank| if rank == me { 0 } else { bytes }).collect();
            let send = group.buffer::<u8>(counts.iter().sum())?;
            group.barrier(LINKS)?;
            let start = Instant::now();
            group.start_all_to_all_v(LINKS, send, &counts)?.wait(group)?;
            Ok(start.elapsed())
        })
    }

    /// The same of exchanges that somebody else makes: `exchange` sends every other rank so many bytes and gets as
    /// many from it, and says how long it took.
    ///
    /// # Errors
    /// As [`Self::measure`].
    pub fn measure_with(
        group: &dyn Communicator,
        mut exchange: impl FnMut(usize) -> Result<Duration>,
    ) -> Result<Self> {
        let others = group.size() - 1;
        if others == 0 {
            return Err(Error::input("links", "one rank has none"));
        }
        let mut median = |bytes: usize| -> Result<Duration> {
            // the first makes connections and memory
            exchange(bytes)?;
            let mut nanos = Vec::with_capacity(RUNS);
            for _ in 0..RUNS {
                let mine = u64::try_from(exchange(bytes)?.as_nanos()).unwrap_or(u64::MAX);
                let all = group.all_gather(LINKS, vec![mine])?;
                nanos.push(all.into_iter().max().unwrap_or(mine));
            }
            nanos.sort_unstable();
            Ok(Duration::from_nanos(nanos[RUNS / 2]))
        };
        let latency = median(SMALL)?;
        let [mut bytes, larger] = LARGE;
        let mut time = median(bytes)?;
        if time < LONG {
            bytes = larger;
            time = median(bytes)?;
        }
        // a clock that saw no difference has seen a fast link
        let content = time.saturating_sub(latency).max(Duration::from_nanos(100)).as_secs_f64();
        let gbps = (bytes * others) as f64 / content / 1e9;
        Ok(Self { latency_us: latency.as_secs_f64() * 1e6, gbps })
    }

    /// Seconds that collectives with this traffic of one rank take, one after another.
    pub fn seconds(&self, traffic: &Traffic) -> f64 {
        let total = traffic.total();
        let bytes = total.sent.max(total.received) as f64;
        total.calls as f64 * self.latency_us * 1e-6 + bytes / (self.gbps * 1e9)
    }
}
