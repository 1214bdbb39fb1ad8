//! What an instruction set gives the tile: vectors of sixteen lanes, one for each row of a panel.

use super::header::Kind;

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
