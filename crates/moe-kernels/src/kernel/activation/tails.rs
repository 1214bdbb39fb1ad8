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

/// 1/0!, 1/1!, …, 1/8!
const TAYLOR: [f64; 9] = {
    let mut terms = [1.0; 9];
    let mut n = 1;
    while n <= 8 {
        terms[n] = terms[n - 1] / n as f64;
        n += 1;
    }
    terms
};

/// `Σ c[i]·x^i`: even and odd powers are two chains, which a processor computes beside each other.
#[inline(always)]
fn polynomial<const N: usize>(c: &[f64; N], x: f64) -> f64 {
    let square = x * x;
    let (mut high, mut low) = (c[N - 1], c[N - 2]);
    let mut i = N - 2;
    while i >= 2 {
        (high, low) = (high * square + c[i - 1], low * square + c[i - 2]);
        i -= 2;
    }
    // With an odd number of coefficients, the higher chain is the one of even powers, one short.
    match N % 2 {
        0 => high * x + low,
        _ => (high * x + low) * x + c[0],
    }
}

/// `e^x` for `x ≤ 1`; anything for NaN.
///
/// `2^n · p(r)`, `n = round(x/ln 2)`, `r = x - n·ln 2`, and `p` the Taylor polynomial of degree 8,
/// whose error for |r| ≤ ln(2)/2 is below 3e-10.
#[inline(always)]
fn exp(x: f64) -> f64 {
    let bounded = if x > LEAST { x } else { LEAST };
    let shifted = bounded * std::f64::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = bounded - n * LN_2_HIGH - n * LN_2_LOW;
    let p = polynomial(&TAYLOR, r);
    // The low bits of the shifted number count in ones.
    let power = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    if x > LEAST { p * power } else { 0.0 }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(super) fn sigmoid(x: f64) -> f64 {
    let (n, d) = sigmoid_fraction(x);
    n / d
}

/// `n / d = 1 / (1 + e^-x)`, as `(n, d)`; the denominator is 1 to 2. So are those below: a product of
/// such functions needs one division.
#[inline(always)]
pub(super) fn sigmoid_fraction(x: f64) -> (f64, f64) {
    let e = exp(-x.abs());
    (
        if x.is_nan() {
            x
        } else if x < 0.0 {
            e
        } else {
            1.0
        },
        1.0 + e,
    )
}

/// `n / d = tanh(x)`.
#[inline(always)]
pub(super) fn tanh_fraction(x: f64) -> (f64, f64) {
    // Where the difference would cancel, two terms of the series are enough.
    const SMALL: f64 = 1e-4;
    let e = exp(-2.0 * x.abs());
    let (large, small) = ((1.0 - e).copysign(x), x * (1.0 - x * x / 3.0));
    if x.abs() > SMALL { (large, 1.0 + e) } else { (small, 1.0) }
}

/// `erfc(z) / 2`, with a relative error below 4e-9.
///
/// For z ≥ 0 and `t = 1/(1 + 0.35 z)`, `erfc(z)/2 = t · S(t) · exp(-z²)` with a smooth `S` on (0, 1]:
/// here the polynomial of least relative error (fitted in float64; the error was measured on a
/// grid). It does not wait for the exponential.
#[inline(always)]
pub(super) fn half_erfc(z: f64) -> f64 {
    const S: [f64; 12] = [
        0.09873317732435098,
        0.09873310749700738,
        0.09268966942121298,
        0.08050628750080946,
        0.06450040275336667,
        0.0377172573394548,
        0.049079988533609474,
        -0.056462569475139064,
        0.10686936249314202,
        -0.11922499981937436,
        0.05686212005241004,
        -0.010003802590399439,
    ];
    let a = z.abs();
    let t = 1.0 / (1.0 + 0.35 * a);
    let half = t * polynomial(&S, t) * exp(-a * a);
    if z < 0.0 { 1.0 - half } else { half }
}
