//! Experts without a router: for engines that route by themselves.

use super::{ForwardInput, MoeRunner, MoeRunnerInterface, Options};
use crate::Result;
use crate::hidden::{Rows, RowsMut};
use crate::oracle::Choice;
use crate::spec::{
    Dims, ExpertSpec, GateSpec, LayerSpec, OutputSpec, RoutedScale, RouterSpec, ScaleOn, Transform,
    WeightOn,
};
use crate::weights::{Expert, LoadedLayer, OutputWeights};

/// The routed experts of a layer, ready to run on rows that somebody else has routed.
///
/// ```
/// # use moe_runner::hidden::{ActivationDtype, Rows, RowsMut};
/// # use moe_runner::runner::{Options, RoutedExperts};
/// # use moe_runner::spec::{Activation, ExpertSpec, WeightOn};
/// # use moe_runner::weights::{Expert, Matrix};
/// # fn main() -> moe_runner::Result<()> {
/// # let (hidden_size, intermediate) = (4, 2);
/// # let matrix = |rows, cols| Matrix::from_f32(&vec![0.5; rows * cols], [rows, cols]);
/// # let expert = Expert {
/// #     gate: Some(matrix(intermediate, hidden_size)?), up: matrix(intermediate, hidden_size)?,
/// #     down: matrix(hidden_size, intermediate)?,
/// #     gate_bias: None, up_bias: None, down_bias: None, norm: None,
/// # };
/// # let experts = vec![expert; 3];
/// let spec = ExpertSpec { gated: true, activation: Activation::Silu, bias: false, norm: None };
/// let options = Options::new(ActivationDtype::F32, 2)?;
/// let mut experts = RoutedExperts::new(spec, WeightOn::Output, experts, &options)?;
/// println!("{}: {}", experts.choice().kernel.name, experts.choice().why);
///
/// let (hidden, mut output) = ([1.0; 2 * 4], [0.0; 2 * 4]);
/// // two tokens with two slots each; the second token has but one expert here
/// let (ids, weights) = ([0, 2, 1, -1], [0.75, 0.25, 1.0, 0.0]);
/// experts.forward(Rows::F32(&hidden), &ids, &weights, RowsMut::F32(&mut output))?;
/// # assert!(output.iter().all(|v| *v == output[0] && *v != 0.0));
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct RoutedExperts(MoeRunner);

impl RoutedExperts {
    /// Chooses a kernel for `experts`, by local id, and packs them.
    ///
    /// # Errors
    /// [`Error::Spec`](crate::Error::Spec) naming the expert that is not as `spec` says or as the
    /// first one is; [`Error::NoKernel`](crate::Error::NoKernel) with every failing condition of
    /// every kernel.
    pub fn new(
        spec: ExpertSpec,
        weight_on: WeightOn,
        experts: Vec<Expert>,
        options: &Options,
    ) -> Result<Self> {
        let first = experts.first();
        let hidden = first.map_or(0, |expert| expert.up.cols());
        let intermediate = first.map_or(0, |expert| expert.up.rows());
        let layer = LoadedLayer {
            spec: LayerSpec {
                name: "experts".into(),
                index: 0,
                dims: Dims { hidden, routed_hidden: hidden, intermediate },
                gate: GateSpec::default(),
                router: RouterSpec { weight_on, ..RouterSpec::softmax(experts.len(), 1, false) },
                expert: spec,
                input_transform: Transform::default(),
                output_transform: Transform::default(),
                routed_scale: RoutedScale { factor: 1.0, on: ScaleOn::Weights },
                shared: None,
                output: OutputSpec::default(),
            },
            gate: None,
            experts,
            input_transform: Vec::new(),
            output_transform: Vec::new(),
            shared: None,
            output: OutputWeights::default(),
        };
        Ok(Self(MoeRunner::new(layer.into_ready(options, &mut |_| ())?)))
    }

    /// Which kernel was chosen, and why no other.
    pub fn choice(&self) -> &Choice {
        self.0.choice()
    }

    /// Writes `Σ_j weights[t, j] · expert(ids[t, j])(hidden[t])` for every row t, in slot order.
    /// `ids` and `weights` are `[T, k]` for any k; an id that is negative or no expert's adds
    /// nothing.
    ///
    /// # Errors
    /// As [`MoeRunnerInterface::forward`].
    pub fn forward(
        &mut self,
        hidden: Rows<'_>,
        ids: &[i32],
        weights: &[f32],
        output: RowsMut<'_>,
    ) -> Result<()> {
        self.0.forward(&ForwardInput::routed(hidden, ids, weights), output).map(drop)
    }

    /// Bytes of working memory for `tokens` tokens of `top_k` slots.
    pub fn workspace_bytes(&self, tokens: usize, top_k: usize) -> usize {
        self.0.workspace_bytes_of(tokens, top_k)
    }
}
