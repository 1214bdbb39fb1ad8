//! Codes that lie in memory so that whole items are read at once: rows of codes packed along k, and
//! columns of codes that lie row beside row.

use super::layout::{Codes, PANEL, STEP, UNIT};
use super::lines::{self, Items};
use super::order::Order;
use super::plan::{Plan, Recode};
use crate::numerics::for_each_isa;
use crate::stored::{Packing, Stored, View};

/// Where codes lie.
#[derive(Clone, Copy)]
pub(super) struct Fast<'a> {
    bytes: &'a [u8],
    lie: Lie,
    /// Bytes from row to row, or from line of columns to line of columns.
    stride: usize,
    /// The stored row of the view's first row, and from one to the next.
    first: usize,
    step: usize,
    /// The stored column at the first place that is not padding.
    start: usize,
}

/// How codes lie.
#[derive(Clone, Copy, PartialEq)]
enum Lie {
    /// Along the rows.
    Rows,
    /// Items of so many bytes along the columns.
    Columns(usize),
    /// Nibbles along the columns.
    Nibbles,
    /// As nibbles, in AWQ's order.
    Awq,
    /// Bytes of two nibbles of a row, row beside row.
    Pairs,
    /// Words of eight nibbles of a row, row beside row.
    GptqNibbles,
    /// Words of four bytes of a row, row beside row.
    GptqBytes,
}

impl<'a> Fast<'a> {
    /// `None` where codes must be read one by one.
    pub(super) fn of(view: &'a View, plan: &Plan) -> Option<Fast<'a>> {
        let cols = view.stored_cols();
        let first = view.stored_row(0);
        let lead = match plan.columns.order {
            Order::Straight { lead, .. } => lead,
            Order::Permuted(_) => 1,
        };
        let (bytes, lie, stride) = match view.stored() {
            Stored::Floats(floats) => {
                let size = floats.float().size();
                match floats.is_transposed() {
                    true => (floats.bytes(), Lie::Columns(size), floats.rows() * size),
                    false => (floats.bytes(), Lie::Rows, floats.cols() * size),
                }
            }
            Stored::Codes(_) if plan.recode == Recode::NanToScale => return None,
            Stored::Codes(codes) => {
                let lie = match (codes.packing(), codes.element().bits()) {
                    (Packing::Rows, 8) => Lie::Rows,
                    (Packing::Rows, 4) if cols.start.is_multiple_of(2) => Lie::Rows,
                    (Packing::Transposed, 8) => Lie::Columns(1),
                    (Packing::Transposed, 4) => Lie::Nibbles,
                    (Packing::Awq, _) => Lie::Awq,
                    (Packing::TransposedPairs, _) => Lie::Pairs,
                    (Packing::Gptq, 8) => Lie::GptqBytes,
                    (Packing::Gptq, 4) => Lie::GptqNibbles,
                    _ => return None,
                };
                (codes.bytes(), lie, codes.stride())
            }
            Stored::Blocks(_) => return None,
        };
        let whole = match lie {
            Lie::Rows => lead == 0,
            Lie::Nibbles | Lie::Awq => view.step() == 1 && first.is_multiple_of(8),
            _ => true,
        };
        let (step, start) = (view.step(), cols.start);
        whole.then_some(Fast { bytes, lie, stride, first, step, start })
    }

    /// Whether it can write a unit of `rows` rows.
    pub(super) fn writes(&self, rows: usize) -> bool {
        match self.lie {
            Lie::Rows => rows.is_multiple_of(PANEL),
            _ => rows == UNIT,
        }
    }

    /// The stored column at `place`.
    #[inline(always)]
    fn column(&self, plan: &Plan, place: usize) -> Option<usize> {
        plan.columns.order.column(place).map(|column| self.start + column)
    }
}

for_each_isa! {
    /// Writes the codes of a step of a unit; `row` is the view's row that is the unit's first, and
    /// `place` the step's first. Whether the step is whole is for [`Fast::writes`] and, for rows, the
    /// caller to know.
    pub(super) fn write(
        cpu: Cpu,
        fast: &Fast<'_>,
        plan: &Plan,
        row: usize,
        place: usize,
        panels: usize,
        to: &mut [u8],
    ) {
        match fast.lie {
            Lie::Rows => along_rows(fast, plan, row, place, panels, to),
            Lie::GptqNibbles if straight_words(fast, plan, place) => {
                // not the place: padding may come before the first column
                let line = fast.column(plan, place).unwrap_or_default() / 8 * fast.stride;
                for (octet, to) in to.as_chunks_mut::<{ 4 * UNIT }>().0.iter_mut().enumerate() {
                    let line = &fast.bytes[line + octet * fast.stride..][..fast.stride];
                    let words = &line.as_chunks::<4>().0[fast.first + row * fast.step..];
                    let to = to.as_chunks_mut::<4>().0.iter_mut();
                    let put = |(to, word): (&mut [u8; 4], &[u8; 4])| {
                        *to = lines::in_position(u32::from_le_bytes(*word)).to_le_bytes();
                    };
                    // apart, so that the common case is a loop over neighbours
                    match fast.step {
                        1 => to.zip(words).for_each(put),
                        step => to.zip(words.iter().step_by(step)).for_each(put),
                    }
                }
            }
            Lie::Nibbles | Lie::Awq | Lie::Pairs | Lie::GptqNibbles => {
                let mut columns = [[0; UNIT]; 8];
                for (octet, to) in to.as_chunks_mut::<{ 4 * UNIT }>().0.iter_mut().enumerate() {
                    for (j, column) in columns.iter_mut().enumerate() {
                        match fast.column(plan, place + octet * 8 + j) {
                            Some(k) => nibbles(fast, row, k, column),
                            None => column.fill(0),
                        }
                    }
                    lines::nibbles(&columns, to);
                }
            }
            Lie::Columns(4) => along_columns::<4>(fast, plan, row, place, to),
            Lie::Columns(2) if plan.layout.codes == Codes::Bf16 => {
                words_of_columns::<2>(fast, plan, row, place, to);
            }
            Lie::Columns(2) => along_columns::<2>(fast, plan, row, place, to),
            Lie::Columns(_) | Lie::GptqBytes if plan.layout.quads => {
                words_of_columns::<1>(fast, plan, row, place, to);
            }
            Lie::Columns(_) | Lie::GptqBytes => along_columns::<1>(fast, plan, row, place, to),
        }
        if plan.recode == Recode::Signed {
            // Padding too, which may be anything.
            to.iter_mut().for_each(|code| *code ^= 0x80);
        }
    }
}

#[inline(always)]
fn along_rows(
    fast: &Fast<'_>,
    plan: &Plan,
    row: usize,
    place: usize,
    panels: usize,
    to: &mut [u8],
) {
    let codes = plan.layout.codes;
    let start = (fast.start + place) * codes.bits() / 8;
    for panel in 0..panels {
        let row = |r: usize| {
            let row = fast.first + (row + panel * PANEL + r) * fast.step;
            &fast.bytes[row * fast.stride + start..]
        };
        let items = &mut Items { step: &mut *to, panel, panels, quads: plan.layout.quads };
        match codes.bits() {
            32 => lines::from_words::<32>(codes, row, items),
            16 => lines::from_words::<16>(codes, row, items),
            8 => lines::from_words::<8>(codes, row, items),
            _ => lines::from_words::<4>(codes, row, items),
        }
    }
}

/// Whether the words of GPTQ from `place` on are words of the step.
#[inline(always)]
fn straight_words(fast: &Fast<'_>, plan: &Plan, place: usize) -> bool {
    let first = fast.column(plan, place);
    let last = fast.column(plan, place + STEP - 1);
    matches!(plan.columns.order, Order::Straight { .. })
        && first.is_some_and(|k| k.is_multiple_of(8))
        && last.is_some()
}

/// Column `k` of a unit's rows, one code to a byte.
#[inline(always)]
fn nibbles(fast: &Fast<'_>, row: usize, k: usize, column: &mut [u8; UNIT]) {
    let row = fast.first + row * fast.step;
    match fast.lie {
        Lie::Pairs => {
            let line = &fast.bytes[k / 2 * fast.stride..][..fast.stride];
            for (r, code) in column.iter_mut().enumerate() {
                *code = line[row + r * fast.step] >> (k % 2 * 4) & 15;
            }
        }
        Lie::GptqNibbles => {
            let line = &fast.bytes[k / 8 * fast.stride..][..fast.stride];
            for (r, code) in column.iter_mut().enumerate() {
                *code = line[4 * (row + r * fast.step) + k % 8 / 2] >> (k % 2 * 4) & 15;
            }
        }
        _ => {
            let line = &fast.bytes[k * fast.stride + row / 2..][..UNIT / 2];
            for (word, codes) in line.as_chunks::<4>().0.iter().zip(column.as_chunks_mut::<8>().0) {
                let word = u64::from(u32::from_le_bytes(*word));
                let codes_of_word = match fast.lie {
                    Lie::Awq => spread(word & 0xFFFF) | spread(word >> 16) << 8,
                    _ => natural(word),
                };
                *codes = codes_of_word.to_le_bytes();
            }
        }
    }
}

/// Four nibbles, sixteen bits apart.
#[inline(always)]
fn spread(nibbles: u64) -> u64 {
    let pairs = (nibbles | nibbles << 24) & 0x0000_00FF_0000_00FF;
    (pairs | pairs << 12) & 0x000F_000F_000F_000F
}

/// Eight nibbles, a byte each.
#[inline(always)]
fn natural(word: u64) -> u64 {
    let halves = (word | word << 16) & 0x0000_FFFF_0000_FFFF;
    let bytes = (halves | halves << 8) & 0x00FF_00FF_00FF_00FF;
    (bytes | bytes << 4) & 0x0F0F_0F0F_0F0F_0F0F
}

/// Items of `SIZE` bytes for each row and k.
#[inline(always)]
fn along_columns<const SIZE: usize>(
    fast: &Fast<'_>,
    plan: &Plan,
    row: usize,
    place: usize,
    to: &mut [u8],
) {
    for (i, items) in to.chunks_exact_mut(UNIT * SIZE).enumerate() {
        match fast.column(plan, place + i) {
            Some(k) => column::<SIZE>(fast, row, k, items.as_chunks_mut().0),
            None => items.fill(0),
        }
    }
}

/// Words of codes of `SIZE` bytes: of two columns of bf16, of four of bytes.
#[inline(always)]
fn words_of_columns<const SIZE: usize>(
    fast: &Fast<'_>,
    plan: &Plan,
    row: usize,
    place: usize,
    to: &mut [u8],
) {
    let mut columns = [[[0; SIZE]; UNIT]; 4];
    let columns = &mut columns[..4 / SIZE];
    for (i, items) in to.chunks_exact_mut(UNIT * 4).enumerate() {
        for (j, values) in columns.iter_mut().enumerate() {
            match fast.column(plan, place + i * 4 / SIZE + j) {
                Some(k) => column::<SIZE>(fast, row, k, values),
                None => values.fill([0; SIZE]),
            }
        }
        for (r, word) in items.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let codes = word.as_chunks_mut::<SIZE>().0.iter_mut();
            codes.zip(&*columns).for_each(|(code, column)| *code = column[r]);
        }
    }
}

/// Column `k` of a unit's rows, codes of `SIZE` bytes.
#[inline(always)]
fn column<const SIZE: usize>(fast: &Fast<'_>, row: usize, k: usize, to: &mut [[u8; SIZE]]) {
    let row = fast.first + row * fast.step;
    if fast.lie == Lie::GptqBytes {
        let line = &fast.bytes[k / 4 * fast.stride..][..fast.stride];
        for (r, to) in to.iter_mut().enumerate() {
            to[0] = line[4 * (row + r * fast.step) + k % 4];
        }
        return;
    }
    let line = fast.bytes[k * fast.stride..][..fast.stride].as_chunks::<SIZE>().0;
    match fast.step {
        1 => to.copy_from_slice(&line[row..row + UNIT]),
        step => to.iter_mut().zip(line[row..].iter().step_by(step)).for_each(|(to, v)| *to = *v),
    }
}
