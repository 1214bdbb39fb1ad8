//! Codes of sixteen rows to the lines of a panel's step.

use super::layout::{Codes, PANEL, STEP, position};

/// Writes the lines of a step of 32 k. `rows` holds the codes of sixteen rows from that k on,
/// `stride` bytes apart: codes of whole bytes as they are, smaller ones one to a byte.
pub(super) fn write(codes: Codes, rows: &[u8], stride: usize, lines: &mut [u8]) {
    debug_assert_eq!(lines.len(), codes.panel_bytes());
    match codes {
        Codes::F32 => spread::<4>(rows, stride, lines),
        Codes::F16 => spread::<2>(rows, stride, lines),
        Codes::Int8 | Codes::E4m3 | Codes::E5m2 => spread::<1>(rows, stride, lines),
        // Pairs of bf16 are words of a row.
        Codes::Bf16 => spread::<4>(rows, stride, lines),
        Codes::Table4 => plane::<4>(rows, stride, 0, lines),
        Codes::Table2 => plane::<2>(rows, stride, 0, lines),
        Codes::Table3 => {
            let (low, high) = lines.split_at_mut(2 * 64);
            plane::<2>(rows, stride, 0, low);
            plane::<1>(rows, stride, 2, high);
        }
        Codes::Int5 => {
            let (low, high) = lines.split_at_mut(4 * 64);
            plane::<4>(rows, stride, 0, low);
            plane::<1>(rows, stride, 4, high);
        }
        Codes::Int6 | Codes::Table6 => {
            let (low, high) = lines.split_at_mut(4 * 64);
            plane::<4>(rows, stride, 0, low);
            plane::<2>(rows, stride, 4, high);
        }
    }
}

/// Items of `SIZE` bytes: item `i` of all rows, then the next item.
fn spread<const SIZE: usize>(rows: &[u8], stride: usize, lines: &mut [u8]) {
    for (i, items) in lines.chunks_exact_mut(PANEL * SIZE).enumerate() {
        for (row, item) in items.chunks_exact_mut(SIZE).enumerate() {
            item.copy_from_slice(&rows[row * stride + i * SIZE..][..SIZE]);
        }
    }
}

/// `BITS` bits of each code, from bit `from` on.
fn plane<const BITS: usize>(rows: &[u8], stride: usize, from: usize, lines: &mut [u8]) {
    const { assert!(matches!(BITS, 1 | 2 | 4)) }
    let octets = 4 / BITS;
    for (line, words) in lines.chunks_exact_mut(64).enumerate() {
        for (row, word) in words.chunks_exact_mut(4).enumerate() {
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
    debug_assert_eq!(lines.len(), STEP * PANEL * BITS / 8);
}
