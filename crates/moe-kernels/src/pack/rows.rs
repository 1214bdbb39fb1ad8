//! Any format, row by row: the codes of a unit's rows, one to a byte, then lines of them; the
//! numbers of each row, then headers of them.

use std::ops::Range;

use half::{bf16, f16};

use super::blocks::{self, Parts};
use super::layout::{Codes, Number, Offset, PANEL, STEP};
use super::lines::{self, Items};
use super::order::PADDING;
use super::plan::{Plan, Recode, is_nan, zero};
use crate::stored::{self, Floats, Stored, View};

/// Bytes of a code before it lies in a line.
pub(super) fn code_size(codes: Codes) -> usize {
    codes.bits().div_ceil(8)
}

/// Packs `rows` as one unit: as many panels as they fill.
pub(super) fn unit(view: &View, plan: &Plan, rows: Range<usize>, unit: &mut [u8]) {
    let panels = rows.len().div_ceil(PANEL);
    let stride = plan.columns.order.padded() * code_size(plan.layout.codes);
    let mut codes = vec![0; panels * PANEL * stride];
    let mut numbers = vec![0; panels * PANEL * row_numbers(plan)];
    for (i, row) in rows.enumerate() {
        let codes = &mut codes[i * stride..(i + 1) * stride];
        let len = row_numbers(plan);
        write_row(view, plan, row, codes, &mut numbers[i * len..(i + 1) * len]);
    }
    write_unit(plan, panels, &codes, stride, &numbers, unit);
}

/// Bytes of a row in all headers.
pub(super) fn row_numbers(plan: &Plan) -> usize {
    plan.columns.blocks.iter().map(|steps| plan.layout.header_bytes(usize::from(*steps))).sum()
}

/// Interleaves the codes and numbers of rows.
fn write_unit(
    plan: &Plan,
    panels: usize,
    codes: &[u8],
    stride: usize,
    numbers: &[u8],
    unit: &mut [u8],
) {
    let layout = &plan.layout;
    let size = code_size(layout.codes);
    let row_numbers = row_numbers(plan);
    let (mut at, mut k, mut from) = (0, 0, 0);
    for steps in &plan.columns.blocks {
        let steps = usize::from(*steps);
        // A row's numbers are in the order of the header: one after the other, each of all rows.
        let mut sizes = vec![2; layout.outer_bytes() / 2];
        for _ in 0..layout.groups(steps) {
            let scale = layout.scale_bytes();
            sizes.extend([scale, layout.group_bytes() - scale]);
        }
        for size in sizes {
            for row in 0..panels * PANEL {
                let number = &numbers[row * row_numbers + from..][..size];
                unit[at..at + size].copy_from_slice(number);
                at += size;
            }
            from += size;
        }
        for _ in 0..steps {
            let step = &mut unit[at..at + panels * layout.codes.panel_bytes()];
            at += step.len();
            for panel in 0..panels {
                let codes = &codes[panel * PANEL * stride + k * size..];
                let mut items = Items { step: &mut *step, panel, panels };
                lines::write(layout.codes, codes, stride, &mut items);
            }
            k += STEP;
        }
    }
}

/// Writes the packed codes of a row at their places, and its numbers in the order of the headers.
pub(super) fn write_row(
    view: &View,
    plan: &Plan,
    row: usize,
    codes: &mut [u8],
    numbers: &mut [u8],
) {
    let row = view.stored_row(row);
    match view.stored() {
        Stored::Floats(floats) => float_row(floats, row, view.stored_cols(), codes),
        Stored::Codes(stored) => code_row(stored, plan, row, view.stored_cols(), codes, numbers),
        Stored::Blocks(stored) => block_row(stored, plan, row, view.stored_cols(), codes, numbers),
    }
}

fn float_row(floats: &Floats, row: usize, cols: Range<usize>, codes: &mut [u8]) {
    let size = floats.float().size();
    let bytes = floats.bytes();
    if !floats.is_transposed() {
        let start = (row * floats.cols() + cols.start) * size;
        codes[..cols.len() * size].copy_from_slice(&bytes[start..start + cols.len() * size]);
        return;
    }
    for (col, code) in cols.zip(codes.chunks_exact_mut(size)) {
        code.copy_from_slice(&bytes[(col * floats.rows() + row) * size..][..size]);
    }
}

fn code_row(
    stored: &stored::Codes,
    plan: &Plan,
    row: usize,
    cols: Range<usize>,
    codes: &mut [u8],
    numbers: &mut [u8],
) {
    let mut straight = vec![0; cols.len()];
    stored.codes(row, cols, &mut straight);
    if plan.recode == Recode::Signed {
        straight.iter_mut().for_each(|code| *code ^= 0x80);
    }
    plan.columns.order.apply(&straight, codes);
    let mut numbers = Writer(numbers);
    let mut groups = plan.columns.groups.iter();
    let mut at = 0;
    for steps in &plan.columns.blocks {
        let steps = usize::from(*steps);
        let len = steps * STEP / plan.layout.groups(steps);
        for group in groups.by_ref().take(plan.layout.groups(steps)) {
            let codes = &mut codes[at..at + len];
            at += len;
            if *group == PADDING {
                numbers.skip(plan.layout.group_bytes());
                continue;
            }
            let mut nan = false;
            if plan.recode == Recode::NanToScale {
                for code in codes.iter_mut().filter(|code| is_nan(**code)) {
                    (*code, nan) = (0, true);
                }
            }
            let group = *group as usize;
            if let Some(number) = plan.layout.scale {
                match nan {
                    true => numbers.put(number, f32::NAN),
                    false => numbers.put_stored(number, stored.scales(), row, group),
                }
            }
            if let Offset::Zero(number) = plan.layout.offset {
                numbers.put(number, zero(stored, row, group));
            }
        }
    }
}

fn block_row(
    stored: &stored::Blocks,
    plan: &Plan,
    row: usize,
    cols: Range<usize>,
    codes: &mut [u8],
    numbers: &mut [u8],
) {
    let (len, bytes) = (stored.block().block_len(), stored.block().block_bytes());
    let layout = &plan.layout;
    let mut parts = Parts::new();
    let mut numbers = Writer(numbers);
    // The column at the first place.
    let origin = cols.start - cols.start % STEP;
    let mut at = origin;
    for steps in &plan.columns.blocks {
        let steps = usize::from(*steps);
        let block = at / len;
        let bytes = &stored.row(row)[block * bytes..(block + 1) * bytes];
        blocks::take_apart(stored.block(), bytes, &mut parts);
        let inside = at.max(cols.start)..(at + steps * STEP).min(cols.end);
        codes[inside.start - origin..inside.end - origin]
            .copy_from_slice(&parts.codes[inside.start - block * len..inside.end - block * len]);
        if layout.outer_scale {
            numbers.bytes(&parts.scale);
        }
        if layout.outer_minimum {
            numbers.bytes(&parts.minimum);
        }
        let first = (at - block * len) / layout.group_len();
        for group in first..first + layout.groups(steps) {
            match layout.scale {
                Some(Number::Bf16) => {
                    numbers.put(Number::Bf16, crate::numerics::e8m0::decode(parts.scale[0]));
                }
                Some(number) if !layout.outer_scale => {
                    numbers.bytes(&parts.scale[..number.size()]);
                }
                _ => numbers.bytes(&parts.scales[group..group + 1]),
            }
            match layout.offset {
                Offset::Minimum(Number::High4) | Offset::None | Offset::Zero(_) => {}
                Offset::Minimum(_) if !layout.outer_minimum => numbers.bytes(&parts.minimum),
                Offset::Minimum(_) => numbers.bytes(&parts.minima[group..group + 1]),
            }
        }
        at += steps * STEP;
    }
}

/// Numbers, one after the other.
struct Writer<'a>(&'a mut [u8]);

impl Writer<'_> {
    fn bytes(&mut self, bytes: &[u8]) {
        let (head, rest) = std::mem::take(&mut self.0).split_at_mut(bytes.len());
        head.copy_from_slice(bytes);
        self.0 = rest;
    }

    fn skip(&mut self, len: usize) {
        self.0 = &mut std::mem::take(&mut self.0)[len..];
    }

    /// `value`, which the type holds exactly.
    fn put(&mut self, number: Number, value: f32) {
        match number {
            Number::F32 => self.bytes(&value.to_le_bytes()),
            Number::F16 => self.bytes(&f16::from_f32_const(value).to_le_bytes()),
            Number::Bf16 => self.bytes(&bf16::from_f32_const(value).to_le_bytes()),
            Number::Int8 => self.bytes(&(value as i8).to_le_bytes()),
            Number::E8m0 | Number::E4m3 | Number::Low4 | Number::High4 => {
                unreachable!("such numbers are copied as they are stored")
            }
        }
    }

    /// A scale as it is stored, or in the type that replaces it.
    fn put_stored(&mut self, number: Number, scales: &stored::Scales, row: usize, group: usize) {
        let bytes = scales.get_bytes(row, group);
        match bytes.len() == number.size() {
            true => self.bytes(bytes),
            false => self.put(number, scales.get(row, group)),
        }
    }
}
