//! Codes with scales: `w[n, k] = (code[n, k] − zero) · scale[block of (n, k)]`, or
//! `code[n, k] · scale + minimum`, and for some formats one more scale for the whole tensor.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use super::{Bytes, Element, Granularity, Misfit, Packing, ScaleType, Scales, WeightFormat, Zeros};
use crate::numerics::{DecodeScale, EncodeScale, for_each_group};

/// The scale of a whole tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Global {
    /// Weights are divided by it (compressed-tensors).
    Divide(EncodeScale),
    /// Weights are multiplied by it (ModelOpt, Quark).
    Multiply(DecodeScale),
}

/// Codes and scales of a matrix `[rows, cols]`.
#[derive(Clone, Debug)]
pub struct Codes {
    format: WeightFormat,
    element: Element,
    packing: Packing,
    bytes: Bytes,
    stride: usize,
    rows: usize,
    cols: usize,
    scales: Scales,
    zeros: Zeros,
    global: Option<Global>,
    group_of: Option<Arc<[u32]>>,
}

impl Codes {
    /// `bytes` are the codes in the order of `packing`; `scales` were made for the same matrix.
    ///
    /// # Errors
    /// If the codes are too few or too many, there is not a zero point or minimum for each scale, or no
    /// format has such elements with such scales.
    pub fn new(
        (element, packing): (Element, Packing),
        bytes: Bytes,
        [rows, cols]: [usize; 2],
        scales: Scales,
        zeros: Zeros,
        global: Option<Global>,
    ) -> Result<Self, Misfit> {
        let stride = packing.stride(element, [rows, cols], bytes.len())?;
        if let Zeros::Each(zeros) = &zeros
            && zeros.shape() != scales.shape()
        {
            let (zeros, scales) = (zeros.shape(), scales.shape());
            return Err(Misfit::new(format!("zero points {zeros:?} for scales {scales:?}")));
        }
        if let Zeros::Minima(minima) = &zeros
            && (minima.block(), minima.shape()) != (scales.block(), scales.shape())
        {
            let (minima, scales) = (minima.shape(), scales.shape());
            return Err(Misfit::new(format!("minima {minima:?} for scales {scales:?}")));
        }
        let format = format(element, &scales, &zeros, global).ok_or_else(|| {
            let (block, stored) = (scales.block(), scales.stored());
            Misfit::new(format!(
                "no format has {element:?} codes with {stored} scales of {block:?}"
            ))
        })?;
        let group_of = None;
        Ok(Self {
            format,
            element,
            packing,
            bytes,
            stride,
            rows,
            cols,
            scales,
            zeros,
            global,
            group_of,
        })
    }

    /// The same with the group of each column given (act-order), where it is not simply
    /// `column / size`.
    ///
    /// # Errors
    /// If there is not a group for each column, or a group has no scale.
    pub fn with_groups(self, group_of: Arc<[u32]>) -> Result<Self, Misfit> {
        let [_, groups] = self.scales.shape();
        let (found, cols) = (group_of.len(), self.cols);
        if found != cols {
            return Err(Misfit::new(format!("{found} groups are named for {cols} columns")));
        }
        if let Some(group) = group_of.iter().find(|group| **group as usize >= groups) {
            return Err(Misfit::new(format!("group {group} is named, scales are for {groups}")));
        }
        let size = self.scales.block()[1];
        let plain = group_of.iter().enumerate().all(|(k, g)| *g as usize == k / size);
        Ok(Self { group_of: (!plain).then_some(group_of), ..self })
    }

    /// The name of the format.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// Format of a code.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Order of the codes in memory.
    pub fn packing(&self) -> Packing {
        self.packing
    }

    /// All codes, as they are stored.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes from one line of the stored codes to the next: from row to row for
    /// [`Packing::Rows`], from column to column for [`Packing::Transposed`] and [`Packing::Awq`],
    /// from the words (or pairs) of some columns to those of the next for [`Packing::Gptq`] and
    /// [`Packing::TransposedPairs`].
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The scales of blocks.
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// The zero points.
    pub fn zeros(&self) -> &Zeros {
        &self.zeros
    }

    /// The scale of the whole tensor.
    pub fn global(&self) -> Option<Global> {
        self.global
    }

    /// The group of each column, where it is not simply `column / size`.
    pub fn group_of(&self) -> Option<&[u32]> {
        self.group_of.as_deref()
    }

    /// What is subtracted from the codes of row `row` in the `group`-th block of columns.
    #[inline]
    pub fn zero(&self, row: usize, group: usize) -> f32 {
        match &self.zeros {
            Zeros::None | Zeros::Minima(_) => 0.0,
            Zeros::Same(zero) => f32::from(*zero),
            Zeros::Each(zeros) => f32::from(zeros.get(row / self.scales.block()[0], group)),
        }
    }

    /// Writes the codes of `cols` of `row`, one to a byte.
    ///
    /// # Panics
    /// If they do not lie inside the array, or `out` has another length than `cols`.
    pub fn codes(&self, row: usize, cols: Range<usize>, out: &mut [u8]) {
        assert!(row < self.rows && cols.end <= self.cols && cols.len() == out.len());
        self.packing.codes(self.element, &self.bytes, self.stride, row, cols, out);
    }

    /// The codes of one row, packed as [`Packing::Rows`] has them: borrowed where they lie so.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> Cow<'_, [u8]> {
        if self.packing == Packing::Rows {
            return Cow::Borrowed(&self.bytes[row * self.stride..(row + 1) * self.stride]);
        }
        let mut codes = vec![0; self.cols];
        self.codes(row, 0..self.cols, &mut codes);
        if self.element.bits() == 4 {
            // an odd row ends with a low nibble
            let pairs = codes.chunks(2);
            let bytes = pairs.map(|pair| pair[0] | pair.get(1).map_or(0, |high| high << 4));
            codes = bytes.collect();
        }
        Cow::Owned(codes)
    }

    /// Writes the numbers that the codes of `cols` of `row` stand for, without any scale.
    ///
    /// # Panics
    /// As [`codes`](Self::codes).
    pub fn elements(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        assert!(row < self.rows && cols.end <= self.cols && cols.len() == out.len());
        if self.packing == Packing::Rows {
            let line = &self.bytes[row * self.stride..(row + 1) * self.stride];
            return self.element.decode(line, cols.start, out);
        }
        let mut codes = [0; 64];
        for (out, start) in out.chunks_mut(codes.len()).zip(cols.step_by(codes.len())) {
            let codes = &mut codes[..out.len()];
            let cols = start..start + out.len();
            self.packing.codes(self.element, &self.bytes, self.stride, row, cols, codes);
            out.iter_mut().zip(codes).for_each(|(out, code)| *out = self.element.value(*code));
        }
    }

    pub(super) fn decode(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        let start = cols.start;
        self.elements(row, cols.clone(), out);
        match &self.group_of {
            None => for_each_group(out, start, self.scales.block()[1], |group, values| {
                self.scale(row, group, values);
            }),
            Some(groups) => {
                for (value, group) in out.chunks_mut(1).zip(&groups[cols]) {
                    self.scale(row, *group as usize, value);
                }
            }
        }
    }

    /// Scales `values`, codes of one row and group. One rounding: codes less zero points are exact;
    /// so are E2M1 codes times E4M3 scales, and where two f32 scales meet, float64 holds the product.
    /// Before a minimum is added, codes times scales of 16 bits are exact, and others are not rounded.
    #[inline]
    fn scale(&self, row: usize, group: usize, values: &mut [f32]) {
        let scale = self.scales.get(row, group);
        if let Zeros::Minima(minima) = &self.zeros {
            let minimum = minima.get(row, group);
            return match self.scales.stored() {
                ScaleType::F32 => values.iter_mut().for_each(|v| *v = v.mul_add(scale, minimum)),
                _ => values.iter_mut().for_each(|v| *v = *v * scale + minimum),
            };
        }
        let zero = self.zero(row, group);
        match self.global {
            None => values.iter_mut().for_each(|v| *v = (*v - zero) * scale),
            Some(Global::Divide(EncodeScale(global))) => {
                values.iter_mut().for_each(|v| *v = (*v - zero) * scale / global);
            }
            Some(Global::Multiply(DecodeScale(global)))
                if matches!(self.scales.stored(), ScaleType::E4m3 | ScaleType::E8m0) =>
            {
                values.iter_mut().for_each(|v| *v = (*v - zero) * scale * global);
            }
            Some(Global::Multiply(DecodeScale(global))) => {
                let both = f64::from(scale) * f64::from(global);
                values.iter_mut().for_each(|v| *v = (f64::from(*v - zero) * both) as f32);
            }
        }
    }

    pub(super) fn describe(&self) -> String {
        let [rows, cols] = self.scales.block();
        let name = self.format.to_string();
        // the formats' names hold the word where the size belongs
        let sized = match self.scales.granularity() {
            Granularity::Group => name.replace("group", &format!("group of {cols}")),
            Granularity::Block => name.replace("block", &format!("block of {rows}x{cols}")),
            Granularity::Tensor | Granularity::Channel => name,
        };
        match self.group_of {
            Some(_) => sized + " in act-order",
            None => sized,
        }
    }

    pub(super) fn stored_bytes(&self) -> usize {
        let zeros = match &self.zeros {
            Zeros::Each(zeros) => zeros.stored_bytes(),
            Zeros::Minima(minima) => minima.stored_bytes(),
            Zeros::None | Zeros::Same(_) => 0,
        };
        let order = self.group_of.as_ref().map_or(0, |groups| groups.len() * 4);
        self.bytes.len() + self.scales.stored_bytes() + zeros + order
    }
}

/// The name of a combination.
fn format(
    element: Element,
    scales: &Scales,
    zeros: &Zeros,
    global: Option<Global>,
) -> Option<WeightFormat> {
    use WeightFormat as F;
    let granularity = scales.granularity();
    let per = |size| granularity == Granularity::Group && scales.block()[1] == size;
    let (powers, eighths) =
        (scales.stored() == ScaleType::E8m0, scales.stored() == ScaleType::E4m3);
    let asymmetric = matches!(zeros, Zeros::Each(_));
    if let Zeros::Minima(minima) = zeros {
        use Element::{Uint1, Uint2, Uint3, Uint4, Uint5, Uint6, Uint8};
        let floats = ![scales.stored(), minima.stored()]
            .iter()
            .any(|stored| matches!(stored, ScaleType::E4m3 | ScaleType::E8m0));
        let unsigned = matches!(element, Uint1 | Uint2 | Uint3 | Uint4 | Uint5 | Uint6 | Uint8);
        let fits = floats && unsigned && granularity == Granularity::Group && global.is_none();
        return fits.then_some(F::IntMinima(element.bits() as u8));
    }
    Some(match element {
        Element::E4m3 if powers && per(32) => F::Mxfp8,
        Element::E4m3 if !eighths => F::Fp8(granularity),
        Element::E5m2 if !eighths => F::Fp8E5m2(granularity),
        Element::E2m1 if powers && per(32) => F::Mxfp4,
        Element::E2m1 if eighths && per(16) => F::Nvfp4,
        Element::E2m3 if powers && per(32) => F::Mxfp6E2m3,
        Element::E3m2 if powers && per(32) => F::Mxfp6E3m2,
        Element::Int8 | Element::Uint8 if !eighths => match asymmetric {
            true => F::Int8Asymmetric(granularity),
            false => F::Int8(granularity),
        },
        Element::Uint4 | Element::Int4 if !eighths => match asymmetric {
            true => F::Int4Asymmetric(granularity),
            false => F::Int4(granularity),
        },
        _ => return None,
    })
}
