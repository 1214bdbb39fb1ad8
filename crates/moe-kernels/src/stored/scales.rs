//! Scales in an array of their own, one for each block of weights.

use half::{bf16, f16};

use super::{Bytes, Granularity, Misfit};
use crate::numerics::{e4m3, e8m0};

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
    /// All of them.
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Bf16, Self::E4m3, Self::E8m0];

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
    shape: [usize; 2],
    transposed: bool,
}

impl Scales {
    /// Row-major scales of a matrix `[rows, cols]`. For [`Granularity::Group`] and
    /// [`Granularity::Block`], `block` is their size; the others follow from the matrix.
    ///
    /// # Errors
    /// If `bytes` does not hold exactly these scales, or a block is empty.
    pub fn new(
        bytes: Bytes,
        stored: ScaleType,
        granularity: Granularity,
        block: [usize; 2],
        [rows, cols]: [usize; 2],
    ) -> Result<Self, Misfit> {
        let block = match granularity {
            Granularity::Tensor => [rows.max(1), cols.max(1)],
            Granularity::Channel => [1, cols.max(1)],
            Granularity::Group => [1, block[1]],
            Granularity::Block => block,
        };
        if block.contains(&0) {
            return Err(Misfit::new("a scale for blocks of no weights"));
        }
        let shape = [rows.div_ceil(block[0]), cols.div_ceil(block[1])];
        let needed = shape[0].checked_mul(shape[1]).and_then(|n| n.checked_mul(stored.size()));
        if needed != Some(bytes.len()) {
            let [down, across] = shape;
            let what = format_args!("scales [{down}, {across}] of {stored}");
            return Err(Misfit::bytes(what, bytes.len(), needed));
        }
        Ok(Self { bytes, stored, granularity, block, shape, transposed: false })
    }

    /// The same scales, stored column after column.
    pub fn transposed(self) -> Self {
        Self { transposed: true, ..self }
    }

    /// Scales to look at one after the other, without a matrix.
    ///
    /// # Errors
    /// If `bytes` are not whole scales.
    pub fn vector(bytes: Bytes, stored: ScaleType) -> Result<Self, Misfit> {
        let count = bytes.len() / stored.size();
        Self::new(bytes, stored, Granularity::Channel, [1, 1], [count, 1])
    }

    /// Which weights share a scale.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Rows and columns of the matrix that share a scale.
    pub fn block(&self) -> [usize; 2] {
        self.block
    }

    /// How many scales there are, below and beside one another.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Stored type.
    pub fn stored(&self) -> ScaleType {
        self.stored
    }

    /// Bytes that hold them.
    pub fn stored_bytes(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The scale of row `row` of the matrix and the `group`-th block of columns.
    ///
    /// # Panics
    /// If there is none.
    #[inline]
    pub fn get(&self, row: usize, group: usize) -> f32 {
        self.decode(self.index(row, group))
    }

    /// That scale as it is stored, little-endian.
    ///
    /// # Panics
    /// If there is none.
    pub fn get_bytes(&self, row: usize, group: usize) -> &[u8] {
        let size = self.stored.size();
        &self.bytes[self.index(row, group) * size..][..size]
    }

    /// All scales, in the order that they are stored in.
    pub fn iter(&self) -> impl Iterator<Item = f32> {
        (0..self.bytes.len() / self.stored.size()).map(|index| self.decode(index))
    }

    #[inline]
    fn index(&self, row: usize, group: usize) -> usize {
        let row = row / self.block[0];
        debug_assert!(row < self.shape[0] && group < self.shape[1], "scale [{row}, {group}]");
        match self.transposed {
            false => row * self.shape[1] + group,
            true => group * self.shape[0] + row,
        }
    }

    #[inline]
    fn decode(&self, index: usize) -> f32 {
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
}
