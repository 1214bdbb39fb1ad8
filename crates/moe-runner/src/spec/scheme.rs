//! Names of stored number formats: what the oracle matches kernels on.

use std::fmt;

use moe_kernels::numerics::ggml::BlockType;
use serde::{Serialize, Serializer};

/// How the numbers of a weight matrix are stored. Sizes of groups and types of scales are not part
/// of it: [`Scaled`](crate::weights::Scaled) has them.
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

/// How activations are quantised before a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ActivationFormat {
    /// Not at all.
    Unquantised,
    /// FP8 E4M3, a scale from the checkpoint.
    Fp8Static,
    /// FP8 E4M3, a scale for each token.
    Fp8Token,
    /// FP8 E4M3, a scale for some channels of a token.
    Fp8Group,
    /// 8-bit integers, a scale from the checkpoint.
    Int8Static,
    /// 8-bit integers, a scale for each token.
    Int8Token,
    /// 8-bit integers, a scale for some channels of a token.
    Int8Group,
    /// NVFP4, a global scale from the checkpoint.
    Nvfp4,
    /// NVFP4, a global scale for each token.
    Nvfp4Token,
    /// OCP MXFP4.
    Mxfp4,
    /// OCP MXFP6 with E2M3 elements.
    Mxfp6E2m3,
    /// OCP MXFP6 with E3M2 elements.
    Mxfp6E3m2,
    /// OCP MXFP8 with E4M3 elements.
    Mxfp8,
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

impl fmt::Display for ActivationFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unquantised => "unquantised",
            Self::Fp8Static => "fp8 (static)",
            Self::Fp8Token => "fp8 (token)",
            Self::Fp8Group => "fp8 (group)",
            Self::Int8Static => "int8 (static)",
            Self::Int8Token => "int8 (token)",
            Self::Int8Group => "int8 (group)",
            Self::Nvfp4 => "nvfp4",
            Self::Nvfp4Token => "nvfp4 (token)",
            Self::Mxfp4 => "mxfp4",
            Self::Mxfp6E2m3 => "mxfp6 e2m3",
            Self::Mxfp6E3m2 => "mxfp6 e3m2",
            Self::Mxfp8 => "mxfp8",
        })
    }
}

/// As the name that people see.
impl Serialize for WeightFormat {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// As the name that people see.
impl Serialize for ActivationFormat {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
