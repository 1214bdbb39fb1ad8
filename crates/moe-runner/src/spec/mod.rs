//! What a layer *is*: dimensions, routing, experts, shared experts, output. Plain data.
//!
//! The options are orthogonal (each field can change alone), and together they cover the published
//! families: `checkpoint::architecture` fills a [`LayerSpec`] from a model's `config.json`.
//!
//! One block, all options:
//! ```text
//! logits = norm(x) · Wgᵀ (+ bias) (· multiplier), soft-capped
//! ids, w = route(logits)                               RouterSpec
//! h      = input_transform(x)
//! y      = Σ_j w_j · expert_{ids_j}(h)   | expert(w_j · h)
//! y      = output_transform(f · y)
//! y      = y + shared(x)   | averaged | weighted by the router
//! ```

mod router;
mod scheme;

pub use moe_kernels::activation::Activation;
pub(crate) use moe_kernels::activation::sigmoid;
pub use router::{
    Correction, GroupFill, GroupScore, Groups, IdleExperts, Renormalise, RouterSpec, Score,
    Selection, WeightFrom, WeightOn,
};
pub use scheme::{ActivationFormat, Granularity, WeightFormat};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Everything about a layer that is known before its weights: from this alone follow the output's
/// shape and dtype, the workspace, and which kernels can run it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerSpec {
    /// The block's name in the checkpoint, e.g. `model.layers.3.mlp`. Unique within a model.
    pub name: String,
    /// Index of the decoder layer in the model.
    pub index: usize,
    /// Sizes.
    pub dims: Dims,
    /// How the gate computes logits.
    pub gate: GateSpec,
    /// How logits become expert ids and weights.
    pub router: RouterSpec,
    /// The routed experts.
    pub expert: ExpertSpec,
    /// What is done to the rows before the routed experts. Empty: nothing.
    pub input_transform: Transform,
    /// What is done to the routed sum before the shared output is added. Empty: nothing.
    pub output_transform: Transform,
    /// `routed_scaling_factor`, and who applies it.
    pub routed_scale: RoutedScale,
    /// The dense branch beside the routed experts.
    pub shared: Option<SharedSpec>,
    /// What is done to the sum of both branches.
    pub output: OutputSpec,
}

/// Sizes of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dims {
    /// H: width of the hidden states that come in and go out.
    pub hidden: usize,
    /// Width of the rows that the routed experts see: H, or the latent width.
    pub routed_hidden: usize,
    /// I: width between an expert's two products.
    pub intermediate: usize,
}

/// The gate: `logits [T, E_total] = norm(x) · Wgᵀ (+ bias)`, computed and returned in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GateSpec {
    /// A bias is added to the logits.
    pub bias: bool,
    /// The gate sees `rms(x) · scale · H^-1/2` instead of `x` (gemma4); the value is the ε.
    pub scaled_rms_eps: Option<f32>,
}

/// One routed expert: `Wd · act(Wg·h, Wu·h)`, or `Wd · act(Wu·h)` without a gate projection.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertSpec {
    /// Has a gate projection beside the up projection.
    pub gated: bool,
    /// The function between the two products.
    pub activation: Activation,
    /// All projections have biases.
    pub bias: bool,
    /// Each expert's output is normalised before it is weighted.
    pub norm: Option<RmsNorm>,
}

/// `x / sqrt(mean(x²) + eps) · w`, or `· (1 + w)`; or the same of `x · w`, with no weight after.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub eps: f32,
    /// The stored weight is an offset from one.
    pub unit_offset: bool,
    /// The weight multiplies before the mean square is taken, not after (muse_spark's norm after
    /// each expert).
    pub scale_first: bool,
}

/// Steps applied to rows, first to last.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Transform {
    /// The steps. Empty: the identity.
    pub steps: Vec<TransformStep>,
}

/// One step of a [`Transform`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum TransformStep {
    /// A projection without bias to `width` columns (the latent projections).
    Linear {
        /// Columns of the result.
        width: usize,
    },
    /// A root-mean-square normalisation.
    RmsNorm(RmsNorm),
}

impl Transform {
    /// Nothing is done.
    pub fn is_identity(&self) -> bool {
        self.steps.is_empty()
    }

    /// `transform(a + b) = transform(a) + transform(b)`: it may run on partial sums of ranks, so
    /// that only one reduction is needed, at the end.
    pub fn is_linear(&self) -> bool {
        self.steps.iter().all(|step| matches!(step, TransformStep::Linear { .. }))
    }

    /// The most columns that rows of `width` columns have on the way, before and after included.
    pub fn widest(&self, width: usize) -> usize {
        let widths = self.steps.iter().filter_map(|step| match step {
            TransformStep::Linear { width } => Some(*width),
            TransformStep::RmsNorm(_) => None,
        });
        widths.fold(width, usize::max)
    }

    /// Columns of the result for rows of `width` columns.
    pub fn output_width(&self, width: usize) -> usize {
        self.steps.iter().fold(width, |width, step| match step {
            TransformStep::Linear { width } => *width,
            TransformStep::RmsNorm(_) => width,
        })
    }
}

/// `routed_scaling_factor`. It has one owner, chosen here: applied exactly once.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoutedScale {
    /// The factor; 1 where the model has none.
    pub factor: f32,
    /// Who multiplies by it.
    pub on: ScaleOn,
}

/// Who applies the routed scaling factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ScaleOn {
    /// The router, on the weights, after renormalisation.
    Weights,
    /// The runner, on the routed sum (with the fp16 rule: see `runner::scale`).
    Output,
}

/// The dense branch that every token takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SharedSpec {
    /// Number of separate shared experts; their outputs are added (or weighted by the router).
    pub count: usize,
    /// Width between the two products of each.
    pub intermediate: usize,
    /// Has a gate projection.
    pub gated: bool,
    /// The function between the two products.
    pub activation: Activation,
    /// All projections have biases.
    pub bias: bool,
    /// A scalar gate: the output is multiplied by `sigmoid(x · ws)` (the qwen2 family).
    pub sigmoid_gate: bool,
    /// How the two branches become one.
    pub combine: SharedCombine,
    /// Normalisation of the branch's input (gemma4's dense branch).
    pub input_norm: Option<RmsNorm>,
    /// Normalisation of the branch's output (gemma4's dense branch).
    pub output_norm: Option<RmsNorm>,
}

/// How the routed and the shared branch become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SharedCombine {
    /// `routed + shared`.
    Add,
    /// `(routed + shared) / 2` (cohere2).
    Average,
    /// `routed + Σ_s w_s · shared_s`, the weights from the router (inkling).
    RouterWeighted,
}

/// What is done to the sum of the branches, in this order: `+ bias`, norm, `· multiplier`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutputSpec {
    /// A vector is added (jetmoe).
    pub bias: bool,
    /// Normalisation inside the block (axk1, gemma4); norms that stand between the block and the
    /// residual stream (afmoe, kolibri1) are the decoder layer's.
    pub norm: Option<RmsNorm>,
    /// Multiplies the result.
    pub multiplier: f32,
}

impl Default for OutputSpec {
    fn default() -> Self {
        Self { bias: false, norm: None, multiplier: 1.0 }
    }
}

/// No layer may have more experts than this: sixty times what has been published.
pub const MAX_EXPERTS: usize = 1 << 16;

/// No layer may be wider than this: beyond any published model, and small enough that products of two sizes never overflow.
pub const MAX_SIZE: usize = 1 << 24;

impl LayerSpec {
    /// Checks that the description does not contradict itself.
    ///
    /// # Errors
    /// [`Error::Spec`] naming the first contradiction.
    pub fn validate(&self) -> Result<()> {
        let fail = |reason: String| Err(Error::Spec { layer: self.name.clone(), reason });
        let Dims { hidden, routed_hidden, intermediate } = self.dims;
        for (what, size) in [
            ("hidden size", hidden),
            ("routed hidden size", routed_hidden),
            ("intermediate size", intermediate),
        ] {
            if size == 0 || size > MAX_SIZE {
                return fail(format!("{what} is {size}; it must be 1 to {MAX_SIZE}"));
            }
        }
        if self.input_transform.output_width(hidden) != routed_hidden {
            return fail(format!(
                "the input transform yields {} columns, the experts expect {routed_hidden}",
                self.input_transform.output_width(hidden)
            ));
        }
        if self.output_transform.output_width(routed_hidden) != hidden {
            return fail(format!(
                "the output transform yields {} columns, the layer returns {hidden}",
                self.output_transform.output_width(routed_hidden)
            ));
        }
        if let Err(reason) = self.router.validate() {
            return fail(reason);
        }
        if !self.routed_scale.factor.is_finite() {
            return fail(format!("routed scaling factor is {}", self.routed_scale.factor));
        }
        if self.router.weight_on == WeightOn::Input
            && self.routed_scale.on == ScaleOn::Weights
            && self.routed_scale.factor != 1.0
        {
            return fail(
                "a scaling factor on weights that multiply the experts' input would pass through \
                 the activation; it must be applied to the output"
                    .into(),
            );
        }
        if matches!(self.router.idle, Some(IdleExperts::Identity { .. }))
            && !(self.input_transform.is_identity()
                && self.output_transform.is_identity()
                && (self.routed_scale.on == ScaleOn::Weights || self.routed_scale.factor == 1.0))
        {
            return fail(
                "identity experts return the layer's own input: neither a transform nor a factor \
                 on the output can stand between"
                    .into(),
            );
        }
        if !self.output.multiplier.is_finite() {
            return fail(format!("output multiplier is {}", self.output.multiplier));
        }
        if let Some(shared) = &self.shared {
            if shared.count == 0 || shared.count > MAX_EXPERTS {
                return fail(format!("{} shared experts", shared.count));
            }
            if shared.intermediate == 0 || shared.intermediate > MAX_SIZE {
                return fail(format!("shared intermediate size is {}", shared.intermediate));
            }
        }
        if self.shared.as_ref().is_some_and(|s| s.combine == SharedCombine::RouterWeighted)
            && self.routed_scale.on == ScaleOn::Output
            && self.routed_scale.factor != 1.0
        {
            return fail(
                "shared experts weighted by the router take its scaling factor: it must be \
                 applied to the weights"
                    .into(),
            );
        }
        let joint = match self.router.weight_from {
            WeightFrom::JointSoftmax { shared } => Some(shared),
            _ => None,
        };
        let weighted = self
            .shared
            .as_ref()
            .filter(|shared| shared.combine == SharedCombine::RouterWeighted)
            .map(|shared| shared.count);
        if joint != weighted {
            return fail(format!(
                "the router weighs {joint:?} shared experts, the shared branch has {weighted:?} of that kind"
            ));
        }
        Ok(())
    }

    /// Shape [T, H] of the layer's output for `tokens` rows, known before anything runs.
    pub fn output_shape(&self, tokens: usize) -> [usize; 2] {
        [tokens, self.dims.hidden]
    }
}
