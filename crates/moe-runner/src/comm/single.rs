//! One rank: every exchange is a copy from itself.

use std::sync::{Arc, OnceLock};

use super::{Arrived, Communicator, Exchange, InFlight, Pool, TrafficCounter, failure};
use crate::Result;

/// A group of one rank.
pub fn single() -> Arc<dyn Communicator> {
    Arc::new(Single::default())
}

#[derive(Default)]
struct Single {
    traffic: TrafficCounter,
    pool: Pool,
    /// Shared with the groups split from this one.
    failed: Arc<OnceLock<String>>,
}

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

    fn start(&self, exchange: Exchange) -> Result<Box<dyn InFlight>> {
        match self.failed.get() {
            Some(cause) => Err(failure(0, cause)),
            None => Ok(Box::new(Landed(exchange))),
        }
    }

    fn split(&self, _color: usize, _key: usize) -> Result<Arc<dyn Communicator>> {
        Ok(Arc::new(Self { failed: self.failed.clone(), ..Self::default() }))
    }

    fn abort(&self, reason: &str) {
        self.failed.get_or_init(|| format!("gave up: {reason}"));
    }

    fn traffic(&self) -> &TrafficCounter {
        &self.traffic
    }

    fn pool(&self) -> &Pool {
        &self.pool
    }
}

/// An exchange with oneself: what was sent is what arrives.
struct Landed(Exchange);

impl InFlight for Landed {
    fn poll(&mut self) -> Result<bool> {
        Ok(true)
    }

    fn wait(self: Box<Self>) -> Result<Arrived> {
        let elements = Arc::unwrap_or_clone(self.0.send);
        let len = elements.len();
        Ok(Arrived::Together(elements, vec![len]))
    }
}
