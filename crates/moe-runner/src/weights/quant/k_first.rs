//! Integers stored K first: GPTQ, AWQ and Quark, with their scales and zero points.

use super::module::{FLOATS, Module, Result, WORDS, expect_dims, expect_dtype, misfit, scale_type};
use super::names;
use super::packed::{element, with_groups};
use crate::checkpoint::Tensor;
use crate::spec::Granularity;
use crate::weights::{Codes, Element, Matrix, Packing, Scales, ZeroPacking, ZeroPoints, Zeros};

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

    /// Scales `[groups, N]`.
    fn scales(&self, tensor: &Tensor, [rows, cols]: [usize; 2]) -> Result<Scales> {
        let kind = scale_type(tensor, FLOATS)?;
        expect_dims(tensor, &[self.count, rows])?;
        let (bytes, block) = (tensor.bytes.clone(), [1, self.size]);
        let scales = Scales::new(bytes, kind, self.granularity, block, [rows, cols]);
        scales.map(Scales::transposed).map_err(misfit(tensor))
    }

    /// Zero points of `rows` rows, in words along N.
    fn zeros(
        &self,
        tensor: &Tensor,
        packing: ZeroPacking,
        rows: usize,
        per_word: usize,
        offset: i16,
    ) -> Result<Zeros> {
        expect_dtype(tensor, WORDS)?;
        expect_dims(tensor, &[self.count, rows.div_ceil(per_word)])?;
        let zeros = ZeroPoints::new(tensor.bytes.clone(), packing, [rows, self.count], offset);
        zeros.map(Zeros::Each).map_err(misfit(tensor))
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
            let packing = if bits == 4 { ZeroPacking::Nibbles } else { ZeroPacking::Bytes };
            let stored = module.need(names::QZEROS)?;
            groups.zeros(&stored, packing, rows, per_word, i16::from(zeros_less_one))?
        }
    };
    let (packing, shape) = ((element, Packing::Gptq), [rows, cols]);
    let codes = Codes::new(packing, tensor.bytes.clone(), shape, scales, zeros, None);
    let codes = codes.map_err(misfit(&tensor))?;
    let codes = match module.find(names::G_IDX)? {
        Some(groups) => with_groups(codes, &groups)?,
        None => codes,
    };
    module.set_zero_bias_aside()?;
    module.part(codes)
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
    // zero points count from the least code, −8 where codes are signed
    let (element, least) = if signed { (Element::Int4, -8) } else { (Element::Uint4, 0) };
    let zeros = match symmetric {
        true => {
            module.set_aside(zeros)?;
            Zeros::Same(8 + least)
        }
        false => {
            let packing = if interleaved { ZeroPacking::Awq } else { ZeroPacking::Nibbles };
            groups.zeros(&module.need(zeros)?, packing, rows, 8, least)?
        }
    };
    let packing = if interleaved { Packing::Awq } else { Packing::Transposed };
    let codes = tensor.bytes.clone();
    let codes = Codes::new((element, packing), codes, [rows, cols], scales, zeros, None);
    let codes = codes.map_err(misfit(&tensor))?;
    module.set_zero_bias_aside()?;
    module.part(codes)
}
