//! The types of GGUF tensors: a row is a sequence of blocks, each of so many elements in so many
//! bytes.

use crate::checkpoint::tensor::Dtype;

/// How a type of GGUF tensor is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgmlType {
    /// Its number in the format.
    pub number: u32,
    /// Its name in ggml.
    pub name: &'static str,
    /// Elements of a block; rows have a whole number of blocks.
    pub block: usize,
    /// Bytes of a block.
    pub bytes: usize,
}

impl GgmlType {
    /// The type of this number; `None` for unknown ones, and for those that ggml has removed.
    pub fn of(number: u32) -> Option<Self> {
        GGML_TYPES.iter().find(|row| row.0 == number).map(|&(number, name, block, bytes)| Self {
            number,
            name,
            block,
            bytes,
        })
    }

    /// The dtype of a tensor of this type: plain types have one of their own.
    pub(super) fn dtype(self) -> Dtype {
        match self.name {
            "F32" => Dtype::F32,
            "F16" => Dtype::F16,
            "BF16" => Dtype::Bf16,
            "F64" => Dtype::F64,
            "I8" => Dtype::I8,
            "I16" => Dtype::I16,
            "I32" => Dtype::I32,
            "I64" => Dtype::I64,
            _ => Dtype::Ggml(self.number),
        }
    }
}

/// Number, name, elements and bytes of a block.
const GGML_TYPES: [(u32, &str, usize, usize); 35] = [
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 2 + 16),
    (3, "Q4_1", 32, 4 + 16),
    (6, "Q5_0", 32, 2 + 4 + 16),
    (7, "Q5_1", 32, 4 + 4 + 16),
    (8, "Q8_0", 32, 2 + 32),
    (9, "Q8_1", 32, 4 + 32),
    (10, "Q2_K", 256, 16 + 64 + 4),
    (11, "Q3_K", 256, 32 + 64 + 12 + 2),
    (12, "Q4_K", 256, 4 + 12 + 128),
    (13, "Q5_K", 256, 4 + 12 + 32 + 128),
    (14, "Q6_K", 256, 128 + 64 + 16 + 2),
    (15, "Q8_K", 256, 4 + 256 + 32),
    (16, "IQ2_XXS", 256, 2 + 64),
    (17, "IQ2_XS", 256, 2 + 64 + 8),
    (18, "IQ3_XXS", 256, 2 + 64 + 32),
    (19, "IQ1_S", 256, 2 + 32 + 16),
    (20, "IQ4_NL", 32, 2 + 16),
    (21, "IQ3_S", 256, 2 + 64 + 32 + 8 + 4),
    (22, "IQ2_S", 256, 2 + 64 + 16),
    (23, "IQ4_XS", 256, 2 + 2 + 128 + 4),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 32 + 16 + 8),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 48 + 4 + 2),
    (35, "TQ2_0", 256, 64 + 2),
    (39, "MXFP4", 32, 1 + 16),
    (40, "NVFP4", 64, 4 + 32),
    (41, "Q1_0", 128, 2 + 16),
    (42, "Q2_0", 64, 2 + 16),
];
