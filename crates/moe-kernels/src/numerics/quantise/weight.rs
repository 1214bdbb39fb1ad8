//! Weight matrices `[rows, cols]`, row after row, to codes and scales.
//!
//! Every function takes the scale from the largest magnitude of the values that share it, and then
//! the nearest code, ties to even. A scale of zeros is 1, so that readers which look for a scale
//! of 0 as a sign of a broken checkpoint find none. A group that the row's end cuts is shorter and
//! has its own scale. Values must be finite: quantised weights have no good way to hold others.

use half::{bf16, f16};

use super::super::{EncodeScale, e2m1, e4m3, int4, int8};
use super::{amax, mx, nvfp4};

/// A quantised matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantised<Code, Scale> {
    /// Row after row; how many to a row the function says that made them.
    pub codes: Vec<Code>,
    /// Row after row; how many to a row the function says that made them.
    pub scales: Vec<Scale>,
}

/// A weight that is NaN or infinite.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NotFinite {
    /// Its row.
    pub row: usize,
    /// Its column.
    pub col: usize,
    /// What it is.
    pub value: f32,
}

impl std::fmt::Display for NotFinite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { row, col, value } = self;
        write!(f, "the weight in row {row}, column {col} is {value}, which cannot be quantised")
    }
}

impl std::error::Error for NotFinite {}

/// Stored type of a scale: it is rounded to it before the codes are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl ScaleType {
    fn round(self, scale: f32) -> f32 {
        match self {
            Self::F32 => scale,
            Self::F16 => f16::from_f32(scale).to_f32(),
            Self::Bf16 => bf16::from_f32(scale).to_f32(),
        }
    }
}

/// FP8 E4M3, one scale for each row: `w = e4m3 · scale[row]`, `scale = max / 448`.
///
/// # Panics
/// If `values` are not whole rows.
pub fn fp8_channel(values: &[f32], cols: usize) -> Result<Quantised<u8, f32>, NotFinite> {
    fp8_block(values, cols, [1, cols.max(1)])
}

/// FP8 E4M3 with one scale for each block of `[rows, cols]`: `w = e4m3 · scale[row / block[0],
/// col / block[1]]`, `scale = max / 448`. Blocks at the edges may be smaller.
///
/// # Panics
/// If `values` are not whole rows, or a block is empty.
pub fn fp8_block(
    values: &[f32],
    cols: usize,
    block: [usize; 2],
) -> Result<Quantised<u8, f32>, NotFinite> {
    check(values, cols)?;
    let per_row = cols.div_ceil(block[1]);
    let (mut codes, mut scales) = (Vec::with_capacity(values.len()), Vec::new());
    for band in values.chunks(block[0] * cols.max(1)) {
        let first = scales.len();
        scales.resize(first + per_row, 0.0f32);
        let scales = &mut scales[first..];
        for row in band.chunks_exact(cols) {
            for (scale, part) in scales.iter_mut().zip(row.chunks(block[1])) {
                *scale = scale.max(amax(part));
            }
        }
        for scale in scales.iter_mut() {
            *scale = nonzero(*scale / e4m3::MAX);
        }
        for row in band.chunks_exact(cols) {
            for (scale, part) in scales.iter().zip(row.chunks(block[1])) {
                codes.extend(part.iter().map(|x| e4m3::encode(x / scale)));
            }
        }
    }
    Ok(Quantised { codes, scales })
}

/// INT8, one scale for each row: `w = code · scale[row]`, `scale = max / 127.5`, the symmetric rule
/// of compressed-tensors: half a step more than the largest code.
///
/// # Panics
/// If `values` are not whole rows.
pub fn int8_channel(values: &[f32], cols: usize) -> Result<Quantised<i8, f32>, NotFinite> {
    check(values, cols)?;
    let (mut codes, mut scales) = (Vec::with_capacity(values.len()), Vec::new());
    for row in values.chunks_exact(cols.max(1)) {
        let scale = nonzero(amax(row) / 127.5);
        codes.extend(row.iter().map(|x| int8::encode(x / scale)));
        scales.push(scale);
    }
    Ok(Quantised { codes, scales })
}

/// INT4, one scale for each `group` of values along a row: `w = (code − 8) · scale[row, col /
/// group]`, `scale = max / 7.5`, the symmetric rule of compressed-tensors, rounded to `scale_type`.
/// The codes are its `pack-quantized` words, little-endian, eight to a word, `cols.div_ceil(8)`
/// words to a row; codes beyond the row's end are 0.
///
/// # Panics
/// If `values` are not whole rows, or `group` is zero.
pub fn int4_group(
    values: &[f32],
    cols: usize,
    group: usize,
    scale_type: ScaleType,
) -> Result<Quantised<u8, f32>, NotFinite> {
    check(values, cols)?;
    let row_bytes = cols.div_ceil(8) * 4;
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    let mut row_codes = vec![0; row_bytes * 2];
    for row in values.chunks_exact(cols.max(1)) {
        for (values, codes) in row.chunks(group).zip(row_codes.chunks_mut(group)) {
            let scale = nonzero(scale_type.round(amax(values) / 7.5));
            for (code, x) in codes.iter_mut().zip(values) {
                *code = ((x / scale).round_ties_even().clamp(-8.0, 7.0) + 8.0) as u8;
            }
            scales.push(scale);
        }
        let first = codes.len();
        codes.resize(first + row_bytes, 0);
        int4::pack(&row_codes, &mut codes[first..]);
    }
    Ok(Quantised { codes, scales })
}

/// The global scale that NVFP4 gives a tensor, or tensors that share it, with this largest
/// magnitude: 448 · 6 / `amax`; 1 for zeros.
pub fn nvfp4_global_scale(amax: f32) -> EncodeScale {
    if amax == 0.0 { EncodeScale(1.0) } else { nvfp4::global_scale(amax) }
}

/// NVFP4: `w = e2m1 · e4m3(scale[row, col / 16]) / global`, `scale = e4m3(global · max / 6)`. Two
/// codes lie in a byte, the even column in the low nibble, `cols.div_ceil(2)` bytes to a row. The
/// scales are E4M3 codes. A block whose scale rounds to zero becomes zeros.
///
/// # Panics
/// If `values` are not whole rows.
pub fn nvfp4(
    values: &[f32],
    cols: usize,
    global: EncodeScale,
) -> Result<Quantised<u8, u8>, NotFinite> {
    fp4(values, cols, nvfp4::BLOCK, |amax| {
        let (code, scale) = nvfp4::block_scale(amax, global);
        let encode = move |x: f32| if scale == 0.0 { 0.0 } else { x * global.0 / scale };
        (code, encode)
    })
}

/// MXFP4: `w = e2m1 · 2^(scale[row, col / 32] − 127)`, the scale by the "even" rule, as
/// [`Qdq::Mxfp4`](super::Qdq::Mxfp4). Codes are packed as in [`nvfp4()`]; the scales are E8M0 codes.
///
/// # Panics
/// If `values` are not whole rows.
pub fn mxfp4(values: &[f32], cols: usize) -> Result<Quantised<u8, u8>, NotFinite> {
    fp4(values, cols, mx::BLOCK, |amax| {
        let code = mx::mxfp4_scale(amax);
        let inverse = 1.0 / super::super::e8m0::decode(code);
        (code, move |x: f32| x * inverse)
    })
}

/// `scale` gives the code of a block's scale and what takes its values into the range of E2M1.
fn fp4<F: Fn(f32) -> f32>(
    values: &[f32],
    cols: usize,
    block: usize,
    scale: impl Fn(f32) -> (u8, F),
) -> Result<Quantised<u8, u8>, NotFinite> {
    check(values, cols)?;
    let row_bytes = cols.div_ceil(2);
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    let mut scaled = vec![0.0; cols];
    for row in values.chunks_exact(cols.max(1)) {
        for (values, scaled) in row.chunks(block).zip(scaled.chunks_mut(block)) {
            let (code, up) = scale(amax(values));
            scaled.iter_mut().zip(values).for_each(|(scaled, &x)| *scaled = up(x));
            scales.push(code);
        }
        let first = codes.len();
        codes.resize(first + row_bytes, 0);
        e2m1::encode_packed(&scaled, &mut codes[first..]);
    }
    Ok(Quantised { codes, scales })
}

/// Whole rows of finite values?
fn check(values: &[f32], cols: usize) -> Result<(), NotFinite> {
    assert!(
        if cols == 0 { values.is_empty() } else { values.len().is_multiple_of(cols) },
        "{} values in rows of {cols}",
        values.len()
    );
    if amax(values).is_finite() {
        return Ok(());
    }
    let index = values.iter().position(|x| !x.is_finite()).unwrap_or_default();
    Err(NotFinite { row: index / cols, col: index % cols, value: values[index] })
}

/// A scale that can be divided by.
fn nonzero(scale: f32) -> f32 {
    if scale == 0.0 { 1.0 } else { scale }
}
