//! Quantisation of a matrix's input, as bytes.

use moe_kernels::numerics::EncodeScale;
use moe_kernels::numerics::quantise::{Fp6, GroupScale, Mxfp8Rule, Nvfp4Rule, Qdq};

use super::bytes::{Reader, Writer, broken};
use crate::Result;
use crate::weights::ActivationQuant;

const GROUP_SCALES: &[GroupScale] = &[GroupScale::F32, GroupScale::PowerOfTwo];
const MXFP8_RULES: &[Mxfp8Rule] = &[Mxfp8Rule::Floor, Mxfp8Rule::Ceil];
const FP6: &[Fp6] = &[Fp6::E3M2, Fp6::E2M3];
const NVFP4_RULES: &[Nvfp4Rule] = &[Nvfp4Rule::Division, Nvfp4Rule::Reciprocal];

impl ActivationQuant {
    pub(super) fn write(&self, to: &mut Writer) {
        let Self::Quantised(qdq) = self else { return to.tag(0) };
        match qdq {
            Qdq::Fp8Static { scale } => {
                to.tag(1);
                to.f32(*scale);
            }
            Qdq::Fp8Tensor => to.tag(2),
            Qdq::Fp8Token => to.tag(3),
            Qdq::Fp8Group { size, scale } => {
                to.tag(4);
                to.count(*size);
                to.choice(GROUP_SCALES, scale);
            }
            Qdq::Int8Static { scale } => {
                to.tag(5);
                to.f32(*scale);
            }
            Qdq::Int8Tensor => to.tag(6),
            Qdq::Int8Token => to.tag(7),
            Qdq::Int8Group { size } => {
                to.tag(8);
                to.count(*size);
            }
            Qdq::Mxfp8(rule) => {
                to.tag(9);
                to.choice(MXFP8_RULES, rule);
            }
            Qdq::Mxfp6(element) => {
                to.tag(10);
                to.choice(FP6, element);
            }
            Qdq::Mxfp4 => to.tag(11),
            Qdq::Nvfp4 { global: EncodeScale(global), rule } => {
                to.tag(12);
                to.f32(*global);
                to.choice(NVFP4_RULES, rule);
            }
            Qdq::Nvfp4Token { rule } => {
                to.tag(13);
                to.choice(NVFP4_RULES, rule);
            }
        }
    }

    pub(super) fn read(from: &mut Reader<'_>) -> Result<Self> {
        Ok(Self::Quantised(match from.tag()? {
            0 => return Ok(Self::None),
            1 => Qdq::Fp8Static { scale: from.f32()? },
            2 => Qdq::Fp8Tensor,
            3 => Qdq::Fp8Token,
            4 => Qdq::Fp8Group { size: group(from)?, scale: from.choice(GROUP_SCALES)? },
            5 => Qdq::Int8Static { scale: from.f32()? },
            6 => Qdq::Int8Tensor,
            7 => Qdq::Int8Token,
            8 => Qdq::Int8Group { size: group(from)? },
            9 => Qdq::Mxfp8(from.choice(MXFP8_RULES)?),
            10 => Qdq::Mxfp6(from.choice(FP6)?),
            11 => Qdq::Mxfp4,
            12 => {
                let global = EncodeScale(from.f32()?);
                Qdq::Nvfp4 { global, rule: from.choice(NVFP4_RULES)? }
            }
            13 => Qdq::Nvfp4Token { rule: from.choice(NVFP4_RULES)? },
            tag => return Err(broken(&format!("quantisation {tag}"))),
        }))
    }
}

fn group(from: &mut Reader<'_>) -> Result<usize> {
    match from.count()? {
        0 => Err(broken("a group of no values")),
        size => Ok(size),
    }
}
