//! Zero points: what is subtracted from codes before they are scaled. Some formats add a least value
//! afterwards instead.

use super::{Bytes, Misfit, Scales};
use crate::numerics::int4;

/// What is subtracted from codes before they are scaled.
#[derive(Clone, Debug)]
pub enum Zeros {
    /// Nothing.
    None,
    /// The same for all: the middle of the codes.
    Same(i16),
    /// One for each scale.
    Each(ZeroPoints),
    /// Nothing; but to the scaled weights of each scale a number of their own is added (MLX's biases).
    Minima(Scales),
}

/// How zero points `[down, across]` lie in memory, one for each scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ZeroPacking {
    /// Little-endian i16, `[down, across]`.
    I16,
    /// i8, `[down, across]`.
    I8,
    /// 4-bit codes in words along the rows, `[across, ⌈down / 8⌉]` (GPTQ, Quark).
    Nibbles,
    /// 8-bit codes in words along the rows, `[across, ⌈down / 4⌉]` (GPTQ).
    Bytes,
    /// 4-bit codes in words along the rows with interleaved nibbles, `[across, down / 8]` (AWQ).
    Awq,
    /// 4-bit codes in words along the rows, `[⌈down / 8⌉, across]` (compressed-tensors).
    NibblesByGroup,
    /// 8-bit codes in words along the rows, `[⌈down / 4⌉, across]` (compressed-tensors).
    BytesByGroup,
}

/// Zero points `[down, across]`, where they lie.
#[derive(Clone, Debug)]
pub struct ZeroPoints {
    bytes: Bytes,
    packing: ZeroPacking,
    down: usize,
    across: usize,
    offset: i16,
}

impl ZeroPoints {
    /// Zero points for scales `[down, across]`. `offset` is added to each: GPTQ's first version
    /// stores one less than it means.
    ///
    /// # Errors
    /// If `bytes` has another length, or words with interleaved nibbles would not be full.
    pub fn new(
        bytes: Bytes,
        packing: ZeroPacking,
        [down, across]: [usize; 2],
        offset: i16,
    ) -> Result<Self, Misfit> {
        let line = match packing {
            ZeroPacking::I16 => down.checked_mul(2),
            ZeroPacking::I8 => Some(down),
            ZeroPacking::Nibbles | ZeroPacking::NibblesByGroup => down.div_ceil(8).checked_mul(4),
            ZeroPacking::Bytes | ZeroPacking::BytesByGroup => down.div_ceil(4).checked_mul(4),
            ZeroPacking::Awq if down.is_multiple_of(8) => Some(down / 2),
            ZeroPacking::Awq => {
                let reason = "words with the zero points of 8 rows are not filled by";
                return Err(Misfit::new(format!("{reason} {down} rows")));
            }
        };
        let needed = line.and_then(|line| line.checked_mul(across));
        if needed != Some(bytes.len()) {
            let what = format_args!("zero points [{down}, {across}]");
            return Err(Misfit::bytes(what, bytes.len(), needed));
        }
        Ok(Self { bytes, packing, down, across, offset })
    }

    /// Zero points `[down, across]` of their own.
    ///
    /// # Errors
    /// If there are more or fewer.
    pub fn from_i16(zeros: &[i16], shape: [usize; 2]) -> Result<Self, Misfit> {
        let bytes: Vec<u8> = zeros.iter().flat_map(|zero| zero.to_le_bytes()).collect();
        Self::new(bytes.into(), ZeroPacking::I16, shape, 0)
    }

    /// Rows and columns of the zero points.
    pub fn shape(&self) -> [usize; 2] {
        [self.down, self.across]
    }

    /// Bytes that hold them.
    pub fn stored_bytes(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The zero point of the scale `[down, across]`.
    ///
    /// # Panics
    /// If there is no such scale.
    #[inline]
    pub fn get(&self, down: usize, across: usize) -> i16 {
        assert!(down < self.down && across < self.across, "zero point [{down}, {across}]");
        let bytes: &[u8] = &self.bytes;
        let index = down * self.across + across;
        let zero = match self.packing {
            ZeroPacking::I16 => i16::from_le_bytes([bytes[index * 2], bytes[index * 2 + 1]]),
            ZeroPacking::I8 => i16::from(bytes[index] as i8),
            ZeroPacking::Nibbles => {
                i16::from(int4::nibble(bytes, across * self.down.next_multiple_of(8) + down))
            }
            ZeroPacking::Bytes => i16::from(bytes[across * self.down.next_multiple_of(4) + down]),
            ZeroPacking::Awq => i16::from(int4::awq_nibble(bytes, self.down, down, across)),
            ZeroPacking::NibblesByGroup => {
                i16::from(int4::gptq_nibble(bytes, self.across, across, down))
            }
            ZeroPacking::BytesByGroup => {
                i16::from(bytes[(down / 4 * self.across + across) * 4 + down % 4])
            }
        };
        zero + self.offset
    }
}
