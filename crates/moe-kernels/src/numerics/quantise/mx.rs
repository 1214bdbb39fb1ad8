//! The OCP MX formats: 32 elements along a row share an E8M0 scale.

use super::super::{e2m1, e2m3, e3m2, e4m3, e8m0};
use super::amax;

/// Elements that share a scale.
pub(super) const BLOCK: usize = 32;

/// Elements of MXFP6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fp6 {
    /// 3 exponent bits, 2 mantissa bits.
    E3M2,
    /// 2 exponent bits, 3 mantissa bits.
    E2M3,
}

/// How MXFP8 takes the scale's exponent from the largest magnitude of a block (at least the
/// smallest normal f32). Engines changed it from the first to the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mxfp8Rule {
    /// `⌊log2 max⌋`: the largest element lies in [1, 2), so that elements 2^−10 times as large
    /// vanish (vLLM 0.20).
    Floor,
    /// `⌈log2(max / 448)⌉`: the largest element lies in (224, 448] (vLLM 0.33).
    Ceil,
}

#[inline(always)]
pub(super) fn mxfp8(rows: &mut [f32], cols: usize, rule: Mxfp8Rule) {
    qdq(rows, cols, |amax| mxfp8_scale(amax, rule), e4m3::round);
}

#[inline(always)]
pub(super) fn mxfp6(rows: &mut [f32], cols: usize, element: Fp6) {
    match element {
        Fp6::E3M2 => qdq(rows, cols, |amax| even_scale(amax, 2, 4), e3m2::round),
        Fp6::E2M3 => qdq(rows, cols, |amax| even_scale(amax, 3, 2), e2m3::round),
    }
}

#[inline(always)]
pub(super) fn mxfp4(rows: &mut [f32], cols: usize) {
    qdq(rows, cols, mxfp4_scale, e2m1::round);
}

/// `scale` gives the E8M0 code of a block with that largest magnitude.
#[inline(always)]
fn qdq(rows: &mut [f32], cols: usize, scale: impl Fn(f32) -> u8, round: impl Fn(f32) -> f32) {
    for block in rows.chunks_exact_mut(cols).flat_map(|row| row.chunks_mut(BLOCK)) {
        let amax = amax(block);
        if !amax.is_finite() {
            block.fill(f32::NAN);
            continue;
        }
        let scale = e8m0::decode(scale(amax));
        let inverse = 1.0 / scale; // a power of two as well, exact
        for x in block {
            *x = round(*x * inverse) * scale;
        }
    }
}

fn mxfp8_scale(amax: f32, rule: Mxfp8Rule) -> u8 {
    let amax = amax.max(f32::MIN_POSITIVE);
    match rule {
        Mxfp8Rule::Floor => e8m0::from_exponent(e8m0::floor_log2(amax)),
        Mxfp8Rule::Ceil => e8m0::encode_up(amax / e4m3::MAX),
    }
}

/// E8M0 code of an MXFP4 block.
pub(super) fn mxfp4_scale(amax: f32) -> u8 {
    even_scale(amax, 1, 2)
}

/// E8M0 code by the "even" rule: `amax`, rounded to the element's `mantissa` bits, has an exponent;
/// the scale's is that less the exponent of the element's largest value. So 1.75 · 2^n and above
/// counts as 2^(n+1) for E2M1, and what would round to the next power of two does not saturate.
fn even_scale(amax: f32, mantissa: u32, largest_exponent: i32) -> u8 {
    let half = 1 << (22 - mantissa);
    let exponent = ((amax.to_bits() + half) >> 23) as i32 - 127;
    e8m0::from_exponent(exponent - largest_exponent)
}
