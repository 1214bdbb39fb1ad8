//! Codes of sixteen rows to the items of a panel's step.

use super::layout::{Codes, PANEL, position};

/// Where the items of a panel go: among those of the other panels of its unit.
pub(super) struct Items<'a> {
    /// A step of all panels.
    pub(super) step: &'a mut [u8],
    pub(super) panel: usize,
    /// Panels of the unit.
    pub(super) panels: usize,
}

impl Items<'_> {
    /// Item `i`, of `SIZE` bytes.
    fn item<const SIZE: usize>(&mut self, i: usize) -> &mut [u8; SIZE] {
        let item = (i * self.panels + self.panel) * SIZE;
        self.step[item..].first_chunk_mut().expect("the step is whole")
    }
}

/// Writes the items of a step of 32 k. `rows` holds the codes of sixteen rows from that k on,
/// `stride` bytes apart: codes of whole bytes as they are, smaller ones one to a byte.
pub(super) fn write(codes: Codes, rows: &[u8], stride: usize, to: &mut Items<'_>) {
    match codes {
        Codes::F32 => spread::<4, 64>(rows, stride, 32, to),
        // Pairs of bf16 are words of a row.
        Codes::Bf16 => spread::<4, 64>(rows, stride, 16, to),
        Codes::F16 => spread::<2, 32>(rows, stride, 32, to),
        Codes::Int8 | Codes::E4m3 | Codes::E5m2 => spread::<1, 16>(rows, stride, 32, to),
        Codes::Table4 => plane::<4>(rows, stride, 0, 0, to),
        Codes::Table2 => plane::<2>(rows, stride, 0, 0, to),
        Codes::Table3 => {
            plane::<2>(rows, stride, 0, 0, to);
            plane::<1>(rows, stride, 2, 2, to);
        }
        Codes::Int5 => {
            plane::<4>(rows, stride, 0, 0, to);
            plane::<1>(rows, stride, 4, 4, to);
        }
        Codes::Int6 | Codes::Table6 => {
            plane::<4>(rows, stride, 0, 0, to);
            plane::<2>(rows, stride, 4, 4, to);
        }
    }
}

/// Items of `SIZE` bytes of each row.
fn spread<const SIZE: usize, const ITEM: usize>(
    rows: &[u8],
    stride: usize,
    count: usize,
    to: &mut Items<'_>,
) {
    const { assert!(ITEM == SIZE * PANEL) }
    for i in 0..count {
        let item = to.item::<ITEM>(i);
        for (row, item) in item.chunks_exact_mut(SIZE).enumerate() {
            item.copy_from_slice(&rows[row * stride + i * SIZE..][..SIZE]);
        }
    }
}

/// `BITS` bits of each code, from bit `from` on, to the items from `first` on.
fn plane<const BITS: usize>(
    rows: &[u8],
    stride: usize,
    from: usize,
    first: usize,
    to: &mut Items<'_>,
) {
    const { assert!(matches!(BITS, 1 | 2 | 4)) }
    let octets = 4 / BITS;
    for line in 0..BITS {
        let item = to.item::<64>(first + line);
        for (row, word) in item.chunks_exact_mut(4).enumerate() {
            let codes = &rows[row * stride + line * octets * 8..][..octets * 8];
            let mut bits = 0u32;
            for (octet, codes) in codes.chunks_exact(8).enumerate() {
                for (j, code) in codes.iter().enumerate() {
                    let code = u32::from(code >> from) & ((1 << BITS) - 1);
                    bits |= code << (octet * 8 * BITS + BITS * position(j));
                }
            }
            word.copy_from_slice(&bits.to_le_bytes());
        }
    }
}
