//! What an instruction set gives the tile: vectors of sixteen lanes, one for each row of a panel.

use crate::pack::Number;

/// Vectors of sixteen f32, and of sixteen 32-bit words.
///
/// # Safety
/// All functions may be called only where the CPU has the implementor's features; they are inlined
/// into functions that enable them. A pointer must be readable, or writable, for the sixteen
/// elements that the function names, at any alignment.
pub(super) trait Simd {
    type V: Copy;
    type I: Copy;
    /// Sixteen numbers to look up.
    type Table: Copy;

    unsafe fn splat(value: f32) -> Self::V;

    /// Sixteen f32.
    unsafe fn load(at: *const u8) -> Self::V;

    unsafe fn store(v: Self::V, at: *mut f32);

    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;

    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;

    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;

    /// `a · b + c`, rounded once.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;

    /// Sixteen f16.
    unsafe fn f16(at: *const u8) -> Self::V;

    /// Sixteen bf16.
    unsafe fn bf16(at: *const u8) -> Self::V;

    /// Sixteen signed bytes.
    unsafe fn int8(at: *const u8) -> Self::V;

    /// The low nibbles of sixteen bytes.
    unsafe fn low4(at: *const u8) -> Self::V;

    /// The high nibbles of sixteen bytes.
    unsafe fn high4(at: *const u8) -> Self::V;

    /// Sixteen E4M3 numbers, times 2^-8; anything for NaN.
    unsafe fn e4m3(at: *const u8) -> Self::V;

    /// Sixteen E5M2 numbers.
    unsafe fn e5m2(at: *const u8) -> Self::V;

    /// Sixteen E8M0 numbers; anything for the codes 0 and 255.
    unsafe fn e8m0(at: *const u8) -> Self::V;

    /// Sixteen words.
    unsafe fn words(at: *const u8) -> Self::I;

    /// The bf16 in the low halves.
    unsafe fn low_bf16(words: Self::I) -> Self::V;

    /// The bf16 in the high halves.
    unsafe fn high_bf16(words: Self::I) -> Self::V;

    unsafe fn shr(words: Self::I, bits: u32) -> Self::I;

    unsafe fn shl(words: Self::I, bits: u32) -> Self::I;

    /// The bits of `a` where `mask` has ones, those of `b` elsewhere.
    unsafe fn blend(mask: u32, a: Self::I, b: Self::I) -> Self::I;

    /// `words & mask` as numbers, less `bias - 2^23`. The mask has at most 8 bits, the lowest.
    unsafe fn integers(words: Self::I, mask: u32, bias: Self::V) -> Self::V;

    unsafe fn table(numbers: &[f32; 64]) -> Self::Table;

    /// The numbers at the indices in the lowest four bits.
    unsafe fn lookup16(table: Self::Table, words: Self::I) -> Self::V;

    /// The numbers at the indices in the lowest six bits.
    unsafe fn lookup64(numbers: &[f32; 64], words: Self::I) -> Self::V;

    /// Numbers of a header, one vector after the other, by a function of its own.
    unsafe fn numbers(kind: &Kind, to: *mut Self::V);

    /// Brings a cache line nearer; any address will do.
    unsafe fn prefetch(at: *const u8);
}

/// 2^23: with it in the exponent, the low bits of an f32 count in ones.
pub(super) const MAGIC: f32 = (1 << 23) as f32;

/// Numbers of one kind in the head of a block, of some panels' rows.
pub(super) struct Kind {
    pub(super) number: Number,
    /// Those of the first group, and bytes from one group's to the next.
    pub(super) at: *const u8,
    pub(super) stride: usize,
    pub(super) groups: usize,
    /// Of the header's rows the first ones that are read, and how many panels of them.
    pub(super) first: usize,
    pub(super) panels: usize,
    /// An f16 of each row that they are multiplied by.
    pub(super) outer: Option<*const u8>,
}

/// How many bytes ahead of what is read more is asked for.
pub(super) const AHEAD: usize = 4096;

/// Asks for what lies ahead of so many bytes from `at` on: of codes, and of headers, or each would be waited for.
///
/// # Safety
/// As [`Simd`]; any address will do.
#[inline(always)]
pub(super) unsafe fn ahead<S: Simd>(at: *const u8, bytes: usize) {
    for line in 0..bytes.div_ceil(64) {
        // SAFETY: a prefetch takes any address.
        unsafe { S::prefetch(at.wrapping_add(AHEAD + 64 * line)) }
    }
}
