//! Routing as it was captured: the ids are the trace's, the weights come from today's logits.

use super::{LogicalId, Router, Routing, Trace};
use crate::{Error, Result};

/// Plays a [`Trace`] back, call by call.
///
/// Each layer must be called as when it was captured: as often, and with as many tokens each time.
/// Layers advance independently of each other.
#[derive(Clone, Debug)]
pub struct Replay {
    trace: Trace,
    /// One for each layer of the trace.
    positions: Vec<Position>,
    /// `[T, k]` of the current call.
    ids: Vec<LogicalId>,
}

/// The next call of a layer, and its first row.
#[derive(Clone, Copy, Debug, Default)]
struct Position {
    call: usize,
    row: usize,
}

impl Replay {
    /// From the trace's first call on.
    pub fn new(trace: Trace) -> Self {
        let positions = vec![Position::default(); trace.layers().len()];
        Self { trace, positions, ids: Vec::new() }
    }

    /// Routes the next call of `layer` to the experts of the trace, weighted by the router's own
    /// rules at these `logits`, `[T, E_total]`.
    ///
    /// # Errors
    /// If the trace has no such layer, no further call of it, or one with another number of
    /// tokens; if the layer's sizes are not those of the trace; and as [`Router::route_to`]. The
    /// replay then stays where it was.
    pub fn route(
        &mut self,
        layer: &str,
        router: &Router,
        logits: &[f32],
        tokens: usize,
        out: &mut Routing,
    ) -> Result<()> {
        out.clear();
        let mismatch = |reason: String| Error::input("routing replay", reason);
        let index = self.trace.layers().iter().position(|traced| traced.name() == layer);
        let index = index.ok_or_else(|| mismatch(format!("the trace has no layer '{layer}'")))?;
        let traced = &self.trace.layers()[index];
        let position = &mut self.positions[index];
        traced.check_sizes(router.spec())?;
        match traced.calls().get(position.call) {
            None => {
                return Err(mismatch(format!(
                    "layer '{layer}' was called {} times when it was captured, not more",
                    traced.calls().len()
                )));
            }
            Some(&captured) if captured != tokens => {
                return Err(mismatch(format!(
                    "layer '{layer}', call {}: {tokens} tokens, {captured} when it was captured",
                    position.call
                )));
            }
            Some(_) => {}
        }
        self.ids.clear();
        self.ids.extend(traced.ids_from(position.row, tokens));
        router.route_to(logits, &self.ids, tokens, out)?;
        position.call += 1;
        position.row += tokens;
        Ok(())
    }

    /// Back to the first call of every layer.
    pub fn rewind(&mut self) {
        self.positions.fill(Position::default());
    }

    /// Checks that every captured call was replayed.
    ///
    /// # Errors
    /// Names the first layer with calls left.
    pub fn finish(&self) -> Result<()> {
        for (traced, position) in self.trace.layers().iter().zip(&self.positions) {
            let captured = traced.calls().len();
            if position.call < captured {
                return Err(Error::input(
                    "routing replay",
                    format!(
                        "layer '{}': {} of {captured} captured calls were replayed",
                        traced.name(),
                        position.call
                    ),
                ));
            }
        }
        Ok(())
    }
}
