//! NVFP4: 16 E2M1 elements along a row share an E4M3 scale, and all of a tensor an f32 scale.

use super::super::{EncodeScale, e2m1, e4m3};
use super::amax;

/// Elements that share a scale.
pub(super) const BLOCK: usize = 16;

/// Largest global scale, 2^118: divided by the smallest block scale, 2^−9, it is still finite.
const MAX_GLOBAL: f32 = f32::from_bits((118 + 127) << 23);

/// Order of the arithmetic, where `G` is the global scale and `m` the largest magnitude of a block.
/// They differ only where a value lies on, or a rounding error beside, a tie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Nvfp4Rule {
    /// `s = e4m3((G · m) / 6)`, `x' = e2m1((x · G) / s) · s / G`: the definition, as
    /// compressed-tensors and ModelOpt checkpoints are calibrated with it.
    Division,
    /// `s = e4m3(G · (m · (1/6)))`, `x' = e2m1(x · (G / s)) · (s / G)`: as vLLM 0.33 emulates it.
    Reciprocal,
}

/// The scale that takes `amax` to the largest value that a block can hold: 448 · 6.
pub(super) fn global_scale(amax: f32) -> EncodeScale {
    EncodeScale((e4m3::MAX * e2m1::MAX / amax).min(MAX_GLOBAL))
}

#[inline(always)]
pub(super) fn qdq(rows: &mut [f32], cols: usize, global: EncodeScale, rule: Nvfp4Rule) {
    let g = global.0;
    for block in rows.chunks_exact_mut(cols).flat_map(|row| row.chunks_mut(BLOCK)) {
        let amax = amax(block);
        let scale = match rule {
            Nvfp4Rule::Division => e4m3::round(g * amax / 6.0),
            Nvfp4Rule::Reciprocal => e4m3::round(g * (amax * (1.0 / 6.0))),
        };
        // Where one value is NaN the scale is, and so the whole block becomes.
        if scale == 0.0 {
            // Too small for the scale: zeros, with the signs of the values.
            block.iter_mut().for_each(|x| *x = 0f32.copysign(*x));
        } else if rule == Nvfp4Rule::Division {
            block.iter_mut().for_each(|x| *x = e2m1::round(*x * g / scale) * scale / g);
        } else {
            let (up, down) = (g / scale, scale / g);
            block.iter_mut().for_each(|x| *x = e2m1::round(*x * up) * down);
        }
    }
}

/// E4M3 code of the scale of a block, and its value.
pub(super) fn block_scale(amax: f32, global: EncodeScale) -> (u8, f32) {
    let code = e4m3::encode(global.0 * amax / 6.0);
    (code, e4m3::decode(code))
}
