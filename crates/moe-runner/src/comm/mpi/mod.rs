//! Ranks that are processes, on one machine or many, over MPI.
//!
//! `mpirun -n 4 PROGRAM` starts the processes; [`open`] joins them. libmpi is opened at run time:
//! Open MPI 4 and 5, MPICH, or any library with the MPI-5 standard interface; nothing is needed at
//! build time. Elements travel as bytes; sums are made here, in rank order, so that they equal those
//! of ranks that are threads bit by bit.
//!
//! **One thread.** All calls must come from the thread that called [`open`]; others get an error.
//! (MPI is initialised as "funneled", which every library supports at full speed.) Other threads
//! may compute meanwhile. The last handle must be dropped on that thread too, before it ends: that
//! says good-bye to the others, waits for theirs (no longer than the time-out), and finalizes MPI.
//!
//! **Failure.** As for [every group](super): a rank that fails tells the others why; one that is
//! killed or stuck is named by the others after the time-out. Note that `mpirun` by itself ends all
//! processes as soon as one is killed or exits without finalizing, which may be before they have
//! said why; Open MPI's `mpirun --enable-recovery` leaves that to them.

mod library;
mod transfer;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use self::library::Mpi;
use self::transfer::{Circle, Fault, Transfer, send_farewell};
use super::{
    Arrived, At, Communicator, Dtype, Elements, Exchange, Head, InFlight, Kind, Options, Pool,
    Spans, Step, TrafficCounter, failure, sighting,
};
use crate::{Error, Result};

/// Joins the processes that this one was started with, as their group of ranks. Once per process.
///
/// Errors if no library is found, or if the launcher says that there are several processes and the
/// library that was found sees one (a launcher of one MPI and a library of another).
pub fn open() -> Result<Arc<dyn Communicator>> {
    open_with(Options::default(), None)
}

/// [`open`] with options, and with the MPI library at `library` instead of the one that is found.
pub fn open_with(options: Options, library: Option<&Path>) -> Result<Arc<dyn Communicator>> {
    static OPENED: AtomicBool = AtomicBool::new(false);
    if OPENED.swap(true, Ordering::SeqCst) {
        let reason = "MPI has been opened before in this process; hand that group on instead";
        return Err(Error::Communication(reason.to_owned()));
    }
    Ok(Arc::new(World::open(options, library)?))
}

/// What launchers say about the number of processes.
const LAUNCHED: [&str; 4] =
    ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"];

fn check_launch(
    version: &str,
    size: usize,
    launched: impl Fn(&str) -> Option<usize>,
) -> Result<()> {
    let claims = LAUNCHED.iter().find_map(|name| Some((name, launched(name)?)));
    match claims {
        Some((name, ranks)) if ranks > 1 && size == 1 => Err(Error::Communication(format!(
            "the launcher started {ranks} processes ({name}), but {version} sees only this one: \
             each would do all the work. Use the mpirun that belongs to {version}, or give the \
             library that belongs to the mpirun"
        ))),
        _ => Ok(()),
    }
}

/// What all groups of this process share.
struct World {
    mpi: Mpi,
    thread: ThreadId,
    timeout: Duration,
    rank: usize,
    /// There may be more ranks than cores: one that spins keeps others from what it waits for.
    crowded: bool,
    /// The first failure.
    failed: OnceLock<String>,
    pool: Pool,
    engine: Mutex<Engine>,
}

struct Engine {
    /// All exchanges under way, by number: whichever a rank waits for, all are moved on.
    transfers: HashMap<u64, Transfer>,
    next: u64,
    /// All groups of this process.
    circles: Vec<Arc<Circle>>,
    /// The collective that each rank was seen in last.
    seen: Vec<Option<Head>>,
}

impl World {
    fn open(options: Options, library: Option<&Path>) -> Result<Member> {
        let mpi = Mpi::open(library)?;
        let comm = mpi.world()?;
        let (rank, size) = mpi.rank_and_size(comm)?;
        check_launch(&mpi.version, size, |name| std::env::var(name).ok()?.parse().ok())
            .inspect_err(|_| mpi.finalize())?;
        let circle = Arc::new(Circle { comm, rank, members: (0..size).collect() });
        let engine = Engine {
            transfers: HashMap::new(),
            next: 0,
            circles: vec![circle.clone()],
            seen: vec![None; size],
        };
        let world = Arc::new(Self {
            mpi,
            thread: thread::current().id(),
            timeout: options.timeout,
            rank,
            crowded: size > thread::available_parallelism().map_or(1, usize::from),
            failed: OnceLock::new(),
            pool: Pool::default(),
            engine: Mutex::new(engine),
        });
        Ok(Member::new(world, circle))
    }

    fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An error on any thread but the one that opened MPI.
    fn check_thread(&self) -> Result<()> {
        if thread::current().id() == self.thread {
            return Ok(());
        }
        let reason = "MPI can be used only from the thread that opened it";
        Err(failure(self.rank, reason))
    }

    fn check_failed(&self) -> Result<()> {
        self.failed.get().map_or(Ok(()), |cause| Err(failure(self.rank, cause)))
    }

    /// Moves all exchanges on.
    fn progress(&self, engine: &mut Engine) -> Result<()> {
        let Engine { transfers, seen, .. } = engine;
        let mut fault = None;
        transfers.retain(|_, transfer| match transfer.progress(&self.mpi, &self.pool, seen) {
            Ok(done) => !(done && transfer.abandoned),
            Err(error) => {
                fault.get_or_insert(error);
                true
            }
        });
        match fault {
            None => Ok(()),
            Some(Fault::Here(cause) | Fault::Told(cause)) => Err(self.fail(engine, cause)),
        }
    }

    /// Records the first failure, and tells all other ranks.
    fn fail(&self, engine: &Engine, cause: String) -> Error {
        if self.failed.set(cause.clone()).is_ok() {
            let tell = |circle: &Arc<Circle>| send_farewell(&self.mpi, circle, &cause);
            let mut notes: Vec<_> = engine.circles.iter().flat_map(tell).collect();
            // They are short, and MPI lets go of them at once; but it moves only inside calls.
            let patience = Instant::now() + Duration::from_millis(200);
            while !notes.is_empty() && Instant::now() < patience {
                notes.retain_mut(|note| matches!(self.mpi.test(note), Ok(false)));
                thread::yield_now();
            }
        }
        let cause = self.failed.get().map_or("", |cause| cause);
        failure(self.rank, cause)
    }

    fn start(&self, circle: &Arc<Circle>, number: u64, exchange: Exchange) -> Result<u64> {
        let mut engine = self.engine();
        self.check_failed()?;
        let head = exchange.head;
        engine.seen[self.rank] = Some(head);
        match Transfer::start(&self.mpi, circle, number, exchange) {
            Ok(transfer) => {
                let id = engine.next;
                engine.next += 1;
                engine.transfers.insert(id, transfer);
                Ok(id)
            }
            Err(error) => Err(self.fail(&engine, format!("{error}, in {head}"))),
        }
    }

    /// Ends MPI together with the other ranks, unless that cannot end well.
    fn leave(&self) {
        if self.check_thread().and_then(|()| self.say_goodbye()).is_ok() {
            self.mpi.finalize();
        } else {
            self.desert();
        }
    }

    /// One last exchange in every group, in which all ranks leave; those that are still in another
    /// collective learn from it that this one has left.
    fn say_goodbye(&self) -> Result<()> {
        self.check_failed()?;
        let who = sighting(self.rank, self.engine().seen[self.rank].as_ref());
        if thread::panicking() {
            return Err(self.fail(&self.engine(), format!("{who}, panicked")));
        }
        let place = At::new("", Step::Finish).into();
        let head = Head { kind: Kind::Leave, dtype: Dtype::Bytes, root: 0, total: 0, place };
        let circles = self.engine().circles.clone();
        for circle in circles {
            let send = Arc::new(Elements::new(Dtype::Bytes));
            self.start(&circle, 0, Exchange { head, send, spans: Spans::Whole })?;
        }
        let mut engine = self.engine();
        // There are no handles any more that would take what has come.
        engine.transfers.values_mut().for_each(|transfer| transfer.abandoned = true);
        let mut backoff = Backoff::new(self.crowded);
        loop {
            self.progress(&mut engine)?;
            let Some(transfer) = engine.transfers.values().next() else {
                return Ok(());
            };
            if backoff.since.elapsed() >= self.timeout {
                let waited = self.timeout.as_secs_f32();
                let awaited = transfer.awaited(&engine.seen);
                let error =
                    self.fail(&engine, format!("waited {waited} s to leave, for {awaited}"));
                // This runs in a drop: there is no one to return it to.
                eprintln!("error: {error}");
                return Err(error);
            }
            backoff.pause(true);
        }
    }

    /// MPI goes on reading and writing the buffers of what is under way: they are never freed. It
    /// is not finalized either, since that would wait for the others without end.
    fn desert(&self) {
        std::mem::forget(std::mem::take(&mut self.engine().transfers));
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.leave();
    }
}

/// How long to pause between two looks at MPI.
struct Backoff {
    since: Instant,
    crowded: bool,
}

impl Backoff {
    fn new(crowded: bool) -> Self {
        Self { since: Instant::now(), crowded }
    }

    /// `idle`: a rank is missing, so that nothing moves. While elements flow, MPI needs the calls:
    /// each brings some of them, and giving the core away in between would cost more than that.
    fn pause(&mut self, idle: bool) {
        let waited = self.since.elapsed();
        if !idle && !self.crowded && waited < Duration::from_millis(2) {
            std::hint::spin_loop();
        } else if !idle || waited < Duration::from_millis(5) {
            thread::yield_now();
        } else if waited < Duration::from_secs(1) {
            thread::sleep(Duration::from_micros(50));
        } else {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// One group of this process.
struct Member {
    world: Arc<World>,
    circle: Arc<Circle>,
    /// The number of the next exchange.
    next: AtomicU64,
    traffic: TrafficCounter,
}

impl Member {
    fn new(world: Arc<World>, circle: Arc<Circle>) -> Self {
        Self { world, circle, next: AtomicU64::new(0), traffic: TrafficCounter::default() }
    }
}

impl Communicator for Member {
    fn rank(&self) -> usize {
        self.circle.rank
    }

    fn size(&self) -> usize {
        self.circle.members.len()
    }

    fn name(&self) -> String {
        self.world.mpi.version.clone()
    }

    fn start(&self, exchange: Exchange) -> Result<Box<dyn InFlight>> {
        self.world.check_thread()?;
        let head = exchange.head;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let id = self.world.start(&self.circle, number, exchange)?;
        Ok(Box::new(Flight { world: self.world.clone(), id, head, waiting_since: None }))
    }

    fn split(&self, color: usize, key: usize) -> Result<Arc<dyn Communicator>> {
        let this: &dyn Communicator = self;
        let members = this.split_members(color, key)?;
        // Color and key may be any size; these are small.
        let lowest = members.iter().min().copied().unwrap_or_default();
        let rank = members.iter().position(|&member| member == self.circle.rank);
        let rank = rank.unwrap_or_default();
        // All ranks have just been here, so that this cannot wait for long.
        let comm = self.world.mpi.split(self.circle.comm, lowest as i32, rank as i32)?;
        let members = members.iter().map(|&member| self.circle.members[member]).collect();
        let circle = Arc::new(Circle { comm, rank, members });
        self.world.engine().circles.push(circle.clone());
        Ok(Arc::new(Self::new(self.world.clone(), circle)))
    }

    fn abort(&self, reason: &str) {
        if self.world.check_thread().is_ok() {
            let engine = self.world.engine();
            let who = sighting(self.world.rank, engine.seen[self.world.rank].as_ref());
            self.world.fail(&engine, format!("{who}, gave up: {reason}"));
        }
    }

    fn traffic(&self) -> &TrafficCounter {
        &self.traffic
    }

    fn pool(&self) -> &Pool {
        &self.world.pool
    }
}

/// The caller's handle on an exchange.
struct Flight {
    world: Arc<World>,
    id: u64,
    head: Head,
    waiting_since: Option<Instant>,
}

impl Flight {
    /// Moves things on; whether the exchange is complete, and whether a rank is missing in it.
    fn advance(&mut self) -> Result<(bool, bool)> {
        let world = &*self.world;
        world.check_thread()?;
        let mut engine = world.engine();
        world.check_failed()?;
        world.progress(&mut engine)?;
        let Some(transfer) = engine.transfers.get(&self.id) else {
            return Ok((true, false));
        };
        if transfer.is_done() {
            return Ok((true, false));
        }
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= world.timeout {
            let (waited, awaited) = (world.timeout.as_secs_f32(), transfer.awaited(&engine.seen));
            let cause = format!("waited {waited} s in {} for {awaited}", self.head);
            return Err(world.fail(&engine, cause));
        }
        Ok((false, transfer.lacks_ranks()))
    }
}

impl InFlight for Flight {
    fn poll(&mut self) -> Result<bool> {
        self.advance().map(|(done, _)| done)
    }

    fn wait(mut self: Box<Self>) -> Result<Arrived> {
        let mut backoff = Backoff::new(self.world.crowded);
        loop {
            match self.advance()? {
                (true, _) => break,
                (false, idle) => backoff.pause(idle),
            }
        }
        // Only this takes it out, once.
        let transfer = self.world.engine().transfers.remove(&self.id);
        let transfer = transfer.ok_or_else(|| failure(self.world.rank, "an exchange was lost"))?;
        let (elements, counts, sent) = transfer.into_parts();
        self.world.pool.keep(sent);
        Ok(Arrived::Together(elements, counts))
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        // Still to be moved on, so that the others can finish.
        if let Some(transfer) = self.world.engine().transfers.get_mut(&self.id) {
            transfer.abandoned = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_world_of_one_under_a_launcher_of_many_is_refused() {
        let launched = |name: &str| (name == "PMI_SIZE").then_some(4);
        let error = check_launch("Open MPI v5", 1, launched).unwrap_err().to_string();
        assert!(
            error.contains("4 processes (PMI_SIZE)") && error.contains("Open MPI v5"),
            "{error}"
        );
        assert!(check_launch("Open MPI v5", 4, launched).is_ok());
        assert!(check_launch("Open MPI v5", 1, |_| None).is_ok());
        assert!(check_launch("Open MPI v5", 1, |_| Some(1)).is_ok());
    }
}
