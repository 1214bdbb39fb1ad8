//! What all groups of a process share: MPI itself, and the exchanges that are under way.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use super::check_launch;
use super::library::Mpi;
use super::transfer::{Circle, Fault, Spares, Transfer, send_farewell};
use crate::comm::{At, Buffers, Dtype, Head, Kind, Message, Options, Step, failure, sighting};
use crate::{Error, Result};

/// What all groups of this process share.
pub(super) struct World {
    pub(super) mpi: Mpi,
    pub(super) thread: ThreadId,
    pub(super) timeout: Duration,
    pub(super) rank: usize,
    /// There may be more ranks than cores: one that spins keeps others from what it waits for.
    pub(super) crowded: bool,
    /// The first failure.
    pub(super) failed: OnceLock<String>,
    pub(super) buffers: Arc<Buffers>,
    /// What transfers hold that are over.
    pub(super) empty: Arc<Message>,
    pub(super) engine: Mutex<Engine>,
}

pub(super) struct Engine {
    /// All exchanges under way, by number: whichever a rank waits for, all are moved on.
    pub(super) transfers: HashMap<u64, Transfer>,
    pub(super) next: u64,
    pub(super) spares: Spares,
    /// All groups of this process that have a communicator.
    pub(super) circles: Vec<Arc<Circle>>,
    /// Groups whose last handle has been dropped, in that order, and the exchange in which their
    /// ranks say so to each other, if it has begun. After it the communicator is freed.
    pub(super) retired: VecDeque<(Arc<Circle>, Option<u64>)>,
    /// The collective that each rank was seen in last.
    pub(super) seen: Vec<Option<Head>>,
}

impl World {
    pub(super) fn open(
        options: Options,
        library: Option<&Path>,
    ) -> Result<(Arc<Self>, Arc<Circle>)> {
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
        Ok((world, circle))
    }

    pub(super) fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An error on any thread but the one that opened MPI.
    pub(super) fn check_thread(&self) -> Result<()> {
        if thread::current().id() == self.thread {
            return Ok(());
        }
        let reason = "MPI can be used only from the thread that opened it";
        Err(failure(self.rank, reason))
    }

    pub(super) fn check_failed(&self) -> Result<()> {
        self.failed.get().map_or(Ok(()), |cause| Err(failure(self.rank, cause)))
    }

    /// Moves all exchanges on, and frees what nobody uses any more.
    pub(super) fn progress(&self, engine: &mut Engine) -> Result<()> {
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
    pub(super) fn let_go(&self, spares: &mut Spares, transfer: Transfer) {
        if let Some(received) = transfer.received() {
            self.buffers.keep(received.clone());
        }
        spares.keep(transfer, &self.empty);
    }

    /// Records the first failure, and tells all other ranks.
    pub(super) fn fail(&self, engine: &Engine, cause: String) -> Error {
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

    pub(super) fn start(
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
    pub(super) fn retire(&self, circle: &Arc<Circle>) {
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
pub(super) struct Backoff {
    pub(super) since: Instant,
    pub(super) crowded: bool,
}

impl Backoff {
    pub(super) fn new(crowded: bool) -> Self {
        Self { since: Instant::now(), crowded }
    }

    /// `idle`: a rank is missing, so that nothing moves. While elements flow, MPI needs the calls:
    /// each brings some of them, and giving the core away in between would cost more than that.
    pub(super) fn pause(&mut self, idle: bool) {
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
