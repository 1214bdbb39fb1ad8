//! Quantised activation rows as bytes, for rows that travel: a half or a quarter of the values.
//!
//! ```text
//! the scale of each group (f32, little-endian; none where it is given), then one code for each value
//! ```
//!
//! And the other way: codes and scales of rows that were quantised and dequantised, for products of
//! codes with codes.

use std::ops::Range;

use half::bf16;

use super::super::float16::nearest_bf16;
use super::super::vectorised::for_each_isa;
use super::super::{e4m3, int8};
use super::activation::{
    FP8_TOKEN_FLOOR, fp8_codes, fp8_group_scale, fp8_scale, int8_anchored, int8_scale,
};
use super::{Qdq, amax};
use crate::isa::Cpu;

#[derive(Clone, Copy, PartialEq)]
enum Code {
    Fp8,
    Int8,
}

impl Qdq {
    /// Bytes of a row of `cols` values as [`encode_row`](Self::encode_row) writes it; `None` for
    /// formats whose codes are not bytes, or that bytes would not give back bit by bit.
    pub fn row_bytes(&self, cols: usize) -> Option<usize> {
        // a given scale leaves NaN what it is, which no int8 code says
        let (_, group) = self.layout(cols).filter(|layout| *layout != (Code::Int8, None))?;
        Some(cols + 4 * group.map_or(0, |size| cols.div_ceil(size)))
    }

    /// The code, and how many values share a scale that is taken from them.
    fn layout(&self, cols: usize) -> Option<(Code, Option<usize>)> {
        let row = Some(cols.max(1));
        match *self {
            Self::Fp8Static { .. } => Some((Code::Fp8, None)),
            Self::Fp8Tensor | Self::Fp8Token => Some((Code::Fp8, row)),
            Self::Fp8Group { size, .. } => Some((Code::Fp8, Some(size))),
            Self::Int8Tensor | Self::Int8Token => Some((Code::Int8, row)),
            Self::Int8Group { size } => Some((Code::Int8, Some(size))),
            Self::Int8Static { .. } => Some((Code::Int8, None)),
            Self::Mxfp8(_) | Self::Mxfp6(_) | Self::Mxfp4 => None,
            Self::Nvfp4 { .. } | Self::Nvfp4Token { .. } => None,
        }
    }

    /// The scale of `group`; NaN if one of its values is NaN or infinite.
    fn scale_of(&self, group: &[f32]) -> f32 {
        let amax = amax(group);
        self.scale_by(amax)
    }

    /// The scale of a group whose largest magnitude is `amax`; NaN if that is not finite.
    fn scale_by(&self, amax: f32) -> f32 {
        match *self {
            Self::Fp8Static { scale } | Self::Int8Static { scale } => scale,
            _ if !amax.is_finite() => f32::NAN,
            Self::Fp8Tensor => fp8_scale(amax, f32::MIN_POSITIVE),
            Self::Fp8Group { scale: rounding, .. } => fp8_group_scale(amax, rounding),
            Self::Int8Tensor | Self::Int8Token | Self::Int8Group { .. } => int8_scale(amax),
            _ => fp8_scale(amax, FP8_TOKEN_FLOOR),
        }
    }

    /// Quantises `row` into `bytes`.
    ///
    /// # Panics
    /// If `bytes` are not [`row_bytes`](Self::row_bytes) many.
    pub fn encode_row(&self, cpu: Cpu, row: &[f32], bytes: &mut [u8]) {
        let (code, size, scales) = self.split(row.len(), bytes.len());
        let (scales, codes) = bytes.split_at_mut(scales);
        let groups = row.chunks(size).zip(codes.chunks_mut(size));
        for (i, (values, codes)) in groups.enumerate() {
            let scale = self.scale_of(values);
            if let Some(to) = scales.as_chunks_mut::<4>().0.get_mut(i) {
                *to = scale.to_le_bytes();
            }
            match code {
                Code::Fp8 => fp8_codes(cpu, values, scale, codes),
                Code::Int8 => int8_bytes(cpu, values, scale, codes),
            }
        }
    }

    /// Values of a row that [`encode_row`](Self::encode_row) wrote: bit by bit those that
    /// [`apply`](Self::apply) leaves of that row by itself.
    ///
    /// # Panics
    /// As `encode_row`.
    pub fn decode_row(&self, bytes: &[u8], row: &mut [f32]) {
        let (code, size, scales) = self.split(row.len(), bytes.len());
        let (scales, codes) = bytes.split_at(scales);
        for (i, (values, codes)) in row.chunks_mut(size).zip(codes.chunks(size)).enumerate() {
            let scale = match scales.as_chunks::<4>().0.get(i) {
                Some(bytes) => f32::from_le_bytes(*bytes),
                None => self.scale_of(&[]),
            };
            match code {
                Code::Fp8 => e4m3::decode_slice(codes, values),
                Code::Int8 => int8::decode_bytes(codes, values),
            }
            values.iter_mut().for_each(|v| *v *= scale);
        }
    }

    /// The code, values of a group, and bytes of scales.
    fn split(&self, cols: usize, bytes: usize) -> (Code, usize, usize) {
        assert_eq!(self.row_bytes(cols), Some(bytes), "bytes of a row of {cols} values");
        match self.layout(cols) {
            Some((code, group)) => (code, group.unwrap_or(cols.max(1)), bytes - cols),
            None => unreachable!("such a format has no number of bytes"),
        }
    }
}

/// What the values of a quantised row are beside floats: a code of a byte each, and scales.
///
/// They are told from the values that [`Qdq::apply`] left, so that a row that came as codes from
/// elsewhere gives the same. The largest of a group is the largest code, or the scale is at its least:
/// so the rule that made the scale finds it again, but for the last bit (or half of it, where scales are
/// powers of two: codes come out twice as large then). And a value divided by that is nearer to its code
/// than to any other.
impl Qdq {
    /// How many of `cols` values share a scale, where values are codes of a byte times scales; `None`
    /// for other formats, and where a given scale is so small that values may have lost bits.
    pub(crate) fn coded_group(&self, cols: usize) -> Option<usize> {
        if let Self::Fp8Static { scale } | Self::Int8Static { scale } = *self
            && !(1e-30..1e30).contains(&scale)
        {
            return None;
        }
        let (_, group) = self.layout(cols)?;
        Some(group.unwrap_or(cols.max(1)))
    }

    /// Whether codes are integers.
    pub(crate) fn has_integers(&self) -> bool {
        matches!(self.layout(1), Some((Code::Int8, _)))
    }

    /// Whether values are exact in bf16: elements of few bits times powers of two.
    pub(crate) fn fits_bf16(&self) -> bool {
        matches!(self, Self::Mxfp8(_) | Self::Mxfp6(_) | Self::Mxfp4)
    }

    /// The scale of each run of `size` values of a quantised row; NaN if one of them is NaN or infinite.
    /// `max` is the largest magnitude before quantisation of the row that this one is a slice of, where it
    /// is one.
    pub(crate) fn coded_scales(
        &self,
        cpu: Cpu,
        row: &[f32],
        size: usize,
        max: Option<f32>,
        scales: &mut [f32],
    ) {
        amax_of_runs(cpu, row, size, scales);
        for scale in scales {
            *scale = match (*scale, max) {
                (largest, _) if !largest.is_finite() => f32::NAN,
                (_, Some(max)) => self.scale_by(max),
                (largest, None) => self.scale_by(largest),
            };
        }
    }
}

/// Calls `each` for every run of `size` values; runs of 32 have a loop that needs no count.
#[inline(always)]
fn runs<T>(values: &[f32], size: usize, to: &mut [T], mut each: impl FnMut(&[f32], &mut [T])) {
    if size == 32 {
        let (values, rest) = values.as_chunks::<32>();
        let (to, rest_to) = to.as_chunks_mut::<32>();
        values.iter().zip(to).for_each(|(values, to)| each(values, to));
        if !rest.is_empty() {
            each(rest, rest_to);
        }
        return;
    }
    values.chunks(size).zip(to.chunks_mut(size)).for_each(|(values, to)| each(values, to));
}

for_each_isa! {
    fn amax_of_runs(cpu: Cpu, values: &[f32], size: usize, largest: &mut [f32]) {
        let (chunks, rest) = values.as_chunks::<32>();
        if size == 32 {
            chunks.iter().zip(&mut *largest).for_each(|(values, to)| *to = amax(values));
            if !rest.is_empty() {
                largest[chunks.len()] = amax(rest);
            }
            return;
        }
        values.chunks(size).zip(largest).for_each(|(values, to)| *to = amax(values));
    }
}

for_each_isa! {
    /// The codes of quantised values, of which `size` have a scale each, as the numbers that they stand for.
    pub(crate) fn coded_bf16(cpu: Cpu, values: &[f32], size: usize, scales: &[f32], codes: &mut [bf16]) {
        let mut scales = scales.iter();
        runs(values, size, codes, |values, codes| {
            let inverse = 1.0 / scales.next().expect("every run has a scale");
            for (code, &x) in codes.iter_mut().zip(values) {
                *code = bf16::from_bits(nearest_bf16(x * inverse));
            }
        });
    }
}

for_each_isa! {
    /// Likewise of integers; anything where the scale is NaN.
    pub(crate) fn coded_int8(cpu: Cpu, values: &[f32], size: usize, scales: &[f32], codes: &mut [i8]) {
        let mut scales = scales.iter();
        runs(values, size, codes, |values, codes| {
            let inverse = 1.0 / scales.next().expect("every run has a scale");
            for (code, &x) in codes.iter_mut().zip(values) {
                *code = int8_anchored(x * inverse).to_bits() as i8;
            }
        });
    }
}

for_each_isa! {
    /// The sums of groups of codes.
    pub(crate) fn sums_of_codes(
        cpu: Cpu,
        codes: &[i8],
        groups: &mut dyn Iterator<Item = Range<usize>>,
        sum: &mut dyn FnMut(i32),
    ) {
        for group in groups {
            sum(codes[group].iter().map(|code| i32::from(*code)).sum());
        }
    }
}

for_each_isa! {
    fn int8_bytes(cpu: Cpu, row: &[f32], scale: f32, codes: &mut [u8]) {
        for (code, &x) in codes.iter_mut().zip(row) {
            // The low bits of the sum are the code.
            *code = int8_anchored(x / scale).to_bits() as u8;
        }
    }
}
