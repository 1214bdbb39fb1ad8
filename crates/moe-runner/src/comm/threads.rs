//! Ranks that are threads of one process.
//!
//! Each collective of a group is a *round*: a rank posts its buffer and its head, and when the last
//! rank has posted, all read their parts straight from the others' buffers: no copy, or one where
//! the caller wants the parts together, outside the lock. Ranks sleep while they wait, so many ranks run on few cores.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::{
    Arrived, Communicator, Exchange, Head, InFlight, Options, Pool, TrafficCounter, failure,
    sighting,
};
use crate::{Error, Result};

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
    let Some(world) = members.first().map(|member| member.group.world.clone()) else {
        return Ok(Vec::new());
    };
    let run = |member: Member| {
        let me = member.rank;
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
                let who = sighting(me, world.last_seen(me).as_ref());
                world.fail(format!("{who}, panicked: {text}"));
                None
            }
        }
    };
    let results: Vec<Option<T>> = thread::scope(|scope| {
        let run = &run;
        let spawn = |member: Member| {
            let rank = member.rank;
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
    let world = Arc::new(World {
        timeout: options.timeout,
        failed: OnceLock::new(),
        error: Mutex::new(None),
        seen: (0..size).map(|_| Mutex::new(None)).collect(),
        left: (0..size).map(|_| OnceLock::new()).collect(),
        groups: Mutex::new(Vec::new()),
    });
    let group = Group::new(&world, (0..size).collect());
    let presence = |rank| Arc::new(Presence { world: world.clone(), rank });
    (0..size).map(|rank| Member::new(&group, rank, presence(rank))).collect()
}

/// A panic while a lock is held would be a bug of this file; the others can still report it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What all groups of one set of ranks share.
struct World {
    timeout: Duration,
    /// The first failure: set once, read by all.
    failed: OnceLock<String>,
    /// The error that a rank's own code ended with.
    error: Mutex<Option<Error>>,
    /// The collective that each rank entered last.
    seen: Vec<Mutex<Option<Head>>>,
    /// How each rank left, if it did.
    left: Vec<OnceLock<&'static str>>,
    /// Whom to wake on failure.
    groups: Mutex<Vec<Weak<Group>>>,
}

impl World {
    fn last_seen(&self, rank: usize) -> Option<Head> {
        *lock(&self.seen[rank])
    }

    /// Records the first failure, wakes everyone, and returns the cause. No lock may be held.
    fn fail(&self, cause: String) -> &str {
        let cause = self.failed.get_or_init(|| cause);
        self.wake();
        cause
    }

    /// Wakes all that wait, in any group. No lock may be held.
    fn wake(&self) {
        let groups: Vec<_> = lock(&self.groups).iter().filter_map(Weak::upgrade).collect();
        for group in groups {
            // A rank that has looked and found no news, but does not sleep yet, holds the lock.
            drop(lock(&group.state));
            group.changed.notify_all();
        }
    }

    /// `rank`'s own code ended with `error`.
    fn fail_by(&self, rank: usize, error: Error) {
        let mut first = lock(&self.error);
        if self.failed.get().is_none() {
            let who = sighting(rank, self.last_seen(rank).as_ref());
            self.fail(format!("{who}, failed: {error}"));
            *first = Some(error);
        }
    }

    /// The error of the whole run.
    fn error(&self) -> Error {
        lock(&self.error)
            .take()
            .unwrap_or_else(|| Error::Communication(self.failed.get().cloned().unwrap_or_default()))
    }
}

/// What the ranks of one group share.
struct Group {
    world: Arc<World>,
    /// The members' ranks in the world: what messages name.
    members: Vec<usize>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The rounds that some rank has yet to enter or to finish, from number `first` on.
    rounds: VecDeque<Round>,
    first: u64,
    /// Groups that some member has yet to pick up, by the split's number and the color.
    splits: HashMap<(u64, usize), (Arc<Group>, usize)>,
}

struct Round {
    posts: Vec<Option<Exchange>>,
    arrived: usize,
    finished: usize,
    /// All posts, once all ranks have arrived.
    complete: Option<Arc<Vec<Exchange>>>,
}

impl Group {
    fn new(world: &Arc<World>, members: Vec<usize>) -> Arc<Self> {
        let group = Arc::new(Self {
            world: world.clone(),
            members,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let mut groups = lock(&world.groups);
        groups.retain(|group| group.strong_count() > 0);
        groups.push(Arc::downgrade(&group));
        drop(groups);
        group
    }

    fn size(&self) -> usize {
        self.members.len()
    }

    /// Posts `exchange` as `rank`'s part of round `number`.
    fn post(&self, number: u64, rank: usize, exchange: Exchange) {
        *lock(&self.world.seen[self.members[rank]]) = Some(exchange.head);
        let mut state = lock(&self.state);
        let index = (number - state.first) as usize;
        while state.rounds.len() <= index {
            let posts = (0..self.size()).map(|_| None).collect();
            state.rounds.push_back(Round { posts, arrived: 0, finished: 0, complete: None });
        }
        let round = &mut state.rounds[index];
        round.posts[rank] = Some(exchange);
        round.arrived += 1;
        if round.arrived == self.size() {
            round.complete = Some(Arc::new(round.posts.drain(..).flatten().collect()));
            drop(state);
            self.changed.notify_all();
        }
    }

    /// One rank needs round `number` no more.
    fn finish(&self, number: u64) {
        let mut state = lock(&self.state);
        let index = (number - state.first) as usize;
        state.rounds[index].finished += 1;
        while state.rounds.front().is_some_and(|round| round.finished == self.size()) {
            state.rounds.pop_front();
            state.first += 1;
        }
    }

    /// A world rank that will never enter `round`, and how it left.
    fn gone(&self, round: &Round) -> Option<(usize, &'static str)> {
        let absent = self.members.iter().zip(&round.posts).filter(|(_, post)| post.is_none());
        absent.map(|(&rank, _)| rank).find_map(|rank| Some((rank, *self.world.left[rank].get()?)))
    }

    /// The world ranks, as a failure names them, that have not entered round `number`.
    fn missing(&self, round: &Round) -> String {
        let absent = round.posts.iter().enumerate().filter(|(_, post)| post.is_none());
        let names = absent.map(|(rank, _)| {
            let rank = self.members[rank];
            sighting(rank, self.world.last_seen(rank).as_ref())
        });
        names.collect::<Vec<_>>().join("; ")
    }
}

/// What all handles of one rank share: when the last is dropped, the rank has left.
struct Presence {
    world: Arc<World>,
    rank: usize,
}

impl Drop for Presence {
    fn drop(&mut self) {
        let how = if thread::panicking() { "panicked" } else { "left" };
        self.world.left[self.rank].get_or_init(|| how);
        self.world.wake();
    }
}

/// One rank's handle on one group.
struct Member {
    group: Arc<Group>,
    rank: usize,
    presence: Arc<Presence>,
    /// The number of the next round.
    next: AtomicU64,
    splits: AtomicU64,
    pool: Pool,
    traffic: TrafficCounter,
}

impl Member {
    fn new(group: &Arc<Group>, rank: usize, presence: Arc<Presence>) -> Self {
        Self {
            group: group.clone(),
            rank,
            presence,
            next: AtomicU64::new(0),
            splits: AtomicU64::new(0),
            pool: Pool::default(),
            traffic: TrafficCounter::default(),
        }
    }

    fn world_rank(&self) -> usize {
        self.group.members[self.rank]
    }
}

impl Communicator for Member {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.size()
    }

    fn name(&self) -> String {
        "threads".to_owned()
    }

    fn start(&self, exchange: Exchange) -> Result<Box<dyn InFlight>> {
        if let Some(cause) = self.group.world.failed.get() {
            return Err(failure(self.world_rank(), cause));
        }
        let flight = Flight {
            group: self.group.clone(),
            rank: self.rank,
            number: self.next.fetch_add(1, Ordering::Relaxed),
            head: exchange.head,
            waiting_since: None,
            posts: None,
        };
        self.pool.keep(exchange.send.clone());
        self.group.post(flight.number, self.rank, exchange);
        Ok(Box::new(flight))
    }

    fn split(&self, color: usize, key: usize) -> Result<Arc<dyn Communicator>> {
        let this: &dyn Communicator = self;
        let members = this.split_members(color, key)?;
        // `split_members` has put this rank there.
        let rank = members.iter().position(|&member| member == self.rank).unwrap_or_default();
        let id = (self.splits.fetch_add(1, Ordering::Relaxed), color);
        let mut state = lock(&self.group.state);
        let (group, waiting) = state.splits.entry(id).or_insert_with(|| {
            let size = members.len();
            let members = members.iter().map(|&member| self.group.members[member]).collect();
            (Group::new(&self.group.world, members), size)
        });
        let member = Member::new(group, rank, self.presence.clone());
        *waiting -= 1;
        if *waiting == 0 {
            state.splits.remove(&id);
        }
        Ok(Arc::new(member))
    }

    fn abort(&self, reason: &str) {
        let world = &self.group.world;
        let who = sighting(self.world_rank(), world.last_seen(self.world_rank()).as_ref());
        world.fail(format!("{who}, gave up: {reason}"));
    }

    fn traffic(&self) -> &TrafficCounter {
        &self.traffic
    }

    fn pool(&self) -> &Pool {
        &self.pool
    }
}

/// One rank's part of a round.
struct Flight {
    group: Arc<Group>,
    rank: usize,
    number: u64,
    head: Head,
    waiting_since: Option<Instant>,
    /// All ranks' posts, once they are there and agree.
    posts: Option<Arc<Vec<Exchange>>>,
}

impl Flight {
    /// Sees whether all ranks have arrived; with `block`, sleeps until they have.
    fn arrive(&mut self, block: bool) -> Result<bool> {
        if self.posts.is_some() {
            return Ok(true);
        }
        let group = self.group.clone();
        let deadline = *self.waiting_since.get_or_insert_with(Instant::now) + group.world.timeout;
        let mut state = lock(&group.state);
        let posts = loop {
            let round = &state.rounds[(self.number - state.first) as usize];
            if let Some(posts) = &round.complete {
                break posts.clone();
            }
            if let Some(cause) = group.world.failed.get() {
                return Err(failure(group.members[self.rank], cause));
            }
            if let Some((rank, how)) = group.gone(round) {
                let who = sighting(rank, group.world.last_seen(rank).as_ref());
                drop(state);
                return Err(self.fail(format!("{who}, {how}; it is missing in {}", self.head)));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let waited = group.world.timeout.as_secs_f32();
                let missing = group.missing(round);
                let cause = format!("waited {waited} s in {} for {missing}", self.head);
                drop(state);
                return Err(self.fail(cause));
            }
            if !block {
                return Ok(false);
            }
            state =
                group.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        drop(state);
        for (rank, post) in posts.iter().enumerate() {
            if let Some(conflict) = self.head.conflict(&post.head) {
                let (mine, theirs) = (group.members[self.rank], group.members[rank]);
                let cause = format!(
                    "{conflict}: rank {mine} is in {}, rank {theirs} in {}",
                    self.head, post.head
                );
                return Err(self.fail(cause));
            }
        }
        self.posts = Some(posts);
        Ok(true)
    }

    fn fail(&self, cause: String) -> Error {
        failure(self.group.members[self.rank], self.group.world.fail(cause))
    }
}

impl InFlight for Flight {
    fn poll(&mut self) -> Result<bool> {
        self.arrive(false)
    }

    fn wait(mut self: Box<Self>) -> Result<Arrived> {
        self.arrive(true)?;
        let posts = self.posts.take().unwrap_or_default();
        let part = |post: &Exchange| {
            let span = post.spans.to(self.rank, post.send.len());
            (post.send.clone(), span)
        };
        Ok(Arrived::Apart(posts.iter().map(part).collect()))
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.group.finish(self.number);
    }
}
