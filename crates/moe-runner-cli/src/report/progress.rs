//! Progress of long work: on standard error, and only on a terminal.

use std::fmt::Write;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressState, ProgressStyle};

/// A bar, which disappears when it is dropped.
pub(crate) struct Progress {
    bar: ProgressBar,
    begun: Instant,
}

impl Progress {
    /// Of `steps` steps.
    pub(crate) fn new(steps: usize) -> Self {
        Self::with(steps as u64, "{bar:24} {pos}/{len}  {msg}  {elapsed}{left}")
    }

    /// Of bytes.
    pub(crate) fn of_bytes(bytes: u64) -> Self {
        let template = "{bar:24} {decimal_bytes}/{decimal_total_bytes}, \
                        {decimal_bytes_per_sec}{left}  {wide_msg}";
        Self::with(bytes, template)
    }

    fn with(length: u64, template: &str) -> Self {
        // hidden by itself where standard error is no terminal
        let bar = ProgressBar::new(length);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.with_key("left", |state: &ProgressState, out: &mut dyn Write| {
                // nothing is known before something is done
                if state.pos() > 0 {
                    let _ = write!(out, ", {:#} left", HumanDuration(state.eta()));
                }
            }));
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar, begun: Instant::now() }
    }

    /// Does what writes to the terminal, without the bar in between.
    pub(crate) fn aside<R>(&self, work: impl FnOnce() -> R) -> R {
        self.bar.suspend(work)
    }

    /// How far it is, of a bar of bytes.
    pub(crate) fn at(&self, bytes: u64) {
        self.bar.set_position(bytes);
    }

    /// About how long the rest will take, if it goes on as it did: after at least one step.
    pub(crate) fn left(&self) -> Option<Duration> {
        let (done, all) = (self.bar.position(), self.bar.length()?);
        let each = self.begun.elapsed().checked_div(u32::try_from(done).ok()?)?;
        Some(each * u32::try_from(all.saturating_sub(done)).ok()?)
    }

    /// Says what is being done.
    pub(crate) fn doing(&self, what: impl Into<String>) {
        self.bar.set_message(what.into());
    }

    /// One step is done.
    pub(crate) fn step(&self) {
        self.bar.inc(1);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
