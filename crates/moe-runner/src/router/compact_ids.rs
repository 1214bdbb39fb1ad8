//! A growing list of expert ids in as few bytes each as the number of experts needs.

use crate::checkpoint::Dtype;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum CompactIds {
    U8(Vec<u8>),
    U16(Vec<u16>),
    U32(Vec<u32>),
}

impl CompactIds {
    /// An empty list for ids below `choices`.
    pub(super) fn for_choices(choices: usize) -> Self {
        match choices {
            0..=0x100 => Self::U8(Vec::new()),
            0x101..=0x1_0000 => Self::U16(Vec::new()),
            _ => Self::U32(Vec::new()),
        }
    }

    /// Appends ids, which must be below `choices`.
    pub(super) fn extend(&mut self, ids: impl Iterator<Item = u32>) {
        match self {
            Self::U8(list) => list.extend(ids.map(|id| id as u8)),
            Self::U16(list) => list.extend(ids.map(|id| id as u16)),
            Self::U32(list) => list.extend(ids),
        }
    }

    pub(super) fn get(&self, index: usize) -> u32 {
        match self {
            Self::U8(list) => u32::from(list[index]),
            Self::U16(list) => u32::from(list[index]),
            Self::U32(list) => list[index],
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::U8(list) => list.len(),
            Self::U16(list) => list.len(),
            Self::U32(list) => list.len(),
        }
    }

    pub(super) fn dtype(&self) -> Dtype {
        match self {
            Self::U8(_) => Dtype::U8,
            Self::U16(_) => Dtype::U16,
            Self::U32(_) => Dtype::U32,
        }
    }

    /// Little-endian.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::U8(list) => list.clone(),
            Self::U16(list) => list.iter().flat_map(|id| id.to_le_bytes()).collect(),
            Self::U32(list) => list.iter().flat_map(|id| id.to_le_bytes()).collect(),
        }
    }
}

/// Ids stored as any unsigned type of at most 32 bits, little-endian; `None` for other types.
pub(super) fn decode(dtype: safetensors::Dtype, bytes: &[u8]) -> Option<Vec<u32>> {
    use safetensors::Dtype;
    match dtype {
        Dtype::U8 => Some(bytes.iter().map(|&id| u32::from(id)).collect()),
        Dtype::U16 => {
            let ids = bytes.as_chunks().0.iter();
            Some(ids.map(|&id| u32::from(u16::from_le_bytes(id))).collect())
        }
        Dtype::U32 => Some(bytes.as_chunks().0.iter().map(|&id| u32::from_le_bytes(id)).collect()),
        _ => None,
    }
}
