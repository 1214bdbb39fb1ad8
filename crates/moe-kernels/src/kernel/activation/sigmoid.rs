//! `x · σ(z)` in f32 vectors, within 3 ulp wherever the result is a normal number.
//!
//! With `t = e^-|z|`, σ(z) is `1/(1+t)` for z ≥ 0 and `t/(1+t)` below: nothing overflows or
//! cancels. The exponential is `2^n · p(r)`, `n = round(-|z|/ln 2)`, `r = -|z| - n·ln 2`, and `p` the
//! Taylor polynomial of degree 7, whose error for |r| ≤ ln(2)/2 is below 2^-27. The power of two is
//! multiplied in last, so that small results keep their digits.

use crate::kernel::lanes::Lanes;

/// ln 2 in two parts. The first has few digits: its product with `n` is exact.
const LN_2_HIGH: f32 = 355.0 / 512.0;
const LN_2_LOW: f32 = (std::f64::consts::LN_2 - 355.0 / 512.0) as f32;

/// `e^-LARGE` times any f32 is zero in f32 for the products that occur, and `2^n` in two normal
/// factors reaches beyond it.
const LARGE: f32 = 170.0;

/// Added to a number below 2^22 and subtracted again, it rounds to an integer, ties to even.
const ROUND: f32 = 1.5 * (1 << 23) as f32;

/// 1/7!, …, 1/1!, 1/0!
const TAYLOR: [f32; 8] =
    [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

/// `x · σ(z + z_low)`, where `z_low` is at most the rounding error of `z`; it may be anything where
/// `z` is not finite.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(super) unsafe fn times_sigmoid<S: Lanes>(x: S::V, z: S::V, z_low: S::V) -> S::V {
    // SAFETY: the caller's.
    unsafe {
        let (zero, one) = (S::splat(0.0), S::splat(1.0));
        // y = -|z|, in two parts.
        let minus = S::sub(zero, z);
        let y = S::at_least(S::select_less(z, zero, z, minus), S::splat(-LARGE));
        let y_low = S::select_less(z, zero, z_low, S::sub(zero, z_low));
        let y_low = S::select_less(S::splat(-LARGE), y, y_low, zero);

        let n = S::mul_add(y, S::splat(std::f32::consts::LOG2_E), S::splat(ROUND));
        let n = S::sub(n, S::splat(ROUND));
        let r = S::mul_add(n, S::splat(-LN_2_HIGH), y);
        let r = S::add(S::mul_add(n, S::splat(-LN_2_LOW), r), y_low);
        let mut p = S::splat(TAYLOR[0]);
        for coefficient in &TAYLOR[1..] {
            p = S::mul_add(p, r, S::splat(*coefficient));
        }
        // 2^n in two factors, because one alone may be too small for a normal number.
        let n_high = S::at_least(n, S::splat(-126.0));
        let (scale, rest) = (S::pow2(n_high), S::pow2(S::sub(n, n_high)));
        let rest = S::select_less(S::splat(-LARGE), y, rest, zero);

        let sum = S::mul_add(p, scale, one);
        let factor = S::div(S::select_less(z, zero, p, one), sum);
        let high = S::mul(S::mul(x, S::select_less(z, zero, scale, one)), factor);
        S::mul(high, S::select_less(z, zero, rest, one))
    }
}
