//! Products of token rows with packed weights: `out[i][j] = Σ_k x[i][k] · w[j][k]`.
//!
//! A [`Gemm`] is an entry of a table, [`ALL`]: what codes it reads, what rows, and the features it
//! needs. [`gemm`] picks the best entry for a matrix and a set of features; since it takes the set
//! as an argument, every entry can be forced. [`pack`](crate::pack::pack) makes what the entry
//! reads, and refuses where the CPU lacks a feature, so that packed weights prove what they need.
//!
//! # The promise
//! An element of `out` is computed in one way. With the columns in the order of
//! the packed weights, in groups that share a scale and of at most 256 columns:
//!
//! ```text
//! s = 0;    s = x[k] · code[k] + s              for each k of a group, in order
//! acc = scale · s + acc                         (without a scale: acc = s + acc)
//! acc = minimum · Σx + acc                      where the format has minima
//! out = acc, times or divided by the scale of the whole matrix
//! ```
//!
//! With rows of bf16 a group's columns go in pairs, each of which is two fused multiply-adds, the odd
//! column's first; numbers below the smallest normal one are zero there, before and after:
//!
//! ```text
//! s = x[k] · code[k] + (x[k + 1] · code[k + 1] + s)
//! ```
//!
//! Rows that were quantised to codes of a byte can be multiplied as these codes
//! ([`Packed::coded`]); a row's scale comes in with the weights':
//!
//! ```text
//! acc = (scale · row scale) · s + acc           (without a scale: acc = row scale · s + acc)
//! acc = minimum · (row scale · Σx) + acc        where the format has minima: integers alone
//! ```
//!
//! Products of integers with integers are added without any rounding, in whatever order: `s` is the
//! exact sum, whatever kind of dot product made it.
//!
//! On tile registers a group goes in turns of 32 columns, or 16 where a scale is for no more, and even and
//! odd ones have sums of their own; groups of formats without scales are one sum. Small numbers are zero as
//! with bf16:
//!
//! ```text
//! even = x[k] · code[k] + even;  odd = x[k + 1] · code[k + 1] + odd        from zero, for each pair of a turn, in order
//! s = s + (even + odd)
//! ```
//!
//! Each other `·` with its `+` is one fused multiply-add in f32; codes, less their zero points, and scales
//! are exact, `Σx` is computed in f64 and rounded once. So the result is the same bit by bit for any rows
//! beside it, any split into units, and on every set of features.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop, reason = "loops over constants, which must unroll")]
mod avx2_quads;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
#[cfg(target_arch = "x86_64")]
mod avx512_vnni;
#[allow(clippy::needless_range_loop, reason = "loops over constants, which must unroll")]
mod header;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod panel;
mod portable;
#[cfg(target_arch = "x86_64")]
mod quads;
#[cfg(target_arch = "x86_64")]
mod registers;
mod simd;
#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop, reason = "loops over constants, which must unroll")]
mod strips;
#[allow(clippy::needless_range_loop, reason = "loops over constants, which must unroll")]
mod tile;
#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop, reason = "loops over constants, which must unroll")]
mod tiles;
#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop, reason = "loops over constants, which must unroll")]
mod turns;

#[cfg(target_arch = "x86_64")]
pub(crate) use amx::probe as probe_tiles;

use std::fmt;
use std::ops::Range;

use crate::isa::{Cpu, Features};
use crate::operand::{self, Operand, OperandKind};
use crate::pack::{Codes, PANEL, PANELS, Packed, UNIT};
use crate::rows::{Rows, RowsMut};
use crate::stored::View;
use tile::{Args, Shape};

/// An entry of the table.
pub struct Gemm {
    name: &'static str,
    codes: Codes,
    rows: OperandKind,
    needs: Features,
    /// Tiles, the preferred first, and of one row for units of four panels and of one.
    shapes: &'static [Shape],
}

/// The entries of one set of features for one kind of rows.
macro_rules! entries {
    (
        $set:ident, $panels:ident, $rows:ident $rows_name:literal, $name:literal, $needs:expr;
        $($panel:ident $codes:literal),*
    ) => {
        [$(Gemm {
            name: concat!($codes, " · ", $rows_name, ", ", $name),
            codes: Codes::$panel,
            rows: OperandKind::$rows,
            needs: $needs,
            shapes: $set::of::<$panels::$panel>(),
        }),*]
    };
}

/// The entries for rows of f32: they read all codes.
macro_rules! f32_entries {
    ($set:ident, $name:literal, $needs:expr) => {
        entries!($set, panel, F32 "f32", $name, $needs;
            F32 "f32", F16 "f16", Bf16 "bf16", Int8 "int8", E4m3 "e4m3", E5m2 "e5m2",
            Table2 "2-bit table", Table3 "3-bit table", Table4 "4-bit table",
            Int5 "5-bit integers", Int6 "6-bit integers", Table6 "6-bit table")
    };
}

/// The entries for rows of bf16: they read the codes that bf16 holds.
#[cfg(target_arch = "x86_64")]
macro_rules! pair_entries {
    ($set:ident, $rows:ident, $name:literal, $needs:expr) => {
        entries!($set, pairs, $rows "bf16", $name, $needs;
            Bf16 "bf16", Int8 "int8", E4m3 "e4m3", E5m2 "e5m2",
            Table2 "2-bit table", Table3 "3-bit table", Table4 "4-bit table",
            Int5 "5-bit integers", Int6 "6-bit integers", Table6 "6-bit table")
    };
}

#[cfg(target_arch = "x86_64")]
static AMX_BF16: [Gemm; 10] = pair_entries!(amx, TileBf16, "amx_bf16", Features::V4_AMX);
#[cfg(target_arch = "x86_64")]
static AVX512_BF16: [Gemm; 10] = pair_entries!(avx512_bf16, Bf16, "avx512_bf16", Features::V4_BF16);
#[cfg(target_arch = "x86_64")]
static AVX512_VNNI: [Gemm; 1] = entries!(
    avx512_vnni, avx512_vnni, Int8 "int8", "avx512_vnni", Features::V4_VNNI; Int8 "int8");
#[cfg(target_arch = "x86_64")]
static AVX512_QUADS: [Gemm; 6] = entries!(
    quads, quads, Int8 "int8", "avx512_vnni", Features::V4_VNNI.with(Features::AVX512_VBMI);
    Table2 "2-bit table", Table3 "3-bit table", Table4 "4-bit table",
    Int5 "5-bit integers", Int6 "6-bit integers", Table6 "6-bit table");
#[cfg(target_arch = "x86_64")]
static AVX512: [Gemm; 12] = f32_entries!(avx512, "avx512", Features::V4);
#[cfg(target_arch = "x86_64")]
static AVX2_QUADS: [Gemm; 7] = entries!(
    avx2_quads, avx2_quads, Int8 "int8", "avx2", Features::V3;
    Int8 "int8", Table2 "2-bit table", Table3 "3-bit table", Table4 "4-bit table",
    Int5 "5-bit integers", Int6 "6-bit integers", Table6 "6-bit table");
#[cfg(target_arch = "x86_64")]
static AVX2: [Gemm; 12] = f32_entries!(avx2, "avx2", Features::V3);
static PORTABLE: [Gemm; 12] = f32_entries!(portable, "portable", Features::NONE);

/// Every entry; of those for the same rows the preferred ones first.
#[cfg(target_arch = "x86_64")]
pub static ALL: [&[Gemm]; 8] =
    [&AMX_BF16, &AVX512_BF16, &AVX512_VNNI, &AVX512_QUADS, &AVX512, &AVX2_QUADS, &AVX2, &PORTABLE];
/// Every entry; of those for the same rows the preferred ones first.
#[cfg(not(target_arch = "x86_64"))]
pub static ALL: [&[Gemm]; 1] = [&PORTABLE];

/// The best entry for `weights` and `rows` on a CPU with `have`; `None` if there is none, also where
/// rows of that kind are multiplied by weights of the same kind, which does not hold all of `weights`.
pub fn gemm(weights: &View, rows: OperandKind, have: Features) -> Option<&'static Gemm> {
    if !crate::pack::holds(rows, weights) {
        return None;
    }
    let codes = crate::pack::codes(weights);
    let mut entries = ALL.into_iter().flatten();
    entries.find(|gemm| gemm.codes == codes && gemm.rows == rows && have.contains(gemm.needs))
}

impl Gemm {
    /// The name in reports.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The codes that it reads.
    pub fn codes(&self) -> Codes {
        self.codes
    }

    /// What its rows are.
    pub fn rows(&self) -> OperandKind {
        self.rows
    }

    /// The CPU features that it needs.
    pub fn needs(&self) -> Features {
        self.needs
    }

    /// Whether this CPU can run it.
    pub fn runs_here(&self) -> bool {
        Cpu::detect().has(self.needs)
    }

    /// Bytes that [`operand`](Self::operand) needs for `rows` rows.
    pub fn operand_bytes(&self, w: &Packed, rows: usize) -> usize {
        operand::bytes(w, rows)
    }

    /// `rows` `[M, K]` as the kernel reads them, written to `into`, which begins at a multiple of
    /// 64 bytes (4 will do, but slower). Runs on the calling thread. What it makes also serves any
    /// other weights that [take](Packed::takes) the same rows.
    ///
    /// # Panics
    /// If `rows` has other columns than `w`, or `into` is too short; if the entry multiplies integers,
    /// and `w` is not for rows of them ([`Packed::coded`]).
    pub fn operand<'a>(&self, w: &Packed, rows: Rows<'_>, into: &'a mut [u8]) -> Operand<'a> {
        self.operand_of(w, rows, None, into)
    }

    /// The same for rows that are slices: `max` is the largest magnitude of the whole row, before it was
    /// quantised. (It matters to rows that are multiplied as [codes](Packed::coded) with one scale.)
    ///
    /// # Panics
    /// As [`operand`](Self::operand).
    pub fn operand_of<'a>(
        &self,
        w: &Packed,
        rows: Rows<'_>,
        max: Option<f32>,
        into: &'a mut [u8],
    ) -> Operand<'a> {
        self.owns(w);
        assert_eq!(rows.cols(), w.cols(), "columns of the rows and the weights");
        operand::write(w, rows, max, into)
    }

    /// `rows` rows that [`operand`](Self::operand) wrote for `w`, one at a time, `stride` bytes from
    /// one to the next: at least `operand_bytes(w, 1)`.
    ///
    /// # Panics
    /// If they are not all there, or overlap.
    pub fn written<'a>(
        &self,
        w: &Packed,
        bytes: &'a [u8],
        rows: usize,
        stride: usize,
    ) -> Operand<'a> {
        self.owns(w);
        operand::written(w, bytes, rows, stride)
    }

    /// `out[i][j] = Σ_k x[rows][k] · w[j][k]` for the weight rows `j` of `units`, as the module
    /// promises. Runs on the calling thread.
    ///
    /// # Panics
    /// If `w` was packed for another entry, `x` made for weights with another order of columns, the
    /// ranges do not lie inside, or `out` is not `[rows, columns of the units]`.
    pub fn run(
        &self,
        w: &Packed,
        x: Operand<'_>,
        rows: Range<usize>,
        units: Range<usize>,
        out: &mut RowsMut<'_>,
    ) {
        self.owns(w);
        assert!(x.fits(w), "rows for other weights");
        assert!(rows.start <= rows.end && rows.end <= x.rows(), "rows {rows:?} of {}", x.rows());
        let columns = w.columns(units.clone());
        assert_eq!((out.rows(), out.cols()), (rows.len(), columns.len()), "shape of out");
        if rows.is_empty() || columns.is_empty() {
            return;
        }
        let x_rows = x.slice(rows.clone());
        let mut next = units.start;
        while next < units.end {
            let unit = next;
            next += self.together(w, unit..units.end);
            let panels = w.panels(unit);
            let bytes = w.unit_bytes(unit..next);
            let column = (unit - units.start) * UNIT;
            self.cover(rows.len(), panels, |shape, rows, panel| {
                // A unit of one panel has no others before the tile's.
                let (start, first) = match shape.of {
                    PANELS => (0, panel),
                    _ => (panel * w.panel_bytes(), 0),
                };
                let args = Args {
                    layout: *w.layout(),
                    table: w.table(),
                    finish: w.finish(),
                    blocks: w.blocks(),
                    unit: bytes[start..].as_ptr(),
                    units: next - unit,
                    unit_bytes: PANELS * w.panel_bytes(),
                    first,
                    rows: rows.len(),
                    x: x_rows[rows.start * x.stride()..].as_ptr(),
                    x_stride: x.stride(),
                    sums: x.sums_at(),
                    scales: x.scales_at(),
                    out: out.at(rows.start, column + panel * PANEL),
                    out_stride: out.stride(),
                    columns: columns.len() - column - panel * PANEL,
                };
                // SAFETY: the CPU has the features, or `w` could not have been packed for this
                // entry. The units have all blocks of the panels that the shape names; the rows of
                // the shape lie in `x`, with their sums, and in `out`, which is borrowed mutably and
                // has the columns.
                unsafe { (shape.run)(&args) }
            });
        }
    }

    /// How many of `units`, at least one, are multiplied at a time: several if they are whole.
    fn together(&self, w: &Packed, units: Range<usize>) -> usize {
        let shapes = self.shapes.iter().filter(|shape| shape.of == PANELS);
        let most = shapes.map(|shape| shape.units).max().unwrap_or(1);
        units.take(most).take_while(|unit| w.panels(*unit) == PANELS).count().max(1)
    }

    /// Calls `tile(shape, rows, panel)` so that the shapes cover `rows` × `panels` once.
    fn cover(&self, rows: usize, panels: usize, mut tile: impl FnMut(&Shape, Range<usize>, usize)) {
        let of = if panels == PANELS { PANELS } else { 1 };
        let shapes = || self.shapes.iter().filter(|shape| shape.of == of);
        if let Some(shape) = shapes().find(|shape| shape.rows == Shape::ANY && rows > 0) {
            (0..panels).step_by(shape.panels).for_each(|panel| tile(shape, 0..rows, panel));
            return;
        }
        let most = shapes().map(|shape| shape.rows).max().unwrap_or(1);
        let mut row = 0;
        while row < rows {
            // Strips of about equal height.
            let left = rows - row;
            let height = left.div_ceil(left.div_ceil(most));
            let shape = shapes().find(|shape| shape.rows <= height).expect("a shape of one row");
            let end = row + shape.rows;
            (0..panels).step_by(shape.panels).for_each(|panel| tile(shape, row..end, panel));
            row = end;
        }
    }

    fn owns(&self, w: &Packed) {
        assert!(std::ptr::eq(self, w.gemm()), "weights packed for {}", w.gemm().name);
    }
}

impl fmt::Debug for Gemm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

#[cfg(test)]
mod tests;
