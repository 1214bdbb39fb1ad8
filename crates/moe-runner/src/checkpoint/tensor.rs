//! A named array in a file: bytes that are mapped, not copied, with dtype and shape.

use std::path::PathBuf;

pub use moe_kernels::stored::Bytes;

use super::gguf::types::GgmlType;
use crate::{Error, Result};

/// The dtype of a stored tensor: what the container's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum Dtype {
    Bool,
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F16,
    Bf16,
    F32,
    F64,
    /// FP8 with 4 exponent bits, finite values only.
    F8E4M3,
    /// FP8 with 5 exponent bits.
    F8E5M2,
    /// Powers of two, as scales.
    F8E8M0,
    /// A GGUF block type, by its number in the format.
    Ggml(u32),
}

impl Dtype {
    /// Bytes of one element; `None` for block types.
    pub fn size(self) -> Option<usize> {
        Some(match self {
            Self::Bool | Self::U8 | Self::I8 | Self::F8E4M3 | Self::F8E5M2 | Self::F8E8M0 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
            Self::Ggml(_) => return None,
        })
    }
}

impl From<GgmlType> for Dtype {
    /// Plain types have a dtype of their own.
    fn from(stored: GgmlType) -> Self {
        match stored.name {
            "F32" => Self::F32,
            "F16" => Self::F16,
            "BF16" => Self::Bf16,
            "F64" => Self::F64,
            "I8" => Self::I8,
            "I16" => Self::I16,
            "I32" => Self::I32,
            "I64" => Self::I64,
            _ => Self::Ggml(stored.number),
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self {
            Self::Ggml(number) => match GgmlType::of(*number) {
                Some(stored) => stored.name,
                None => return write!(f, "ggml type {number}"),
            },
            Self::Bool => "BOOL",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::U16 => "U16",
            Self::I16 => "I16",
            Self::U32 => "U32",
            Self::I32 => "I32",
            Self::U64 => "U64",
            Self::I64 => "I64",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::F32 => "F32",
            Self::F64 => "F64",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
            Self::F8E8M0 => "F8_E8M0",
        };
        f.write_str(name)
    }
}

/// One tensor of a checkpoint. The bytes are row-major and little-endian, and their number fits
/// shape and dtype (the container's reader has checked that).
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Full name.
    pub name: String,
    /// The file that holds it.
    pub file: PathBuf,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// The content.
    pub bytes: Bytes,
    /// The content is not to be read: an outline's numbers are all one.
    pub(crate) blank: bool,
}

impl Tensor {
    /// An [`Error::Tensor`] about this tensor.
    pub fn error(&self, reason: impl Into<String>) -> Error {
        Error::tensor(&self.file, &self.name, reason)
    }

    /// Checks the shape.
    ///
    /// # Errors
    /// [`Error::Tensor`] with both shapes.
    pub fn expect_shape(&self, shape: &[usize]) -> Result<()> {
        if self.shape != shape {
            return Err(self.wrong_shape(shape));
        }
        Ok(())
    }

    /// The [`Error::Tensor`] that the layer needs another shape.
    pub fn wrong_shape(&self, needed: &[usize]) -> Error {
        self.error(format!("has shape {:?}, the layer needs {needed:?}", self.shape))
    }

    /// All elements of a float or integer tensor as f32 (64-bit values are rounded).
    ///
    /// # Errors
    /// [`Error::Tensor`] if the dtype is none of F32, F16, BF16, F64.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let float = matches!(self.dtype, Dtype::F32 | Dtype::F64 | Dtype::F16 | Dtype::Bf16);
        if self.blank && float {
            return Ok(vec![1.0; self.shape.iter().product()]);
        }
        let bytes: &[u8] = &self.bytes;
        Ok(match self.dtype {
            Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::F64 => {
                bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect()
            }
            Dtype::F16 => {
                bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect()
            }
            Dtype::Bf16 => {
                bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
            }
            other => return Err(self.error(format!("is {other}; a float tensor is needed"))),
        })
    }

    /// All elements of an integer tensor, as i64.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the dtype is none of I64, I32, U32, U8.
    pub fn to_i64(&self) -> Result<Vec<i64>> {
        let integer = matches!(self.dtype, Dtype::I64 | Dtype::I32 | Dtype::U32 | Dtype::U8);
        if self.blank && integer {
            return Ok(vec![0; self.shape.iter().product()]);
        }
        let bytes: &[u8] = &self.bytes;
        Ok(match self.dtype {
            Dtype::I64 => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
            Dtype::I32 => {
                bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect()
            }
            Dtype::U32 => {
                bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b).into()).collect()
            }
            Dtype::U8 => bytes.iter().map(|b| i64::from(*b)).collect(),
            other => return Err(self.error(format!("is {other}; an integer tensor is needed"))),
        })
    }
}
