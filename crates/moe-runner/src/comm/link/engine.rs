//! The exchanges of one rank, from the first note to the last byte.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::comm::head::total_size;
use crate::comm::{
    At, Buffers, Communicator, Dtype, Flight, Head, Message, Part, Step, Underway, sighting,
};
use crate::{Error, Result};

/// Bytes of a note: a head, and the number of elements that follow.
const NOTE: usize = Head::WIRE + 8;

/// What carries parts between ranks, which it knows by their number in the control group. All ranks
/// start the same exchanges with each other in the same order; they arrive in that order. No method waits
/// for another rank. Errors say what went wrong; which exchange it ended is added.
pub trait Link: Send {
    /// Whether another exchange can be started.
    ///
    /// # Errors
    /// What went wrong since it was last asked for anything.
    fn is_ready(&mut self) -> Result<bool>;

    /// Starts an exchange: bytes to some ranks, and so many bytes from some. Nothing stays borrowed.
    ///
    /// # Errors
    /// What refuses.
    fn start(&mut self, sends: &[(usize, &[u8])], receives: &[(usize, usize)]) -> Result<()>;

    /// Whether the oldest exchange that has not been taken is there.
    ///
    /// # Errors
    /// What went wrong since it was last asked for anything.
    fn has_arrived(&mut self) -> Result<bool>;

    /// Copies what came in it, one part after another, to `to`, which is as long.
    fn take(&mut self, to: &mut [u8]);

    /// Ends everything that is under way. Nothing but a drop follows.
    fn abort(&mut self);
}

/// A group: the one that it stands on, and its members' ranks in the world.
pub(super) struct Circle {
    pub(super) members: Vec<usize>,
    pub(super) control: Arc<dyn Communicator>,
}

/// All exchanges of this rank, in the order in which they were begun.
pub(super) struct Engine {
    state: Mutex<State>,
    timeout: Duration,
    /// All ranks.
    control: Arc<dyn Communicator>,
}

struct State {
    link: Box<dyn Link>,
    transfers: VecDeque<Transfer>,
    next: u64,
    /// The collective that each rank was seen in last.
    seen: Vec<Option<Head>>,
    aborted: bool,
}

struct Transfer {
    number: u64,
    circle: Arc<Circle>,
    head: Head,
    message: Arc<Message>,
    stage: Stage,
    /// Elements from each member, once the notes are there.
    counts: Vec<usize>,
    /// What came from the others, in rank order.
    received: Option<Arc<Message>>,
    /// The caller has yet to take what comes.
    wanted: bool,
}

enum Stage {
    /// Notes are on their way.
    Noted(Flight),
    /// All lengths are known.
    Known,
    /// The link has it.
    Started,
    Done,
}

/// Why nothing goes on.
enum Fault {
    /// The group beneath has failed, and has said so to all.
    Control(Error),
    /// Found out here.
    Here(String),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Control(error)
    }
}

impl From<String> for Fault {
    fn from(cause: String) -> Self {
        Self::Here(cause)
    }
}

impl Engine {
    pub(super) fn new(
        control: Arc<dyn Communicator>,
        link: Box<dyn Link>,
        timeout: Duration,
    ) -> Self {
        let state = State {
            link,
            transfers: VecDeque::new(),
            next: 0,
            seen: vec![None; control.size()],
            aborted: false,
        };
        Self { state: Mutex::new(state), timeout, control }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ranks in the world of a group that was split off.
    pub(super) fn members(&self, split: &Arc<dyn Communicator>) -> Result<Vec<usize>> {
        let mine = [self.control.rank() as u64];
        let all = split.all_gather(At::new("", Step::Setup), mine)?;
        Ok(all.into_iter().map(|rank| rank as usize).collect())
    }

    /// Sends the notes of an exchange on their way; its number.
    pub(super) fn start(
        &self,
        circle: &Arc<Circle>,
        head: Head,
        message: Arc<Message>,
    ) -> Result<u64> {
        let (control, members) = (&circle.control, circle.members.len());
        let mut note = control.buffers().take(Dtype::Bytes, NOTE * members)?;
        if let Some(note) = Arc::get_mut(&mut note) {
            for (peer, bytes) in note.bytes_mut().chunks_exact_mut(NOTE).enumerate() {
                let count = message.span(peer).len() as u64;
                bytes[..Head::WIRE].copy_from_slice(&head.encode());
                bytes[Head::WIRE..].copy_from_slice(&count.to_le_bytes());
            }
            note.cut(members, |_| NOTE);
        }
        control.buffers().keep(note.clone());
        let mut state = self.state();
        let noted = Head { dtype: Dtype::Bytes, total: (NOTE * members) as u64, ..head };
        let flight = control.start(noted, note)?;
        let number = state.next;
        state.next += 1;
        state.seen[self.control.rank()] = Some(head);
        state.transfers.push_back(Transfer {
            number,
            circle: circle.clone(),
            head,
            message,
            stage: Stage::Noted(flight),
            counts: Vec::new(),
            received: None,
            wanted: true,
        });
        Ok(number)
    }

    /// True once the exchange is done. Moves all of them on; waits for it with `block`.
    pub(super) fn arrive(
        &self,
        exchange: &mut Underway,
        block: bool,
        buffers: &Buffers,
    ) -> Result<bool> {
        let since = *exchange.since.get_or_insert_with(Instant::now);
        let mut state = self.state();
        loop {
            let moved = state.progress(&self.control, buffers);
            let done = match moved {
                Ok(()) => state.is_done(exchange.number),
                Err(fault) => return Err(self.fail(&mut state, fault)),
            };
            if done || !block {
                return Ok(done);
            }
            let paused = state.pause(&self.control, exchange, since, self.timeout);
            if let Err(fault) = paused {
                return Err(self.fail(&mut state, fault));
            }
        }
    }

    /// Adds the parts of an exchange that is done, in rank order, to `parts`.
    pub(super) fn take(&self, number: u64, parts: &mut Vec<Part>) {
        let state = self.state();
        let Some(transfer) = state.transfers.iter().find(|t| t.number == number) else { return };
        let (me, mut start) = (transfer.circle.control.rank(), 0);
        for (peer, count) in transfer.counts.iter().enumerate() {
            if peer == me {
                parts.push((transfer.message.clone(), transfer.message.span(me)));
            } else if let Some(received) = &transfer.received {
                parts.push((received.clone(), start..start + count));
                start += count;
            }
        }
    }

    /// The caller needs an exchange no more; the others get their parts all the same.
    pub(super) fn finish(&self, number: u64, buffers: &Buffers) {
        let mut state = self.state();
        if let Some(transfer) = state.transfers.iter_mut().find(|t| t.number == number) {
            transfer.wanted = false;
        }
        state.let_go(buffers);
    }

    fn fail(&self, state: &mut State, fault: Fault) -> Error {
        if !state.aborted {
            state.aborted = true;
            state.link.abort();
        }
        match fault {
            Fault::Control(error) => error,
            Fault::Here(cause) => {
                self.control.abort(&cause);
                let told = self.control.check().err();
                told.unwrap_or_else(|| crate::comm::failure(self.control.rank(), &cause))
            }
        }
    }
}

impl Drop for Engine {
    /// What was given up here is still to be sent.
    fn drop(&mut self) {
        let buffers = Buffers::default();
        let since = Instant::now();
        let mut state = self.state();
        state.transfers.iter_mut().for_each(|transfer| transfer.wanted = false);
        let mut well = !thread::panicking() && self.control.check().is_ok();
        while well && !state.transfers.is_empty() && since.elapsed() < self.timeout {
            well = state.progress(&self.control, &buffers).is_ok();
            state.let_go(&buffers);
            thread::yield_now();
        }
        let over = well && state.transfers.is_empty();
        if !over && !state.aborted {
            state.link.abort();
        }
    }
}

impl State {
    fn is_done(&self, number: u64) -> bool {
        let transfer = self.transfers.iter().find(|transfer| transfer.number == number);
        transfer.is_none_or(|transfer| matches!(transfer.stage, Stage::Done))
    }

    /// What was received and is not wanted any more is used again.
    fn let_go(&mut self, buffers: &Buffers) {
        self.transfers.retain_mut(|transfer| {
            let over = !transfer.wanted && matches!(transfer.stage, Stage::Done);
            if let Some(received) = transfer.received.take_if(|_| over) {
                buffers.keep(received);
            }
            !over
        });
    }

    /// Moves on what can be. Does not wait.
    fn progress(
        &mut self,
        control: &Arc<dyn Communicator>,
        buffers: &Buffers,
    ) -> Result<(), Fault> {
        loop {
            let mut moved = false;
            let started = |t: &&mut Transfer| matches!(t.stage, Stage::Started);
            if let Some(transfer) = self.transfers.iter_mut().find(started)
                && self.link.has_arrived().map_err(|error| at(error, transfer))?
            {
                if let Some(room) = transfer.received.as_mut().and_then(Arc::get_mut) {
                    self.link.take(room.bytes_mut());
                }
                transfer.stage = Stage::Done;
                moved = true;
            }
            let waits = |t: &&mut Transfer| matches!(t.stage, Stage::Noted(_) | Stage::Known);
            if let Some(transfer) = self.transfers.iter_mut().find(waits) {
                if let Stage::Noted(flight) = &mut transfer.stage
                    && flight.arrive(false)?
                {
                    transfer.read_notes(buffers, &mut self.seen)?;
                    moved = true;
                }
                let known = matches!(transfer.stage, Stage::Known);
                if known && self.link.is_ready().map_err(|error| at(error, transfer))? {
                    transfer.post(&mut *self.link)?;
                    moved = true;
                }
            }
            if !moved {
                self.let_go(buffers);
                // a rank that is gone may be the one whose part is waited for
                return Ok(control.check()?);
            }
        }
    }

    /// Waits a little, or for the notes that are missing.
    fn pause(
        &mut self,
        control: &Arc<dyn Communicator>,
        exchange: &Underway,
        since: Instant,
        timeout: Duration,
    ) -> Result<(), Fault> {
        let open = |t: &&mut Transfer| !matches!(t.stage, Stage::Done);
        let Some(oldest) = self.transfers.iter_mut().find(open) else { return Ok(()) };
        if let Stage::Noted(flight) = &mut oldest.stage {
            flight.arrive(true)?;
            return Ok(());
        }
        if since.elapsed() >= timeout {
            let (waited, head) = (timeout.as_secs_f32(), exchange.head);
            let others = oldest.circle.members.iter().filter(|member| **member != control.rank());
            let others = others.map(|member| sighting(*member, self.seen[*member].as_ref()));
            let others = others.collect::<Vec<_>>().join("; ");
            let cause = format!("waited {waited} s in {head} for the elements to or from {others}");
            return Err(Fault::Here(cause));
        }
        match since.elapsed() < Duration::from_millis(5) {
            true => thread::yield_now(),
            false => thread::sleep(Duration::from_micros(50)),
        }
        Ok(())
    }
}

impl Transfer {
    /// All members have said what they bring: does it fit?
    fn read_notes(&mut self, buffers: &Buffers, seen: &mut [Option<Head>]) -> Result<(), Fault> {
        let Stage::Noted(flight) = &self.stage else { return Ok(()) };
        let mut notes = self.circle.control.buffers().take_list();
        flight.take(&mut notes);
        let me = self.circle.control.rank();
        let (members, mine) = (&self.circle.members, self.head);
        for (peer, (note, span)) in notes.iter().enumerate() {
            let rank = members[peer];
            let note = &note.bytes()[span.clone()];
            let head = note.first_chunk().and_then(Head::decode);
            let count = note.get(Head::WIRE..).and_then(|count| count.first_chunk());
            let (Some(head), Some(count)) = (head, count) else {
                return Err(Fault::Here(format!("rank {rank} sent a note that cannot be read")));
            };
            if let Some(conflict) = mine.conflict(&head) {
                let me = members[me];
                return Err(Fault::Here(format!(
                    "{conflict}: rank {me} is in {mine}, rank {rank} in {head}"
                )));
            }
            seen[rank] = Some(head);
            let count = head.part_size(u64::from_le_bytes(*count));
            self.counts.push(count.map_err(|reason| format!("rank {rank}: {reason}, in {mine}"))?);
        }
        self.circle.control.buffers().keep_list(notes);
        let width = mine.dtype.size();
        let total = total_size(&self.counts, width).map_err(|why| format!("{why}, in {mine}"))?;
        let others = total - self.counts[me];
        self.received = Some(buffers.take(mine.dtype, others).map_err(|e| e.to_string())?);
        let sends = (0..members.len()).filter(|peer| *peer != me).any(|peer| self.sends(peer) > 0);
        self.stage = if others > 0 || sends { Stage::Known } else { Stage::Done };
        Ok(())
    }

    fn sends(&self, peer: usize) -> usize {
        self.message.span(peer).len()
    }

    /// Hands the parts to the link.
    fn post(&mut self, link: &mut dyn Link) -> Result<(), Fault> {
        let (me, members) = (self.circle.control.rank(), &self.circle.members);
        let others = || (0..members.len()).filter(|peer| *peer != me);
        let sends: Vec<(usize, &[u8])> = others()
            .filter(|peer| self.sends(*peer) > 0)
            .map(|peer| (members[peer], self.message.part(peer)))
            .collect();
        let width = self.head.dtype.size();
        let receives: Vec<(usize, usize)> = others()
            .filter(|peer| self.counts[*peer] > 0)
            .map(|peer| (members[peer], self.counts[peer] * width))
            .collect();
        link.start(&sends, &receives).map_err(|error| at(error, self))?;
        self.stage = Stage::Started;
        Ok(())
    }
}

/// An error of the link, with the exchange that it ended.
fn at(error: Error, transfer: &Transfer) -> String {
    format!("{error}, in {}", transfer.head)
}
