//! What a pass did when, by the device's clock: events around its steps, read once they are done.

use std::cell::RefCell;
use std::time::Duration;

use moe_cuda::{Event, Stream};

use super::device::error;
use crate::Result;
use crate::experts::DeviceSpan;

/// The marks of one pass; none where nobody asks.
pub(super) struct Marks(Option<Recorded>);

struct Recorded {
    begin: Event,
    spans: RefCell<Vec<Marked>>,
}

/// A step, and the events around it.
struct Marked {
    what: &'static str,
    lane: Option<usize>,
    events: [Event; 2],
}

impl Marks {
    /// From what is on `stream` now on, if `wanted`.
    pub(super) fn new(wanted: bool, stream: &Stream) -> Result<Self> {
        let begin =
            || Ok::<_, crate::Error>(Recorded { begin: at(stream)?, spans: RefCell::default() });
        wanted.then(begin).transpose().map(Self)
    }

    /// Before a step.
    pub(super) fn open(&self, stream: &Stream) -> Result<Option<Event>> {
        self.0.as_ref().map(|_| at(stream)).transpose()
    }

    /// After the step that was opened.
    pub(super) fn close(
        &self,
        stream: &Stream,
        opened: Option<Event>,
        what: &'static str,
        lane: Option<usize>,
    ) -> Result<()> {
        if let (Some(recorded), Some(opened)) = (&self.0, opened) {
            let events = [opened, at(stream)?];
            recorded.spans.borrow_mut().push(Marked { what, lane, events });
        }
        Ok(())
    }

    /// Puts a step on `stream`.
    pub(super) fn span<T>(
        &self,
        stream: &Stream,
        what: &'static str,
        lane: Option<usize>,
        step: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let opened = self.open(stream)?;
        let done = step()?;
        self.close(stream, opened, what, lane)?;
        Ok(done)
    }

    /// Adds what was recorded, from the pass's begin on; all of it is done.
    pub(super) fn read(&self, to: &mut Vec<DeviceSpan>) -> Result<()> {
        let Some(Recorded { begin, spans }) = &self.0 else { return Ok(()) };
        let since = |event: &Event| {
            let micros = event.microseconds_since(begin).map_err(error)?;
            Ok::<_, crate::Error>(Duration::from_secs_f64(micros.max(0.0) * 1e-6))
        };
        for Marked { what, lane, events: [start, end] } in spans.borrow().iter() {
            to.push(DeviceSpan { what, lane: *lane, start: since(start)?, end: since(end)? });
        }
        Ok(())
    }
}

fn at(stream: &Stream) -> Result<Event> {
    let event = Event::new(stream.gpu()).map_err(error)?;
    stream.record(&event).map_err(error)?;
    Ok(event)
}
