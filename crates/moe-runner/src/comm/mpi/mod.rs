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

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use self::library::Mpi;
use self::transfer::{Circle, Fault, Spares, Transfer, send_farewell};
use super::{
    At, Buffers, Communicator, Dtype, Exchanges, Flight, Head, Kind, Message, Options, Part, Step,
    TrafficCounter, Underway, failure, sighting,
};
use crate::{Error, Result};

/// Joins the processes that this one was started with, as their group of ranks. Once per process; a
/// try that failed may be followed by another, with another library.
///
/// Errors if no library is found, or if the launcher says that there are several processes and the
/// library that was found sees one (a launcher of one MPI and a library of another).
pub fn open() -> Result<Arc<dyn Communicator>> {
    open_with(Options::default(), None)
}

/// [`open`] with options, and with the MPI library at `library` instead of the one that is found.
pub fn open_with(options: Options, library: Option<&Path>) -> Result<Arc<dyn Communicator>> {
    static OPENED: Mutex<bool> = Mutex::new(false);
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if *opened {
        let reason = "MPI has been opened before in this process; hand that group on instead";
        return Err(Error::Communication(reason.to_owned()));
    }
    let world = World::open(options, library)?;
    *opened = true;
    Ok(Arc::new(world))
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
    buffers: Arc<Buffers>,
    /// What transfers hold that are over.
    empty: Arc<Message>,
    engine: Mutex<Engine>,
}

struct Engine {
    /// All exchanges under way, by number: whichever a rank waits for, all are moved on.
    transfers: HashMap<u64, Transfer>,
    next: u64,
    spares: Spares,
    /// All groups of this process that have a communicator.
    circles: Vec<Arc<Circle>>,
    /// Groups whose last handle has been dropped, in that order, and the exchange in which their
    /// ranks say so to each other, if it has begun. After it the communicator is freed.
    retired: VecDeque<(Arc<Circle>, Option<u64>)>,
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
            spares: Spares::default(),
            circles: vec![circle.clone()],
            retired: VecDeque::new(),
            seen: vec![None; size],
        };
        let world = Arc::new(Self {
            mpi,
            thread: thread::current().id(),
            timeout: options.timeout,
            rank,
            crowded: size > thread::available_parallelism().map_or(1, usize::from),
            failed: OnceLock::new(),
            buffers: Arc::default(),
            empty: Arc::new(Message::new()),
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

    /// Moves all exchanges on, and frees what nobody uses any more.
    fn progress(&self, engine: &mut Engine) -> Result<()> {
        self.say_goodbyes(engine)?;
        let Engine { transfers, spares, seen, .. } = engine;
        let mut fault = None;
        let over = transfers.extract_if(|_, transfer| {
            match transfer.progress(&self.mpi, &self.buffers, spares, seen) {
                Ok(done) => done && transfer.abandoned,
                Err(error) => {
                    fault.get_or_insert(error);
                    false
                }
            }
        });
        let over: Vec<_> = over.collect();
        over.into_iter().for_each(|(_, transfer)| self.let_go(spares, transfer));
        if let Some(Fault::Here(cause) | Fault::Told(cause)) = fault {
            return Err(self.fail(engine, cause));
        }
        let Engine { transfers, circles, retired, .. } = engine;
        let over = |(_, goodbye): &mut (_, Option<u64>)| {
            goodbye.is_some_and(|goodbye| !transfers.contains_key(&goodbye))
        };
        // in order: all ranks free the same ones one after the other
        while let Some((circle, _)) = retired.pop_front_if(over) {
            circles.retain(|other| !Arc::ptr_eq(other, &circle));
            self.mpi.free(circle.comm)?;
        }
        Ok(())
    }

    /// Begins the last exchange of every retired group: all its ranks leave; those that are still in
    /// another collective learn from it that this one has left.
    fn say_goodbyes(&self, engine: &mut Engine) -> Result<()> {
        let place = At::new("", Step::Finish).into();
        let head = Head { kind: Kind::Leave, dtype: Dtype::Bytes, root: 0, total: 0, place };
        for at in 0..engine.retired.len() {
            if let (circle, None) = &engine.retired[at] {
                let circle = circle.clone();
                let id = self.begin(engine, &circle, 0, (head, self.empty.clone()))?;
                if let Some(transfer) = engine.transfers.get_mut(&id) {
                    transfer.abandoned = true;
                }
                engine.retired[at].1 = Some(id);
            }
        }
        Ok(())
    }

    /// A transfer that is over: what it held is used again.
    fn let_go(&self, spares: &mut Spares, transfer: Transfer) {
        if let Some(received) = transfer.received() {
            self.buffers.keep(received.clone());
        }
        spares.keep(transfer, &self.empty);
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

    fn start(
        &self,
        circle: &Arc<Circle>,
        number: u64,
        (head, message): (Head, Arc<Message>),
    ) -> Result<u64> {
        let mut engine = self.engine();
        self.check_failed()?;
        engine.seen[self.rank] = Some(head);
        self.begin(&mut engine, circle, number, (head, message))
    }

    fn begin(
        &self,
        engine: &mut Engine,
        circle: &Arc<Circle>,
        number: u64,
        (head, message): (Head, Arc<Message>),
    ) -> Result<u64> {
        let spares = &mut engine.spares;
        match Transfer::start(&self.mpi, spares, circle, number, (head, message)) {
            Ok(transfer) => {
                let id = engine.next;
                engine.next += 1;
                engine.transfers.insert(id, transfer);
                Ok(id)
            }
            Err(error) => Err(self.fail(engine, format!("{error}, in {head}"))),
        }
    }

    /// The last handle of a group has been dropped.
    fn retire(&self, circle: &Arc<Circle>) {
        let mut engine = self.engine();
        engine.retired.push_back((circle.clone(), None));
        // A panic may end this rank, which then says so; if it goes on, so does this, later.
        let go_on = !thread::panicking() && self.failed.get().is_none();
        if go_on && self.check_thread().is_ok() {
            // What fails here fails in the next call as well, which can return it.
            let _ = self.progress(&mut engine);
        }
    }

    /// Ends MPI together with the other ranks, unless that cannot end well.
    fn leave(&self) {
        if self.check_thread().and_then(|()| self.finish_goodbyes()).is_ok() {
            self.mpi.finalize();
        } else {
            self.desert();
        }
    }

    /// Waits until all ranks have left all groups.
    fn finish_goodbyes(&self) -> Result<()> {
        self.check_failed()?;
        let mut engine = self.engine();
        if thread::panicking() {
            let who = sighting(self.rank, engine.seen[self.rank].as_ref());
            return Err(self.fail(&engine, format!("{who}, panicked")));
        }
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

/// This rank's place in one group of this process; when it is dropped, the group is retired.
struct Seat {
    world: Arc<World>,
    circle: Arc<Circle>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.world.retire(&self.circle);
    }
}

/// A handle on one group of this process.
struct Member {
    seat: Arc<Seat>,
    /// The number of the next exchange.
    next: AtomicU64,
    traffic: TrafficCounter,
}

impl Member {
    fn new(world: Arc<World>, circle: Arc<Circle>) -> Self {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// One test: MPI can be opened once in a process.
    #[test]
    fn a_failed_open_may_be_tried_again_and_communicators_are_freed() {
        for _ in 0..2 {
            let nowhere = Path::new("/nonexistent/libmpi.so");
            let error = open_with(Options::default(), Some(nowhere)).err().unwrap().to_string();
            assert!(error.contains("no MPI library found"), "{error}");
        }
        let world = match World::open(Options::default(), None) {
            Ok(world) => world,
            Err(error) if error.to_string().contains("no MPI library found") => {
                return eprintln!("SKIPPED: there is no MPI (Debian: apt-get install openmpi-bin)");
            }
            Err(error) => panic!("{error}"),
        };
        let live = || world.seat.world.engine().circles.len();
        for _ in 0..100 {
            let part = world.split(0, 0).unwrap();
            part.barrier(At::new("test", Step::Finish)).unwrap();
            assert_eq!(live(), 2);
            drop(part);
            assert_eq!(live(), 1);
        }
    }

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
