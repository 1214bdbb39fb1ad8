//! Codes of sixteen rows, or of a whole unit's rows, to the items of a step.

use super::layout::{Codes, PANEL, UNIT, position};

/// Where the items of a panel go: among those of the other panels of its unit.
pub(super) struct Items<'a> {
    /// A step of all panels.
    pub(super) step: &'a mut [u8],
    pub(super) panel: usize,
    /// Panels of the unit.
    pub(super) panels: usize,
    /// Whether codes of 8 bits lie in quads.
    pub(super) quads: bool,
}

impl Items<'_> {
    /// Item `i`, of `SIZE` bytes.
    #[inline(always)]
    fn item<const SIZE: usize>(&mut self, i: usize) -> &mut [u8; SIZE] {
        let item = (i * self.panels + self.panel) * SIZE;
        self.step[item..].first_chunk_mut().expect("the step is whole")
    }

    /// Item `i`: a word for each row.
    #[inline(always)]
    fn put_words(&mut self, i: usize, words: [u32; PANEL]) {
        let item = self.item::<64>(i).as_chunks_mut::<4>().0;
        item.iter_mut().zip(words).for_each(|(to, word)| *to = word.to_le_bytes());
    }
}

/// Writes the items of a step of 32 k. `rows` holds the codes of sixteen rows from that k on,
/// `stride` bytes apart: codes of whole bytes as they are, smaller ones one to a byte.
#[inline(always)]
pub(super) fn from_codes(codes: Codes, rows: &[u8], stride: usize, to: &mut Items<'_>) {
    match codes {
        Codes::F32 => from_words::<32>(codes, |r| &rows[r * stride..], to),
        Codes::F16 | Codes::Bf16 => from_words::<16>(codes, |r| &rows[r * stride..], to),
        Codes::Int8 | Codes::E4m3 | Codes::E5m2 => {
            from_words::<8>(codes, |r| &rows[r * stride..], to);
        }
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

/// Writes the items of a step of 32 k of codes of 4, 8, 16 or 32 bits, packed along their rows:
/// `N` words of each.
#[inline(always)]
pub(super) fn from_words<'a, const N: usize>(
    codes: Codes,
    row: impl Fn(usize) -> &'a [u8],
    to: &mut Items<'_>,
) {
    let mut lines = [[0u32; PANEL]; N];
    for r in 0..PANEL {
        let words = row(r)[..4 * N].as_chunks::<4>().0;
        for (line, word) in lines.iter_mut().zip(words) {
            line[r] = u32::from_le_bytes(*word);
        }
    }
    for (i, line) in lines.into_iter().enumerate() {
        match codes {
            Codes::F16 => {
                for half in 0..2 {
                    let item = to.item::<32>(2 * i + half).as_chunks_mut::<2>().0;
                    for (to, word) in item.iter_mut().zip(line) {
                        *to = ((word >> (16 * half)) as u16).to_le_bytes();
                    }
                }
            }
            Codes::Int8 | Codes::E4m3 | Codes::E5m2 if !to.quads => {
                for byte in 0..4 {
                    let item = to.item::<16>(4 * i + byte);
                    for (to, word) in item.iter_mut().zip(line) {
                        *to = (word >> (8 * byte)) as u8;
                    }
                }
            }
            Codes::Table4 => to.put_words(i, line.map(in_position)),
            _ => to.put_words(i, line),
        }
    }
}

/// Eight nibbles at their positions.
#[inline(always)]
pub(super) fn in_position(word: u32) -> u32 {
    let swap = (word ^ word >> 4) & 0x00F0_00F0;
    let word = word ^ swap ^ swap << 4;
    let swap = (word ^ word >> 8) & 0x0000_FF00;
    word ^ swap ^ swap << 8
}

/// Writes `BITS` bits of each code, from bit `from` on, to the items from `first` on.
#[inline(always)]
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
        let mut words = [0; PANEL];
        for (row, word) in words.iter_mut().enumerate() {
            let codes = rows[row * stride + line * octets * 8..][..octets * 8].as_chunks::<8>().0;
            for (octet, codes) in codes.iter().enumerate() {
                let bits = gathered::<BITS>(u64::from_le_bytes(*codes) >> from);
                *word |= bits << (octet * 8 * BITS);
            }
        }
        to.put_words(first + line, words);
    }
}

/// The lowest `BITS` bits of eight bytes, at their [`position`]s.
#[inline(always)]
fn gathered<const BITS: usize>(codes: u64) -> u32 {
    let mask = (1 << BITS) - 1;
    // Every other code, sixteen bits apart: in two steps they move together.
    let together = |codes: u64| {
        let ones = codes & (mask * 0x0001_0001_0001_0001);
        let pairs = ones | ones >> (16 - BITS);
        let pairs = pairs & (((1 << (2 * BITS)) - 1) * 0x0000_0001_0000_0001);
        ((pairs | pairs >> (32 - 2 * BITS)) & ((1 << (4 * BITS)) - 1)) as u32
    };
    together(codes) | together(codes >> 8) << (4 * BITS)
}

/// The line of eight 4-bit codes of a unit's rows, column by column.
#[inline(always)]
pub(super) fn nibbles(columns: &[[u8; UNIT]; 8], line: &mut [u8; 4 * UNIT]) {
    for (r, word) in line.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let mut bits = 0u32;
        for (j, column) in columns.iter().enumerate() {
            bits |= u32::from(column[r]) << (4 * position(j));
        }
        *word = bits.to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_come_to_their_positions() {
        let codes: [u8; 8] = [1, 7, 3, 12, 15, 0, 9, 6];
        let place = |bits: usize, mask: u8| {
            let at = |j: usize| u32::from(codes[j] & mask) << (bits * position(j));
            (0..8).map(at).sum::<u32>()
        };
        let bytes = u64::from_le_bytes(codes);
        assert_eq!(gathered::<4>(bytes), place(4, 15));
        assert_eq!(gathered::<2>(bytes), place(2, 3));
        assert_eq!(gathered::<1>(bytes), place(1, 1));
        let natural = codes.iter().rev().fold(0, |word, code| word << 4 | u32::from(*code));
        assert_eq!(in_position(natural), place(4, 15));
    }
}
