//! Names of stored number formats: what the oracle matches kernels on.

use std::fmt;

pub use moe_kernels::stored::{Granularity, WeightFormat};
use serde::{Serialize, Serializer};

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
impl Serialize for ActivationFormat {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
