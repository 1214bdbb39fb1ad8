//! The handles on groups, and what a rank does with them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::transfer::Circle;
use super::world::{Backoff, Engine, World};
use crate::Result;
use crate::comm::{
    Buffers, Communicator, Exchanges, Flight, Head, Message, Part, TrafficCounter, Underway,
    sighting,
};

/// This rank's place in one group of this process; when it is dropped, the group is retired.
pub(super) struct Seat {
    pub(super) world: Arc<World>,
    pub(super) circle: Arc<Circle>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.world.retire(&self.circle);
    }
}

/// A handle on one group of this process.
pub(super) struct Member {
    pub(super) seat: Arc<Seat>,
    /// The number of the next exchange.
    pub(super) next: AtomicU64,
    pub(super) traffic: TrafficCounter,
}

impl Member {
    pub(super) fn new(world: Arc<World>, circle: Arc<Circle>) -> Self {
        let seat = Arc::new(Seat { world, circle });
        Self { seat, next: AtomicU64::new(0), traffic: TrafficCounter::default() }
    }
}

impl Communicator for Member {
    fn rank(&self) -> usize {
        self.seat.circle.rank
    }

    fn size(&self) -> usize {
        self.seat.circle.members.len()
    }

    fn name(&self) -> String {
        self.seat.world.mpi.version.clone()
    }

    fn start(&self, head: Head, message: Arc<Message>) -> Result<Flight> {
        let Seat { world, circle } = &*self.seat;
        world.check_thread()?;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let id = world.start(circle, number, (head, message))?;
        Ok(Flight::new(id, head, self.seat.clone()))
    }

    fn split(&self, color: usize, key: usize) -> Result<Arc<dyn Communicator>> {
        let this: &dyn Communicator = self;
        let Seat { world, circle } = &*self.seat;
        let members = this.split_members(color, key)?;
        // Color and key may be any size; these are small.
        let lowest = members.iter().min().copied().unwrap_or_default();
        let rank = members.iter().position(|&member| member == circle.rank);
        let rank = rank.unwrap_or_default();
        // All ranks have just been here, so that this cannot wait for long.
        let comm = world.mpi.split(circle.comm, lowest as i32, rank as i32)?;
        let members = members.iter().map(|&member| circle.members[member]).collect();
        let circle = Arc::new(Circle { comm, rank, members });
        world.engine().circles.push(circle.clone());
        Ok(Arc::new(Self::new(world.clone(), circle)))
    }

    fn abort(&self, reason: &str) {
        let world = &self.seat.world;
        if world.check_thread().is_ok() {
            let engine = world.engine();
            let who = sighting(world.rank, engine.seen[world.rank].as_ref());
            world.fail(&engine, format!("{who}, gave up: {reason}"));
        }
    }

    fn check(&self) -> Result<()> {
        let world = &self.seat.world;
        world.check_thread()?;
        let mut engine = world.engine();
        world.check_failed()?;
        world.progress(&mut engine)
    }

    fn traffic(&self) -> &TrafficCounter {
        &self.traffic
    }

    fn buffers(&self) -> &Arc<Buffers> {
        &self.seat.world.buffers
    }
}

impl Seat {
    /// Moves things on; whether the exchange is complete, and whether a rank is missing in it.
    fn advance(&self, exchange: &mut Underway) -> Result<(bool, bool)> {
        let world = &*self.world;
        world.check_thread()?;
        let mut engine = world.engine();
        world.check_failed()?;
        world.progress(&mut engine)?;
        let Some(transfer) = engine.transfers.get(&exchange.number) else {
            return Ok((true, false));
        };
        if transfer.is_done() {
            return Ok((true, false));
        }
        let since = *exchange.since.get_or_insert_with(Instant::now);
        if since.elapsed() >= world.timeout {
            let (waited, awaited) = (world.timeout.as_secs_f32(), transfer.awaited(&engine.seen));
            let cause = format!("waited {waited} s in {} for {awaited}", exchange.head);
            return Err(world.fail(&engine, cause));
        }
        Ok((false, transfer.lacks_ranks()))
    }
}

impl Exchanges for Seat {
    fn arrive(&self, exchange: &mut Underway, block: bool) -> Result<bool> {
        let mut backoff = Backoff::new(self.world.crowded);
        loop {
            match self.advance(exchange)? {
                (false, idle) if block => backoff.pause(idle),
                (done, _) => return Ok(done),
            }
        }
    }

    fn take(&self, exchange: &Underway, parts: &mut Vec<Part>) {
        if let Some(transfer) = self.world.engine().transfers.get(&exchange.number) {
            parts.extend(transfer.parts());
        }
    }

    fn finish(&self, exchange: &Underway) {
        let mut engine = self.world.engine();
        let Engine { transfers, spares, .. } = &mut *engine;
        match transfers.get_mut(&exchange.number) {
            Some(transfer) if transfer.is_done() => {
                if let Some(transfer) = transfers.remove(&exchange.number) {
                    self.world.let_go(spares, transfer);
                }
            }
            // Still to be moved on, so that the others can finish.
            Some(transfer) => transfer.abandoned = true,
            None => {}
        }
    }
}
