//! Every way of storing weights against the float64 reference.

use moe_kernels::numerics::ggml::BlockType;
use moe_kernels::numerics::quantise::{GroupScale, Qdq};
use moe_runner::Error;
use moe_runner::hidden::ActivationDtype::{Bf16, F32};
use moe_runner::spec::{Dims, Granularity, LayerSpec};
use moe_runner::weights::{
    Element, FloatType, RandomFormat, RandomScaled, ScaleType, random_layer,
};

use crate::layers::{forward, nmse, plain, rows, shared, truth};
use crate::{gpu, runner, scaled};

fn formats() -> Vec<RandomFormat> {
    use Granularity::{Block, Channel, Group, Tensor};
    use ScaleType::{Bf16 as B, E4m3, E8m0, F16 as H, F32 as S};
    let group = Qdq::Fp8Group { size: 128, scale: GroupScale::F32 };
    let power = Qdq::Fp8Group { size: 64, scale: GroupScale::PowerOfTwo };
    let mut all: Vec<RandomFormat> = FloatType::ALL.map(RandomFormat::Float).into();
    all.extend([
        scaled(Element::E4m3, S, Tensor, [0, 0], Some(Qdq::Fp8Tensor)),
        scaled(Element::E4m3, S, Tensor, [0, 0], Some(Qdq::Fp8Static { scale: 0.01 })),
        scaled(Element::E4m3, S, Channel, [0, 0], Some(Qdq::Fp8Token)),
        scaled(Element::E4m3, S, Block, [128, 128], Some(group)),
        scaled(Element::E4m3, B, Block, [128, 128], Some(power)),
        scaled(Element::E5m2, S, Channel, [0, 0], None),
        scaled(Element::Int8, S, Channel, [0, 0], Some(Qdq::Int8Token)),
        scaled(Element::Int8, S, Channel, [0, 0], Some(Qdq::Int8Tensor)),
        scaled(Element::Int8, S, Channel, [0, 0], Some(Qdq::Int8Static { scale: 0.03 })),
        scaled(Element::Int8, B, Group, [1, 128], Some(Qdq::Int8Group { size: 128 })),
        scaled(Element::Uint4, B, Group, [1, 128], None),
        scaled(Element::Int4, H, Group, [1, 32], None),
        scaled(Element::E2m1, E8m0, Group, [1, 32], None),
        scaled(Element::E2m3, E8m0, Group, [1, 32], None),
        scaled(Element::E3m2, E8m0, Group, [1, 32], None),
        scaled(Element::E4m3, E8m0, Group, [1, 32], None),
        scaled(Element::E2m1, E4m3, Group, [1, 16], None),
    ]);
    let blocks = BlockType::ALL.into_iter();
    // two that random layers are not made of
    let made = |block: &BlockType| !matches!(block, BlockType::Iq1M | BlockType::Nvfp4);
    all.extend(blocks.filter(made).map(RandomFormat::Ggml));
    all
}

fn spec() -> LayerSpec {
    LayerSpec {
        dims: Dims { hidden: 256, routed_hidden: 256, intermediate: 256 },
        shared: Some(moe_runner::spec::SharedSpec { intermediate: 256, ..shared() }),
        ..plain()
    }
}

#[test]
fn every_format_holds_its_bound() {
    let _alone = crate::alone();
    let layers = formats().into_iter().map(|format| {
        let layer = random_layer(&spec(), format, 3);
        (format, layer.unwrap_or_else(|error| panic!("{format:?}: {error}")))
    });
    let layers: Vec<_> = layers.collect();
    for dtype in [F32, Bf16] {
        let Some(options) = gpu(dtype) else { return };
        for (format, layer) in &layers {
            let quantised =
                matches!(format, RandomFormat::Scaled(RandomScaled { input: Some(_), .. }));
            let mut runner = runner(layer, &options);
            for tokens in [1, 40] {
                let hidden = rows(dtype, tokens, 256, 1 + tokens as u64);
                let mut y = forward(&mut runner, &hidden);
                y.iter_mut().for_each(|v| *v = dtype.round(*v));
                let error = nmse(&y, &truth(layer, &hidden));
                let bound = runner.choice().kernel.bound(dtype, quantised);
                assert!(error <= bound, "{format:?}, {dtype:?}, T={tokens}: NMSE {error:e}");
            }
        }
    }
}

/// Rows that no kernel quantises are refused with the reason, not left as they are.
#[test]
fn rows_that_no_kernel_quantises_are_refused() {
    let _alone = crate::alone();
    let Some(options) = gpu(F32) else { return };
    let format =
        scaled(Element::E2m1, ScaleType::E8m0, Granularity::Group, [1, 32], Some(Qdq::Mxfp4));
    let layer = random_layer(&spec(), format, 3).unwrap();
    let Err(Error::NoKernel(reason)) = layer.ready(&options) else { panic!("not refused") };
    assert!(reason.contains("cuda_f32: does not take activations as mxfp4"), "{reason}");
}
