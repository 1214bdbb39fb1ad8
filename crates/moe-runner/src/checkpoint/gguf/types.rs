//! The types of GGUF tensors: a row is a sequence of blocks, each of so many elements in so many
//! bytes.

use moe_kernels::numerics::ggml::BlockType;

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
        let row = match BlockType::from_ggml(number) {
            Some(known) => (number, known.name(), known.block_len(), known.block_bytes()),
            None => OTHERS.into_iter().find(|row| row.0 == number)?,
        };
        let (number, name, block, bytes) = row;
        Some(Self { number, name, block, bytes })
    }
}

/// The types that are not among [`BlockType`]s, plain ones and those that cannot be decoded: number,
/// name, elements and bytes of a block.
const OTHERS: [(u32, &str, usize, usize); 12] = [
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (9, "Q8_1", 32, 4 + 32),
    (15, "Q8_K", 256, 4 + 256 + 32),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (30, "BF16", 1, 2),
    (41, "Q1_0", 128, 2 + 16),
    (42, "Q2_0", 64, 2 + 16),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_number_stands_for_two_types() {
        for (number, name, ..) in OTHERS {
            assert_eq!(BlockType::from_ggml(number), None, "{name}");
            assert_eq!(GgmlType::of(number).unwrap().name, name);
        }
        assert_eq!(GgmlType::of(12).unwrap().name, "Q4_K");
        // Removed from ggml: Q4_2, Q4_3 and the interleaved variants of Q4_0.
        assert!([4, 5, 31, 32, 33].into_iter().all(|number| GgmlType::of(number).is_none()));
    }

    #[test]
    fn plain_types_have_their_own_dtype() {
        for number in 0..50 {
            let Some(stored) = GgmlType::of(number) else { continue };
            match crate::checkpoint::Dtype::from(stored).size() {
                Some(size) => {
                    assert_eq!((stored.block, stored.bytes), (1, size), "{}", stored.name)
                }
                None => assert!(stored.block > 1, "{}", stored.name),
            }
        }
    }
}
