//! The rounds of one group: what its ranks have posted, and who has taken it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::world::{Wake, World};
use crate::comm::sync::{Condvar, Mutex, MutexGuard, lock};
use crate::comm::{Exchanges, Head, Message, Part, Underway, failure};
use crate::{Error, Result};

/// What the ranks of one group share.
pub(super) struct Group {
    pub(super) world: Arc<World>,
    /// The members' ranks in the world: what messages name.
    pub(super) members: Vec<usize>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The rounds that some rank has yet to enter or to finish, from number `first` on.
    rounds: VecDeque<Round>,
    first: u64,
    /// Rounds that are over, to be used again.
    spare: Vec<Round>,
    /// Groups that some member has yet to pick up, by the split's number and the color.
    splits: HashMap<(u64, usize), (Arc<Group>, usize)>,
}

/// One collective.
struct Round {
    /// By rank.
    posts: Vec<Option<(Head, Arc<Message>)>>,
    arrived: usize,
    finished: usize,
}

impl State {
    /// Round `number`, which some rank has yet to finish.
    fn round(&mut self, number: u64) -> &mut Round {
        &mut self.rounds[(number - self.first) as usize]
    }
}

impl Wake for Group {
    fn wake(&self) {
        // A rank that has looked and found no news, but does not sleep yet, holds the lock.
        drop(lock(&self.state));
        self.changed.notify_all();
    }
}

impl Group {
    pub(super) fn new(world: &Arc<World>, members: Vec<usize>) -> Arc<Self> {
        let group = Arc::new(Self {
            world: world.clone(),
            members,
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
        });
        let weak = Arc::downgrade(&group);
        world.add(weak);
        group
    }

    pub(super) fn size(&self) -> usize {
        self.members.len()
    }

    /// Posts `message` as `rank`'s part of round `number`.
    pub(super) fn post(&self, number: u64, rank: usize, head: Head, message: Arc<Message>) {
        self.world.see(self.members[rank], head);
        let mut state = lock(&self.state);
        while state.first + state.rounds.len() as u64 <= number {
            let round = state.spare.pop().unwrap_or_else(|| Round {
                posts: (0..self.size()).map(|_| None).collect(),
                arrived: 0,
                finished: 0,
            });
            state.rounds.push_back(round);
        }
        let round = state.round(number);
        round.posts[rank] = Some((head, message));
        round.arrived += 1;
        if round.arrived == self.size() {
            drop(state);
            self.changed.notify_all();
        }
    }

    /// One rank needs round `number` no more.
    fn finish(&self, number: u64) {
        let mut state = lock(&self.state);
        state.round(number).finished += 1;
        let over = |round: &Round| round.finished == self.size();
        while let Some(mut round) = state.rounds.pop_front_if(|round| over(round)) {
            round.posts.fill_with(|| None);
            (round.arrived, round.finished) = (0, 0);
            state.spare.push(round);
            state.first += 1;
        }
    }

    /// The part of a split that this rank, one of `members` of this group, is in.
    pub(super) fn split(&self, id: (u64, usize), members: &[usize]) -> Arc<Group> {
        let mut state = lock(&self.state);
        let (group, waiting) = state.splits.entry(id).or_insert_with(|| {
            let in_world = members.iter().map(|&member| self.members[member]).collect();
            (Group::new(&self.world, in_world), members.len())
        });
        let group = group.clone();
        *waiting -= 1;
        if *waiting == 0 {
            state.splits.remove(&id);
        }
        group
    }

    /// The world ranks that have not entered `round`.
    fn absent(&self, round: &Round) -> impl Iterator<Item = usize> {
        let absent = self.members.iter().zip(&round.posts).filter(|(_, post)| post.is_none());
        absent.map(|(&rank, _)| rank)
    }
}

/// One rank's place in a group.
pub(super) struct Seat {
    pub(super) group: Arc<Group>,
    pub(super) rank: usize,
}

impl Seat {
    pub(super) fn world_rank(&self) -> usize {
        self.group.members[self.rank]
    }

    /// The round of `flight`, when all ranks have entered it; `None` while some have not. With
    /// `block`, sleeps until they have.
    fn complete(
        &self,
        flight: &mut Underway,
        block: bool,
    ) -> Result<Option<MutexGuard<'_, State>>, String> {
        let (group, world) = (&*self.group, &*self.group.world);
        let deadline = *flight.since.get_or_insert_with(Instant::now) + world.timeout;
        let mut state = lock(&group.state);
        loop {
            let round = state.round(flight.number);
            if round.arrived == group.size() {
                return Ok(Some(state));
            }
            if let Some(cause) = world.failed() {
                return Err(cause.to_owned());
            }
            let gone = group.absent(round).find_map(|rank| Some((rank, world.left(rank)?)));
            if let Some((rank, how)) = gone {
                let who = world.sighting(rank);
                return Err(format!("{who}, {how}; it is missing in {}", flight.head));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let missing = group.absent(round).map(|rank| world.sighting(rank));
                let missing = missing.collect::<Vec<_>>().join("; ");
                let waited = world.timeout.as_secs_f32();
                return Err(format!("waited {waited} s in {} for {missing}", flight.head));
            }
            if !block {
                return Ok(None);
            }
            let woken = group.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn fail(&self, cause: String) -> Error {
        failure(self.world_rank(), self.group.world.fail(cause))
    }
}

impl Exchanges for Seat {
    fn arrive(&self, flight: &mut Underway, block: bool) -> Result<bool> {
        let state = self.complete(flight, block).map_err(|cause| self.fail(cause))?;
        let Some(mut state) = state else { return Ok(false) };
        let head = flight.head;
        let posts = state.round(flight.number).posts.iter().flatten().enumerate();
        let conflict = posts.into_iter().find_map(|(rank, (theirs, _))| {
            Some((head.conflict(theirs)?, self.group.members[rank], *theirs))
        });
        drop(state);
        match conflict {
            None => Ok(true),
            Some((conflict, rank, theirs)) => Err(self.fail(format!(
                "{conflict}: rank {} is in {head}, rank {rank} in {theirs}",
                self.world_rank()
            ))),
        }
    }

    fn take(&self, flight: &Underway, parts: &mut Vec<Part>) {
        let mut state = lock(&self.group.state);
        let posts = state.round(flight.number).posts.iter().flatten();
        parts.extend(posts.map(|(_, message)| (message.clone(), message.span(self.rank))));
    }

    fn finish(&self, flight: &Underway) {
        self.group.finish(flight.number);
    }
}
