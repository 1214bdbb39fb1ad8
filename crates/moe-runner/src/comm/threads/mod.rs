//! Ranks that are threads of one process.
//!
//! Each collective of a group is a *round*: a rank posts its message and its head, and when the last
//! rank has posted, all read their parts straight from the others' messages, without a copy. Ranks
//! sleep while they wait, so many ranks run on few cores.

mod group;
#[cfg(all(test, loom))]
mod model;
mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use self::group::{Group, Seat};
use self::world::{Presence, World};
use super::{Buffers, Communicator, Flight, Head, Message, Options, TrafficCounter, failure};
use crate::Result;

/// A group of `size` ranks, one handle each, with the default [`Options`]. A rank leaves when the
/// last of its handles is dropped; what others still expect from it then fails.
pub fn threads(size: usize) -> Vec<Arc<dyn Communicator>> {
    threads_with(size, Options::default())
}

/// [`threads`] with options.
pub fn threads_with(size: usize, options: Options) -> Vec<Arc<dyn Communicator>> {
    let handle = |member| Arc::new(member) as Arc<dyn Communicator>;
    world(size, options).into_iter().map(handle).collect()
}

/// Runs `rank` once per rank, each on a thread of its own, and returns what they return, in rank
/// order.
///
/// If one fails or panics, the others' collectives end at once. The result is then the first error
/// that a rank's own code returned, or else the first failure of the group, which names the rank.
pub fn run_ranks<T: Send>(
    size: usize,
    rank: impl Fn(&Arc<dyn Communicator>) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    run_ranks_with(size, Options::default(), rank)
}

/// [`run_ranks`] with options.
pub fn run_ranks_with<T: Send>(
    size: usize,
    options: Options,
    rank: impl Fn(&Arc<dyn Communicator>) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let members = world(size, options);
    let Some(world) = members.first().map(|member| member.presence.world.clone()) else {
        return Ok(Vec::new());
    };
    let run = |member: Member| {
        let me = member.seat.rank;
        // Stays until the rank's failure, which tells more than its absence, is recorded.
        let _presence = member.presence.clone();
        let comm: Arc<dyn Communicator> = Arc::new(member);
        let call = std::panic::AssertUnwindSafe(|| rank(&comm));
        // The closure's captures are not used again after a panic: the whole run fails.
        match std::panic::catch_unwind(call) {
            Ok(Ok(value)) => Some(value),
            Ok(Err(error)) => {
                world.fail_by(me, error);
                None
            }
            Err(panic) => {
                let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
                let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
                let text = text.unwrap_or_else(|| "without a message".to_owned());
                world.fail(format!("{}, panicked: {text}", world.sighting(me)));
                None
            }
        }
    };
    let results: Vec<Option<T>> = thread::scope(|scope| {
        let run = &run;
        let spawn = |member: Member| {
            let rank = member.seat.rank;
            let name = format!("rank {rank}");
            thread::Builder::new().name(name).spawn_scoped(scope, move || run(member)).map_err(
                |error| world.fail(format!("no thread could be started for rank {rank}: {error}")),
            )
        };
        let running: Vec<_> = members.into_iter().map(spawn).collect();
        running.into_iter().map(|thread| thread.ok()?.join().ok()?).collect()
    });
    match results.into_iter().collect() {
        Some(values) => Ok(values),
        None => Err(world.error()),
    }
}

fn world(size: usize, options: Options) -> Vec<Member> {
    let world = World::new(size, options.timeout);
    let group = Group::new(&world, (0..size).collect());
    let presence = |rank| Arc::new(Presence { world: world.clone(), rank });
    (0..size).map(|rank| Member::new(group.clone(), rank, presence(rank), Arc::default())).collect()
}

/// One rank's handle on one group.
struct Member {
    seat: Arc<Seat>,
    presence: Arc<Presence>,
    /// The number of the next round.
    next: AtomicU64,
    splits: AtomicU64,
    /// Shared by the rank's groups.
    buffers: Arc<Buffers>,
    traffic: TrafficCounter,
}

impl Member {
    fn new(group: Arc<Group>, rank: usize, presence: Arc<Presence>, buffers: Arc<Buffers>) -> Self {
        Self {
            seat: Arc::new(Seat { group, rank }),
            presence,
            next: AtomicU64::new(0),
            splits: AtomicU64::new(0),
            buffers,
            traffic: TrafficCounter::default(),
        }
    }
}

impl Communicator for Member {
    fn rank(&self) -> usize {
        self.seat.rank
    }

    fn size(&self) -> usize {
        self.seat.group.size()
    }

    fn name(&self) -> String {
        "threads".to_owned()
    }

    fn start(&self, head: Head, message: Arc<Message>) -> Result<Flight> {
        let Seat { group, rank } = &*self.seat;
        self.check()?;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        group.post(number, *rank, head, message);
        Ok(Flight::new(number, head, self.seat.clone()))
    }

    fn split(&self, color: usize, key: usize) -> Result<Arc<dyn Communicator>> {
        let this: &dyn Communicator = self;
        let members = this.split_members(color, key)?;
        // `split_members` has put this rank there.
        let rank = members.iter().position(|&member| member == self.seat.rank).unwrap_or_default();
        let id = (self.splits.fetch_add(1, Ordering::Relaxed), color);
        let group = self.seat.group.split(id, &members);
        Ok(Arc::new(Self::new(group, rank, self.presence.clone(), self.buffers.clone())))
    }

    fn abort(&self, reason: &str) {
        let world = &self.presence.world;
        world.fail(format!("{}, gave up: {reason}", world.sighting(self.presence.rank)));
    }

    fn check(&self) -> Result<()> {
        let failed = self.presence.world.failed();
        failed.map_or(Ok(()), |cause| Err(failure(self.seat.world_rank(), cause)))
    }

    fn traffic(&self) -> &TrafficCounter {
        &self.traffic
    }

    fn buffers(&self) -> &Arc<Buffers> {
        &self.buffers
    }
}
