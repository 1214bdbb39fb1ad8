//! Experts alone, of tensors that candle has.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{
    CpuStorage, CustomOp3, DType, Error, Layout, Result, Shape, Storage, Tensor, bail,
};
use moe_runner::runner::{Options, RoutedExperts};
use moe_runner::spec::{Activation, ExpertSpec, WeightOn};
use moe_runner::weights::{GateUp, Stack, StackedExperts};

use crate::rows::{floats, mapped, routing};

/// The weights of all experts of a layer, F32, BF16 or F16.
#[derive(Clone, Copy, Debug)]
pub struct Stacks<'a> {
    /// `[E, 2I, H]`, or `[E, I, H]` without a gate projection.
    pub gate_up: &'a Tensor,
    /// Which rows are whose.
    pub layout: GateUp,
    /// `[E, H, I]`.
    pub down: &'a Tensor,
    /// `[E, 2I]`, or `[E, I]`: in the order of the rows of `gate_up`.
    pub gate_up_bias: Option<&'a Tensor>,
    /// `[E, H]`.
    pub down_bias: Option<&'a Tensor>,
}

/// Routed experts for a model that routes by itself.
///
/// Clones are the same experts; calls take turns.
#[derive(Clone)]
pub struct MoeExperts {
    experts: Arc<Mutex<RoutedExperts>>,
}

impl MoeExperts {
    /// Packs the experts of `stacks`, which are read once and not kept.
    ///
    /// # Errors
    /// Where shapes, dtypes or devices do not fit, and what [`RoutedExperts::new`] says.
    pub fn new(stacks: Stacks<'_>, activation: Activation, options: &Options) -> Result<Self> {
        let Stacks { gate_up, layout, down, gate_up_bias, down_bias } = stacks;
        let bias = |bias: Option<&Tensor>| -> Result<Option<Vec<f32>>> {
            bias.map(|bias| bias.to_dtype(DType::F32)?.flatten_all()?.to_vec1()).transpose()
        };
        let (gate_up_bias, down_bias) = (bias(gate_up_bias)?, bias(down_bias)?);
        let stacked = StackedExperts {
            gate_up: stack("gate_up", gate_up)?,
            layout,
            down: stack("down", down)?,
            gate_up_bias: gate_up_bias.as_deref(),
            down_bias: down_bias.as_deref(),
        };
        let experts = stacked.experts().map_err(Error::wrap)?;
        let bias = gate_up_bias.is_some() || down_bias.is_some();
        let spec = ExpertSpec { gated: layout != GateUp::UpOnly, activation, bias, norm: None };
        let experts = RoutedExperts::new(spec, WeightOn::Output, experts, options);
        Ok(experts.map_err(Error::wrap)?.into())
    }

    /// `Σ_j weights[t, j] · expert(ids[t, j])(hidden[t])` for every row of `hidden` `[…, H]`: `ids` `[…, k]`
    /// (U32 or I64; an id that is no expert's adds nothing) and `weights` `[…, k]` (F32).
    ///
    /// # Errors
    /// Where shapes, dtypes or devices do not fit.
    pub fn forward(&self, hidden: &Tensor, ids: &Tensor, weights: &Tensor) -> Result<Tensor> {
        let (ids, weights) = (ids.contiguous()?, weights.contiguous()?);
        hidden.contiguous()?.apply_op3(&ids, &weights, self.clone())
    }
}

impl From<RoutedExperts> for MoeExperts {
    fn from(experts: RoutedExperts) -> Self {
        Self { experts: Arc::new(Mutex::new(experts)) }
    }
}

impl fmt::Debug for MoeExperts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MoeExperts").finish_non_exhaustive()
    }
}

impl CustomOp3 for MoeExperts {
    fn name(&self) -> &'static str {
        "moe-runner"
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        ids: &CpuStorage,
        ids_layout: &Layout,
        weights: &CpuStorage,
        weights_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (ids, weights) = routing(hidden_layout, (ids, ids_layout), (weights, weights_layout))?;
        mapped((hidden, hidden_layout), |rows, out| {
            // an error leaves the experts ready for the next call
            let mut experts = self.experts.lock().unwrap_or_else(PoisonError::into_inner);
            experts.forward(rows, &ids, weights, out)
        })
    }
}

/// All experts' weights of a projection.
fn stack(what: &str, tensor: &Tensor) -> Result<Stack> {
    let tensor = tensor.contiguous()?;
    let &[experts, rows, cols] = tensor.dims() else {
        bail!(
            "moe-runner: {what} of shape {:?}; all experts' [E, out, in] is needed",
            tensor.dims()
        );
    };
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        bail!("moe-runner: {what} is on another device than the CPU");
    };
    let (bytes, float) = floats(what, (storage, layout))?;
    Ok(Stack { bytes: bytes.into(), float, shape: [experts, rows, cols], transposed: false })
}
