//! One exchange over MPI, as point-to-point messages.
//!
//! Each rank sends each other rank a *note*: the head of the collective, the length of the part,
//! and the part itself if it is short. A longer part follows as *body* messages. So a short
//! exchange costs one message per pair, as MPI's own does, and the notes tell who has not come,
//! who is in another collective, and who has failed.

use std::ffi::c_int;
use std::sync::Arc;

use super::library::{Handle, Mpi};
use crate::comm::head::total_size;
use crate::comm::{Buffers, Head, Kind, Message, Part, sighting};
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

/// `NOTE` bytes. Not a box: MPI holds their address while the owner is moved, and a box that moves
/// claims to be the only one who has it.
type Note = Vec<u8>;

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
struct Posted<T> {
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
    send: Arc<Message>,
    notes_out: Vec<Posted<Note>>,
    bodies_out: Vec<Posted<()>>,
    notes_in: Vec<Posted<Note>>,
    /// The notes that have come, by sender.
    arrived: Vec<Option<Note>>,
    bodies_in: Vec<Posted<()>>,
    /// What has come, once all notes have.
    received: Option<Arc<Message>>,
    /// Elements from each rank.
    counts: Vec<usize>,
    /// The caller has dropped its handle.
    pub(super) abandoned: bool,
}

/// What exchanges that are over leave to those to come.
#[derive(Default)]
pub(super) struct Spares {
    notes: Vec<Note>,
    transfers: Vec<Transfer>,
}

impl Spares {
    fn note(&mut self) -> Note {
        self.notes.pop().unwrap_or_else(|| vec![0; NOTE])
    }

    /// Lets go of a transfer that is done.
    pub(super) fn keep(&mut self, mut transfer: Transfer, empty: &Arc<Message>) {
        debug_assert!(transfer.is_done());
        self.notes.extend(transfer.arrived.drain(..).flatten());
        transfer.send = empty.clone();
        transfer.received = None;
        self.transfers.push(transfer);
    }
}

impl Transfer {
    /// Sends all notes and bodies on their way. `number` is the count of exchanges that this circle
    /// had before.
    pub(super) fn start(
        mpi: &Mpi,
        spares: &mut Spares,
        circle: &Arc<Circle>,
        number: u64,
        (head, send): (Head, Arc<Message>),
    ) -> Result<Self> {
        let size = circle.members.len();
        let body_tag = 1 + (number % BODY_TAGS) as c_int;
        let mut transfer = match spares.transfers.pop() {
            Some(spare) => Self { circle: circle.clone(), head, body_tag, send, ..spare },
            None => Self {
                circle: circle.clone(),
                head,
                body_tag,
                send,
                notes_out: Vec::new(),
                bodies_out: Vec::new(),
                notes_in: Vec::new(),
                arrived: Vec::new(),
                bodies_in: Vec::new(),
                received: None,
                counts: Vec::new(),
                abandoned: false,
            },
        };
        transfer.abandoned = false;
        transfer.arrived.resize_with(size, || None);
        transfer.counts.clear();
        transfer.counts.resize(size, 0);
        match transfer.post(mpi, spares) {
            Ok(()) => Ok(transfer),
            Err(error) => {
                // What has been posted is under way for good.
                std::mem::forget(transfer);
                Err(error)
            }
        }
    }

    fn post(&mut self, mpi: &Mpi, spares: &mut Spares) -> Result<()> {
        let circle = self.circle.clone();
        for peer in circle.others() {
            self.expect_note(mpi, spares.note(), peer)?;
        }
        for peer in circle.others() {
            self.send_part(mpi, spares.note(), peer)?;
        }
        Ok(())
    }

    fn expect_note(&mut self, mpi: &Mpi, mut buffer: Note, peer: usize) -> Result<()> {
        let (room, comm) = (buffer.as_mut_ptr(), self.circle.comm);
        // SAFETY: the note is on the heap and stays in `notes_in`, untouched, until it is there.
        let request = unsafe { mpi.receive(room, NOTE as c_int, peer, NOTE_TAG, comm) }?;
        self.notes_in.push(Posted { peer, request, buffer });
        Ok(())
    }

    fn send_part(&mut self, mpi: &Mpi, mut buffer: Note, peer: usize) -> Result<()> {
        let comm = self.circle.comm;
        let part = self.send.part(peer);
        let count = self.send.span(peer).len() as u64;
        let inline = if part.len() <= NOTE - INLINE { part } else { &[] };
        buffer[..Head::WIRE].copy_from_slice(&self.head.encode());
        buffer[Head::WIRE..INLINE].copy_from_slice(&count.to_le_bytes());
        buffer[INLINE..INLINE + inline.len()].copy_from_slice(inline);
        let len = (INLINE + inline.len()) as c_int;
        // SAFETY: the note is on the heap and stays in `notes_out`, unchanged, until it is sent.
        let request = unsafe { mpi.send(buffer.as_ptr(), len, peer, NOTE_TAG, comm) }?;
        self.notes_out.push(Posted { peer, request, buffer });
        if part.len() > inline.len() {
            for piece in part.chunks(PIECE) {
                let (start, len) = (piece.as_ptr(), piece.len() as c_int);
                // SAFETY: the elements are on the heap, shared and so unchanged, and `send` keeps
                // them there until all bodies are sent.
                let request = unsafe { mpi.send(start, len, peer, self.body_tag, comm) }?;
                self.bodies_out.push(Posted { peer, request, buffer: () });
            }
        }
        Ok(())
    }

    /// Moves the exchange on; true when it is complete. `seen` are the heads that each rank of the
    /// world was seen with last.
    pub(super) fn progress(
        &mut self,
        mpi: &Mpi,
        buffers: &Buffers,
        spares: &mut Spares,
        seen: &mut [Option<Head>],
    ) -> Result<bool, Fault> {
        while let Some(sent) = take_done(mpi, &mut self.notes_out)? {
            spares.notes.push(sent.buffer);
        }
        while take_done(mpi, &mut self.bodies_out)?.is_some() {}
        while let Some(Posted { peer, buffer, .. }) = take_done(mpi, &mut self.notes_in)? {
            self.read_note(peer, &buffer, seen)?;
            self.arrived[peer] = Some(buffer);
        }
        if self.received.is_none() && self.notes_in.is_empty() {
            self.lay_out(mpi, buffers)?;
        }
        while take_done(mpi, &mut self.bodies_in)?.is_some() {}
        Ok(self.is_done())
    }

    pub(super) fn is_done(&self) -> bool {
        self.received.is_some()
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
        self.counts[peer] = head
            .part_size(u64::from_le_bytes(count))
            .map_err(|reason| Fault::Here(format!("rank {sender}: {reason}, in {mine}")))?;
        Ok(())
    }

    /// All lengths are known: makes room, fills in what is here, and asks for the rest.
    fn lay_out(&mut self, mpi: &Mpi, buffers: &Buffers) -> Result<(), Fault> {
        let (width, me) = (self.head.dtype.size(), self.circle.rank);
        self.counts[me] = self.send.span(me).len();
        let total = total_size(&self.counts, width)
            .map_err(|reason| Fault::Here(format!("{reason}, in {}", self.head)))?;
        let mut received = buffers.take(self.head.dtype, total)?;
        let room = Arc::get_mut(&mut received).map(Message::bytes_mut).unwrap_or_default();
        let mut start = 0;
        for (peer, count) in self.counts.iter().enumerate() {
            let len = count * width;
            let to = &mut room[start..start + len];
            start += len;
            if peer == me {
                to.copy_from_slice(self.send.part(me));
            } else if len <= NOTE - INLINE
                && let Some(note) = &self.arrived[peer]
            {
                to.copy_from_slice(&note[INLINE..INLINE + len]);
            }
        }
        let (place, mut start) = (room.as_mut_ptr(), 0);
        self.received = Some(received);
        for (peer, count) in self.counts.iter().enumerate() {
            let len = count * width;
            if peer != me && len > NOTE - INLINE {
                for offset in (0..len).step_by(PIECE) {
                    let piece = PIECE.min(len - offset) as c_int;
                    let (tag, comm) = (self.body_tag, self.circle.comm);
                    // SAFETY: the sum of all parts was checked, and the message has room for it: on
                    // the heap, this transfer's alone, and not touched again until all bodies are
                    // there.
                    let request =
                        unsafe { mpi.receive(place.add(start + offset), piece, peer, tag, comm) }?;
                    self.bodies_in.push(Posted { peer, request, buffer: () });
                }
            }
            start += len;
        }
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

    /// What came from every rank, in rank order. The exchange is done.
    pub(super) fn parts(&self) -> impl Iterator<Item = Part> {
        let mut start = 0;
        let received = self.received.iter().flat_map(move |received| {
            self.counts.iter().map(move |count| {
                start += count;
                (received.clone(), start - count..start)
            })
        });
        received.into_iter()
    }

    /// The message that has come.
    pub(super) fn received(&self) -> Option<&Arc<Message>> {
        self.received.as_ref()
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

/// Removes and returns a message that is complete, if there is one.
fn take_done<T>(mpi: &Mpi, messages: &mut Vec<Posted<T>>) -> Result<Option<Posted<T>>> {
    for index in 0..messages.len() {
        if mpi.test(&mut messages[index].request)? {
            return Ok(Some(messages.swap_remove(index)));
        }
    }
    Ok(None)
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

fn read_farewell(note: &[u8]) -> String {
    let len = usize::from(u16::from_le_bytes([note[1], note[2]]));
    String::from_utf8_lossy(&note[3..][..len.min(NOTE - 3)]).into_owned()
}
