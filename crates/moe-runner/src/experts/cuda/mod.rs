//! The whole layer on an NVIDIA GPU: the flow of a pass in the verbs of `moe-cuda`. Where a layer is split
//! over ranks whose GPUs are connected, the same with rows that go from GPU to GPU; else a rank's experts alone.
//!
//! What a kernel is stands here in any build, so that every machine can be asked about it. The rest is
//! compiled with the feature `cuda`; it opens NVIDIA's libraries at run time, and building it needs
//! nothing of NVIDIA's.

#[cfg(feature = "cuda")]
mod alone;
#[cfg(feature = "cuda")]
mod branch;
#[cfg(feature = "cuda")]
mod device;
#[cfg(feature = "cuda")]
mod layer;
#[cfg(feature = "cuda")]
mod marks;
#[cfg(feature = "cuda")]
mod moves;
#[cfg(feature = "cuda")]
mod one_sided;
#[cfg(feature = "cuda")]
mod pass;
#[cfg(feature = "cuda")]
mod products;
#[cfg(feature = "cuda")]
mod ranks;
#[cfg(feature = "cuda")]
mod rules;
#[cfg(feature = "cuda")]
mod two_sided;
#[cfg(feature = "cuda")]
mod upload;

use super::{
    Archs, Arithmetic, BuildCall, BuiltKernel, Caps, Determinism, Extras, Formats, Functions,
    KernelDesc, ProductFormat, RowFormat, Scheme, Target,
};
#[cfg(not(feature = "cuda"))]
use crate::Error;
use crate::Result;
use crate::hidden::ActivationDtype;
use crate::spec::{ActivationFormat, Granularity, WeightFormat};
use crate::weights::{Expert, Matrix};

/// Every format in f32 on any GPU that is supported.
pub const CUDA_F32: KernelDesc = KernelDesc {
    name: "cuda_f32",
    summary: "the whole layer on an NVIDIA GPU, f32 multiply-add; floats as stored, other formats \
              decoded when made ready: right, not fast",
    target: Target::Cuda(Archs::AtLeast(80)),
    schemes: &[Scheme { rows: Formats::Only(ROWS), ..Scheme::ANY }],
    dtypes: &[ActivationDtype::F32, ActivationDtype::Bf16, ActivationDtype::F16],
    functions: Functions::All,
    multiples: (1, 1),
    arithmetic: Arithmetic::F32,
    caps: Caps::ALL_EXPERTS.with(Caps::ROUTES).with(Caps::ALONE).with(Caps::CAPTURES),
    row_formats: &[RowFormat::Standard],
    determinism: Determinism::AnyBatch,
    build: |desc, call| build(desc, call, Method::F32),
    dense: None,
};

/// bf16 on Hopper.
pub const CUDA_SM90_BF16: KernelDesc = KernelDesc {
    name: "cuda_sm90_bf16",
    summary: "the whole layer on Hopper, bf16: experts in one launch up to 512 slots (up to 128 with gate and \
              routing), on tensor cores beyond; shared experts alike, or in f32",
    target: Target::Cuda(Archs::Exactly(&[90])),
    schemes: &[Scheme {
        // floats have no scales
        groups: Formats::All,
        ..scheme(&[WeightFormat::Bf16], &[], &[ActivationFormat::Unquantised])
    }],
    dtypes: &[ActivationDtype::Bf16],
    multiples: (64, 64),
    // which of the two kernels runs is decided by the size of the batch
    determinism: Determinism::RunToRun,
    caps: Caps::BIASES.with(Caps::ROUTES).with(Caps::ALONE).with(Caps::CAPTURES),
    build: |desc, call| build(desc, call, Method::Sm90(Sm90::Bf16)),
    ..CUDA_F32
};

/// FP8 in blocks of 128 × 128 with rows in groups of 128, on Hopper.
pub const CUDA_SM90_FP8: KernelDesc = KernelDesc {
    name: "cuda_sm90_fp8",
    summary: "the whole layer on Hopper, FP8 weights by 128 × 128 and rows by 128: in one launch up to 512 \
              slots, on tensor cores beyond; shared experts alike, or in f32",
    schemes: &[scheme(
        &[WeightFormat::Fp8(Granularity::Block)],
        &[[128, 128]],
        &[ActivationFormat::Fp8Group],
    )],
    multiples: (128, 128),
    build: |desc, call| build(desc, call, Method::Sm90(Sm90::Fp8)),
    ..CUDA_SM90_BF16
};

/// MXFP4 with bf16 rows, on Hopper.
pub const CUDA_SM90_MXFP4: KernelDesc = KernelDesc {
    name: "cuda_sm90_mxfp4",
    summary: "the whole layer on Hopper, MXFP4 weights unpacked in registers, bf16 rows: in one launch up to \
              512 slots, on tensor cores beyond; shared experts alike, or in f32",
    schemes: &[scheme(&[WeightFormat::Mxfp4], &[[1, 32]], &[ActivationFormat::Unquantised])],
    build: |desc, call| build(desc, call, Method::Sm90(Sm90::Mxfp4)),
    ..CUDA_SM90_BF16
};

/// Symmetric INT4 by groups of 128 with bf16 scales and rows, on Hopper.
pub const CUDA_SM90_INT4: KernelDesc = KernelDesc {
    name: "cuda_sm90_int4",
    summary: "the whole layer on Hopper, INT4 weights with bf16 scales unpacked in registers, bf16 rows: in \
              one launch up to 512 slots, on tensor cores beyond; shared experts alike, or in f32",
    schemes: &[Scheme {
        extras: Extras::NONE,
        ..scheme(
            &[WeightFormat::Int4(Granularity::Group)],
            &[[1, 128]],
            &[ActivationFormat::Unquantised],
        )
    }],
    multiples: (128, 128),
    build: |desc, call| build(desc, call, Method::Sm90(Sm90::Int4)),
    ..CUDA_SM90_BF16
};

const fn scheme(
    weights: &'static [WeightFormat],
    groups: &'static [[usize; 2]],
    rows: &'static [ActivationFormat],
) -> Scheme {
    Scheme {
        weights: Formats::Only(weights),
        groups: Formats::Only(groups),
        rows: Formats::Only(rows),
        ..Scheme::ANY
    }
}

/// How rows may be quantised.
const ROWS: &[ActivationFormat] = &[
    ActivationFormat::Unquantised,
    ActivationFormat::Fp8Static,
    ActivationFormat::Fp8Token,
    ActivationFormat::Fp8Group,
    ActivationFormat::Int8Static,
    ActivationFormat::Int8Token,
    ActivationFormat::Int8Group,
];

/// How the products of the experts are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "nothing is built then"))]
enum Method {
    /// Any format, in f32.
    F32,
    /// Hopper's kernels, for weights in one format.
    Sm90(Sm90),
}

/// Formats that Hopper's kernels read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sm90 {
    Bf16,
    Fp8,
    Mxfp4,
    Int4,
}

/// Bytes that `kernel`, one of these, takes of its GPU for the projections of experts.
pub fn held_bytes(kernel: &KernelDesc, experts: &[Expert]) -> usize {
    let fast = kernel.name != CUDA_F32.name && takes(kernel, experts);
    let bytes = |matrix: &Matrix| {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let blocks = |down: usize, across: usize| rows.div_ceil(down) * cols.div_ceil(across);
        match matrix.format() {
            WeightFormat::Bf16 | WeightFormat::F16 => 2 * rows * cols,
            WeightFormat::Fp8(_) if fast => rows * cols + size_of::<f32>() * blocks(128, 128),
            WeightFormat::Mxfp4 if fast => rows * cols / 2 + blocks(1, 32),
            WeightFormat::Int4(_) if fast => rows * cols / 2 + size_of::<u16>() * blocks(1, 128),
            // decoded
            _ => size_of::<f32>() * rows * cols,
        }
    };
    let projections = experts.iter().flat_map(|e| e.gate.iter().chain([&e.up, &e.down]));
    projections.map(bytes).sum()
}

/// Whether all of these experts can run on `kernel`: gated, in its formats and in sizes that it divides.
fn takes(kernel: &KernelDesc, experts: &[Expert]) -> bool {
    let (hidden, inner) = kernel.multiples;
    let fits = |matrix: &Matrix| {
        kernel.scheme(&ProductFormat::of(matrix)).is_some()
            && matrix.rows().is_multiple_of(hidden)
            && matrix.cols().is_multiple_of(inner)
    };
    experts.iter().all(|expert| {
        expert.gate.as_ref().is_some_and(fits) && fits(&expert.up) && fits(&expert.down)
    })
}

/// The compute capability, times ten, of the `index`-th NVIDIA GPU of this machine.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device): no driver, one that is too old, no such GPU, or one that is too old; or a build
/// without the feature `cuda`.
pub fn capability(index: usize) -> Result<u32> {
    #[cfg(feature = "cuda")]
    return device::capability(index);
    #[cfg(not(feature = "cuda"))]
    return Err(Error::Device(format!("GPU {index}: {WITHOUT}")));
}

#[cfg(feature = "cuda")]
fn build(desc: &'static KernelDesc, call: BuildCall<'_>, method: Method) -> Result<BuiltKernel> {
    Ok(match call.layer {
        Some(layer) => {
            BuiltKernel::Layer(Box::new(layer::CudaLayer::new(desc, method, layer, call)?))
        }
        None => BuiltKernel::Modular(Box::new(alone::CudaExperts::new(desc, method, call)?)),
    })
}

#[cfg(not(feature = "cuda"))]
fn build(desc: &'static KernelDesc, _: BuildCall<'_>, _: Method) -> Result<BuiltKernel> {
    Err(Error::NoKernel(format!("'{}': {WITHOUT}", desc.name)))
}

#[cfg(not(feature = "cuda"))]
const WITHOUT: &str = "this build was made without the feature 'cuda'";
