//! A unit: headers and codes, block after block.

use std::ops::Range;

use half::{bf16, f16};

use super::fast::{self, Fast};
use super::layout::{BLOCK, Codes, Group, Layout, Number, Offset, PANEL, STEP};
use super::lines::{self, Items};
use super::order::{Order, PADDING};
use super::plan::{Plan, Recode, is_nan, minimum, zero};
use crate::isa::Cpu;
use crate::numerics::e8m0;
use crate::numerics::ggml::{Parts, unsigned_e4m3};
use crate::stored::{self, Stored, View};

/// What is to be packed, and how.
pub(super) struct Packing<'a> {
    view: &'a View,
    plan: &'a Plan,
    cpu: Cpu,
    fast: Option<Fast<'a>>,
    /// Codes of a block's rows, one to a byte or as they are.
    codes: Vec<u8>,
    parts: Parts,
}

impl<'a> Packing<'a> {
    pub(super) fn new(view: &'a View, plan: &'a Plan, cpu: Cpu) -> Packing<'a> {
        let fast = (view.rows() > 0).then(|| Fast::of(view, plan)).flatten();
        Packing { view, plan, cpu, fast, codes: Vec::new(), parts: Parts::new() }
    }

    /// Packs `rows` as one unit: as many panels as they fill.
    pub(super) fn unit(&mut self, rows: Range<usize>, unit: &mut [u8]) {
        let layout = &self.plan.layout;
        let panels = rows.len().div_ceil(PANEL);
        let fast = self.fast.filter(|fast| fast.writes(rows.len()));
        let mut rest = unit;
        let (mut place, mut groups) = (0, &self.plan.columns.groups[..]);
        for steps in &self.plan.columns.blocks {
            let steps = usize::from(*steps);
            let header = panels * PANEL * layout.header_bytes(steps);
            let (header, after) = std::mem::take(&mut rest).split_at_mut(header);
            let codes = panels * steps * layout.codes.panel_bytes();
            let (codes, after) = after.split_at_mut(codes);
            rest = after;
            let (here, later) = groups.split_at(layout.groups(steps));
            groups = later;
            match self.view.stored() {
                Stored::Floats(_) => {}
                Stored::Codes(stored) => {
                    self.code_header(stored, &rows, here, place, steps, header)
                }
                Stored::Blocks(stored) => self.take_apart(stored, &rows, place, steps, header),
            }
            let step_bytes = panels * layout.codes.panel_bytes();
            let mut read = matches!(self.view.stored(), Stored::Blocks(_));
            for (i, to) in codes.chunks_exact_mut(step_bytes).enumerate() {
                let at = place + i * STEP;
                match &fast {
                    Some(fast) if self.whole(at) => {
                        fast::write(self.cpu, fast, self.plan, rows.start, at, panels, to);
                    }
                    _ => {
                        if !read {
                            self.read(&rows, place, steps);
                            read = true;
                        }
                        self.lines(i, panels, to);
                    }
                }
            }
            place += steps * STEP;
        }
    }

    /// Whether the step at `place` has no padding, or padding does not matter.
    fn whole(&self, place: usize) -> bool {
        match &self.plan.columns.order {
            Order::Straight { lead: 0, cols, .. } => place + STEP <= *cols,
            // Only columns are read so.
            _ => true,
        }
    }

    /// Bytes of a code in `codes`.
    fn code_bytes(&self) -> usize {
        code_bytes(self.plan.layout.codes)
    }

    /// Writes the step `i` of the block whose codes were read.
    fn lines(&self, i: usize, panels: usize, to: &mut [u8]) {
        let size = self.code_bytes();
        let stride = BLOCK * size;
        for panel in 0..panels {
            let codes = &self.codes[panel * PANEL * stride + i * STEP * size..];
            let quads = self.plan.layout.quads;
            let items = &mut Items { step: &mut *to, panel, panels, quads };
            lines::from_codes(self.plan.layout.codes, codes, stride, items);
        }
    }

    /// Makes room for the codes of a block of `rows` rows: zeros.
    fn clear(&mut self, rows: usize) {
        self.codes.clear();
        self.codes.resize(rows.next_multiple_of(PANEL) * BLOCK * self.code_bytes(), 0);
    }

    /// Reads the codes of a block one by one.
    fn read(&mut self, rows: &Range<usize>, place: usize, steps: usize) {
        self.clear(rows.len());
        let size = self.code_bytes();
        let places = place..place + steps * STEP;
        for (i, row) in rows.clone().enumerate() {
            let to = &mut self.codes[i * BLOCK * size..][..places.len() * size];
            row_codes(self.view, self.plan, row, places.clone(), to);
        }
    }

    /// Writes the header of a block whose first place is `place`.
    fn code_header(
        &self,
        stored: &stored::Codes,
        rows: &Range<usize>,
        groups: &[u32],
        place: usize,
        steps: usize,
        mut header: &mut [u8],
    ) {
        let layout = &self.plan.layout;
        let all = rows.len().next_multiple_of(PANEL);
        let mut next = |size: usize| {
            let (field, rest) = std::mem::take(&mut header).split_at_mut(all * size);
            header = rest;
            field
        };
        let scale = layout.scale.expect("codes have scales");
        for (i, group) in groups.iter().enumerate() {
            let scales = next(scale.size());
            let offsets = match layout.offset {
                Offset::Zero(number) => {
                    Some((number, zero as fn(&_, _, _) -> _, next(number.size())))
                }
                Offset::Minimum(number) => Some((number, minimum as _, next(number.size()))),
                Offset::None => None,
            };
            if *group == PADDING {
                continue;
            }
            let group = *group as usize;
            for (row, to) in rows.clone().zip(scales.chunks_exact_mut(scale.size())) {
                let nan = self.plan.recode == Recode::NanToScale && {
                    let len = steps * STEP / groups.len();
                    self.has_nan(row, place + i * len..place + (i + 1) * len)
                };
                let row = self.view.stored_row(row);
                let bytes = stored.scales().get_bytes(row, group);
                match bytes.len() == scale.size() && !nan {
                    true => to.copy_from_slice(bytes),
                    false if nan => put(scale, f32::NAN, to),
                    false => put(scale, stored.scales().get(row, group), to),
                }
            }
            if let Some((number, of, offsets)) = offsets {
                for (row, to) in rows.clone().zip(offsets.chunks_exact_mut(number.size())) {
                    put(number, of(stored, self.view.stored_row(row), group), to);
                }
            }
        }
    }

    /// Whether a code at `places` is NaN.
    fn has_nan(&self, row: usize, places: Range<usize>) -> bool {
        let Stored::Codes(stored) = self.view.stored() else { return false };
        let order = &self.plan.columns.order;
        let start = self.view.stored_cols().start;
        let mut columns = places.filter_map(|place| order.column(place));
        columns.any(|k| {
            let mut code = [0];
            let k = start + k;
            stored.codes(self.view.stored_row(row), k..k + 1, &mut code);
            is_nan(code[0])
        })
    }

    /// Reads the codes of a block of GGUF and writes its header.
    fn take_apart(
        &mut self,
        stored: &stored::Blocks,
        rows: &Range<usize>,
        place: usize,
        steps: usize,
        header: &mut [u8],
    ) {
        self.clear(rows.len());
        let layout = &self.plan.layout;
        let all = rows.len().next_multiple_of(PANEL);
        let (len, bytes) = (stored.block().block_len(), stored.block().block_bytes());
        let cols = self.view.stored_cols();
        // The column at the first place of all, and of the block.
        let at = cols.start - cols.start % STEP + place;
        let (block, first) = (at / len, at % len);
        let inside = at.max(cols.start)..(at + steps * STEP).min(cols.end);
        for (i, row) in rows.clone().enumerate() {
            let row = stored.row(self.view.stored_row(row));
            let parts = &mut self.parts;
            stored.block().take_apart(&row[block * bytes..(block + 1) * bytes], parts);
            self.codes[i * BLOCK + inside.start - at..i * BLOCK + inside.end - at].copy_from_slice(
                &parts.codes[inside.start - block * len..inside.end - block * len],
            );
            let mut field = 0;
            let mut field = |number: &[u8]| {
                header[field + i * number.len()..][..number.len()].copy_from_slice(number);
                field += all * number.len();
            };
            if layout.outer_scale {
                field(&parts.scale);
            }
            if layout.outer_minimum {
                field(&parts.minimum);
            }
            let first = if layout.group == Group::Block { 0 } else { first / layout.group_len() };
            for group in first..first + layout.groups(steps) {
                block_scale(layout, parts, group, &mut field);
            }
        }
    }
}

/// The scale and the minimum of a group of a GGUF block.
fn block_scale(layout: &Layout, parts: &Parts, group: usize, field: &mut impl FnMut(&[u8])) {
    match layout.scale {
        Some(Number::Low4) => field(&[parts.scales[group] | parts.minima[group] << 4]),
        _ if layout.outer_scale => field(&parts.scales[group..group + 1]),
        // MXFP4's, where a code is not among those that kernels read.
        Some(Number::Bf16) => {
            field(&bf16::from_f32_const(e8m0::decode(parts.scale[0])).to_le_bytes());
        }
        // NVFP4 has one for each group, and none for the block.
        Some(Number::E4m3) => field(&parts.scales[group..group + 1]),
        Some(Number::F16) if layout.group == Group::Sixteen => {
            let scale = unsigned_e4m3(parts.scales[group]);
            field(&f16::from_f32_const(scale).to_le_bytes());
        }
        Some(number) => field(&parts.scale[..number.size()]),
        None => {}
    }
    match layout.offset {
        Offset::Minimum(Number::High4) | Offset::None | Offset::Zero(_) => {}
        Offset::Minimum(_) if layout.outer_minimum => field(&parts.minima[group..group + 1]),
        Offset::Minimum(_) => field(&parts.minimum),
    }
}

/// Bytes of a code before it lies in a line.
pub(super) fn code_bytes(codes: Codes) -> usize {
    codes.bits().div_ceil(8)
}

/// Writes the packed codes of `row` at `places`, for floats and codes: those of padding stay.
pub(super) fn row_codes(view: &View, plan: &Plan, row: usize, places: Range<usize>, to: &mut [u8]) {
    let (size, row) = (code_bytes(plan.layout.codes), view.stored_row(row));
    let start = view.stored_cols().start;
    let order = &plan.columns.order;
    let mut at = places.start;
    while at < places.end {
        let Some(first) = order.column(at) else {
            at += 1;
            continue;
        };
        // A run of columns that follow one another.
        let run = (at..places.end).zip(first..);
        let len = run.take_while(|(place, k)| order.column(*place) == Some(*k)).count();
        let columns = start + first..start + first + len;
        let to = &mut to[(at - places.start) * size..][..len * size];
        match view.stored() {
            Stored::Codes(stored) => stored.codes(row, columns, to),
            Stored::Floats(floats) if floats.is_transposed() => {
                for (k, to) in columns.zip(to.chunks_exact_mut(size)) {
                    to.copy_from_slice(&floats.bytes()[(k * floats.rows() + row) * size..][..size]);
                }
            }
            Stored::Floats(floats) => {
                let at = (row * floats.cols() + columns.start) * size;
                to.copy_from_slice(&floats.bytes()[at..at + len * size]);
            }
            Stored::Blocks(_) => unreachable!("blocks are taken apart"),
        }
        match plan.recode {
            Recode::Same => {}
            Recode::Signed => to.iter_mut().for_each(|code| *code ^= 0x80),
            Recode::NanToScale => {
                to.iter_mut().filter(|code| is_nan(**code)).for_each(|code| *code = 0);
            }
        }
        at += len;
    }
}

/// Writes `value`, which the type holds exactly.
fn put(number: Number, value: f32, to: &mut [u8]) {
    match number {
        Number::F32 => to.copy_from_slice(&value.to_le_bytes()),
        Number::F16 => to.copy_from_slice(&f16::from_f32_const(value).to_le_bytes()),
        Number::Bf16 => to.copy_from_slice(&bf16::from_f32_const(value).to_le_bytes()),
        Number::Int8 => to.copy_from_slice(&(value as i8).to_le_bytes()),
        Number::E8m0 | Number::E4m3 | Number::Low4 | Number::High4 => {
            unreachable!("such numbers are copied as they are stored")
        }
    }
}
