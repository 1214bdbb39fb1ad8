//! Scales: of groups along a row, and of whole tensors.

/// Calls `visit(group, values)` for each part of `values` that lies in one group, where `values`
/// are the elements `start..` of a row whose groups are `size` elements long.
///
/// # Panics
/// If `size` is zero.
///
/// ```
/// // A window of an int4 row with a scale for each 4 elements.
/// let scales = [1.0, 2.0, 4.0];
/// let mut window = [9.0, 9.0, 10.0, 7.0];
/// moe_kernels::numerics::for_each_group(&mut window, 6, 4, |group, values| {
///     values.iter_mut().for_each(|v| *v = (*v - 8.0) * scales[group]);
/// });
/// assert_eq!(window, [2.0, 2.0, 8.0, -4.0]);
/// ```
#[inline]
pub fn for_each_group(
    values: &mut [f32],
    start: usize,
    size: usize,
    mut visit: impl FnMut(usize, &mut [f32]),
) {
    let lead = (size - start % size).min(values.len());
    let (head, body) = values.split_at_mut(lead);
    if !head.is_empty() {
        visit(start / size, head);
    }
    for (i, values) in body.chunks_mut(size).enumerate() {
        visit(start / size + 1 + i, values);
    }
}

/// A tensor's scale that *multiplies* values before they are quantised, and divides them after:
/// `weight_global_scale` and `input_global_scale` of compressed-tensors.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct EncodeScale(pub f32);

/// A tensor's scale that multiplies values *after* they were quantised: `weight_scale_2` and
/// `input_scale` of ModelOpt.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct DecodeScale(pub f32);

impl EncodeScale {
    /// Its reciprocal, rounded to f32.
    pub fn to_decode(self) -> DecodeScale {
        DecodeScale(1.0 / self.0)
    }
}

impl DecodeScale {
    /// Its reciprocal, rounded to f32.
    pub fn to_encode(self) -> EncodeScale {
        EncodeScale(1.0 / self.0)
    }
}
