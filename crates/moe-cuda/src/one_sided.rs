//! Rows between ranks whose GPUs reach each other's memory: each puts them straight where the other reads them, and
//! outputs where they are summed. Nothing is counted, packed or unpacked; see exchange.cu.

use crate::exchange::{Homes, RawHomes, SlotOutputs};
use crate::many::SlotHomes;
use crate::module::{Argument, Function, Launch, Modules};
use crate::sources::EXCHANGE;
use crate::{Error, FaultWord, Result, Rows, RowsMut, StopWord, Stream, View};

/// The verbs, compiled and loaded. Ranks are counted from this one on: number 0 is this rank.
pub struct OneSidedVerbs {
    put_rows: Function,
    meet: Function,
    put_outputs: Function,
    combine: Function,
}

/// The windows of all ranks, and what is where in them.
#[derive(Clone, Copy, Debug)]
pub struct Windows<'a> {
    /// `[3, R]` addresses by number: of what arrives, of outputs, of signals.
    pub table: View<'a, u64>,
    /// Number of ranks, at most 32.
    pub ranks: usize,
    /// Rows of the rank that has most of them.
    pub most: usize,
    /// Slots of a row.
    pub top_k: usize,
    /// Bytes of a row: whole 16 bytes.
    pub row_bytes: usize,
}

/// Where ranks meet: when rows have been put, and when outputs have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// All rows are there.
    Rows,
    /// All outputs are there.
    Outputs,
}

impl Windows<'_> {
    /// Most ranks.
    pub const MOST_RANKS: usize = 32;

    /// Slots that can arrive.
    pub fn slots(&self) -> usize {
        self.ranks * self.most * self.top_k
    }

    /// Rows that can arrive.
    pub fn rows(&self) -> usize {
        self.ranks * self.most
    }

    /// Where the ids of slots begin among what arrives.
    pub fn ids_at(&self) -> usize {
        self.rows() * self.row_bytes
    }

    /// Bytes of the window of what arrives.
    pub fn arrivals(&self) -> usize {
        self.ids_at() + 4 * self.slots()
    }

    /// Where the scales of such outputs begin in a window of outputs.
    pub fn scales_at(&self, of: SlotOutputs) -> usize {
        (self.most * self.top_k * of.value_bytes).next_multiple_of(16)
    }

    /// Bytes of the window of outputs.
    pub fn outputs(&self, of: SlotOutputs) -> usize {
        self.scales_at(of) + self.most * self.top_k * of.scale_bytes
    }

    /// Bytes of the window of signals: how often each rank, this one first, has come to either meeting `[2, R]`, and in
    /// which layer `[2, R]`, in words of 32 bits.
    pub fn signals(ranks: usize) -> usize {
        4 * (4 * ranks)
    }

    fn raw(&self) -> RawWindows {
        RawWindows {
            table: self.table.pointer,
            all: self.ranks as u32,
            most: self.most as u32,
            top_k: self.top_k as u32,
            pieces: (self.row_bytes / 16) as u32,
            ids_at: self.ids_at() as u64,
        }
    }
}

impl<'a> Windows<'a> {
    /// Where products put the outputs of the slots that have arrived.
    pub fn homes(&self, of: SlotOutputs) -> SlotHomes<'a> {
        SlotHomes {
            addresses: self.table.part(self.ranks..2 * self.ranks),
            slots: self.most * self.top_k,
            scales_at: self.scales_at(of),
        }
    }
}

#[repr(C)]
struct RawWindows {
    table: u64,
    all: u32,
    most: u32,
    top_k: u32,
    pieces: u32,
    ids_at: u64,
}

// SAFETY: `struct Windows` of exchange.cu.
unsafe impl Argument for RawWindows {}

impl OneSidedVerbs {
    /// Compiles (or finds in the cache) and loads what the verbs need.
    ///
    /// # Errors
    /// If a kernel does not compile or load.
    pub fn new(modules: &Modules) -> Result<Self> {
        let get = |name| modules.function(&EXCHANGE, &[], name);
        Ok(Self {
            put_rows: get("put_rows")?,
            meet: get("meet_ranks")?,
            put_outputs: get("put_outputs")?,
            combine: get("combine_put")?,
        })
    }

    /// Puts the rows `x` `[T, H]` where their slots' experts are, and to all ranks what they have of the slots `ids`
    /// `[T, k]`.
    ///
    /// # Safety
    /// The windows are as large as they say, on all ranks, and nobody reads what the last pass has put there.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub unsafe fn put_rows(
        &self,
        stream: &Stream,
        (x, ids): (Rows<'_>, View<'_, u32>),
        homes: &Homes,
        windows: &Windows<'_>,
    ) -> Result<()> {
        let (tokens, bytes) = (x.rows(), x.float().bytes());
        let stride = x.stride() * bytes;
        let whole = |bytes: usize| bytes.is_multiple_of(16);
        if ids.len() != tokens * windows.top_k
            || tokens > windows.most
            || windows.ranks != homes.ranks()
            || windows.ranks > Windows::MOST_RANKS
            || x.cols() * bytes != windows.row_bytes
            || !(whole(windows.row_bytes) && whole(stride) && x.address().is_multiple_of(16))
        {
            let sizes = format!("{tokens} rows of {} bytes in {windows:?}", x.cols() * bytes);
            return Err(Error::input("rows to put", sizes));
        }
        if windows.most == 0 {
            return Ok(());
        }
        let (raw, homes): (RawWindows, RawHomes) = (windows.raw(), homes.raw());
        // SAFETY: the parameters of `put_rows`; shapes were checked, the windows are as the caller promises.
        unsafe {
            self.put_rows.launch(
                stream,
                Launch::plain(windows.most as u32, 128),
                &[
                    &x.raw.data,
                    &((stride / 16) as u64),
                    &ids.pointer,
                    &(tokens as u32),
                    &homes,
                    &raw,
                ],
            )
        }
    }

    /// Tells every rank that all that this stream has put before is there, in a layer of this number, and waits on the
    /// stream for the same from all. Gives up on `stop`, or after `seconds`, which is a fault.
    ///
    /// # Safety
    /// As [`Self::put_rows`]; and all ranks come to the same meetings.
    ///
    /// # Errors
    /// If an earlier step failed.
    pub unsafe fn meet(
        &self,
        stream: &Stream,
        windows: &Windows<'_>,
        (meeting, layer): (Meeting, u32),
        (stop, seconds): (&StopWord, f64),
        fault: &FaultWord,
    ) -> Result<()> {
        let meeting = match meeting {
            Meeting::Rows => 0u32,
            Meeting::Outputs => 1,
        };
        let arguments: [&dyn Argument; 6] = [
            &windows.raw(),
            &meeting,
            &layer,
            &stop.address(),
            &((seconds * 1e9) as u64),
            &fault.view().pointer,
        ];
        // SAFETY: the parameters of `meet_ranks`; the windows are as the caller promises.
        unsafe { self.meet.launch(stream, Launch::plain(1, 32), &arguments) }
    }

    /// Puts outputs `of` all slots that can arrive, those with one of `experts` experts, to the ranks that they are of.
    ///
    /// # Safety
    /// As [`Self::put_rows`], for outputs; and there is one for every slot.
    ///
    /// # Errors
    /// If a size does not fit, or an earlier step failed.
    pub unsafe fn put_outputs(
        &self,
        stream: &Stream,
        of: SlotOutputs,
        experts: usize,
        windows: &Windows<'_>,
    ) -> Result<()> {
        if !of.value_bytes.is_multiple_of(16) || !of.scale_bytes.is_multiple_of(4) {
            return Err(Error::input("outputs to put", format!("{of:?}")));
        }
        if windows.slots() == 0 {
            return Ok(());
        }
        let arguments: [&dyn Argument; 7] = [
            &of.values,
            &of.scales,
            &((of.value_bytes / 16) as u32),
            &((of.scale_bytes / 4) as u32),
            &(windows.scales_at(of) as u64),
            &(experts as u32),
            &windows.raw(),
        ];
        let blocks = windows.slots().div_ceil(8).min(1 << 16) as u32;
        // SAFETY: the parameters of `put_outputs`; the memory is as the caller promises.
        unsafe { self.put_outputs.launch(stream, Launch::plain(blocks, 256), &arguments) }
    }

    /// `out[t] = factor · Σ_j weights[t, j] · output of slot (t, j)`, in slot order, from the outputs `of` this rank's
    /// slots. Those whose id is not below `experts` are left out; a sum that is not finite raises the fault.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub fn combine(
        &self,
        stream: &Stream,
        of: SlotOutputs,
        (ids, weights): (View<'_, u32>, View<'_, f32>),
        (experts, factor): (usize, f32),
        out: &mut RowsMut<'_>,
        fault: &FaultWord,
    ) -> Result<()> {
        let top_k = ids.len().checked_div(out.rows()).unwrap_or(0);
        let fits = ids.len() == top_k * out.rows() && weights.len() == ids.len();
        if !fits || !out.cols().is_multiple_of(8) {
            let sizes = format!("{} ids, {} weights", ids.len(), weights.len());
            return Err(Error::input("sum of slots", sizes));
        }
        if ids.is_empty() {
            return Ok(());
        }
        let arguments: [&dyn Argument; 10] = [
            &of.values,
            &of.scales,
            &(of.tile as u32),
            &ids.pointer,
            &(experts as u32),
            &weights.pointer,
            &(top_k as u32),
            &factor,
            &out.raw,
            &fault.view().pointer,
        ];
        let blocks = (out.rows() * out.cols() / 8).div_ceil(256).min(1 << 20) as u32;
        // SAFETY: the parameters of `combine_put`; every slot with an expert has an output.
        unsafe { self.combine.launch(stream, Launch::plain(blocks, 256), &arguments) }
    }
}
