//! Scales in an array of their own, one for each block of weights.

use half::{bf16, f16};
use moe_kernels::numerics::{e4m3, e8m0};

use crate::checkpoint::{Bytes, Dtype};
use crate::spec::Granularity;

/// Stored type of scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// FP8 E4M3.
    E4m3,
    /// Powers of two.
    E8m0,
}

impl ScaleType {
    /// The type of a tensor of scales; bytes are powers of two. `None` for what cannot be one.
    pub fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::F16 => Some(Self::F16),
            Dtype::Bf16 => Some(Self::Bf16),
            Dtype::F8E4M3 => Some(Self::E4m3),
            Dtype::F8E8M0 | Dtype::U8 => Some(Self::E8m0),
            _ => None,
        }
    }

    /// Bytes of a scale.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::E4m3 | Self::E8m0 => 1,
        }
    }
}

impl std::fmt::Display for ScaleType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::E4m3 => "F8_E4M3",
            Self::E8m0 => "F8_E8M0 or U8",
        })
    }
}

/// Scales `[⌈rows / block[0]⌉, ⌈cols / block[1]⌉]` of a matrix `[rows, cols]`.
#[derive(Clone, Debug)]
pub struct Scales {
    bytes: Bytes,
    stored: ScaleType,
    granularity: Granularity,
    block: [usize; 2],
    per_row: usize,
}

impl Scales {
    /// Row-major scales of a matrix `[rows, cols]`. For [`Granularity::Group`] and
    /// [`Granularity::Block`], `block` is their size; the others follow from the matrix. `None` if
    /// `bytes` does not hold exactly these scales, or a block is empty.
    pub fn new(
        bytes: Bytes,
        stored: ScaleType,
        granularity: Granularity,
        block: [usize; 2],
        [rows, cols]: [usize; 2],
    ) -> Option<Self> {
        let block = match granularity {
            Granularity::Tensor => [rows.max(1), cols.max(1)],
            Granularity::Channel => [1, cols.max(1)],
            Granularity::Group => [1, block[1]],
            Granularity::Block => block,
        };
        if block.contains(&0) {
            return None;
        }
        let (down, per_row) = (rows.div_ceil(block[0]), cols.div_ceil(block[1]));
        let fits = down.checked_mul(per_row)?.checked_mul(stored.size())? == bytes.len();
        fits.then_some(Self { bytes, stored, granularity, block, per_row })
    }

    /// Scales to look at one after the other, without a matrix. `None` if `bytes` are not whole
    /// scales.
    pub(crate) fn vector(bytes: Bytes, stored: ScaleType) -> Option<Self> {
        let count = bytes.len() / stored.size();
        Self::new(bytes, stored, Granularity::Channel, [1, 1], [count, 1])
    }

    /// Which weights share a scale.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Rows and columns that share a scale.
    pub fn block(&self) -> [usize; 2] {
        self.block
    }

    /// Scales beside one another.
    pub fn per_row(&self) -> usize {
        self.per_row
    }

    /// Stored type.
    pub fn stored(&self) -> ScaleType {
        self.stored
    }

    /// The stored scales, row after row, little-endian.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Position of the scale of row `row` and the `group`-th block of columns.
    #[inline]
    pub fn index(&self, row: usize, group: usize) -> usize {
        row / self.block[0] * self.per_row + group
    }

    /// Scale number `index`.
    ///
    /// # Panics
    /// If there is none.
    #[inline]
    pub fn get(&self, index: usize) -> f32 {
        let bytes: &[u8] = &self.bytes;
        let at = index * self.stored.size();
        match self.stored {
            ScaleType::F32 => {
                f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
            }
            ScaleType::F16 => f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32_const(),
            ScaleType::Bf16 => bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
            ScaleType::E4m3 => e4m3::decode(bytes[at]),
            ScaleType::E8m0 => e8m0::decode(bytes[at]),
        }
    }

    /// All scales.
    pub fn iter(&self) -> impl Iterator<Item = f32> {
        (0..self.bytes.len() / self.stored.size()).map(|index| self.get(index))
    }
}
