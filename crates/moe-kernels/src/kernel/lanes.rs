//! What an instruction set gives the generic algorithms: vectors of f32 lanes.

/// A vector of [`COUNT`](Lanes::COUNT) f32 lanes.
///
/// # Safety
/// All functions may be called only where the CPU has the implementor's instruction set; they are
/// inlined into functions that enable it. A pointer must be readable, or writable, for the elements
/// that the function names, at any alignment.
pub(super) trait Lanes {
    type V: Copy;

    /// Lanes of a vector.
    const COUNT: usize;

    unsafe fn splat(value: f32) -> Self::V;

    /// `COUNT` little-endian f32.
    unsafe fn load_f32(from: *const u8) -> Self::V;

    /// `COUNT` f32, in the CPU's byte order.
    unsafe fn store(v: Self::V, to: *mut f32);

    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;

    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;

    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;

    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;

    /// The greater of `v` and `bound`; NaN where `v` is NaN.
    unsafe fn at_least(v: Self::V, bound: Self::V) -> Self::V;

    /// The lesser of `v` and `bound`; NaN where `v` is NaN.
    unsafe fn at_most(v: Self::V, bound: Self::V) -> Self::V;

    /// `a < b ? yes : no`; `no` where either is NaN.
    unsafe fn select_less(a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;

    /// `2^n` for integers -126 ≤ n ≤ 127; anything for others.
    unsafe fn pow2(n: Self::V) -> Self::V;

    /// `a · b - product`, where `product` is `a · b` rounded; anything where that is not finite.
    unsafe fn mul_error(a: Self::V, b: Self::V, product: Self::V) -> Self::V;

    /// `a · b + c`, in each lane.
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V;

    /// The sum of each vector's lanes, all by the same tree.
    unsafe fn sums(vectors: [Self::V; 4]) -> [f32; 4];

    /// Brings a cache line nearer; any address will do.
    unsafe fn prefetch(at: *const u8);
}
