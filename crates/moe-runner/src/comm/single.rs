//! One rank: every exchange is with itself.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::sync::{Mutex, lock};
use super::{
    Buffers, Communicator, Exchanges, Flight, Head, Message, Part, TrafficCounter, Underway,
    failure,
};
use crate::Result;

/// A group of one rank.
pub fn single() -> Arc<dyn Communicator> {
    Arc::new(Single::default())
}

#[derive(Default)]
struct Single {
    traffic: TrafficCounter,
    buffers: Arc<Buffers>,
    next: AtomicU64,
    sent: Arc<Sent>,
    /// Shared with the groups split from this one.
    failed: Arc<OnceLock<String>>,
}

/// What was sent is what arrives: exchanges that have not been taken, by number.
#[derive(Default)]
struct Sent(Mutex<VecDeque<(u64, Arc<Message>)>>);

impl Communicator for Single {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn name(&self) -> String {
        "single".to_owned()
    }

    fn start(&self, head: Head, message: Arc<Message>) -> Result<Flight> {
        self.check()?;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.sent.0).push_back((number, message));
        Ok(Flight::new(number, head, self.sent.clone()))
    }

    fn split(&self, _color: usize, _key: usize) -> Result<Arc<dyn Communicator>> {
        Ok(Arc::new(Self { failed: self.failed.clone(), ..Self::default() }))
    }

    fn abort(&self, reason: &str) {
        self.failed.get_or_init(|| format!("gave up: {reason}"));
    }

    fn check(&self) -> Result<()> {
        self.failed.get().map_or(Ok(()), |cause| Err(failure(0, cause)))
    }

    fn traffic(&self) -> &TrafficCounter {
        &self.traffic
    }

    fn buffers(&self) -> &Arc<Buffers> {
        &self.buffers
    }
}

impl Exchanges for Sent {
    fn arrive(&self, _flight: &mut Underway, _block: bool) -> Result<bool> {
        Ok(true)
    }

    fn take(&self, flight: &Underway, parts: &mut Vec<Part>) {
        let sent = lock(&self.0);
        let mine = sent.iter().filter(|(number, _)| *number == flight.number);
        parts.extend(mine.map(|(_, message)| (message.clone(), message.span(0))));
    }

    fn finish(&self, flight: &Underway) {
        lock(&self.0).retain(|(number, _)| *number != flight.number);
    }
}
