//! Token rows as a kernel reads them.
//!
//! A kernel's rows have the columns in the order of its packed weights: padded to whole steps, and
//! permuted where the weights' groups are not runs of columns (act-order). Weights with minima also
//! need the sum of a row over each of their groups. All of that is done once for all products of the
//! rows, by [`Gemm::operand`](crate::gemm::Gemm::operand), in memory of the caller.
//!
//! Rows that were quantised to codes of a byte can be multiplied as these codes
//! ([`Packed::coded`]): then they have a scale for each group of the weights.

mod integers;

use std::ops::Range;

use half::bf16;

use crate::isa::Cpu;
use crate::numerics::float16::{bf16_to_f32, f32_to_bf16};
use crate::numerics::quantise::{coded_bf16, coded_int8};
use crate::pack::{BLOCK, LINE, Packed};
use crate::rows::Rows;

/// What the elements of a kernel's rows are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OperandKind {
    /// f32, as they come.
    F32,
    /// Rounded to bf16, to nearest, ties to even.
    Bf16,
    /// The same, for products on tile registers, whose sums have an order of their own.
    TileBf16,
    /// Signed bytes: the codes of rows that were quantised to integers.
    Int8,
}

impl OperandKind {
    /// Elements of a word of 32 bits.
    const fn per_word(self) -> usize {
        match self {
            OperandKind::F32 => 1,
            OperandKind::Bf16 | OperandKind::TileBf16 => 2,
            OperandKind::Int8 => 4,
        }
    }
}

/// Rows that a kernel reads, made for packed weights or for others with the same
/// [order of columns](Packed::takes).
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    /// `rows` rows, `stride` apart: words of elements, then sums of groups, then scales of groups, then
    /// sums times scales.
    data: &'a [f32],
    rows: usize,
    shape: RowShape,
    stride: usize,
}

/// What a row consists of, in words of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RowShape {
    kind: OperandKind,
    elements: usize,
    sums: usize,
    scales: usize,
    scaled_sums: usize,
}

/// The parts of a row.
struct RowParts<'a> {
    elements: &'a mut [f32],
    sums: &'a mut [f32],
    scales: &'a mut [f32],
    scaled_sums: &'a mut [f32],
}

impl RowShape {
    fn of(w: &Packed) -> RowShape {
        let kind = w.gemm().rows();
        let elements = w.order().padded() / kind.per_word();
        let (sums, scales, scaled_sums) = (w.sums(), w.row_scales(), w.scaled_sums());
        RowShape { kind, elements, sums, scales, scaled_sums }
    }

    fn split(self, row: &mut [f32]) -> RowParts<'_> {
        let (elements, rest) = row.split_at_mut(self.elements);
        let (sums, rest) = rest.split_at_mut(self.sums);
        let (scales, rest) = rest.split_at_mut(self.scales);
        // what follows them is padding
        RowParts { elements, sums, scales, scaled_sums: &mut rest[..self.scaled_sums] }
    }

    /// Words from one row to the next: an odd number of cache lines, so that the same columns of
    /// the rows of a tile do not meet in one set of a cache.
    fn stride(self) -> usize {
        let numbers = self.sums + self.scales + self.scaled_sums;
        let lines = (self.elements + numbers).div_ceil(LINE / 4);
        (lines | 1) * (LINE / 4)
    }
}

/// Bytes of `rows` rows for `w`.
pub(crate) fn bytes(w: &Packed, rows: usize) -> usize {
    RowShape::of(w).stride().saturating_mul(rows).saturating_mul(4)
}

/// Writes `rows` for `w`. `max` is the largest magnitude, before they were quantised, of the row that
/// they are a slice of, where they are one.
pub(crate) fn write<'a>(
    w: &Packed,
    rows: Rows<'_>,
    max: Option<f32>,
    into: &'a mut [u8],
) -> Operand<'a> {
    let shape = RowShape::of(w);
    let len = shape.stride() * rows.rows();
    let data = floats(into);
    assert!(data.len() >= len, "{} bytes for {} rows", data.len() * 4, rows.rows());
    let data = &mut data[..len];
    for (i, to) in data.chunks_exact_mut(shape.stride()).enumerate() {
        let RowParts { elements, sums, scales, scaled_sums } = shape.split(to);
        let (row, order) = (rows.row(i), w.order());
        let groups = || w.group_ranges();
        match shape.kind {
            OperandKind::F32 => {
                order.apply(row, elements);
                groups().zip(sums).for_each(|(group, to)| *to = sum(&elements[group]));
            }
            OperandKind::Bf16 | OperandKind::TileBf16 if shape.scales > 0 => {
                write_codes(w, row, max, coded_bf16, parts(elements), scales);
            }
            OperandKind::Bf16 | OperandKind::TileBf16 => {
                let elements = parts(elements);
                order.place(row, elements, f32_to_bf16, bf16::from_f32);
                groups().zip(sums).for_each(|(group, to)| *to = sum_of_halves(&elements[group]));
            }
            OperandKind::Int8 => {
                integers::write(w, row, max, parts(elements), [sums, scales, scaled_sums]);
            }
        }
    }
    Operand { data, rows: rows.rows(), shape, stride: shape.stride() }
}

/// Makes codes of values, of which so many each have a scale.
type CodesOf<T> = fn(Cpu, &[f32], usize, &[f32], &mut [T]);

/// Writes the codes of a quantised row to their places, and the scale of each group of `w`.
fn write_codes<T: Part>(
    w: &Packed,
    row: &[f32],
    max: Option<f32>,
    codes_of: CodesOf<T>,
    codes: &mut [T],
    scales: &mut [f32],
) {
    let cpu = Cpu::detect();
    let rows = w.row_codes().expect("rows that are multiplied as codes were quantised");
    let size = rows.coded_group(row.len()).expect("codes of a byte");
    // Columns of a group of weights share a scale: there are no more scales than groups. They lie at the end
    // until each comes to its groups, which takes none before it was read.
    let first = scales.len() - row.len().div_ceil(size);
    let runs = &mut scales[first..];
    rows.coded_scales(cpu, row, size, max, runs);
    let all = |row: &[f32], codes: &mut [T]| codes_of(cpu, row, size, runs, codes);
    let one = |value: f32| {
        let mut code = [T::default()];
        // columns in another order share one scale, all of them
        codes_of(cpu, &[value], 1, runs, &mut code);
        code[0]
    };
    w.order().place(row, codes, all, one);
    let mut run = 0;
    for (group, mut places) in w.group_ranges().enumerate() {
        // padding may have any
        if let Some(column) = places.find_map(|place| w.order().column(place)) {
            run = column / size;
        }
        scales[group] = scales[first + run];
    }
}

/// Rows that [`write`] made for `w`, one at a time, `stride` bytes apart.
pub(crate) fn written<'a>(w: &Packed, bytes: &'a [u8], rows: usize, stride: usize) -> Operand<'a> {
    let shape = RowShape::of(w);
    // SAFETY: any four bytes are an f32.
    let (head, data, _) = unsafe { bytes.align_to::<f32>() };
    assert!(head.is_empty() && stride.is_multiple_of(4), "floats of an operand are aligned");
    let stride = stride / 4;
    assert!(stride >= shape.stride() || rows <= 1, "rows of an operand overlap");
    let end = rows
        .checked_sub(1)
        .map_or(Some(0), |last| last.checked_mul(stride)?.checked_add(shape.stride()));
    assert!(end.is_some_and(|end| end <= data.len()), "{} bytes for {rows} rows", bytes.len());
    Operand { data, rows, shape, stride }
}

/// The aligned f32 of `bytes`.
fn floats(bytes: &mut [u8]) -> &mut [f32] {
    // SAFETY: any four bytes are an f32.
    let (head, floats, _) = unsafe { bytes.align_to_mut::<f32>() };
    assert!(head.is_empty(), "memory for an operand begins at a multiple of four bytes");
    floats
}

/// A number that a word of 32 bits holds several of.
///
/// # Safety
/// Any bits are one, and it needs no stricter alignment than a word.
unsafe trait Part: Copy + Default {}
// SAFETY: two bytes, whatever they are.
unsafe impl Part for bf16 {}
// SAFETY: a byte, whatever it is.
unsafe impl Part for i8 {}

/// The same memory as smaller numbers.
fn parts<T: Part>(words: &mut [f32]) -> &mut [T] {
    // SAFETY: any bits are a number, by the contract of `Part`, and an f32 is aligned as one.
    let (head, parts, tail) = unsafe { words.align_to_mut::<T>() };
    assert!(head.is_empty() && tail.is_empty(), "a word is several numbers");
    parts
}

/// The sum of numbers that were rounded.
fn sum_of_halves(halves: &[bf16]) -> f32 {
    // a group has at most so many columns
    let mut values = [0.0; BLOCK];
    let values = &mut values[..halves.len()];
    bf16_to_f32(halves, values);
    sum(values)
}

/// The sum in f64 over eight lanes, rounded once: the same on every CPU.
fn sum(values: &[f32]) -> f32 {
    let mut lanes = [0.0f64; 8];
    let (chunks, rest) = values.as_chunks::<8>();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, v)| *lane += f64::from(*v));
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, v)| *lane += f64::from(*v));
    let [a, b, c, d, e, f, g, h] = lanes;
    (((a + e) + (c + g)) + ((b + f) + (d + h))) as f32
}

impl<'a> Operand<'a> {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Whether `w` reads such rows. (That they were made for the same order of columns is up to the
    /// caller: see [`Packed::takes`].)
    pub(crate) fn fits(&self, w: &Packed) -> bool {
        self.shape == RowShape::of(w)
    }

    /// The rows of `range`, which are there, and what comes after them.
    pub(crate) fn slice(&self, range: Range<usize>) -> &'a [f32] {
        &self.data[range.start * self.stride..]
    }

    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// From a row to its sums.
    pub(crate) fn sums_at(&self) -> usize {
        self.shape.elements
    }

    /// From a group's sum to its scale, where rows have scales.
    pub(crate) fn scales_at(&self) -> Option<usize> {
        (self.shape.scales > 0).then_some(self.shape.sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_rounded_once() {
        let values: Vec<f32> = (0..37).map(|i| (i as f32 - 11.3) * 1e7).collect();
        let exact: f64 = values.iter().map(|v| f64::from(*v)).sum();
        assert_eq!(sum(&values), exact as f32);
        assert_eq!(sum(&[]), 0.0);
    }
}
