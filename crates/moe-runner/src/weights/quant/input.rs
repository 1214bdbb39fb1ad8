//! Quantisation of the rows that a matrix multiplies: stored scales, and which matrices share one.

use moe_kernels::numerics::quantise::{Fp6, GroupScale, Mxfp8Rule, Nvfp4Rule, Qdq};
use moe_kernels::numerics::{DecodeScale, EncodeScale};

use super::module::{Module, Problem, Result};
use super::names;
use crate::checkpoint::quantization::{InputScheme, MxElement};
use crate::weights::{ActivationQuant, Expert};

/// The order of arithmetic of recorded outputs and of engines. Where a calibrated range meets its
/// own largest value, the other one rounds some scales the other way.
const NVFP4_RULE: Nvfp4Rule = Nvfp4Rule::Reciprocal;

/// The quantisation that `scheme` asks for, with the module's stored scale.
pub(super) fn quant(module: &mut Module, scheme: InputScheme) -> Result<ActivationQuant> {
    let qdq = match scheme {
        InputScheme::None => None,
        InputScheme::Fp8Static => {
            Some(Qdq::Fp8Static { scale: module.need_scale(names::INPUT_SCALE)? })
        }
        InputScheme::Fp8Token => Some(Qdq::Fp8Token),
        InputScheme::Fp8Group { size, power_of_two: false } => {
            Some(Qdq::Fp8Group { size, scale: GroupScale::F32 })
        }
        InputScheme::Fp8Group { size, power_of_two: true } => {
            Some(Qdq::Fp8Group { size, scale: GroupScale::PowerOfTwo })
        }
        InputScheme::Int8Static => {
            Some(Qdq::Int8Static { scale: module.need_scale(names::INPUT_SCALE)? })
        }
        InputScheme::Int8Token => Some(Qdq::Int8Token),
        InputScheme::Int8Group(size) => Some(Qdq::Int8Group { size }),
        InputScheme::Nvfp4 => Some(Qdq::Nvfp4 { global: global(module)?, rule: NVFP4_RULE }),
        InputScheme::Nvfp4Token => Some(Qdq::Nvfp4Token { rule: NVFP4_RULE }),
        InputScheme::Mx(MxElement::Fp4) => Some(Qdq::Mxfp4),
        InputScheme::Mx(MxElement::Fp6E2m3) => Some(Qdq::Mxfp6(Fp6::E2M3)),
        InputScheme::Mx(MxElement::Fp6E3m2) => Some(Qdq::Mxfp6(Fp6::E3M2)),
        InputScheme::Mx(MxElement::Fp8) => Some(Qdq::Mxfp8(Mxfp8Rule::Ceil)),
    };
    // a stored scale of a dynamic scheme says nothing
    for endings in [names::INPUT_SCALE, names::INPUT_ENCODE_SCALE, names::INPUT_ZEROS] {
        module.set_aside(endings)?;
    }
    Ok(qdq.map_or(ActivationQuant::None, ActivationQuant::Quantised))
}

/// NVFP4's global scale, under either of its names.
fn global(module: &mut Module) -> Result<EncodeScale> {
    /// Beyond it, a quotient with the smallest block scale is no longer finite.
    const MAX: f32 = f32::from_bits((118 + 127) << 23);
    let encode = names::INPUT_ENCODE_SCALE;
    let (endings, global) = if module.name(encode).is_some() {
        (encode, EncodeScale(module.need_scale(encode)?))
    } else {
        let endings = match module.name(names::INPUT_SCALE_2) {
            Some(_) => names::INPUT_SCALE_2,
            None if module.name(names::DECODE_SCALE).is_some() => names::INPUT_SCALE,
            None => return Err(Problem::Missing(module.projection.module.clone() + encode[0])),
        };
        (endings, DecodeScale(module.need_scale(endings)?).to_encode())
    };
    if global.0 > MAX {
        let tensor = module.need(endings)?;
        return Err(tensor
            .error("is too extreme for a scale (was this expert calibrated?)")
            .into());
    }
    Ok(global)
}

/// Makes the gate and up projections of all experts share one stored scale, as engines do: they
/// multiply the same rows, which are quantised once. The largest range counts, so that no expert's
/// values are cut off. Down projections keep their own.
pub(crate) fn share_input_scale(experts: &mut [Expert]) {
    let first = |expert: &Expert| {
        expert.gate.as_ref().map(|gate| gate.input).into_iter().chain([expert.up.input])
    };
    let mut shared: Option<Qdq> = None;
    for input in experts.iter().flat_map(first) {
        let ActivationQuant::Quantised(qdq) = input else { return };
        shared = match (shared, qdq) {
            (None, qdq) => Some(qdq),
            (Some(a), b) => match wider(a, b) {
                Some(wider) => Some(wider),
                // different kinds: each its own
                None => return,
            },
        };
    }
    let Some(shared) = shared else { return };
    for expert in experts {
        let input = ActivationQuant::Quantised(shared);
        expert.up.input = input;
        if let Some(gate) = &mut expert.gate {
            gate.input = input;
        }
    }
}

/// The one with the larger range; `None` for different kinds.
fn wider(a: Qdq, b: Qdq) -> Option<Qdq> {
    match (a, b) {
        (Qdq::Fp8Static { scale: x }, Qdq::Fp8Static { scale: y }) => {
            Some(Qdq::Fp8Static { scale: x.max(y) })
        }
        (Qdq::Int8Static { scale: x }, Qdq::Int8Static { scale: y }) => {
            Some(Qdq::Int8Static { scale: x.max(y) })
        }
        (Qdq::Nvfp4 { global: x, rule }, Qdq::Nvfp4 { global: y, rule: other })
            if rule == other =>
        {
            let global = if x.0 <= y.0 { x } else { y };
            Some(Qdq::Nvfp4 { global, rule })
        }
        (a, b) => (a == b).then_some(a),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wider_range_wins_in_any_order() {
        let [small, large] = [0.5, 4.0];
        let pairs = [
            [small, large].map(|scale| Qdq::Fp8Static { scale }),
            [small, large].map(|scale| Qdq::Int8Static { scale }),
            // the larger the encode scale, the smaller the range
            [large, small].map(|scale| Qdq::Nvfp4 { global: EncodeScale(scale), rule: NVFP4_RULE }),
        ];
        for [narrow, wide] in pairs {
            assert_eq!(wider(narrow, wide), Some(wide));
            assert_eq!(wider(wide, narrow), Some(wide));
        }
        assert_eq!(wider(pairs[0][0], pairs[1][0]), None);
    }
}
