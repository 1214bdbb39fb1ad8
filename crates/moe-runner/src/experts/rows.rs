//! Row arithmetic beside the products: dot products with a vector, root-mean-square norms. The sums
//! are in float64: a norm's rounding would reach every column.

use crate::spec::RmsNorm;

/// `Σ a·b`, accumulated in float64.
pub(crate) fn dot_f64(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
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
    for (v, &w) in row.iter_mut().zip(weight) {
        *v = (inverse * if norm.scale_first { f64::from(*v) } else { scaled(*v, w) }) as f32;
    }
}
