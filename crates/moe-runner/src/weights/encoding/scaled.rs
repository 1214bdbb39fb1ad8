//! Codes with scales: `w[n, k] = (code[n, k] − zero) · scale[block of (n, k)]`, and for some formats
//! one more scale for the whole tensor.

use std::ops::Range;
use std::sync::Arc;

use moe_kernels::numerics::{DecodeScale, EncodeScale, for_each_group};

use super::{Element, ScaleType, Scales};
use crate::checkpoint::Bytes;
use crate::spec::{Granularity, WeightFormat};
use crate::weights::Encoding;
use crate::weights::portable::{RowWindow, Writer, write_scaled};

/// What is subtracted from codes before they are scaled.
#[derive(Clone, Debug, PartialEq)]
pub enum Zeros {
    /// Nothing.
    None,
    /// The same for all: the middle of the codes.
    Same(i16),
    /// One beside each scale, in the same order.
    Each(Arc<[i16]>),
}

/// The scale of a whole tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Global {
    /// Weights are divided by it (compressed-tensors).
    Divide(EncodeScale),
    /// Weights are multiplied by it (ModelOpt, Quark).
    Multiply(DecodeScale),
}

/// Codes and scales of a matrix `[rows, cols]`, row after row.
#[derive(Clone, Debug)]
pub struct Scaled {
    format: WeightFormat,
    element: Element,
    codes: Bytes,
    row_bytes: usize,
    rows: usize,
    cols: usize,
    scales: Scales,
    zeros: Zeros,
    global: Option<Global>,
    group_of: Option<Arc<[u32]>>,
}

impl Scaled {
    /// `codes` are `rows` rows of equal length, which may be padded at their ends; `scales` were
    /// made for the same matrix. `None` if the codes are too few, there is not a zero point for
    /// each scale, or no format has such elements with such scales.
    pub fn new(
        element: Element,
        codes: Bytes,
        [rows, cols]: [usize; 2],
        scales: Scales,
        zeros: Zeros,
        global: Option<Global>,
    ) -> Option<Self> {
        let row_bytes = codes.len().checked_div(rows).unwrap_or(0);
        if row_bytes * rows != codes.len() || row_bytes < element.row_bytes(cols)? {
            return None;
        }
        if let Zeros::Each(zeros) = &zeros
            && zeros.len() * scales.stored().size() != scales.bytes().len()
        {
            return None;
        }
        let format = format(element, &scales, &zeros)?;
        let group_of = None;
        Some(Self {
            format,
            element,
            codes,
            row_bytes,
            rows,
            cols,
            scales,
            zeros,
            global,
            group_of,
        })
    }

    /// The same with the group of each column given (act-order), where it is not simply
    /// `column / size`. `None` if there is not a group for each column, or a group has no scale.
    pub fn with_groups(self, group_of: Arc<[u32]>) -> Option<Self> {
        let per_row = self.scales.per_row();
        let fits = group_of.len() == self.cols && group_of.iter().all(|g| (*g as usize) < per_row);
        if !fits {
            return None;
        }
        let size = self.scales.block()[1];
        let plain = group_of.iter().enumerate().all(|(k, g)| *g as usize == k / size);
        Some(Self { group_of: (!plain).then_some(group_of), ..self })
    }

    /// Format of the codes.
    pub fn element(&self) -> Element {
        self.element
    }

    /// All codes, row after row, [`row_bytes`](Self::row_bytes) bytes each.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Bytes from one row of codes to the next.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
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

    /// Scales `values`, codes that share the scale and the zero point number `index`. One rounding:
    /// codes less zero points are exact; so are E2M1 codes times E4M3 scales, and where two f32
    /// scales meet, float64 holds the product.
    #[inline]
    fn scale(&self, index: usize, values: &mut [f32]) {
        let scale = self.scales.get(index);
        let zero = match &self.zeros {
            Zeros::None => 0.0,
            Zeros::Same(zero) => f32::from(*zero),
            Zeros::Each(zeros) => f32::from(zeros[index]),
        };
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
}

/// The name of a combination.
fn format(element: Element, scales: &Scales, zeros: &Zeros) -> Option<WeightFormat> {
    use WeightFormat as F;
    let granularity = scales.granularity();
    let per = |size| granularity == Granularity::Group && scales.block()[1] == size;
    let (powers, eighths) =
        (scales.stored() == ScaleType::E8m0, scales.stored() == ScaleType::E4m3);
    let asymmetric = matches!(zeros, Zeros::Each(_));
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
        Element::Uint4 if !eighths => match asymmetric {
            true => F::Int4Asymmetric(granularity),
            false => F::Int4(granularity),
        },
        _ => return None,
    })
}

impl Encoding for Scaled {
    fn format(&self) -> WeightFormat {
        self.format
    }

    fn describe(&self) -> String {
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

    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn decode(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        assert_eq!(cols.len(), out.len());
        let start = cols.start;
        let codes = &self.codes[row * self.row_bytes..(row + 1) * self.row_bytes];
        self.element.decode(codes, start, out);
        let first = self.scales.index(row, 0);
        match &self.group_of {
            None => for_each_group(out, start, self.scales.block()[1], |group, values| {
                self.scale(first + group, values);
            }),
            Some(groups) => {
                for (value, group) in out.chunks_mut(1).zip(&groups[cols]) {
                    self.scale(first + *group as usize, value);
                }
            }
        }
    }

    fn bytes_of_rows(&self, rows: usize) -> usize {
        let zeros = match &self.zeros {
            Zeros::Each(zeros) => zeros.len() * self.element.bits() / 8,
            Zeros::None | Zeros::Same(_) => 0,
        };
        let order = self.group_of.as_ref().map_or(0, |groups| groups.len() * 4);
        let all = self.codes.len() + self.scales.bytes().len() + zeros + order;
        (all as u128 * rows as u128 / self.rows.max(1) as u128) as usize
    }

    fn write_rows(&self, window: RowWindow, to: &mut Writer) {
        write_scaled(self, window, to);
    }

    fn scaled(&self) -> Option<&Scaled> {
        Some(self)
    }
}
