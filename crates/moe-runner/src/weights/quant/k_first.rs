//! Integers stored K first: GPTQ, AWQ and Quark. They are turned into rows once, when they are
//! loaded, one projection after the other; so are their scales and zero points.

use std::sync::Arc;

use moe_kernels::numerics::{int4, int8};

use super::module::{
    FLOATS, Module, Result, WORDS, expect_dims, expect_dtype, scale_type, transpose,
};
use super::names;
use super::packed::{element, with_groups};
use crate::checkpoint::Tensor;
use crate::spec::Granularity;
use crate::weights::{Element, Matrix, Scaled, Scales, Zeros};

/// Groups along K.
struct Groups {
    granularity: Granularity,
    size: usize,
    count: usize,
}

impl Groups {
    fn new(group: Option<usize>, cols: usize) -> Self {
        let size = group.unwrap_or(cols).max(1);
        let granularity = if group.is_some() { Granularity::Group } else { Granularity::Channel };
        Self { granularity, size, count: cols.div_ceil(size) }
    }

    /// Scales `[groups, N]` as `[N, groups]`.
    fn scales(&self, tensor: &Tensor, [rows, cols]: [usize; 2]) -> Result<Scales> {
        let kind = scale_type(tensor, FLOATS)?;
        expect_dims(tensor, &[self.count, rows])?;
        let bytes = transpose(&tensor.bytes, self.count, rows, kind.size());
        Scales::new(bytes.into(), kind, self.granularity, [1, self.size], [rows, cols])
            .ok_or_else(|| tensor.error("does not hold a scale for each group").into())
    }

    /// `code(group, n)` for all zero points, in the order of the scales.
    fn zeros(&self, rows: usize, code: impl Fn(usize, usize) -> i16) -> Zeros {
        let each = (0..rows).flat_map(|n| (0..self.count).map(move |group| (group, n)));
        let zeros: Arc<[i16]> = each.map(|(group, n)| code(group, n)).collect();
        Zeros::Each(zeros)
    }
}

/// GPTQ. Zero points of the first version are one less than meant: one is added to each by itself,
/// so that 15 becomes 16 and nothing is carried into its neighbour.
pub(super) fn gptq(
    module: &mut Module,
    bits: usize,
    group: Option<usize>,
    symmetric: bool,
    zeros_less_one: bool,
) -> Result<Matrix> {
    let [rows, cols] = module.dims();
    let per_word = 32 / bits;
    let tensor = module.need(names::QWEIGHT)?;
    expect_dtype(&tensor, WORDS)?;
    if !cols.is_multiple_of(per_word) {
        let reason = format!("packs {per_word} rows in a word, which {cols} rows do not fill");
        return Err(tensor.error(reason).into());
    }
    tensor.expect_shape(&[cols / per_word, rows])?;
    let groups = Groups::new(group, cols);
    let scales = groups.scales(&module.need(names::QSCALES)?, [rows, cols])?;
    let (element, middle) = element(bits);
    let zeros = match symmetric {
        true => {
            module.set_aside(names::QZEROS)?;
            Zeros::Same(middle)
        }
        false => {
            let stored = module.need(names::QZEROS)?;
            expect_dtype(&stored, WORDS)?;
            let words = rows.div_ceil(per_word);
            expect_dims(&stored, &[groups.count, words])?;
            let offset = i16::from(zeros_less_one);
            groups.zeros(rows, |group, n| {
                let index = group * words * per_word + n;
                let code = match bits {
                    4 => int4::nibble(&stored.bytes, index),
                    _ => stored.bytes[index],
                };
                i16::from(code) + offset
            })
        }
    };
    let mut codes = vec![0; tensor.bytes.len()];
    match bits {
        4 => int4::gptq_to_rows(&tensor.bytes, rows, cols, &mut codes),
        _ => int8::gptq_to_rows(&tensor.bytes, rows, cols, &mut codes),
    }
    let scaled = Scaled::new(element, codes.into(), [rows, cols], scales, zeros, None)
        .ok_or_else(|| tensor.error("cannot be read with these scales"))?;
    let scaled = match module.find(names::G_IDX)? {
        Some(groups) => with_groups(scaled, &groups)?,
        None => scaled,
    };
    module.set_zero_bias_aside()?;
    module.part(Arc::new(scaled))
}

/// 4-bit integers packed along N: AWQ and Quark.
pub(super) fn packed_along_n(
    module: &mut Module,
    group: Option<usize>,
    symmetric: bool,
    interleaved: bool,
    signed: bool,
) -> Result<Matrix> {
    let [rows, cols] = module.dims();
    let awq = [names::QWEIGHT, names::QSCALES, names::QZEROS].concat();
    let quark = module.name(&awq).is_none();
    let (codes, scales, zeros) = match quark {
        true => (names::CODES, names::SCALES, names::ZEROS),
        false => (names::QWEIGHT, names::QSCALES, names::QZEROS),
    };
    let tensor = module.need(codes)?;
    expect_dtype(&tensor, WORDS)?;
    if !rows.is_multiple_of(8) || !cols.is_multiple_of(8) {
        let reason = format!("packs 8 columns in a word, which [{cols}, {rows}] do not fill");
        return Err(tensor.error(reason).into());
    }
    tensor.expect_shape(&[cols, rows / 8])?;
    let groups = Groups::new(group, cols);
    let scales = groups.scales(&module.need(scales)?, [rows, cols])?;
    let zeros = match symmetric {
        true => {
            module.set_aside(zeros)?;
            Zeros::Same(8)
        }
        false => {
            let stored = module.need(zeros)?;
            expect_dtype(&stored, WORDS)?;
            expect_dims(&stored, &[groups.count, rows / 8])?;
            groups.zeros(rows, |group, n| match interleaved {
                true => i16::from(int4::awq_nibble(&stored.bytes, rows, n, group)),
                false => i16::from(int4::nibble(&stored.bytes, group * rows + n)),
            })
        }
    };
    let mut codes = vec![0; tensor.bytes.len()];
    match interleaved {
        true => int4::awq_to_rows(&tensor.bytes, rows, cols, &mut codes),
        false => transpose_nibbles(&tensor.bytes, cols, rows, &mut codes),
    }
    if signed {
        codes.iter_mut().for_each(|byte| *byte ^= 0x88);
    }
    let scaled = Scaled::new(Element::Uint4, codes.into(), [rows, cols], scales, zeros, None)
        .ok_or_else(|| tensor.error("cannot be read with these scales"))?;
    module.set_zero_bias_aside()?;
    module.part(Arc::new(scaled))
}

/// `[rows, cols]` nibbles, both even, transposed.
fn transpose_nibbles(from: &[u8], rows: usize, cols: usize, to: &mut [u8]) {
    for row in 0..rows {
        for col in 0..cols {
            let at = col * rows + row;
            to[at / 2] |= int4::nibble(from, row * cols + col) << (4 * (at % 2));
        }
    }
}
