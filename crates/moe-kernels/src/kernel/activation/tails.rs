//! The sigmoid, the hyperbolic tangent and the normal distribution's tail in f64, without
//! cancellation and without branches, so that loops of them become vectors. Their relative errors
//! are far below those of f32.

/// Added to a number below 2^51 and subtracted again, it rounds to an integer, ties to even.
const ROUND: f64 = 1.5 * (1u64 << 52) as f64;

/// ln 2 in two parts: the product of the first with an integer below 2^11 is exact.
const LN_2_HIGH: f64 = f64::from_bits(std::f64::consts::LN_2.to_bits() & !0xFFF_FFFF);
const LN_2_LOW: f64 = std::f64::consts::LN_2 - LN_2_HIGH;

/// What `e^x` is for less than this: nothing, in f32 and in sums with one.
const LEAST: f64 = -700.0;

/// 1/10!, …, 1/1!, 1/0!
const TAYLOR: [f64; 11] = {
    let mut terms = [1.0; 11];
    let mut n = 1;
    while n <= 10 {
        terms[10 - n] = terms[11 - n] / n as f64;
        n += 1;
    }
    terms
};

/// `e^x` for `x ≤ 1`; anything for NaN.
///
/// `2^n · p(r)`, `n = round(x/ln 2)`, `r = x - n·ln 2`, and `p` the Taylor polynomial of degree 10,
/// whose error for |r| ≤ ln(2)/2 is below 1e-12.
#[inline(always)]
fn exp(x: f64) -> f64 {
    let bounded = if x > LEAST { x } else { LEAST };
    let shifted = bounded * std::f64::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = bounded - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = TAYLOR[0];
    for term in &TAYLOR[1..] {
        p = p * r + term;
    }
    // The low bits of the shifted number count in ones.
    let power = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    if x > LEAST { p * power } else { 0.0 }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(super) fn sigmoid(x: f64) -> f64 {
    let e = exp(-x.abs());
    let value = if x < 0.0 { e } else { 1.0 } / (1.0 + e);
    if x.is_nan() { x } else { value }
}

/// `tanh(x)`.
#[inline(always)]
pub(super) fn tanh(x: f64) -> f64 {
    // Where the difference would cancel, two terms of the series are enough.
    const SMALL: f64 = 1e-4;
    let e = exp(-2.0 * x.abs());
    let large = ((1.0 - e) / (1.0 + e)).copysign(x);
    let small = x * (1.0 - x * x / 3.0);
    if x.abs() > SMALL { large } else { small }
}

/// `erfc(z) / 2`, with a relative error below 1e-8.
///
/// For z ≥ 0 and `t = 2/(2+z)`, `erfc(z) = t · exp(P(t) - z²)` with a smooth `P` on (0, 1], here
/// interpolated at 13 Chebyshev nodes (computed with 40 digits; the error was measured on a grid).
#[inline(always)]
pub(super) fn half_erfc(z: f64) -> f64 {
    const P: [f64; 13] = [
        0.06308584359433057,
        -0.5567954856692163,
        1.9822865480879337,
        -3.696915255871211,
        3.8225773902430333,
        -2.1227180445386407,
        0.7125918327995515,
        -0.3379492491978383,
        -0.05647743427273634,
        0.08070750305818251,
        0.37512063167248894,
        0.9999978343568101,
        -1.2655121170707262,
    ];
    let a = z.abs();
    let t = 2.0 / (2.0 + a);
    let mut p = P[0];
    for coefficient in &P[1..] {
        p = p * t + coefficient;
    }
    let half = 0.5 * t * exp(p - a * a);
    if z < 0.0 { 1.0 - half } else { half }
}
