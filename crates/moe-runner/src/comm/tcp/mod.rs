//! Ranks that are processes, on one machine or many, over TCP: nothing but a network is needed.
//!
//! Each process is told where to meet ([`Rendezvous`]); rank 0 listens there, the others come, and then
//! every two of them hold one connection. Any thread may use a handle. Elements travel as bytes; sums
//! are made here, in rank order, so that they equal those of ranks that are threads bit by bit.
//!
//! **Leaving.** When a rank drops its last handle it says so, and waits for the others to do the same,
//! no longer than the time-out.
//!
//! **Failure.** As for [every group](super). A process that is killed is named as soon as its
//! connections close; one that is stuck, or whose machine is gone, after the time-out.
//!
//! **Trust.** Connections are neither encrypted nor authenticated: whoever reaches the port while ranks
//! are expected can pass for one. Use it where everybody on the network may.

mod rendezvous;
mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use self::world::{Circle, Presence};
use super::{
    Buffers, Communicator, Exchanges, Flight, Head, Message, Options, Part, TrafficCounter,
    Underway,
};
use crate::Result;

/// Where and as whom a process meets the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendezvous {
    /// `HOST:PORT`: an address of the machine of rank 0, which listens there.
    pub address: String,
    /// This process, in `0..ranks`.
    pub rank: usize,
    /// How many meet.
    pub ranks: usize,
}

/// Meets the other ranks.
///
/// # Errors
/// In one line, on every rank that is there, within [`Options::timeout`]: who has not come, cannot be
/// reached, is another version, or expects another number of ranks.
pub fn open(at: &Rendezvous, options: Options) -> Result<Arc<dyn Communicator>> {
    let connections = rendezvous::meet(at, options.timeout)?;
    let presence = Presence::new(at.rank, connections, options.timeout)?;
    let circle = presence.world.circle((0..at.ranks).collect(), at.rank);
    Ok(Arc::new(Member::new(Arc::new(presence), circle)))
}

/// One rank's handle on one group.
struct Member {
    seat: Arc<Seat>,
    next: AtomicU64,
    traffic: TrafficCounter,
}

/// This rank's place in a group.
struct Seat {
    presence: Arc<Presence>,
    circle: Circle,
}

impl Member {
    fn new(presence: Arc<Presence>, circle: Circle) -> Self {
        let seat = Arc::new(Seat { presence, circle });
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
        "tcp".to_owned()
    }

    fn start(&self, head: Head, message: Arc<Message>) -> Result<Flight> {
        let Seat { presence, circle } = &*self.seat;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        presence.world.post(circle, number, head, message)?;
        Ok(Flight::new(number, head, self.seat.clone()))
    }

    fn split(&self, color: usize, key: usize) -> Result<Arc<dyn Communicator>> {
        let this: &dyn Communicator = self;
        let Seat { presence, circle } = &*self.seat;
        let members = this.split_members(color, key)?;
        // `split_members` has put this rank there.
        let rank = members.iter().position(|&member| member == circle.rank).unwrap_or_default();
        let members = members.into_iter().map(|member| circle.members[member]).collect();
        let circle = presence.world.circle(members, rank);
        Ok(Arc::new(Self::new(presence.clone(), circle)))
    }

    fn abort(&self, reason: &str) {
        self.seat.presence.world.give_up(reason);
    }

    fn check(&self) -> Result<()> {
        self.seat.presence.world.check()
    }

    fn traffic(&self) -> &TrafficCounter {
        &self.traffic
    }

    fn buffers(&self) -> &Arc<Buffers> {
        &self.seat.presence.world.buffers
    }
}

impl Exchanges for Seat {
    fn arrive(&self, exchange: &mut Underway, block: bool) -> Result<bool> {
        let since = *exchange.since.get_or_insert_with(Instant::now);
        let world = &self.presence.world;
        world.complete(&self.circle, exchange, since, block)
    }

    fn take(&self, exchange: &Underway, parts: &mut Vec<Part>) {
        self.presence.world.take(&self.circle, exchange.number, parts);
    }

    fn finish(&self, exchange: &Underway) {
        self.presence.world.finish(&self.circle, exchange.number);
    }
}
