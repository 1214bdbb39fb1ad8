//! Weights as kernels read them: panels of sixteen output rows, made once from stored ones.
//!
//! [`pack`] turns one [`View`] into a [`Packed`] for one [`Gemm`], on the calling thread: a layer
//! packs its experts in parallel and lets go of each view as it goes. Codes stay codes, scales stay
//! as compact as they were stored: a packed matrix takes the bytes of the stored one, but for what
//! pads it (rows to sixteen, groups to 32 columns), for codes that GGUF squeezes below a whole
//! number of bits, and for the 6-bit scales of its K types. The layout is described in
//! [`Layout`]'s module.

mod blocks;
mod fast;
mod integers;
mod layout;
mod lines;
mod memory;
mod order;
mod parts;
mod plan;
#[cfg(test)]
pub(crate) mod twin;
mod unit;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

pub use integers::integer_rows;
pub(crate) use integers::lift;
pub(crate) use layout::{BLOCK, Group, Number, OCTET, Offset, PANEL, PANELS, STEP, position};
pub use layout::{Codes, Layout, UNIT, VERSION};
pub(crate) use memory::{LINE, Memory};
pub(crate) use order::Order;
pub use parts::Parts;
pub(crate) use plan::{Finish, codes, holds};

use crate::gemm::Gemm;
use crate::numerics::quantise::Qdq;
use crate::operand::OperandKind;
use crate::stored::{Bytes, View};
use order::Columns;
use plan::Plan;

/// Packed weights `[rows, cols]`, for one entry of [the table](crate::gemm::ALL).
pub struct Packed {
    gemm: &'static Gemm,
    layout: Layout,
    columns: Columns,
    table: Box<[f32; 64]>,
    finish: Finish,
    rows: usize,
    cols: usize,
    /// How the rows that they multiply were quantised, where those are multiplied as codes.
    row_codes: Option<Qdq>,
    bytes: Bytes,
}

/// Why weights cannot be packed for an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The entry reads other codes.
    OtherCodes {
        /// The entry's name.
        gemm: &'static str,
        /// What the weights would be packed as.
        found: Codes,
    },
    /// Not all of the weights, before they are scaled, are numbers of the kind that the entry
    /// multiplies.
    Inexact {
        /// The entry's name.
        gemm: &'static str,
    },
    /// This CPU lacks features.
    Lacks {
        /// The entry's name.
        gemm: &'static str,
        /// Names of the features.
        features: String,
    },
    /// There is no memory for so many bytes.
    NoMemory {
        /// Bytes of the packed weights; all that an address can hold, if they are more.
        bytes: usize,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::OtherCodes { gemm, found } => {
                write!(f, "{gemm} does not read {found:?}")
            }
            Refusal::Inexact { gemm } => {
                write!(f, "{gemm} would round weights: their zero points are out of range")
            }
            Refusal::Lacks { gemm, features } => {
                write!(f, "{gemm} needs {features}, which this processor lacks")
            }
            Refusal::NoMemory { bytes } => {
                write!(f, "no memory for {bytes} bytes of packed weights")
            }
        }
    }
}

impl std::error::Error for Refusal {}

/// Packs `view` for `gemm`, on the calling thread.
///
/// # Errors
/// If `gemm` reads other codes or would round weights, this CPU cannot run it, or there is no memory
/// for the result.
pub fn pack(view: &View, gemm: &'static Gemm) -> Result<Packed, Refusal> {
    if codes(view) != gemm.codes() {
        return Err(Refusal::OtherCodes { gemm: gemm.name(), found: codes(view) });
    }
    if !gemm.runs_here() {
        let lacking = gemm.needs().without(crate::isa::Cpu::detect().features());
        return Err(Refusal::Lacks { gemm: gemm.name(), features: lacking.to_string() });
    }
    if !holds(gemm.rows(), view) {
        return Err(Refusal::Inexact { gemm: gemm.name() });
    }
    let mut plan = Plan::of(view);
    if gemm.rows() == OperandKind::Int8 {
        plan = plan.in_integers().ok_or(Refusal::Inexact { gemm: gemm.name() })?;
    }
    plan.layout.quads = in_quads(gemm);
    let panels = view.rows().div_ceil(PANEL);
    let bytes = panels.saturating_mul(panel_bytes(&plan.layout, &plan.columns.blocks));
    let mut memory = Memory::zeroed(bytes).map_err(|_| Refusal::NoMemory { bytes })?;
    let mut packed = Packed {
        gemm,
        layout: plan.layout,
        columns: plan.columns.clone(),
        table: Box::new(plan.table),
        finish: plan.finish,
        rows: view.rows(),
        cols: view.cols(),
        row_codes: None,
        bytes: Vec::new().into(),
    };
    let cpu = crate::isa::Cpu::detect().only(gemm.needs());
    let mut packing = unit::Packing::new(view, &plan, cpu);
    for unit in 0..packed.units() {
        let (rows, panels) = (packed.columns(unit..unit + 1), packed.panels(unit));
        let range = packed.unit_range(unit);
        let bytes = &mut memory[range];
        if panels == PANELS {
            packing.unit(rows, bytes);
            continue;
        }
        // What does not fill a unit is panels one after the other.
        let panel = panel_bytes(&plan.layout, &plan.columns.blocks);
        for (start, bytes) in rows.clone().step_by(PANEL).zip(bytes.chunks_exact_mut(panel.max(1)))
        {
            packing.unit(start..rows.end.min(start + PANEL), bytes);
        }
    }
    packed.bytes = Bytes::new(Arc::new(memory));
    Ok(packed)
}

/// Whether rows that are quantised as `qdq` says lose nothing as a kernel's rows of that kind, for
/// `weights`: as f32 they never do. As codes of a byte they do not, if all columns of a packed group of
/// weights share a scale of the row, and as bf16 if the weights have no minima; and values that bf16 holds
/// are bf16.
pub fn quantised_rows(kind: OperandKind, weights: &View, qdq: &Qdq) -> bool {
    match kind {
        OperandKind::F32 => true,
        OperandKind::Bf16 | OperandKind::TileBf16 if qdq.fits_bf16() => true,
        OperandKind::Int8 if !qdq.has_integers() => false,
        _ => {
            qdq.coded_group(weights.cols()).is_some_and(|size| plan::one_scale(kind, weights, size))
        }
    }
}

/// Whether codes of 8 bits lie in quads for `gemm`.
fn in_quads(gemm: &Gemm) -> bool {
    gemm.rows() != OperandKind::F32
}

/// Bytes of a panel over all of k, headers included.
fn panel_bytes(layout: &Layout, blocks: &[u8]) -> usize {
    blocks.iter().map(|steps| layout.block_bytes(usize::from(*steps))).sum()
}

impl Packed {
    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Units of 64 rows, the last of which may have fewer: what work is split into.
    pub fn units(&self) -> usize {
        self.rows.div_ceil(UNIT)
    }

    /// The output features of `units`.
    ///
    /// # Panics
    /// If they are not all there.
    pub fn columns(&self, units: Range<usize>) -> Range<usize> {
        let all = self.units();
        assert!(units.start <= units.end && units.end <= all, "units {units:?} of {all}");
        (units.start * UNIT).min(self.rows)..(units.end * UNIT).min(self.rows)
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// How they are packed.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The entry that they were packed for.
    pub fn gemm(&self) -> &'static Gemm {
        self.gemm
    }

    /// These weights for rows that are quantised as `qdq` says, where
    /// [those](quantised_rows) lose nothing so: rows that were quantised and dequantised. They are
    /// multiplied as codes, where the entry multiplies no f32.
    pub fn coded(mut self, qdq: Qdq) -> Packed {
        let multiplies_codes = self.gemm.rows() != OperandKind::F32 && !qdq.fits_bf16();
        self.row_codes = multiplies_codes.then_some(qdq);
        self
    }

    /// Whether an [`Operand`](crate::operand::Operand) made for `other` serves these weights too.
    pub fn takes(&self, other: &Packed) -> bool {
        let numbers = |w: &Packed| w.sums() + w.row_scales() + w.scaled_sums();
        self.gemm.rows() == other.gemm.rows()
            && self.row_codes == other.row_codes
            && self.columns.order == other.columns.order
            && numbers(self) == numbers(other)
            && (numbers(self) == 0 || self.group_ranges().eq(other.group_ranges()))
            && (self.sum_factor(), self.in_octets()) == (other.sum_factor(), other.in_octets())
    }

    /// How rows that are multiplied as codes were quantised.
    pub(crate) fn row_codes(&self) -> Option<&Qdq> {
        self.row_codes.as_ref()
    }

    /// Scales that an operand needs: none, or one for each group.
    pub(crate) fn row_scales(&self) -> usize {
        if self.row_codes.is_some() { self.columns.groups.len() } else { 0 }
    }

    /// The order of the columns.
    pub(crate) fn order(&self) -> &Order {
        &self.columns.order
    }

    /// Sums of groups that an operand needs: none, or one of each.
    pub(crate) fn sums(&self) -> usize {
        match (self.gemm.rows(), self.layout.offset) {
            (OperandKind::Int8, _) | (_, Offset::Minimum(_)) => self.columns.groups.len(),
            (_, Offset::None | Offset::Zero(_)) => 0,
        }
    }

    /// Sums of groups times their rows' scales that an operand needs besides: integers meet minima so.
    pub(crate) fn scaled_sums(&self) -> usize {
        match (self.gemm.rows(), self.layout.offset) {
            (OperandKind::Int8, Offset::Minimum(_)) => self.columns.groups.len(),
            _ => 0,
        }
    }

    /// What sums of groups are multiplied by, for products of integers to begin with: weights are
    /// [lifted](lift) above zero. Those with zero points take that off the sum by themselves.
    pub(crate) fn sum_factor(&self) -> i32 {
        match (self.gemm.rows(), self.layout.offset) {
            (OperandKind::Int8, Offset::None | Offset::Minimum(_)) => match self.layout.codes {
                Codes::Int8 => -128,
                _ => -lift(&self.table),
            },
            _ => 1,
        }
    }

    /// Whether rows of bytes stand in the order of the bits of an octet's codes: k 0, 4, 1, 5, 2, 6, 3, 7.
    pub(crate) fn in_octets(&self) -> bool {
        self.gemm.rows() == OperandKind::Int8 && self.layout.codes != Codes::Int8
    }

    /// The places of each group.
    pub(crate) fn group_ranges(&self) -> impl Iterator<Item = Range<usize>> {
        self.columns.ranges(self.layout.group)
    }

    /// Steps of each block.
    pub(crate) fn blocks(&self) -> &[u8] {
        &self.columns.blocks
    }

    pub(crate) fn table(&self) -> &[f32; 64] {
        &self.table
    }

    pub(crate) fn finish(&self) -> Finish {
        self.finish
    }

    /// Bytes of a panel over all of k, headers included.
    pub(crate) fn panel_bytes(&self) -> usize {
        panel_bytes(&self.layout, &self.columns.blocks)
    }

    /// Panels of a unit.
    pub(crate) fn panels(&self, unit: usize) -> usize {
        (self.rows - unit * UNIT).div_ceil(PANEL).min(PANELS)
    }

    /// The bytes of some units.
    pub(crate) fn unit_bytes(&self, units: Range<usize>) -> &[u8] {
        &self.bytes[self.unit_range(units.start).start..self.unit_range(units.end - 1).end]
    }

    fn unit_range(&self, unit: usize) -> Range<usize> {
        let panel = self.panel_bytes();
        let start = unit * PANELS * panel;
        start..start + self.panels(unit) * panel
    }
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {}] for {}", self.rows, self.cols, self.gemm.name())
    }
}
