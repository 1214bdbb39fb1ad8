//! Quantise-dequantise of activation rows, and the codes of single rows.

use super::super::vectorised::for_each_isa;

use super::super::{EncodeScale, e4m3, e8m0};
use super::{Fp6, Mxfp8Rule, Nvfp4Rule, amax, mx, nvfp4};
use crate::isa::Cpu;

/// How activation rows `[rows, cols]` are quantised before a product. `s` is the multiplier that
/// takes codes back. Values are divided by `s`, as the definitions have it; kernels of other engines
/// multiply by its rounded reciprocal, which differs where a value lies beside a tie.
///
/// A last group that is shorter than the others is a group of its own. Rows and groups of zeros
/// stay zeros, signs included for the floating-point formats. Where a scale is taken from the
/// values, one NaN or infinity among them makes all that share the scale NaN. Where it is given
/// (`Fp8Static`, `Int8Static`, `Nvfp4`), infinities saturate; NaN stays NaN, and makes its NVFP4
/// group NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Qdq {
    /// `e4m3(x / s) · s` with a given scale, positive and finite.
    Fp8Static {
        /// `s`.
        scale: f32,
    },
    /// `s = max|x| / 448` over all rows. A token's result depends on the other tokens.
    Fp8Tensor,
    /// `s = max|x| / 448` of each row, at least 1 / (448 · 512).
    Fp8Token,
    /// `s = max(max|x|, 1e-10) / 448` of each group along a row.
    Fp8Group {
        /// Values of a group.
        size: usize,
        /// Whether `s` is rounded.
        scale: GroupScale,
    },
    /// `clamp(round(x / s), −128, 127) · s` with a given scale, positive and finite.
    Int8Static {
        /// `s`.
        scale: f32,
    },
    /// `s = max(max|x|, 1e-10) / 127` over all rows. A token's result depends on the other tokens.
    Int8Tensor,
    /// `s = max(max|x|, 1e-10) / 127` of each row.
    Int8Token,
    /// `s = max(max|x|, 1e-10) / 127` of each group along a row.
    Int8Group {
        /// Values of a group.
        size: usize,
    },
    /// OCP MXFP8: E4M3 elements, E8M0 scales of 32.
    Mxfp8(Mxfp8Rule),
    /// OCP MXFP6: FP6 elements, E8M0 scales of 32.
    Mxfp6(Fp6),
    /// OCP MXFP4: E2M1 elements, E8M0 scales of 32.
    Mxfp4,
    /// NVFP4: E2M1 elements, E4M3 scales of 16, a given scale for the tensor.
    Nvfp4 {
        /// Positive and at most 2^118.
        global: EncodeScale,
        /// Order of the arithmetic.
        rule: Nvfp4Rule,
    },
    /// NVFP4 with a global scale for each row: 448 · 6 / max|x|.
    Nvfp4Token {
        /// Order of the arithmetic.
        rule: Nvfp4Rule,
    },
}

/// How the scale of a group is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupScale {
    /// Not at all.
    F32,
    /// Up to the next power of two ("UE8M0").
    PowerOfTwo,
}

impl Qdq {
    /// Quantises and dequantises `rows`, each `cols` long, in place. The same bits on every CPU.
    ///
    /// # Panics
    /// If `rows` are not whole rows, or a group size is zero.
    pub fn apply(&self, cpu: Cpu, rows: &mut [f32], cols: usize) {
        assert!(
            if cols == 0 { rows.is_empty() } else { rows.len().is_multiple_of(cols) },
            "{} values in rows of {cols}",
            rows.len()
        );
        if rows.is_empty() {
            return;
        }
        apply(cpu, self, rows, cols);
    }

    #[inline(always)]
    fn apply_inlined(&self, rows: &mut [f32], cols: usize) {
        match *self {
            Self::Fp8Static { scale } => fp8(rows, scale),
            // The floor only keeps zeros from becoming 0 / 0.
            Self::Fp8Tensor => shared(rows, |amax| fp8_scale(amax, f32::MIN_POSITIVE), fp8),
            Self::Fp8Token => {
                for row in rows.chunks_exact_mut(cols) {
                    shared(row, |amax| fp8_scale(amax, FP8_TOKEN_FLOOR), fp8);
                }
            }
            Self::Fp8Group { size, scale: rounding } => {
                for group in rows.chunks_exact_mut(cols).flat_map(|row| row.chunks_mut(size)) {
                    shared(group, |amax| fp8_group_scale(amax, rounding), fp8);
                }
            }
            Self::Int8Static { scale } => int8(rows, scale),
            Self::Int8Tensor => shared(rows, int8_scale, int8),
            Self::Int8Token => {
                for row in rows.chunks_exact_mut(cols) {
                    shared(row, int8_scale, int8);
                }
            }
            Self::Int8Group { size } => {
                for group in rows.chunks_exact_mut(cols).flat_map(|row| row.chunks_mut(size)) {
                    shared(group, int8_scale, int8);
                }
            }
            Self::Mxfp8(rule) => mx::mxfp8(rows, cols, rule),
            Self::Mxfp6(element) => mx::mxfp6(rows, cols, element),
            Self::Mxfp4 => mx::mxfp4(rows, cols),
            Self::Nvfp4 { global, rule } => nvfp4::qdq(rows, cols, global, rule),
            Self::Nvfp4Token { rule } => {
                for row in rows.chunks_exact_mut(cols) {
                    match amax(row) {
                        0.0 => (),
                        max if max.is_finite() => {
                            nvfp4::qdq(row, cols, nvfp4::global_scale(max), rule);
                        }
                        _ => row.fill(f32::NAN),
                    }
                }
            }
        }
    }
}

for_each_isa! {
    fn apply(cpu: Cpu, qdq: &Qdq, rows: &mut [f32], cols: usize) {
        qdq.apply_inlined(rows, cols);
    }
}

/// Codes of `row` as [`Qdq::Int8Token`] quantises it; returns `s`. If a value is NaN or infinite,
/// `s` is NaN and the codes are 0.
///
/// # Panics
/// If the lengths differ.
pub fn int8_row(cpu: Cpu, row: &[f32], codes: &mut [i8]) -> f32 {
    assert_eq!(row.len(), codes.len());
    let amax = amax(row);
    if !amax.is_finite() {
        codes.fill(0);
        return f32::NAN;
    }
    let scale = int8_scale(amax);
    int8_codes(cpu, row, scale, codes);
    scale
}

/// Codes of `row` as [`Qdq::Fp8Token`] quantises it; returns `s`. If a value is NaN or infinite,
/// `s` is NaN and the codes are 0.
///
/// # Panics
/// If the lengths differ.
pub fn fp8_row(cpu: Cpu, row: &[f32], codes: &mut [u8]) -> f32 {
    assert_eq!(row.len(), codes.len());
    let amax = amax(row);
    if !amax.is_finite() {
        codes.fill(0);
        return f32::NAN;
    }
    let scale = fp8_scale(amax, FP8_TOKEN_FLOOR);
    fp8_codes(cpu, row, scale, codes);
    scale
}

for_each_isa! {
    fn int8_codes(cpu: Cpu, row: &[f32], scale: f32, codes: &mut [i8]) {
        for (code, &x) in codes.iter_mut().zip(row) {
            // The low bits of the sum are the code.
            *code = int8_anchored(x / scale).to_bits() as i8;
        }
    }
}

for_each_isa! {
    pub(super) fn fp8_codes(cpu: Cpu, row: &[f32], scale: f32, codes: &mut [u8]) {
        for (code, &x) in codes.iter_mut().zip(row) {
            *code = e4m3::encode(x / scale);
        }
    }
}

/// Quantises values that share one scale, taken from their largest magnitude.
#[inline(always)]
fn shared(
    values: &mut [f32],
    scale: impl FnOnce(f32) -> f32,
    quantise: impl FnOnce(&mut [f32], f32),
) {
    let amax = amax(values);
    if amax.is_finite() {
        quantise(values, scale(amax));
    } else {
        values.fill(f32::NAN);
    }
}

/// Smallest scale of an FP8 row.
pub(super) const FP8_TOKEN_FLOOR: f32 = 1.0 / (448.0 * 512.0);

pub(super) fn fp8_scale(amax: f32, floor: f32) -> f32 {
    (amax / e4m3::MAX).max(floor)
}

pub(super) fn fp8_group_scale(amax: f32, rounding: GroupScale) -> f32 {
    let scale = amax.max(1e-10) / e4m3::MAX;
    match rounding {
        GroupScale::F32 => scale,
        GroupScale::PowerOfTwo => e8m0::decode(e8m0::encode_up(scale)),
    }
}

pub(super) fn int8_scale(amax: f32) -> f32 {
    amax.max(1e-10) / 127.0
}

#[inline(always)]
fn fp8(values: &mut [f32], scale: f32) {
    for x in values {
        *x = e4m3::round(*x / scale) * scale;
    }
}

#[inline(always)]
fn int8(values: &mut [f32], scale: f32) {
    for x in values {
        *x = (int8_anchored(*x / scale) - ANCHOR) * scale;
    }
}

/// At 1.5 · 2^23 the distance of neighbouring floats is 1: a sum's own rounding, to nearest and
/// ties to even, rounds to integers.
const ANCHOR: f32 = 12_582_912.0;

/// [`ANCHOR`] and the nearest integer in −128..=127, ties to even; NaN stays.
#[inline(always)]
pub(super) fn int8_anchored(x: f32) -> f32 {
    x.clamp(-128.0, 127.0) + ANCHOR
}
