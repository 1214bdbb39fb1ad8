//! Number formats of weights, by the names that `bench` knows.

use anyhow::Result;
use moe_kernels::numerics::EncodeScale;
use moe_kernels::numerics::ggml::BlockType;
use moe_kernels::numerics::quantise::{Fp6, GroupScale, Mxfp8Rule, Nvfp4Rule, Qdq};
use moe_runner::hidden::ActivationDtype;
use moe_runner::spec::Granularity;
use moe_runner::weights::{Element, FloatType, RandomFormat, RandomScaled, ScaleType};

use crate::failure::unusable;

/// Formats that safetensors checkpoints have; names without w…a… quantise weights only, but for
/// fp8 and int8, which are published with quantised activations.
const FORMATS: &[(&str, RandomFormat)] = &[
    ("f32", RandomFormat::Float(FloatType::F32)),
    ("f16", RandomFormat::Float(FloatType::F16)),
    ("bf16", RandomFormat::Float(FloatType::Bf16)),
    ("fp8", channel(Element::E4m3, Some(Qdq::Fp8Token))),
    (
        "fp8-tensor",
        scaled(Element::E4m3, ScaleType::F32, Granularity::Tensor, [0, 0], Some(Qdq::Fp8Tensor)),
    ),
    (
        "fp8-block",
        scaled(
            Element::E4m3,
            ScaleType::F32,
            Granularity::Block,
            [128, 128],
            Some(Qdq::Fp8Group { size: 128, scale: GroupScale::F32 }),
        ),
    ),
    ("int8", channel(Element::Int8, Some(Qdq::Int8Token))),
    ("int8-weight", channel(Element::Int8, None)),
    ("int4", group(Element::Uint4, ScaleType::Bf16, 128, None)),
    ("int4-g32", group(Element::Uint4, ScaleType::Bf16, 32, None)),
    ("mxfp4", group(Element::E2m1, ScaleType::E8m0, 32, None)),
    ("mxfp4-w4a4", group(Element::E2m1, ScaleType::E8m0, 32, Some(Qdq::Mxfp4))),
    ("mxfp6", group(Element::E2m3, ScaleType::E8m0, 32, None)),
    ("mxfp6-w6a6", group(Element::E2m3, ScaleType::E8m0, 32, Some(Qdq::Mxfp6(Fp6::E2M3)))),
    ("mxfp8", group(Element::E4m3, ScaleType::E8m0, 32, None)),
    ("mxfp8-w8a8", group(Element::E4m3, ScaleType::E8m0, 32, Some(Qdq::Mxfp8(Mxfp8Rule::Ceil)))),
    ("nvfp4", group(Element::E2m1, ScaleType::E4m3, 16, None)),
    (
        "nvfp4-w4a4",
        group(
            Element::E2m1,
            ScaleType::E4m3,
            16,
            // a calibration that saw 6 as the largest magnitude
            Some(Qdq::Nvfp4 { global: EncodeScale(448.0), rule: Nvfp4Rule::Division }),
        ),
    ),
];

const fn scaled(
    element: Element,
    scales: ScaleType,
    granularity: Granularity,
    block: [usize; 2],
    input: Option<Qdq>,
) -> RandomFormat {
    RandomFormat::Scaled(RandomScaled { element, scales, granularity, block, input })
}

const fn channel(element: Element, input: Option<Qdq>) -> RandomFormat {
    scaled(element, ScaleType::F32, Granularity::Channel, [0, 0], input)
}

const fn group(
    element: Element,
    scales: ScaleType,
    size: usize,
    input: Option<Qdq>,
) -> RandomFormat {
    scaled(element, scales, Granularity::Group, [1, size], input)
}

/// Every format with its name; GGUF's names are ggml's, in lower case.
fn all() -> impl Iterator<Item = (String, RandomFormat)> {
    let blocks = BlockType::ALL
        .into_iter()
        // two have the names of formats with scales of their own, one has a scale in four places
        .filter(|block| !matches!(block, BlockType::Mxfp4 | BlockType::Nvfp4 | BlockType::Iq1M))
        .map(|block| (block.name().to_ascii_lowercase(), RandomFormat::Ggml(block)));
    FORMATS.iter().map(|(name, format)| ((*name).to_owned(), *format)).chain(blocks)
}

/// The format of that name, in whatever case.
pub(crate) fn find(name: &str) -> Result<RandomFormat> {
    let lower = name.to_ascii_lowercase();
    all().find(|(known, _)| *known == lower).map(|(_, format)| format).ok_or_else(|| {
        let names: Vec<String> = all().map(|(name, _)| name).collect();
        unusable(format!("--format {name}: no such format; there are {}", names.join(", ")))
    })
}

/// The dtype of activations that goes with a format: as `auto` chooses it for such a checkpoint.
pub(crate) fn activations(format: RandomFormat) -> ActivationDtype {
    match format {
        RandomFormat::Float(FloatType::F32) | RandomFormat::Ggml(_) => ActivationDtype::F32,
        RandomFormat::Float(FloatType::F16) => ActivationDtype::F16,
        RandomFormat::Float(FloatType::Bf16) | RandomFormat::Scaled(_) => ActivationDtype::Bf16,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use moe_runner::hidden::{Rows, RowsMut};
    use moe_runner::random::Random;
    use moe_runner::runner::{
        ForwardInput, MoeRunner, MoeRunnerInterface, Options, Report, reference,
    };
    use moe_runner::spec::Dims;
    use moe_runner::weights::random_layer;

    use super::*;
    use crate::presets;

    #[test]
    fn names_are_those_of_the_contract() {
        for name in [
            "f32",
            "f16",
            "bf16",
            "fp8",
            "fp8-tensor",
            "fp8-block",
            "int8",
            "int8-weight",
            "int4",
            "int4-g32",
            "mxfp4",
            "mxfp6",
            "mxfp8",
            "nvfp4",
            "nvfp4-w4a4",
            "q8_0",
            "q4_0",
            "q4_k",
            "Q4_K",
            "iq4_xs",
        ] {
            find(name).unwrap();
        }
        assert!(find("int3").is_err());
        let names: Vec<String> = all().map(|(name, _)| name).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "each name once");
    }

    /// ‖y − r‖² / ‖r‖², and the mean of r².
    fn error(y: &[f32], r: &[f64]) -> (f64, f64) {
        let norm: f64 = r.iter().map(|r| r * r).sum();
        let off: f64 = y.iter().zip(r).map(|(y, r)| (f64::from(*y) - r).powi(2)).sum();
        (off / norm, norm / r.len() as f64)
    }

    /// In every format, the kernel that runs by default computes what the float64 reference does,
    /// and rows of unit variance keep about that in each product.
    #[test]
    fn every_format_runs_and_is_right() {
        let mut spec = presets::find("deepseek-v3").unwrap().spec();
        spec.dims = Dims { hidden: 256, routed_hidden: 256, intermediate: 256 };
        spec.router = moe_runner::spec::RouterSpec::softmax(4, 2, true);
        if let Some(shared) = &mut spec.shared {
            shared.intermediate = 256;
        }
        for (name, format) in all() {
            let layer = random_layer(&spec, format, 1).unwrap();
            let up = &layer.experts[1].up;
            assert_eq!(Some(up.stored_bytes()), format.bytes(256, 256), "{name}");
            let mut row = vec![0.0; 256];
            let (mut square, mut distinct) = (0.0, BTreeSet::new());
            for n in 0..256 {
                up.decode_row(n, &mut row);
                square += row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 256.0;
                distinct.extend(row.iter().map(|v| v.to_bits()));
            }
            // one scale for a matrix is anywhere in ±25 %
            assert!((0.5..1.6).contains(&square), "{name}: products have the variance {square}");
            assert!(distinct.len() > 3, "{name}: codes differ");

            let dtype = activations(format);
            let mut random = Random::new(2);
            let x: Vec<f32> = (0..5 * 256).map(|_| dtype.round(random.normal() as f32)).collect();
            let ready = layer.ready(&Options::new(dtype, 1).unwrap()).unwrap();
            let mut runner = MoeRunner::new(ready);
            assert!(runner.choice().kernel.name.starts_with("cpu_"), "{name}");
            let mut y = vec![0.0; x.len()];
            let (input, mut report) = (ForwardInput::new(Rows::F32(&x)), Report::default());
            let rows = RowsMut::F32(&mut y);
            let done = runner.forward_reporting(&input, rows, Some(&mut report)).unwrap();
            let logits = report.router_logits;
            let scale = done.output_scale;
            y.iter_mut().for_each(|v| *v *= scale);
            let truth = reference::layer(&layer, &x, Some(&logits), None).unwrap();
            let (error, variance) = error(&y, &truth.output);
            let quantised = match format {
                RandomFormat::Scaled(scaled) => scaled.input.is_some(),
                _ => false,
            };
            let bound = runner.choice().kernel.bound(dtype, quantised);
            assert!(error <= bound, "{name}: NMSE {error:e}, at most {bound:e}");
            assert!((0.05..20.0).contains(&variance), "{name}: outputs have {variance}");
        }
    }
}
