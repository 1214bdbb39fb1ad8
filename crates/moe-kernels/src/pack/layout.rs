//! What a packed matrix looks like.
//!
//! ```text
//! matrix = units of 64 output rows = 4 panels of 16; what is left over are units of one panel
//! unit   = all of k, block after block
//! block  = header · steps of 32 k        at most 256 k; all k of a block have consecutive scales
//! header = for all rows of the unit: outer scale · outer minimum · for each group: scale · offset
//! step   = item 0 of each panel · item 1 of each panel · …
//! ```
//!
//! Every part of the header is there only where the format has it, one number a row, row after row.
//! What a kernel reads for one token is so in one stream, from the unit's first byte to its last.
//! An item belongs to the sixteen rows of a panel:
//!
//! | codes | items of a step |
//! |---|---|
//! | f32 | 32 of 64 bytes: item `k` holds `k` |
//! | f16 | 32 of 32 bytes: likewise |
//! | 8 bits | 32 of 16 bytes: likewise; in quads 8 of 64 bytes: item `k / 4` holds a word for each row: four `k` |
//! | bf16 | 16 of 64 bytes: item `k / 2` holds a word for each row: the pair `k`, `k + 1`, low half first |
//! | 4 bits | 4 of 64 bytes: item `k / 8` holds a word for each row: eight `k`, in nibbles |
//! | 2 bits | 2 of 64 bytes: item `k / 16` holds a word for each row: sixteen `k`, eight in each half |
//! | 1 bit | 1 of 64 bytes: a word for each row: all `k`, eight in each byte |
//!
//! Among eight `k`, number `j` has the position [`position`]`(j)`: 0, 4, 1, 5, 2, 6, 3, 7, so that
//! a shift brings a pair to the low ends of the halves of a word. 3, 5 and 6 bits are two planes:
//! the items of the low bits, then those of the high bits.

/// Number of this layout: one more where the bytes of packed weights change. Files of packed weights
/// carry it.
pub const VERSION: u32 = 1;

/// Rows of a panel: the lanes of a vector of 512 bits.
pub(crate) const PANEL: usize = 16;

/// Panels of a unit.
pub(crate) const PANELS: usize = 4;

/// Rows of a unit.
pub const UNIT: usize = PANEL * PANELS;

/// k of a step.
pub(crate) const STEP: usize = 32;

/// Most k of a block: what is added up before it joins the sum, so that errors of rounding stay
/// those of a short sum.
pub(crate) const BLOCK: usize = 256;

/// k that are decoded from the same lines.
pub(crate) const OCTET: usize = 8;

/// Place of the `j`-th of eight codes in a word.
#[inline(always)]
pub(crate) const fn position(j: usize) -> usize {
    j % 2 * 4 + j / 2
}

/// What a stored code is, and how it becomes a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Codes {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// Signed 8-bit integers.
    Int8,
    /// FP8 E4M3 without NaN; 2^-8 of their value.
    E4m3,
    /// FP8 E5M2.
    E5m2,
    /// Index of 2 bits into a table.
    Table2,
    /// Index of 3 bits into a table.
    Table3,
    /// Index of 4 bits into a table.
    Table4,
    /// Unsigned 5-bit integers, less the number that the table begins with.
    Int5,
    /// Unsigned 6-bit integers, less the number that the table begins with.
    Int6,
    /// Index of 6 bits into a table.
    Table6,
}

impl Codes {
    /// All of them.
    pub const ALL: [Codes; 12] = [
        Codes::F32,
        Codes::F16,
        Codes::Bf16,
        Codes::Int8,
        Codes::E4m3,
        Codes::E5m2,
        Codes::Table2,
        Codes::Table3,
        Codes::Table4,
        Codes::Int5,
        Codes::Int6,
        Codes::Table6,
    ];

    /// Bits of a code.
    pub const fn bits(self) -> usize {
        match self {
            Codes::F32 => 32,
            Codes::F16 | Codes::Bf16 => 16,
            Codes::Int8 | Codes::E4m3 | Codes::E5m2 => 8,
            Codes::Table2 => 2,
            Codes::Table3 => 3,
            Codes::Table4 => 4,
            Codes::Int5 => 5,
            Codes::Int6 | Codes::Table6 => 6,
        }
    }

    /// Whether they may have zero points: those that are stored with scales in arrays of their own.
    pub(crate) const fn have_zeros(self) -> bool {
        use Codes::*;
        matches!(self, Int8 | E4m3 | E5m2 | Table4 | Table6)
    }

    /// Bytes of an item.
    pub(crate) const fn item_bytes(self) -> usize {
        match self {
            Codes::F16 => 32,
            Codes::Int8 | Codes::E4m3 | Codes::E5m2 => 16,
            _ => 64,
        }
    }

    /// Bytes of a panel's step.
    pub(crate) const fn panel_bytes(self) -> usize {
        PANEL * STEP * self.bits() / 8
    }
}

/// How a header stores the numbers of its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Number {
    F32,
    F16,
    Bf16,
    /// Powers of two, neither the code 0 nor 255.
    E8m0,
    /// Without NaN; 2^-8 of their value.
    E4m3,
    /// Signed bytes.
    Int8,
    /// The low nibble of a byte, unsigned.
    Low4,
    /// The high nibble of the byte that a [`Low4`](Number::Low4) before it came from.
    High4,
}

impl Number {
    /// Bytes of one.
    pub(crate) const fn size(self) -> usize {
        match self {
            Number::F32 => 4,
            Number::F16 | Number::Bf16 => 2,
            Number::E8m0 | Number::E4m3 | Number::Int8 | Number::Low4 => 1,
            Number::High4 => 0,
        }
    }
}

/// What a group of weights has beside its scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Offset {
    None,
    /// Added to every code: `w = (code + zero) · scale`.
    Zero(Number),
    /// Added to every weight: `w = code · scale + minimum`.
    Minimum(Number),
}

/// k that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Group {
    Sixteen,
    ThirtyTwo,
    /// All of a block.
    Block,
}

impl Group {
    /// How many there are in a block of `steps` steps.
    #[inline(always)]
    pub(crate) const fn count(self, steps: usize) -> usize {
        match self {
            Group::Sixteen => 2 * steps,
            Group::ThirtyTwo => steps,
            Group::Block => 1,
        }
    }
}

/// How a matrix is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Layout {
    pub(crate) codes: Codes,
    /// Whether codes of 8 bits lie in quads: rows of 16 bits and fewer are multiplied so.
    pub(crate) quads: bool,
    pub(crate) group: Group,
    /// `None` where codes are the weights.
    pub(crate) scale: Option<Number>,
    /// Whether scales are multiplied by an f16 of the block.
    pub(crate) outer_scale: bool,
    pub(crate) offset: Offset,
    /// Whether minima are multiplied by an f16 of the block.
    pub(crate) outer_minimum: bool,
}

impl Layout {
    /// Codes that are the weights.
    pub(crate) const fn plain(codes: Codes) -> Layout {
        Layout {
            codes,
            quads: false,
            group: Group::Block,
            scale: None,
            outer_scale: false,
            offset: Offset::None,
            outer_minimum: false,
        }
    }

    /// What the codes are.
    pub fn codes(&self) -> Codes {
        self.codes
    }

    /// Groups of a block of `steps` steps.
    #[inline(always)]
    pub(crate) const fn groups(&self, steps: usize) -> usize {
        self.group.count(steps)
    }

    /// Most k of a group.
    pub(crate) const fn group_len(&self) -> usize {
        match self.group {
            Group::Sixteen => 16,
            Group::ThirtyTwo => 32,
            Group::Block => BLOCK,
        }
    }

    /// Bytes of a row in a header before its groups.
    #[inline(always)]
    pub(crate) const fn outer_bytes(&self) -> usize {
        2 * (self.outer_scale as usize + self.outer_minimum as usize)
    }

    /// Bytes of a row's scale of a group.
    #[inline(always)]
    pub(crate) const fn scale_bytes(&self) -> usize {
        match self.scale {
            Some(number) => number.size(),
            None => 0,
        }
    }

    /// Bytes of a row's scale and offset of a group.
    #[inline(always)]
    pub(crate) const fn group_bytes(&self) -> usize {
        let offset = match self.offset {
            Offset::None => 0,
            Offset::Zero(number) | Offset::Minimum(number) => number.size(),
        };
        self.scale_bytes() + offset
    }

    /// Bytes of a row in the header of a block of `steps` steps.
    #[inline(always)]
    pub(crate) const fn header_bytes(&self, steps: usize) -> usize {
        self.outer_bytes() + self.groups(steps) * self.group_bytes()
    }

    /// Bytes of a panel in a block of `steps` steps: its share of the header, and its codes.
    pub(crate) const fn block_bytes(&self, steps: usize) -> usize {
        PANEL * self.header_bytes(steps) + steps * self.codes.panel_bytes()
    }
}
