//! Unsigned 4-bit integers and the three ways of checkpoints to pack eight of them into an int32.
//!
//! | layout | array | word and nibble of `W[n, k]` |
//! |---|---|---|
//! | rows (compressed-tensors) | `[N, K/8]` | word `[n, k/8]`, nibble `k % 8` |
//! | GPTQ, K first | `[K/8, N]` | word `[k/8, n]`, nibble `k % 8` |
//! | AWQ | `[K, N/8]` | word `[k, n/8]`, nibble `[0, 4, 1, 5, 2, 6, 3, 7][n % 8]` |
//!
//! Nibble `i` is `(word >> 4i) & 15`. As the words are little-endian, the first layout is the same
//! as two codes in a byte, the even index in the low nibble: it decodes by rows, in place. GPTQ and
//! AWQ are turned into it once, by [`gptq_to_rows`] and [`awq_to_rows`]; single values can be read
//! in place by [`gptq_nibble`] and [`awq_nibble`]. Zero points are packed in the same ways along N.
//!
//! Values decode to 0..=15; a symmetric format subtracts 8, an asymmetric one its zero point, and
//! both multiply by a scale afterwards (see [`for_each_group`](super::for_each_group)).

/// Nibble of AWQ's word that holds column `i` of eight.
pub const AWQ_NIBBLE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Column that nibble `i` of AWQ's word holds: the inverse of [`AWQ_NIBBLE`].
pub const AWQ_COLUMN: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Both nibbles of a byte, low one first.
static PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [(byte & 15) as f32, (byte >> 4) as f32];
        byte += 1;
    }
    pairs
};

/// Code `index` of a packed row.
///
/// # Panics
/// If the row is shorter.
#[inline]
pub fn nibble(row: &[u8], index: usize) -> u8 {
    row[index / 2] >> (4 * (index % 2)) & 15
}

/// Codes `start..start + out.len()` of a packed row, as 0.0 to 15.0.
///
/// # Panics
/// If the row is shorter.
pub fn decode_packed(row: &[u8], start: usize, out: &mut [f32]) {
    decode_pairs(row, start, out, &PAIRS);
}

/// Packs `codes`, of which the low nibbles count, two to a byte; the last high nibble of an odd
/// number of codes is zero.
///
/// # Panics
/// If `out` is not `codes.len().div_ceil(2)` bytes long.
pub fn pack(codes: &[u8], out: &mut [u8]) {
    pack_nibbles(codes, out, |&code| code & 15);
}

/// Code of `W[n, k]` in a GPTQ array `[K/8, N]` of `columns` = N little-endian words.
///
/// # Panics
/// If there is no such word.
#[inline]
pub fn gptq_nibble(words: &[u8], columns: usize, n: usize, k: usize) -> u8 {
    nibble(words, (k / 8 * columns + n) * 8 + k % 8)
}

/// Code of `W[n, k]` in an AWQ array `[K, N/8]` of little-endian words; `columns` is N.
///
/// # Panics
/// If there is no such word.
#[inline]
pub fn awq_nibble(words: &[u8], columns: usize, n: usize, k: usize) -> u8 {
    nibble(words, (k * (columns / 8) + n / 8) * 8 + AWQ_NIBBLE[n % 8])
}

/// The rows `[N, K/2]` bytes of a GPTQ array `[K/8, N]` of words: the words transposed.
///
/// # Panics
/// If `words` or `rows` are not `n * k / 2` bytes long, or `k` is not a multiple of 8.
pub fn gptq_to_rows(words: &[u8], n: usize, k: usize, rows: &mut [u8]) {
    assert_eq!((words.len(), rows.len(), k % 8), (n * k / 2, n * k / 2, 0));
    transpose_words(words, k / 8, n, rows);
}

/// The inverse of [`gptq_to_rows`].
///
/// # Panics
/// If `words` or `rows` are not `n * k / 2` bytes long, or `k` is not a multiple of 8.
pub fn rows_to_gptq(rows: &[u8], n: usize, k: usize, words: &mut [u8]) {
    assert_eq!((words.len(), rows.len(), k % 8), (n * k / 2, n * k / 2, 0));
    transpose_words(rows, n, k / 8, words);
}

/// The rows `[N, K/2]` bytes of an AWQ array `[K, N/8]` of words.
///
/// # Panics
/// If `words` or `rows` are not `n * k / 2` bytes long, or `n` or `k` is not a multiple of 8.
pub fn awq_to_rows(words: &[u8], n: usize, k: usize, rows: &mut [u8]) {
    assert_eq!((words.len(), rows.len(), n % 8, k % 8), (n * k / 2, n * k / 2, 0, 0));
    for_each_tile(n, k, |n0, k0| {
        let tile = read_tile(words, n / 8, k0, n0 / 8);
        let mut turned = [0u32; 8];
        for (dk, word) in tile.iter().enumerate() {
            for (dn, row) in turned.iter_mut().enumerate() {
                *row |= (word >> (4 * AWQ_NIBBLE[dn]) & 15) << (4 * dk);
            }
        }
        write_tile(rows, k / 8, n0, k0 / 8, &turned);
    });
}

/// The inverse of [`awq_to_rows`].
///
/// # Panics
/// If `words` or `rows` are not `n * k / 2` bytes long, or `n` or `k` is not a multiple of 8.
pub fn rows_to_awq(rows: &[u8], n: usize, k: usize, words: &mut [u8]) {
    assert_eq!((words.len(), rows.len(), n % 8, k % 8), (n * k / 2, n * k / 2, 0, 0));
    for_each_tile(n, k, |n0, k0| {
        let tile = read_tile(rows, k / 8, n0, k0 / 8);
        let mut turned = [0u32; 8];
        for (dn, row) in tile.iter().enumerate() {
            for (dk, word) in turned.iter_mut().enumerate() {
                *word |= (row >> (4 * dk) & 15) << (4 * AWQ_NIBBLE[dn]);
            }
        }
        write_tile(words, n / 8, k0, n0 / 8, &turned);
    });
}

/// Calls `tile(n0, k0)` for the corners of all 8 × 8 tiles.
fn for_each_tile(n: usize, k: usize, mut tile: impl FnMut(usize, usize)) {
    for n0 in (0..n).step_by(8) {
        for k0 in (0..k).step_by(8) {
            tile(n0, k0);
        }
    }
}

/// Eight words below one another, of an array with `width` words to a row.
fn read_tile(words: &[u8], width: usize, row: usize, col: usize) -> [u32; 8] {
    std::array::from_fn(|i| {
        let at = ((row + i) * width + col) * 4;
        u32::from_le_bytes([words[at], words[at + 1], words[at + 2], words[at + 3]])
    })
}

fn write_tile(words: &mut [u8], width: usize, row: usize, col: usize, tile: &[u32; 8]) {
    for (i, word) in tile.iter().enumerate() {
        let at = ((row + i) * width + col) * 4;
        words[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
}

/// Transposes an array `[rows, cols]` of 4-byte words.
pub(super) fn transpose_words(words: &[u8], rows: usize, cols: usize, out: &mut [u8]) {
    for (i, word) in words.chunks_exact(4).enumerate() {
        let at = (i % cols * rows + i / cols) * 4;
        out[at..at + 4].copy_from_slice(word);
    }
}

/// Values `start..start + out.len()` of a row with two codes to a byte.
#[inline]
pub(super) fn decode_pairs(
    row: &[u8],
    start: usize,
    out: &mut [f32],
    pairs: &'static [[f32; 2]; 256],
) {
    let (mut start, mut out) = (start, out);
    if start % 2 == 1 && !out.is_empty() {
        out[0] = pairs[row[start / 2] as usize][1];
        (start, out) = (start + 1, &mut out[1..]);
    }
    let bytes = &row[start / 2..start / 2 + out.len().div_ceil(2)];
    let mut two = out.chunks_exact_mut(2);
    for (out, &byte) in (&mut two).zip(bytes) {
        out.copy_from_slice(&pairs[byte as usize]);
    }
    if let [last] = two.into_remainder() {
        *last = pairs[bytes[bytes.len() - 1] as usize][0];
    }
}

/// Packs the codes of `items` two to a byte.
#[inline]
pub(super) fn pack_nibbles<T>(items: &[T], out: &mut [u8], code: impl Fn(&T) -> u8) {
    assert_eq!(out.len(), items.len().div_ceil(2));
    for (pair, out) in items.chunks(2).zip(out) {
        *out = code(&pair[0]) | pair.get(1).map_or(0, |high| code(high) << 4);
    }
}
