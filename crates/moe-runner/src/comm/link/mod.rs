//! Ranks whose parts go another way than what they say about them.
//!
//! A group of this kind stands on another one, the *control* group, of [threads](super::threads()),
//! [MPI](super::mpi) processes or processes that meet over [TCP](super::tcp). Through that one the ranks
//! find each other and say, before each exchange, what they bring; what they bring goes through a
//! [`Link`], such as [NCCL](super::nccl)'s. So nothing is started that another rank does not expect, and
//! who is missing, has failed or means something else is known and named as in
//! [every group](super): a link by itself may wait without end.
//!
//! ```text
//! note:    head and lengths, through the control group   who is there, and how much comes
//! parts:   through the link, between pairs of ranks      in the order in which exchanges were begun
//! ```
//! All groups of a rank use one link, between all ranks. Exchanges are started in the order in which they
//! were begun, which must be the same on all ranks, also between groups that share ranks.
//!
//! **Failure.** While the link works, a rank watches the control group, the link's own errors and the
//! time-out; on any of them it [ends](Link::abort) what hangs and tells the others.

mod engine;

use std::sync::Arc;

pub use self::engine::Link;
use self::engine::{Circle, Engine};
#[cfg(feature = "cuda")]
use super::peers::{Direct, Peers};
use super::{
    Buffers, Communicator, Exchanges, Flight, Head, Message, Options, Part, TrafficCounter,
    Underway,
};
use crate::Result;

/// The group of the ranks of `control` whose parts go through `link`, which connects the same ranks.
/// `name` is for messages and reports. All ranks call this together.
pub fn over(
    control: Arc<dyn Communicator>,
    name: String,
    link: Box<dyn Link>,
    options: Options,
) -> Arc<dyn Communicator> {
    Arc::new(member(control, name, link, options))
}

/// The same, where rows can go between the memories of GPUs, too.
#[cfg(feature = "cuda")]
pub(super) fn over_gpus(
    control: Arc<dyn Communicator>,
    name: String,
    link: Box<dyn Link>,
    options: Options,
    direct: Arc<Direct>,
) -> Arc<dyn Communicator> {
    Arc::new(Member { direct: Some(direct), ..member(control, name, link, options) })
}

fn member(
    control: Arc<dyn Communicator>,
    name: String,
    link: Box<dyn Link>,
    options: Options,
) -> Member {
    let circle = Circle { members: (0..control.size()).collect(), control: control.clone() };
    let world = Arc::new(World {
        name,
        engine: Engine::new(control, link, options.timeout),
        buffers: Arc::default(),
    });
    Member::new(world, circle)
}

/// What all groups of a rank share.
struct World {
    /// Such as "NCCL 2.27.5 over threads".
    name: String,
    engine: Engine,
    buffers: Arc<Buffers>,
}

/// One rank's handle on one group.
struct Member {
    seat: Arc<Seat>,
    traffic: TrafficCounter,
    #[cfg(feature = "cuda")]
    direct: Option<Arc<Direct>>,
}

/// This rank's place in a group.
struct Seat {
    world: Arc<World>,
    circle: Arc<Circle>,
}

impl Member {
    fn new(world: Arc<World>, circle: Circle) -> Self {
        let seat = Arc::new(Seat { world, circle: Arc::new(circle) });
        Self {
            seat,
            traffic: TrafficCounter::default(),
            #[cfg(feature = "cuda")]
            direct: None,
        }
    }
}

impl Communicator for Member {
    fn rank(&self) -> usize {
        self.seat.circle.control.rank()
    }

    fn size(&self) -> usize {
        self.seat.circle.members.len()
    }

    fn name(&self) -> String {
        self.seat.world.name.clone()
    }

    fn start(&self, head: Head, message: Arc<Message>) -> Result<Flight> {
        let Seat { world, circle } = &*self.seat;
        let number = world.engine.start(circle, head, message)?;
        Ok(Flight::new(number, head, self.seat.clone()))
    }

    fn split(&self, color: usize, key: usize) -> Result<Arc<dyn Communicator>> {
        let Seat { world, circle } = &*self.seat;
        let control = circle.control.split(color, key)?;
        let members = world.engine.members(&control)?;
        let split = Self::new(world.clone(), Circle { members, control });
        #[cfg(feature = "cuda")]
        let split = Self { direct: self.direct.clone(), ..split };
        Ok(Arc::new(split))
    }

    #[cfg(feature = "cuda")]
    fn peers(&self) -> Option<Peers> {
        let Circle { members, control } = &*self.seat.circle;
        Some(Peers::new(self.direct.clone()?, members.clone(), control.clone()))
    }

    fn abort(&self, reason: &str) {
        self.seat.circle.control.abort(reason);
    }

    fn check(&self) -> Result<()> {
        self.seat.circle.control.check()
    }

    fn traffic(&self) -> &TrafficCounter {
        &self.traffic
    }

    fn buffers(&self) -> &Arc<Buffers> {
        &self.seat.world.buffers
    }
}

impl Exchanges for Seat {
    fn arrive(&self, exchange: &mut Underway, block: bool) -> Result<bool> {
        self.world.engine.arrive(exchange, block, &self.world.buffers)
    }

    fn take(&self, exchange: &Underway, parts: &mut Vec<Part>) {
        self.world.engine.take(exchange.number, parts);
    }

    fn finish(&self, exchange: &Underway) {
        self.world.engine.finish(exchange.number, &self.world.buffers);
    }
}
