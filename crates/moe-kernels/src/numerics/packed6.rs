//! Four codes of 6 bits in three bytes: code `i` takes bits `6i..6i + 6` of the little-endian
//! 24-bit number.

/// Values `start..start + out.len()` of a packed row.
#[inline(always)]
pub(super) fn unpack(row: &[u8], start: usize, out: &mut [f32], decode: impl Fn(u8) -> f32) {
    let mut done = 0;
    while done < out.len() {
        let (quad, first) = ((start + done) / 4, (start + done) % 4);
        let bytes = &row[3 * quad..3 * quad + 3];
        let mut word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]) >> (6 * first);
        let count = (4 - first).min(out.len() - done);
        for out in &mut out[done..done + count] {
            *out = decode(word as u8 & 0x3F);
            word >>= 6;
        }
        done += count;
    }
}

/// Packs the codes of `values`; missing ones of the last three bytes are zero.
pub(super) fn pack(values: &[f32], out: &mut [u8], encode: impl Fn(f32) -> u8) {
    assert_eq!(out.len(), values.len().div_ceil(4) * 3);
    for (quad, bytes) in values.chunks(4).zip(out.chunks_exact_mut(3)) {
        let word = quad.iter().rev().fold(0, |word, &x| word << 6 | u32::from(encode(x)));
        bytes.copy_from_slice(&word.to_le_bytes()[..3]);
    }
}
