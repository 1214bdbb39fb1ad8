//! Signed 8-bit integers, and the offset ones of packed checkpoint formats (code − 128).
//!
//! Packed formats put four codes into a little-endian int32, least significant first. Along K
//! (`[N, K/4]`) that is the same as a row of bytes; GPTQ's `[K/4, N]` is turned into rows once, by
//! [`gptq_to_rows`].

/// Nearest integer of `x`, ties to even, saturating at −128 and 127. There is no NaN: it becomes 0,
/// so callers that may meet one look for it first.
#[inline]
pub fn encode(x: f32) -> i8 {
    x.round_ties_even() as i8
}

/// Values of `codes`.
///
/// # Panics
/// If the lengths differ.
pub fn decode_slice(codes: &[i8], out: &mut [f32]) {
    assert_eq!(codes.len(), out.len());
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = f32::from(code);
    }
}

/// Values of bytes that hold signed integers: the same, from a file's bytes.
///
/// # Panics
/// If the lengths differ.
pub fn decode_bytes(bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len());
    for (out, &byte) in out.iter_mut().zip(bytes) {
        *out = f32::from(byte as i8);
    }
}

/// Unsigned codes as 0.0 to 255.0; a symmetric format subtracts 128, an asymmetric one its zero
/// point.
///
/// # Panics
/// If the lengths differ.
pub fn decode_unsigned(codes: &[u8], out: &mut [f32]) {
    assert_eq!(codes.len(), out.len());
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = f32::from(code);
    }
}

/// The rows `[N, K]` bytes of a GPTQ array `[K/4, N]` of words: the words transposed.
///
/// # Panics
/// If `words` or `rows` are not `n * k` bytes long, or `k` is not a multiple of 4.
pub fn gptq_to_rows(words: &[u8], n: usize, k: usize, rows: &mut [u8]) {
    assert_eq!((words.len(), rows.len(), k % 4), (n * k, n * k, 0));
    super::int4::transpose_words(words, k / 4, n, rows);
}

/// The inverse of [`gptq_to_rows`].
///
/// # Panics
/// If `words` or `rows` are not `n * k` bytes long, or `k` is not a multiple of 4.
pub fn rows_to_gptq(rows: &[u8], n: usize, k: usize, words: &mut [u8]) {
    assert_eq!((words.len(), rows.len(), k % 4), (n * k, n * k, 0));
    super::int4::transpose_words(rows, n, k / 4, words);
}
