//! The all-to-all of [`resident`](super::resident) rows where every rank can write into the others' memory.
//!
//! ```text
//! agree    how many rows the rank with most of them has         the host's, no device waits
//! put      each row straight to the ranks of its experts, and to all what they have of its slots
//! meet     all rows are there                                   signals in each other's memory
//! experts  each slot's output straight to its row's rank
//! meet     all outputs are there
//! combine  the weighted sum of each row's slots, in slot order
//! ```
//! Every rank has places for all rows of all ranks, and for the outputs of all its slots, so that a row or an output
//! goes to the place that is its own ([`Places`]): nothing is counted, packed or unpacked, no host learns anything from
//! a device, and a pass can be captured.
//!
//! **Two meetings are enough.** A rank puts a pass's rows when it has met the others over the outputs of the pass
//! before: they have read its last rows by then. It puts outputs when it has met them over rows: they have summed the
//! outputs of the pass before. So what arrives and what comes back lie apart, and nothing else need be waited for.
//!
//! **Micro-batches** ("lanes") have memory of their own, and their rows may be on the way while another's experts work:
//! all are put before the first is waited for, and all experts come before the first sum.
//!
//! **Who waits in vain** can tell for whom: every rank has been told by the others how often they have come to either
//! meeting, and in which layer ([`Signals`]).

use super::resident::{ResidentWire, Ways};
use crate::Result;
use crate::comm::Step;
use crate::exchange::share;

/// Most ranks.
pub const MOST_RANKS: usize = 32;

/// Where rows and slots of one pass lie. Ranks are counted from the one that asks: number d is rank (me + d) mod R.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// Number of ranks.
    pub ranks: usize,
    /// Rows of the rank with most of them.
    pub most: usize,
    /// Slots of a row.
    pub top_k: usize,
}

impl Places {
    /// Those of each of so many micro-batches, as far as any rank has rows in it: every rank cuts its rows alike.
    pub fn lanes(&self, count: usize) -> Vec<Self> {
        let most = (0..count.max(1)).map(|lane| share(self.most, lane, count.max(1)).len());
        most.filter(|most| *most > 0).map(|most| Self { most, ..*self }).collect()
    }

    /// For rows that arrive.
    pub fn rows(&self) -> usize {
        self.ranks * self.most
    }

    /// For slots that arrive.
    pub fn slots(&self) -> usize {
        self.rows() * self.top_k
    }

    /// This rank's number, as number d counts.
    pub fn number_at(&self, d: usize) -> usize {
        (self.ranks - d) % self.ranks
    }

    /// Where row t of number d arrives.
    pub fn row(&self, d: usize, t: usize) -> usize {
        d * self.most + t
    }

    /// Whose slot arrives at this place, and which of its: where its output goes.
    pub fn home(&self, place: usize) -> (usize, usize) {
        let each = self.most * self.top_k;
        (place / each, place % each)
    }

    /// Bytes sent and received, there and back, for these rows and slots that ranks have for each other; what a rank has
    /// of a slot is told to all.
    pub fn traffic(&self, ways: &Ways, wire: ResidentWire) -> [(usize, usize); 2] {
        let sum = |of: fn(&super::resident::Way) -> usize| ways.all.iter().map(of).sum::<usize>();
        let told = (self.slots() - self.most * self.top_k) * ResidentWire::ID;
        let rows = [sum(|way| way.rows.go.len()), sum(|way| way.rows.come.len())];
        let slots = [sum(|way| way.slots.go.len()), sum(|way| way.slots.come.len())];
        let [go, come] = rows.map(|rows| rows * wire.row + told);
        [(go, come), (slots[1] * wire.output, slots[0] * wire.output)]
    }
}

/// Where ranks meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// All have put their rows.
    Rows,
    /// All have put the outputs.
    Outputs,
}

impl Meeting {
    /// Both, in the order of a pass.
    pub const ALL: [Self; 2] = [Self::Rows, Self::Outputs];

    /// What is under way when a rank waits there.
    pub fn step(self) -> Step {
        match self {
            Self::Rows => Step::Dispatch,
            Self::Outputs => Step::Combine,
        }
    }
}

/// What a rank knows of who has come to the meetings of a micro-batch: words of 32 bits in its memory, which the others
/// write. `[2, R]`: how often each rank, by number, has come to either meeting; `[2, R]`: in which layer it was then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signals {
    /// R.
    pub ranks: usize,
}

/// A rank that others wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Late {
    /// Its number, as the one that waits counts.
    pub number: usize,
    /// Where it is waited for, and in which layer.
    pub at: (Meeting, u32),
    /// Where it came to last, if it ever came.
    pub seen: Option<(Meeting, u32)>,
}

impl Signals {
    /// How many there are.
    pub fn words(self) -> usize {
        4 * self.ranks
    }

    /// Where rank number d counts how often it has come.
    pub fn count(self, meeting: Meeting, d: usize) -> usize {
        meeting as usize * self.ranks + d
    }

    /// Where it says in which layer.
    pub fn layer(self, meeting: Meeting, d: usize) -> usize {
        2 * self.ranks + self.count(meeting, d)
    }

    /// The first rank that has not come to where this one is, by the words of this rank's memory.
    pub fn late(self, words: &[u32]) -> Option<Late> {
        let word = |at: usize| words.get(at).copied().unwrap_or(0);
        // counts go round
        let behind = |a: u32, b: u32| (a.wrapping_sub(b) as i32) < 0;
        let (meeting, number) = Meeting::ALL
            .into_iter()
            .flat_map(|meeting| (1..self.ranks).map(move |d| (meeting, d)))
            .find(|(m, d)| behind(word(self.count(*m, *d)), word(self.count(*m, 0))))?;
        let [rows, outputs] = Meeting::ALL.map(|meeting| word(self.count(meeting, number)));
        let last = if behind(outputs, rows) { Meeting::Rows } else { Meeting::Outputs };
        let seen = (rows != 0).then(|| (last, word(self.layer(last, number))));
        Some(Late { number, at: (meeting, word(self.layer(meeting, 0))), seen })
    }
}

/// What does the steps, of each micro-batch with memory of its own. All ranks take the same steps in the same order.
pub trait Side {
    /// Rows of the rank with most of them, and slots of a row.
    ///
    /// # Errors
    /// A rank that does not arrive; so for all the others.
    fn agree(&mut self) -> Result<Places>;

    /// Makes sure of the memory for these micro-batches, here and on all ranks.
    ///
    /// # Errors
    /// Too little memory.
    fn make_room(&mut self, lanes: &[Places]) -> Result<()>;

    /// Puts rows, and ids of slots.
    ///
    /// # Errors
    /// What the memory or the device refuses.
    fn put_rows(&mut self, lane: usize, places: Places) -> Result<()>;

    /// What comes later of this micro-batch on any rank begins when all ranks have done what comes before.
    ///
    /// # Errors
    /// As [`Self::put_rows`].
    fn meet(&mut self, lane: usize, meeting: Meeting) -> Result<()>;

    /// Puts the outputs of all slots that have arrived.
    ///
    /// # Errors
    /// As [`Self::put_rows`].
    fn experts(&mut self, lane: usize, places: Places) -> Result<()>;

    /// The sums.
    ///
    /// # Errors
    /// As [`Self::put_rows`].
    fn combine(&mut self, lane: usize, places: Places) -> Result<()>;
}

/// One batch in so many micro-batches: returns those that there are.
///
/// # Errors
/// As the steps of `side`.
pub fn run(side: &mut dyn Side, lanes: usize) -> Result<Vec<Places>> {
    let lanes = side.agree()?.lanes(lanes);
    // else no rank has any rows
    if !lanes.is_empty() {
        side.make_room(&lanes)?;
        exchange(side, &lanes)?;
    }
    Ok(lanes)
}

/// The same where all know how many rows there are, and have room for them.
///
/// # Errors
/// As [`run`].
pub fn exchange(side: &mut dyn Side, lanes: &[Places]) -> Result<()> {
    for (lane, places) in lanes.iter().enumerate() {
        side.put_rows(lane, *places)?;
    }
    for (lane, places) in lanes.iter().enumerate() {
        side.meet(lane, Meeting::Rows)?;
        side.experts(lane, *places)?;
    }
    for (lane, places) in lanes.iter().enumerate() {
        side.meet(lane, Meeting::Outputs)?;
        side.combine(lane, *places)?;
    }
    Ok(())
}
