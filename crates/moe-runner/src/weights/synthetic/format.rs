//! Random matrices in every format of weights that can be read.
//!
//! Codes are uniform over what the format holds, scales vary from block to block, and both are such
//! that products with rows of unit variance have unit variance. They are drawn as they are stored,
//! not quantised: a gigabyte of them takes a second or two.

use half::{bf16, f16};
use moe_kernels::numerics::ggml::BlockType;
use moe_kernels::numerics::quantise::Qdq;
use moe_kernels::numerics::{DecodeScale, e2m1, e2m3, e3m2, e4m3, e5m2, e8m0};

use crate::random::Random;
use crate::spec::Granularity;
use crate::weights::{
    ActivationQuant, Blocks, Codes, Element, FloatType, Floats, Global, Matrix, Packing, ScaleType,
    Scales, Zeros,
};

/// How random weights are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RandomFormat {
    /// Plain floats.
    Float(FloatType),
    /// Codes with scales in an array of their own.
    Scaled(RandomScaled),
    /// Blocks of GGUF; rows are whole blocks.
    Ggml(BlockType),
}

/// Codes with scales.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RandomScaled {
    /// The codes.
    pub element: Element,
    /// Stored type of the scales; E4M3 ones come with a scale for the whole matrix.
    pub scales: ScaleType,
    /// Which weights share a scale.
    pub granularity: Granularity,
    /// Rows and columns that share one, for groups and blocks.
    pub block: [usize; 2],
    /// How the rows that the matrix multiplies are quantised; `None`: not at all.
    pub input: Option<Qdq>,
}

impl From<FloatType> for RandomFormat {
    fn from(float: FloatType) -> Self {
        Self::Float(float)
    }
}

impl RandomFormat {
    /// The floats of what such a checkpoint does not quantise: gate and transforms.
    pub fn float(&self) -> FloatType {
        match self {
            Self::Float(float) => *float,
            Self::Scaled(_) => FloatType::Bf16,
            Self::Ggml(_) => FloatType::F32,
        }
    }

    /// Bytes of a matrix `[rows, cols]`, scales included; `None` if the format cannot hold it.
    pub fn bytes(&self, rows: usize, cols: usize) -> Option<usize> {
        match self {
            Self::Float(float) => rows.checked_mul(cols)?.checked_mul(float.size()),
            Self::Ggml(block) => rows.checked_mul(block.row_bytes(cols)?),
            Self::Scaled(scaled) => {
                let codes = rows.checked_mul(scaled.element.row_bytes(cols)?)?;
                codes.checked_add(scaled.scale_count(rows, cols) * scaled.scales.size())
            }
        }
    }

    /// A random matrix `[rows, cols]`; `None` if the format cannot hold it: rows are no whole
    /// blocks, or no format has such codes with such scales.
    pub fn matrix(&self, random: &mut Random, rows: usize, cols: usize) -> Option<Matrix> {
        match self {
            Self::Float(float) => floats(random, *float, rows, cols),
            Self::Scaled(scaled) => scaled.matrix(random, rows, cols),
            Self::Ggml(block) => blocks(random, *block, rows, cols),
        }
    }
}

fn floats(random: &mut Random, float: FloatType, rows: usize, cols: usize) -> Option<Matrix> {
    let bound = (3.0 / cols as f32).sqrt();
    let mut bytes = Vec::with_capacity(rows * cols * float.size());
    for _ in 0..rows * cols {
        let v = random.symmetric(bound);
        match float {
            FloatType::F32 => bytes.extend_from_slice(&v.to_le_bytes()),
            FloatType::F16 => bytes.extend_from_slice(&f16::from_f32(v).to_le_bytes()),
            FloatType::Bf16 => bytes.extend_from_slice(&bf16::from_f32(v).to_le_bytes()),
        }
    }
    Floats::row_major(bytes.into(), float, [rows, cols]).map(Matrix::new).ok()
}

/// The largest code, and the code of the number nearest to `v`.
fn element_code(element: Element, v: f32) -> (f32, u8) {
    let whole = |max: f32| (v * max).round();
    match element {
        Element::E4m3 => (e4m3::MAX, e4m3::encode(v * e4m3::MAX)),
        Element::E5m2 => (e5m2::MAX, e5m2::encode(v * e5m2::MAX)),
        Element::E2m1 => (e2m1::MAX, e2m1::encode(v * e2m1::MAX)),
        Element::E2m3 => (e2m3::MAX, e2m3::encode(v * e2m3::MAX)),
        Element::E3m2 => (e3m2::MAX, e3m2::encode(v * e3m2::MAX)),
        Element::Int8 => (127.0, whole(127.0) as i8 as u8),
        Element::Uint8 => (127.0, (whole(127.0) as i16 + UINT8_ZERO) as u8),
        Element::Uint4 => (7.0, (whole(7.0) as i16 + UINT4_ZERO) as u8),
        Element::Int4 => (7.0, whole(7.0) as i8 as u8 & 15),
        Element::Uint1 | Element::Uint2 | Element::Uint3 | Element::Uint5 | Element::Uint6 => {
            let middle = middle(element);
            let max = (middle - 1.0).max(1.0);
            (max, (whole(max) + middle).min(2.0 * middle - 1.0) as u8)
        }
    }
}

/// What is taken off unsigned codes.
fn middle(element: Element) -> f32 {
    (1 << (element.bits() - 1)) as f32
}

const UINT8_ZERO: i16 = 128;
const UINT4_ZERO: i16 = 8;

impl RandomScaled {
    fn scale_count(&self, rows: usize, cols: usize) -> usize {
        match self.granularity {
            Granularity::Tensor => 1,
            Granularity::Channel => rows,
            Granularity::Group => rows * cols.div_ceil(self.block[1].max(1)),
            Granularity::Block => {
                rows.div_ceil(self.block[0].max(1)) * cols.div_ceil(self.block[1].max(1))
            }
        }
    }

    fn matrix(&self, random: &mut Random, rows: usize, cols: usize) -> Option<Matrix> {
        let (max, _) = element_code(self.element, 0.0);
        // evenly spaced over what the element holds
        let table: [u8; 256] =
            std::array::from_fn(|i| element_code(self.element, (i as f32 + 0.5) / 128.0 - 1.0).1);
        let row_bytes = self.element.row_bytes(cols)?;
        let mut codes = Vec::with_capacity(rows.checked_mul(row_bytes)?);
        for _ in 0..rows {
            codes_of_row(random, &table, self.element.bits(), row_bytes, &mut codes);
        }
        // codes are uniform in ±max: their variance is max² / 3
        let wanted = (3.0 / cols as f32).sqrt() / max;
        let (global, wanted) = match self.scales {
            // block scales in the upper half of what E4M3 holds
            ScaleType::E4m3 => {
                let middle = 0.75 * e4m3::MAX;
                (Some(Global::Multiply(DecodeScale(wanted / middle))), middle)
            }
            _ => (None, wanted),
        };
        let count = self.scale_count(rows, cols);
        let mut scales = Vec::with_capacity(count * self.scales.size());
        (0..count).for_each(|_| self.push_scale(random, wanted, &mut scales));
        let shape = [rows, cols];
        let (granularity, block) = (self.granularity, self.block);
        let numbers =
            |bytes: Vec<u8>| Scales::new(bytes.into(), self.scales, granularity, block, shape).ok();
        let scales = numbers(scales)?;
        let zeros = match self.element {
            Element::Uint1 | Element::Uint2 | Element::Uint3 | Element::Uint5 | Element::Uint6 => {
                let mut minima = Vec::new();
                // exact: powers of two
                let least = scales.iter().map(|scale| -middle(self.element) * scale);
                least.for_each(|least| push(self.scales, least, &mut minima));
                Zeros::Minima(numbers(minima)?)
            }
            Element::Uint8 => Zeros::Same(UINT8_ZERO),
            Element::Uint4 => Zeros::Same(UINT4_ZERO),
            _ => Zeros::None,
        };
        let packing = (self.element, Packing::Rows);
        let codes = Codes::new(packing, codes.into(), shape, scales, zeros, global).ok()?;
        let input = self.input.map_or(ActivationQuant::None, ActivationQuant::Quantised);
        Some(Matrix::new(codes).with_input(input))
    }

    /// A scale around `wanted`; the mean of the squares is its square.
    fn push_scale(&self, random: &mut Random, wanted: f32, to: &mut Vec<u8>) {
        // (1 + ε)², ε uniform in ±1/4, has the mean 49/48
        let near = wanted * (1.0 + random.symmetric(0.25)) / (49.0_f32 / 48.0).sqrt();
        match self.scales {
            ScaleType::E8m0 => to.push(power_of_two(random, wanted)),
            stored => push(stored, near, to),
        }
    }
}

/// The power of two below `wanted` or the one above it; the mean of the squares is its square.
fn power_of_two(random: &mut Random, wanted: f32) -> u8 {
    let exponent = wanted.log2().floor();
    let over = f64::from((wanted / exponent.exp2()).powi(2));
    // p · 4 + (1 − p) · 1 = over
    let above = random.unit() < (over - 1.0) / 3.0;
    e8m0::from_exponent(exponent as i32 + i32::from(above))
}

/// Appends a number; powers of two are another's affair.
fn push(stored: ScaleType, value: f32, to: &mut Vec<u8>) {
    match stored {
        ScaleType::F32 => to.extend_from_slice(&value.to_le_bytes()),
        ScaleType::F16 => to.extend_from_slice(&f16::from_f32(value).to_le_bytes()),
        ScaleType::Bf16 => to.extend_from_slice(&bf16::from_f32(value).to_le_bytes()),
        ScaleType::E4m3 => to.push(e4m3::encode(value)),
        ScaleType::E8m0 => {}
    }
}

/// Appends a row of `row_bytes` bytes: codes of `bits` bits, drawn from `table`, the first in the
/// lowest bits.
fn codes_of_row(
    random: &mut Random,
    table: &[u8; 256],
    bits: usize,
    row_bytes: usize,
    to: &mut Vec<u8>,
) {
    let end = to.len() + row_bytes;
    while to.len() < end {
        let draws = random.bits().to_le_bytes().map(|draw| table[usize::from(draw)]);
        let packed = match bits {
            8 => u64::from_le_bytes(draws),
            _ => draws.iter().rev().fold(0, |packed, code| packed << bits | u64::from(*code)),
        };
        // eight codes are `bits` whole bytes
        to.extend_from_slice(&packed.to_le_bytes()[..bits.min(end - to.len())]);
    }
}

/// Where the f16 scale of a block stands, and, for types with one, its f16 minimum: its offset, and
/// its multiple of the scale that takes the mean of random values to zero.
fn scale_of(block: BlockType) -> Option<(usize, Option<(usize, f32)>)> {
    Some(match block {
        BlockType::Q4_0 | BlockType::Q5_0 | BlockType::Q8_0 => (0, None),
        BlockType::Q4_1 => (0, Some((2, -7.5))),
        BlockType::Q5_1 => (0, Some((2, -15.5))),
        BlockType::Q2K => (80, Some((82, 1.5))),
        BlockType::Q3K => (108, None),
        BlockType::Q4K => (0, Some((2, 7.5))),
        BlockType::Q5K => (0, Some((2, 15.5))),
        BlockType::Q6K => (208, None),
        BlockType::Iq4Nl | BlockType::Iq4Xs => (0, None),
        BlockType::Iq1S | BlockType::Iq2Xxs | BlockType::Iq2Xs => (0, None),
        BlockType::Iq2S | BlockType::Iq3Xxs | BlockType::Iq3S => (0, None),
        BlockType::Tq1_0 => (52, None),
        BlockType::Tq2_0 => (64, None),
        // an E8M0 scale, its first byte; or a type that is newer than this table
        _ => return None,
    })
}

fn blocks(random: &mut Random, block: BlockType, rows: usize, cols: usize) -> Option<Matrix> {
    let mut bytes = Vec::with_capacity(rows.checked_mul(block.row_bytes(cols)?)?);
    let size = block.block_bytes();
    let place = match (block, scale_of(block)) {
        (BlockType::Mxfp4, _) => None,
        (_, Some(place)) => Some(place),
        (_, None) => return None,
    };
    let set = |block: &mut [u8], at: usize, v: f32| {
        block[at..at + 2].copy_from_slice(&f16::from_f32(v).to_le_bytes());
    };
    let scaled = |random: &mut Random, scale: f32, bytes: &mut [u8]| match place {
        None => bytes[0] = power_of_two(random, scale),
        Some((at, min)) => {
            let scale = scale * (1.0 + random.symmetric(0.25)) / (49.0_f32 / 48.0).sqrt();
            set(bytes, at, scale);
            if let Some((at, ratio)) = min {
                set(bytes, at, scale * ratio);
            }
        }
    };
    let fill = |random: &mut Random, bytes: &mut Vec<u8>| {
        let end = bytes.len() + size;
        while bytes.len() < end {
            let draw = random.bits().to_le_bytes();
            bytes.extend_from_slice(&draw[..draw.len().min(end - bytes.len())]);
        }
    };
    // what random codes amount to at a scale of about one, from a sample that is always the same
    let mut sample = Random::new(0);
    let (mut square, mut count) = (0.0, 0);
    let mut values = vec![0.0; block.block_len()];
    let mut one = Vec::with_capacity(size);
    while count < SAMPLE {
        one.clear();
        fill(&mut sample, &mut one);
        scaled(&mut sample, 1.0, &mut one);
        block.decode(&one, &mut values);
        square += values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        count += values.len();
    }
    let wanted = (count as f64 / square / cols as f64).sqrt() as f32;
    for _ in 0..rows * (cols / block.block_len()) {
        let start = bytes.len();
        fill(random, &mut bytes);
        scaled(random, wanted, &mut bytes[start..]);
    }
    Blocks::new(block, bytes.into(), [rows, cols]).map(Matrix::new).ok()
}

/// Values that the scale of blocks is taken from.
const SAMPLE: usize = 1 << 15;
