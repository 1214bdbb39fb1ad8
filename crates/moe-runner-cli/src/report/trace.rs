//! A timeline of all ranks, in the trace event format that chrome://tracing and Perfetto read: one
//! process for each rank, one thread for each micro-batch.

use std::path::Path;

use anyhow::Result;
use moe_runner::comm::{At, Groups};
use moe_runner::runner::Span;
use serde::{Deserialize, Serialize};

use crate::outputs;

/// One span of one rank; times in microseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RankSpan {
    rank: usize,
    lane: usize,
    what: String,
    start: f64,
    length: f64,
}

/// The spans of all ranks, on every rank.
pub(crate) fn gather(
    groups: &Groups,
    at: At<'_>,
    spans: &[Span],
) -> moe_runner::Result<Vec<RankSpan>> {
    let rank = groups.world.rank();
    let mine: Vec<RankSpan> = spans
        .iter()
        .map(|span| RankSpan {
            rank,
            // lane 0 is the whole batch, lane n the n-th micro-batch
            lane: span.lane.map_or(0, |lane| lane + 1),
            what: span.what.to_owned(),
            start: span.start.as_secs_f64() * 1e6,
            length: (span.end - span.start).as_secs_f64() * 1e6,
        })
        .collect();
    // spans are plain numbers and names: they cannot fail to be written or read
    let bytes = serde_json::to_vec(&mine).unwrap_or_default();
    let all = groups.world.all_gather_v(at, bytes)?;
    Ok(all
        .iter()
        .flat_map(|part| serde_json::from_slice::<Vec<RankSpan>>(part).unwrap_or_default())
        .collect())
}

#[derive(Serialize)]
struct Event<'a> {
    name: &'a str,
    cat: &'a str,
    ph: &'a str,
    ts: f64,
    dur: f64,
    pid: usize,
    tid: usize,
}

/// Layers one after the other on one timeline.
#[derive(Default)]
pub(crate) struct Trace {
    events: Vec<(String, RankSpan)>,
    end: f64,
}

impl Trace {
    /// Appends a layer's spans after those before it.
    pub(crate) fn add(&mut self, layer: &str, spans: &[RankSpan]) {
        let shift = self.end;
        for span in spans {
            let span = RankSpan { start: span.start + shift, ..span.clone() };
            self.end = self.end.max(span.start + span.length);
            self.events.push((layer.to_owned(), span));
        }
    }

    /// Writes the file, complete or not at all.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let events: Vec<Event<'_>> = self
            .events
            .iter()
            .map(|(layer, span)| Event {
                name: &span.what,
                cat: layer,
                ph: "X",
                ts: span.start,
                dur: span.length,
                pid: span.rank,
                tid: span.lane,
            })
            .collect();
        let text = serde_json::to_vec(&serde_json::json!({ "traceEvents": events }))?;
        outputs::write(path, &text)
    }
}
