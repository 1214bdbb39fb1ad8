//! Who did what, and who waited for what, in a forward pass.

use std::time::{Duration, Instant};

use crate::experts::DeviceSpan;

/// One stretch of time on one rank.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// "gate", "dispatch", "wait for dispatch", "experts", …
    pub what: &'static str,
    /// The micro-batch it belongs to; `None`: to the whole batch.
    pub lane: Option<usize>,
    /// From the timeline's start.
    pub start: Duration,
    /// From the timeline's start.
    pub end: Duration,
}

/// Spans in order of their ends. Recording is off until it is asked for.
#[derive(Clone, Debug)]
pub struct Timeline {
    origin: Option<Instant>,
    spans: Vec<Span>,
}

impl Timeline {
    /// Records nothing.
    pub fn off() -> Self {
        Self { origin: None, spans: Vec::new() }
    }

    /// Records from now on; `origin` is the common zero of several ranks' timelines.
    pub fn since(origin: Instant) -> Self {
        Self { origin: Some(origin), spans: Vec::new() }
    }

    /// Runs `work`, and records how long it took.
    pub fn span<R>(
        &mut self,
        what: &'static str,
        lane: Option<usize>,
        work: impl FnOnce() -> R,
    ) -> R {
        let Some(origin) = self.origin else { return work() };
        let start = origin.elapsed();
        let result = work();
        self.spans.push(Span { what, lane, start, end: origin.elapsed() });
        result
    }

    /// Records from now on what a device does; `None`: nothing is recorded.
    pub(super) fn of_device(&self) -> Option<(Duration, Vec<DeviceSpan>)> {
        self.origin.map(|origin| (origin.elapsed(), Vec::new()))
    }

    /// Adds it. The device began no sooner.
    pub(super) fn add(&mut self, (begin, spans): (Duration, Vec<DeviceSpan>)) {
        self.spans.extend(spans.into_iter().map(|DeviceSpan { what, lane, start, end }| Span {
            what,
            lane,
            start: begin + start,
            end: begin + end,
        }));
    }

    /// What was recorded.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }
}
