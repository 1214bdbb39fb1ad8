//! One exchange over MPI, as point-to-point messages.
//!
//! Each rank sends each other rank a *note*: the head of the collective, the length of the part,
//! and the part itself if it is short. A longer part follows as *body* messages. So a short
//! exchange costs one message per pair, as MPI's own does, and the notes tell who has not come,
//! who is in another collective, and who has failed.

use std::ffi::c_int;
use std::ops::Range;
use std::sync::Arc;

use super::library::{Handle, Mpi};
use crate::comm::{Elements, Exchange, Head, Kind, Pool, Spans, sighting};
use crate::{Error, Result};

/// Bytes of the largest note.
const NOTE: usize = 4096;
/// Where the part starts in a note.
const INLINE: usize = Head::WIRE + 8;
/// The first byte of a note that is a farewell: the rank has failed, its last words follow.
const FAREWELL: u8 = 0xff;
/// MPI counts are 32-bit: longer parts go in pieces.
const PIECE: usize = 1 << 30;

/// The tag of notes. They need no number: MPI keeps the order of messages between two ranks.
const NOTE_TAG: c_int = 0;
/// Bodies of successive exchanges have different tags; the standard allows up to 32767.
const BODY_TAGS: u64 = 30_000;

type Note = Box<[u8; NOTE]>;

/// A communicator, and who is in it.
pub(super) struct Circle {
    pub(super) comm: Handle,
    /// This rank's number in it.
    pub(super) rank: usize,
    /// The members' ranks in the world: what messages name.
    pub(super) members: Vec<usize>,
}

impl Circle {
    pub(super) fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let me = self.rank;
        (0..self.members.len()).filter(move |&peer| peer != me)
    }
}

/// A message under way, to or from a rank of the circle, and the buffer that it keeps for itself.
struct Message<T> {
    peer: usize,
    request: Handle,
    buffer: T,
}

/// This rank's side of one exchange. While messages are under way it must not be dropped: MPI reads
/// and writes its buffers, all of which are on the heap, so that it may be moved.
pub(super) struct Transfer {
    circle: Arc<Circle>,
    head: Head,
    body_tag: c_int,
    send: Arc<Elements>,
    /// What of `send` this rank keeps for itself.
    own: Range<usize>,
    notes_out: Vec<Message<Note>>,
    bodies_out: Vec<Message<()>>,
    notes_in: Vec<Message<Note>>,
    /// The notes that have come, by sender.
    arrived: Vec<Option<Note>>,
    bodies_in: Vec<Message<()>>,
    received: Elements,
    counts: Vec<usize>,
    /// All notes have come, and `received` is laid out.
    laid_out: bool,
    /// The caller has dropped its handle.
    pub(super) abandoned: bool,
}

impl Transfer {
    /// Sends all notes and bodies on their way. `number` is the count of exchanges that this circle
    /// had before.
    pub(super) fn start(
        mpi: &Mpi,
        circle: &Arc<Circle>,
        number: u64,
        exchange: Exchange,
    ) -> Result<Self> {
        let Exchange { head, send, spans } = exchange;
        let size = circle.members.len();
        let mut transfer = Self {
            circle: circle.clone(),
            head,
            body_tag: 1 + (number % BODY_TAGS) as c_int,
            own: spans.to(circle.rank, send.len()),
            send,
            notes_out: Vec::with_capacity(size),
            bodies_out: Vec::new(),
            notes_in: Vec::with_capacity(size),
            arrived: (0..size).map(|_| None).collect(),
            bodies_in: Vec::new(),
            received: Elements::new(head.dtype),
            counts: vec![0; size],
            laid_out: false,
            abandoned: false,
        };
        match transfer.post(mpi, &spans) {
            Ok(()) => Ok(transfer),
            Err(error) => {
                // What has been posted is under way for good.
                std::mem::forget(transfer);
                Err(error)
            }
        }
    }

    fn post(&mut self, mpi: &Mpi, spans: &Spans) -> Result<()> {
        let circle = self.circle.clone();
        for peer in circle.others() {
            self.expect_note(mpi, peer)?;
        }
        for peer in circle.others() {
            self.send_part(mpi, peer, spans.to(peer, self.send.len()))?;
        }
        Ok(())
    }

    fn expect_note(&mut self, mpi: &Mpi, peer: usize) -> Result<()> {
        let mut buffer = Box::new([0; NOTE]);
        let (room, comm) = (buffer.as_mut_ptr(), self.circle.comm);
        // SAFETY: the note is on the heap and stays in `notes_in`, untouched, until it is there.
        let request = unsafe { mpi.receive(room, NOTE as c_int, peer, NOTE_TAG, comm) }?;
        self.notes_in.push(Message { peer, request, buffer });
        Ok(())
    }

    fn send_part(&mut self, mpi: &Mpi, peer: usize, span: Range<usize>) -> Result<()> {
        let comm = self.circle.comm;
        let count = span.len() as u64;
        let part = bytes(&self.send, span);
        let inline = if part.len() <= NOTE - INLINE { part } else { &[] };
        let mut buffer = Box::new([0; NOTE]);
        buffer[..Head::WIRE].copy_from_slice(&self.head.encode());
        buffer[Head::WIRE..INLINE].copy_from_slice(&count.to_le_bytes());
        buffer[INLINE..INLINE + inline.len()].copy_from_slice(inline);
        let len = (INLINE + inline.len()) as c_int;
        // SAFETY: the note is on the heap and stays in `notes_out`, unchanged, until it is sent.
        let request = unsafe { mpi.send(buffer.as_ptr(), len, peer, NOTE_TAG, comm) }?;
        self.notes_out.push(Message { peer, request, buffer });
        if part.len() > inline.len() {
            for piece in part.chunks(PIECE) {
                let (start, len) = (piece.as_ptr(), piece.len() as c_int);
                // SAFETY: the elements are on the heap, shared and so unchanged, and `send` keeps
                // them there until all bodies are sent.
                let request = unsafe { mpi.send(start, len, peer, self.body_tag, comm) }?;
                self.bodies_out.push(Message { peer, request, buffer: () });
            }
        }
        Ok(())
    }

    /// Moves the exchange on; true when it is complete. `seen` are the heads that each rank of the
    /// world was seen with last.
    pub(super) fn progress(
        &mut self,
        mpi: &Mpi,
        pool: &Pool,
        seen: &mut [Option<Head>],
    ) -> Result<bool, Fault> {
        take_done(mpi, &mut self.notes_out)?;
        take_done(mpi, &mut self.bodies_out)?;
        for Message { peer, buffer, .. } in take_done(mpi, &mut self.notes_in)? {
            self.read_note(peer, &buffer, seen)?;
            self.arrived[peer] = Some(buffer);
        }
        if !self.laid_out && self.notes_in.is_empty() {
            self.lay_out(mpi, pool)?;
        }
        take_done(mpi, &mut self.bodies_in)?;
        Ok(self.is_done())
    }

    pub(super) fn is_done(&self) -> bool {
        self.laid_out
            && self.bodies_in.is_empty()
            && self.bodies_out.is_empty()
            && self.notes_out.is_empty()
    }

    /// True while some rank has not entered the collective, so that no bytes can flow.
    pub(super) fn lacks_ranks(&self) -> bool {
        !self.notes_in.is_empty()
    }

    fn read_note(
        &mut self,
        peer: usize,
        note: &Note,
        seen: &mut [Option<Head>],
    ) -> Result<(), Fault> {
        let sender = self.circle.members[peer];
        if note[0] == FAREWELL {
            return Err(Fault::Told(read_farewell(note)));
        }
        let Some(head) = note.first_chunk().and_then(Head::decode) else {
            return Err(Fault::Here(format!("rank {sender} sent a note that cannot be read")));
        };
        let mine = self.head;
        if let Some(conflict) = mine.conflict(&head) {
            if head.kind == Kind::Leave {
                let who = sighting(sender, seen[sender].as_ref());
                return Err(Fault::Here(format!("{who}, left; it is missing in {mine}")));
            }
            let me = self.circle.members[self.circle.rank];
            return Err(Fault::Here(format!(
                "{conflict}: rank {me} is in {mine}, rank {sender} in {head}"
            )));
        }
        seen[sender] = Some(head);
        let mut count = [0; 8];
        count.copy_from_slice(&note[Head::WIRE..INLINE]);
        self.counts[peer] = u64::from_le_bytes(count) as usize;
        Ok(())
    }

    /// All lengths are known: makes room, fills in what is here, and asks for the rest.
    fn lay_out(&mut self, mpi: &Mpi, pool: &Pool) -> Result<(), Fault> {
        self.laid_out = true;
        let width = self.head.dtype.size();
        self.counts[self.circle.rank] = self.own.len();
        self.received = pool.take(self.head.dtype, self.counts.iter().sum());
        let mut start = self.received.as_mut_ptr();
        for peer in 0..self.counts.len() {
            let len = self.counts[peer] * width;
            if peer == self.circle.rank {
                let own = bytes(&self.send, self.own.clone());
                // SAFETY: `received` has room for all counts, this part's is at `start`; the two
                // buffers are different ones.
                unsafe { start.copy_from_nonoverlapping(own.as_ptr(), len) };
            } else if len <= NOTE - INLINE {
                if let Some(note) = self.arrived[peer].take() {
                    // SAFETY: as above; the note has room for a part of this length.
                    unsafe { start.copy_from_nonoverlapping(note[INLINE..].as_ptr(), len) };
                }
            } else {
                for offset in (0..len).step_by(PIECE) {
                    let piece = PIECE.min(len - offset) as c_int;
                    let (tag, comm) = (self.body_tag, self.circle.comm);
                    // SAFETY: `received` has this room, on the heap, and is not touched again until
                    // all bodies are there.
                    let request =
                        unsafe { mpi.receive(start.add(offset), piece, peer, tag, comm) }?;
                    self.bodies_in.push(Message { peer, request, buffer: () });
                }
            }
            // SAFETY: the next part's place, or the end of `received`.
            start = unsafe { start.add(len) };
        }
        self.arrived.clear();
        Ok(())
    }

    /// Which ranks this exchange waits for, and for what.
    pub(super) fn awaited(&self, seen: &[Option<Head>]) -> String {
        let name = |peer: usize| {
            let rank = self.circle.members[peer];
            sighting(rank, seen[rank].as_ref())
        };
        let list = |peers: &mut dyn Iterator<Item = usize>| {
            let peers: std::collections::BTreeSet<usize> = peers.collect();
            peers.into_iter().map(name).collect::<Vec<_>>().join("; ")
        };
        if self.lacks_ranks() {
            return list(&mut self.notes_in.iter().map(|message| message.peer));
        }
        let incoming = self.bodies_in.iter().map(|message| message.peer);
        let outgoing = self.bodies_out.iter().map(|message| message.peer);
        let notes = self.notes_out.iter().map(|message| message.peer);
        format!("the elements to or from {}", list(&mut incoming.chain(outgoing).chain(notes)))
    }

    /// The received elements and their counts by sender, and the buffer that was sent.
    pub(super) fn into_parts(self) -> (Elements, Vec<usize>, Arc<Elements>) {
        debug_assert!(self.is_done());
        (self.received, self.counts, self.send)
    }
}

/// Why an exchange failed.
pub(super) enum Fault {
    /// Found out here.
    Here(String),
    /// Another rank's last words.
    Told(String),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Here(error.to_string())
    }
}

/// Removes and returns the messages that are complete.
fn take_done<T>(mpi: &Mpi, messages: &mut Vec<Message<T>>) -> Result<Vec<Message<T>>> {
    let mut done = Vec::new();
    let mut index = 0;
    while index < messages.len() {
        if mpi.test(&mut messages[index].request)? {
            done.push(messages.swap_remove(index));
        } else {
            index += 1;
        }
    }
    Ok(done)
}

/// Tells the others of `circle` that this rank has failed, as the next note that they expect from
/// it. Returns the requests; the notes are never freed, since nobody may be left to take them.
pub(super) fn send_farewell(mpi: &Mpi, circle: &Circle, cause: &str) -> Vec<Handle> {
    let mut note = [0; NOTE];
    let mut end = cause.len().min(NOTE - 3);
    while !cause.is_char_boundary(end) {
        end -= 1;
    }
    note[0] = FAREWELL;
    note[1..3].copy_from_slice(&(end as u16).to_le_bytes());
    note[3..3 + end].copy_from_slice(&cause.as_bytes()[..end]);
    let note = Box::leak(Box::new(note));
    let send = |peer| {
        // SAFETY: the note is leaked.
        unsafe { mpi.send(note.as_ptr(), 3 + end as c_int, peer, NOTE_TAG, circle.comm) }
    };
    // The failure itself is what gets reported; a rank that cannot be told will time out.
    circle.others().filter_map(|peer| send(peer).ok()).collect()
}

fn read_farewell(note: &Note) -> String {
    let len = usize::from(u16::from_le_bytes([note[1], note[2]]));
    String::from_utf8_lossy(&note[3..][..len.min(NOTE - 3)]).into_owned()
}

/// The bytes of `elements[span]`.
fn bytes(elements: &Elements, span: Range<usize>) -> &[u8] {
    assert!(span.end <= elements.len(), "a span beyond the buffer");
    let width = elements.dtype().size();
    // SAFETY: `span` lies in the buffer; no dtype has padding, so that all bytes are initialised.
    unsafe {
        std::slice::from_raw_parts(elements.as_ptr().add(span.start * width), span.len() * width)
    }
}
