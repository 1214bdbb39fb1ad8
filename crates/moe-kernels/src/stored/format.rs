//! Names of stored number formats: what kernels are matched on.

use std::fmt;

use crate::numerics::ggml::BlockType;

/// How the numbers of a weight matrix are stored. Sizes of groups and types of scales are not part
/// of it: [`Codes`](super::Codes) has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum WeightFormat {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// FP8 E4M3 with scales.
    Fp8(Granularity),
    /// FP8 E5M2 with scales.
    Fp8E5m2(Granularity),
    /// 8-bit integers with scales.
    Int8(Granularity),
    /// 8-bit integers with scales and zero points.
    Int8Asymmetric(Granularity),
    /// 4-bit integers with scales.
    Int4(Granularity),
    /// 4-bit integers with scales and zero points.
    Int4Asymmetric(Granularity),
    /// Integers of so many bits (1, 2, 3, 4, 5, 6 or 8), a scale and a least value for a group of them.
    IntMinima(u8),
    /// FP4 E2M1, an E4M3 scale for 16 of them, one more scale for the tensor.
    Nvfp4,
    /// FP4 E2M1, an E8M0 scale for 32 of them.
    Mxfp4,
    /// FP6 E2M3, an E8M0 scale for 32 of them.
    Mxfp6E2m3,
    /// FP6 E3M2, an E8M0 scale for 32 of them.
    Mxfp6E3m2,
    /// FP8 E4M3, an E8M0 scale for 32 of them.
    Mxfp8,
    /// A block type of GGUF.
    Ggml(BlockType),
}

/// Which weights share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Granularity {
    /// All of a matrix.
    Tensor,
    /// A row: an output feature.
    Channel,
    /// A run of some columns of a row.
    Group,
    /// A block of some rows and columns.
    Block,
}

/// Stored float types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl FloatType {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// "f32", "f16" or "bf16".
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

impl From<FloatType> for WeightFormat {
    fn from(float: FloatType) -> Self {
        match float {
            FloatType::F32 => Self::F32,
            FloatType::F16 => Self::F16,
            FloatType::Bf16 => Self::Bf16,
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::F32 => f.write_str("f32"),
            Self::F16 => f.write_str("f16"),
            Self::Bf16 => f.write_str("bf16"),
            Self::Fp8(scales) => write!(f, "fp8 ({scales})"),
            Self::Fp8E5m2(scales) => write!(f, "fp8 e5m2 ({scales})"),
            Self::Int8(scales) => write!(f, "int8 ({scales})"),
            Self::Int8Asymmetric(scales) => write!(f, "int8 ({scales}, zero points)"),
            Self::Int4(scales) => write!(f, "int4 ({scales})"),
            Self::Int4Asymmetric(scales) => write!(f, "int4 ({scales}, zero points)"),
            Self::IntMinima(bits) => write!(f, "int{bits} (group, minima)"),
            Self::Nvfp4 => f.write_str("nvfp4"),
            Self::Mxfp4 => f.write_str("mxfp4"),
            Self::Mxfp6E2m3 => f.write_str("mxfp6 e2m3"),
            Self::Mxfp6E3m2 => f.write_str("mxfp6 e3m2"),
            Self::Mxfp8 => f.write_str("mxfp8"),
            Self::Ggml(block) => f.write_str(block.name()),
        }
    }
}

impl fmt::Display for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tensor => "tensor",
            Self::Channel => "channel",
            Self::Group => "group",
            Self::Block => "block",
        })
    }
}
