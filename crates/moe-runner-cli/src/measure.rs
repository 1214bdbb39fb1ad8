//! Times of repeated runs, and what the machine allows.

use std::fmt;
use std::time::Duration;

use moe_kernels::kernel::Kernel;
use moe_kernels::limits::Limits;
use moe_kernels::pool::Pool;
use serde::Serialize;

use crate::report::units::plural;

/// How long the limits are measured: a second is ample.
const LIMITS_BUDGET: Duration = Duration::from_secs(1);

/// What this machine can do at most, on these threads.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct MachineLimits {
    pub(crate) threads: usize,
    pub(crate) isa: &'static str,
    /// 10⁹ bytes/s of memory read.
    pub(crate) read_gbps: f64,
    /// 10⁹ f32 operations/s; multiply-adds count two.
    pub(crate) f32_gflops: f64,
}

impl MachineLimits {
    pub(crate) fn measure(pool: &Pool) -> Self {
        let kernel = Kernel::detect();
        let Limits { read_gbps, f32_gflops, threads } =
            Limits::measure(kernel, pool, LIMITS_BUDGET);
        Self { threads, isa: kernel.name(), read_gbps, f32_gflops }
    }

    /// The least time that this machine needs to read so many bytes and do so much arithmetic.
    pub(crate) fn least_seconds(&self, bytes: f64, flops: f64) -> f64 {
        (bytes / self.read_gbps).max(flops / self.f32_gflops) / 1e9
    }
}

impl fmt::Display for MachineLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, {}: reads {:.1} GB/s, computes {:.0} GFLOP/s in f32 (measured now)",
            plural(self.threads, "thread"),
            self.isa,
            self.read_gbps,
            self.f32_gflops
        )
    }
}

/// The times of repeated runs, in seconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) runs: usize,
}

/// Repeats `work`, which says how long it took, until `budget` is used up, at least `least` times,
/// after one run that is not counted: it fetches what later runs find in memory. Ranks that are
/// told the same times stop at the same run.
pub(crate) fn times<E>(
    budget: Duration,
    least: usize,
    mut work: impl FnMut() -> Result<Duration, E>,
) -> Result<Times, E> {
    /// Beyond this, more runs say nothing new.
    const MOST: usize = 1000;
    work()?;
    let mut used = Duration::ZERO;
    let mut seconds = Vec::new();
    while seconds.len() < least || (seconds.len() < MOST && used < budget) {
        let time = work()?;
        used += time;
        // a clock may be coarser than the work
        seconds.push(time.as_secs_f64().max(1e-9));
    }
    seconds.sort_by(f64::total_cmp);
    Ok(Times {
        median: seconds[seconds.len() / 2],
        min: seconds[0],
        max: seconds[seconds.len() - 1],
        runs: seconds.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_run_counts_but_the_first() {
        let mut calls = 0;
        let times = times(Duration::ZERO, 5, || {
            calls += 1;
            Ok::<_, ()>(Duration::from_millis(calls))
        });
        let times = times.unwrap();
        assert_eq!((times.runs, calls), (5, 6));
        assert_eq!((times.min, times.median, times.max), (0.002, 0.004, 0.006));
        assert!(times.min <= times.median && times.median <= times.max);
    }

    #[test]
    fn the_slower_of_reading_and_arithmetic_is_the_limit() {
        let limits =
            MachineLimits { threads: 1, isa: "portable", read_gbps: 10.0, f32_gflops: 100.0 };
        assert!((limits.least_seconds(20e9, 50e9) - 2.0).abs() < 1e-9);
        assert!((limits.least_seconds(1e9, 50e9) - 0.5).abs() < 1e-9);
    }
}
