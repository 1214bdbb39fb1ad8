//! Times of repeated runs.

use std::time::Duration;

/// The times of repeated runs, in seconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Times {
    pub(crate) median: f64,
    pub(crate) min: f64,
    /// Half of the runs are between these.
    pub(crate) quartiles: [f64; 2],
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
        quartiles: [seconds[seconds.len() / 4], seconds[3 * seconds.len() / 4]],
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
        assert_eq!(times.quartiles, [0.003, 0.005]);
        assert!(times.min <= times.median && times.median <= times.max);
    }
}
