//! The weights of a layer: one type for every way a checkpoint stores them.
//!
//! A [`Matrix`] is one projection `[out, in]`, whatever the file's layout: stacked or per expert,
//! transposed, interleaved, quantised. It is a view; loading copies nothing that need not be.

mod activation;
mod int8_rows;
mod load;
mod matrix;
pub mod portable;
pub(crate) mod quant;
mod stacked;
mod synthetic;
mod validate;

pub use activation::ActivationQuant;
pub use load::{Accounting, account, survey};
pub(crate) use load::{accounting::Loader, float};
pub use matrix::Matrix;
pub use stacked::{GateUp, Stack, StackedExperts};
pub use synthetic::{RandomFormat, RandomScaled, random_layer, random_matrix};

pub use moe_kernels::stored::{
    Blocks, Bytes, Codes, Element, FloatType, Floats, Global, Misfit, Packing, ScaleType, Scales,
    Stored, View, ZeroPacking, ZeroPoints, Zeros,
};

use crate::spec::LayerSpec;

/// One expert, routed or shared: `down · act(gate·x, up·x)`.
#[derive(Clone, Debug)]
pub struct Expert {
    /// `[I, H]`, in gated experts.
    pub gate: Option<Matrix>,
    /// `[I, H]`.
    pub up: Matrix,
    /// `[H, I]`.
    pub down: Matrix,
    /// `[I]`, where gated experts have biases.
    pub gate_bias: Option<Vec<f32>>,
    /// `[I]`.
    pub up_bias: Option<Vec<f32>>,
    /// `[H]`. Under tensor parallelism exactly one rank holds it.
    pub down_bias: Option<Vec<f32>>,
    /// `[H]`: weight of the norm after the expert.
    pub norm: Option<Vec<f32>>,
}

/// The gate and what else the router needs.
#[derive(Clone, Debug)]
pub struct GateWeights {
    /// `[E_total, H]`.
    pub weight: Matrix,
    /// `[E_total]`.
    pub bias: Option<Vec<f32>>,
    /// `[choices]`: the correction bias.
    pub correction: Option<Vec<f32>>,
    /// `[E]`: multiplies weights by id.
    pub per_expert_scale: Option<Vec<f32>>,
    /// `[H]`: scale of the gate's own input norm (gemma4).
    pub input_scale: Option<Vec<f32>>,
    /// `[vocabulary · k]`: expert ids by token id.
    pub hash_table: Option<Vec<u32>>,
}

/// The weights of one [`TransformStep`](crate::spec::TransformStep).
#[derive(Clone, Debug)]
pub enum StepWeights {
    /// `[width out, width in]`.
    Linear(Matrix),
    /// `[width]`.
    RmsNorm(Vec<f32>),
}

/// The dense branch.
#[derive(Clone, Debug)]
pub struct SharedWeights {
    /// One for each shared expert.
    pub experts: Vec<Expert>,
    /// `[H]`: the scalar gate.
    pub gate: Option<Vec<f32>>,
    /// `[H]`: norm of the branch's input.
    pub input_norm: Option<Vec<f32>>,
    /// `[H]`: norm of the branch's output.
    pub output_norm: Option<Vec<f32>>,
}

/// What multiplies or shifts the sum of both branches.
#[derive(Clone, Debug, Default)]
pub struct OutputWeights {
    /// `[H]`.
    pub bias: Option<Vec<f32>>,
    /// `[H]`.
    pub norm: Option<Vec<f32>>,
}

/// A layer with all its weights, checked for completeness, but not yet ready to run: no kernel is
/// chosen. Cloning shares the weights.
#[derive(Clone, Debug)]
pub struct LoadedLayer {
    /// What the layer is.
    pub spec: LayerSpec,
    /// The gate; `None` where the caller brings the logits.
    pub gate: Option<GateWeights>,
    /// The routed experts, by logical id.
    pub experts: Vec<Expert>,
    /// Weights of `spec.input_transform`, step by step.
    pub input_transform: Vec<StepWeights>,
    /// Weights of `spec.output_transform`, step by step.
    pub output_transform: Vec<StepWeights>,
    /// The dense branch.
    pub shared: Option<SharedWeights>,
    /// Weights of `spec.output`.
    pub output: OutputWeights,
}
