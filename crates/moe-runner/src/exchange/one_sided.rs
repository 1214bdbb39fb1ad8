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

use super::resident::{ResidentWire, Ways};
use crate::Result;

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

/// What does the steps. All ranks take the same steps in the same order.
pub trait Side {
    /// Rows of the rank with most of them, and slots of a row.
    ///
    /// # Errors
    /// A rank that does not arrive; so for all the others.
    fn agree(&mut self) -> Result<Places>;

    /// Makes sure of the memory, here and on all ranks.
    ///
    /// # Errors
    /// Too little memory.
    fn make_room(&mut self, places: Places) -> Result<()>;

    /// Puts rows, and ids of slots.
    ///
    /// # Errors
    /// What the memory or the device refuses.
    fn put_rows(&mut self, places: Places) -> Result<()>;

    /// What comes later on any rank begins when all ranks have done what comes before.
    ///
    /// # Errors
    /// As [`Self::put_rows`].
    fn meet(&mut self, meeting: Meeting) -> Result<()>;

    /// Puts the outputs of all slots that have arrived.
    ///
    /// # Errors
    /// As [`Self::put_rows`].
    fn experts(&mut self, places: Places) -> Result<()>;

    /// The sums.
    ///
    /// # Errors
    /// As [`Self::put_rows`].
    fn combine(&mut self, places: Places) -> Result<()>;
}

/// One batch.
///
/// # Errors
/// As the steps of `side`.
pub fn run(side: &mut dyn Side) -> Result<Places> {
    let places = side.agree()?;
    // no rank has any rows
    if places.most == 0 {
        return Ok(places);
    }
    side.make_room(places)?;
    exchange(side, places)?;
    Ok(places)
}

/// The same where all know how many rows there are, and have room for them.
///
/// # Errors
/// As [`run`].
pub fn exchange(side: &mut dyn Side, places: Places) -> Result<()> {
    side.put_rows(places)?;
    side.meet(Meeting::Rows)?;
    side.experts(places)?;
    side.meet(Meeting::Outputs)?;
    side.combine(places)
}
