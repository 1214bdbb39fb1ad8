//! Row arithmetic beside the products: dot products with a vector, root-mean-square norms. The sums
//! are in float64: a norm's rounding would reach every column.

use crate::spec::RmsNorm;

/// Sums beside each other, which the compiler puts into vectors: the same on every processor, where a
/// single chain of additions would wait for each of them.
const LANES: usize = 16;

/// `Σ a·b` of rows of equal length, accumulated in float64: element `i` in sum `i mod 16`, then those by
/// halves.
pub(crate) fn dot_f64(a: &[f32], b: &[f32]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += f64::from(*a) * f64::from(*b);
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
        *sum += f64::from(*a) * f64::from(*b);
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}

/// `x / sqrt(mean(x²) + eps) · w`, in place; the mean in float64.
pub(crate) fn rms_norm(norm: RmsNorm, weight: &[f32], row: &mut [f32]) {
    let offset = if norm.unit_offset { 1.0 } else { 0.0 };
    let scaled = |v: f32, w: f32| f64::from(v) * (offset + f64::from(w));
    if norm.scale_first {
        row.iter_mut().zip(weight).for_each(|(v, &w)| *v = scaled(*v, w) as f32);
    }
    let mean_square = dot_f64(row, row) / row.len() as f64;
    let inverse = 1.0 / (mean_square + f64::from(norm.eps)).sqrt();
    match norm.scale_first {
        true => row.iter_mut().for_each(|v| *v = (inverse * f64::from(*v)) as f32),
        false => {
            row.iter_mut().zip(weight).for_each(|(v, &w)| *v = (inverse * scaled(*v, w)) as f32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experts::reference;
    use crate::random::Random;

    /// At any length: every element is there once, and nothing is lost but what float64 rounds.
    #[test]
    fn sums_and_norms_are_those_of_float64() {
        let mut random = Random::new(1);
        for len in (1..40).chain([255, 256, 2048, 2880]) {
            let (x, w) = (random.values(len, 2.0), random.values(len, 1.0));
            let products = || x.iter().zip(&w).map(|(x, w)| f64::from(*x) * f64::from(*w));
            let (exact, most) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
            assert!((dot_f64(&x, &w) - exact).abs() <= 1e-15 * len as f64 * most, "{len}");
            for (unit_offset, scale_first) in [(false, false), (true, false), (false, true)] {
                let norm = RmsNorm { eps: 1e-6, unit_offset, scale_first };
                let mut row = x.clone();
                rms_norm(norm, &w, &mut row);
                let mut want: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                reference::rms_norm(norm, &w, &mut want);
                for (got, want) in row.iter().zip(want) {
                    // one rounding, and one before it where the scale comes first
                    let bound = want.abs() * 1.3e-7;
                    assert!((f64::from(*got) - want).abs() <= bound, "{len} {norm:?}");
                }
            }
        }
    }
}
