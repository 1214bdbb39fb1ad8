//! A layer of a checkpoint.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{
    CpuStorage, CustomOp1, CustomOp3, Error, Layout, Module, Result, Shape, Tensor, bail,
};
use moe_runner::checkpoint::{Checkpoint, architecture};
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, Options};
use moe_runner::weights::LoadedLayer;

use crate::rows::{mapped, routing};

/// A MoE layer as a module: rows `[…, H]` in, rows `[…, H]` of the same dtype out.
///
/// Rows are f32, or of the dtype that the options name. Clones are the same layer; calls take turns.
#[derive(Clone)]
pub struct MoeLayer {
    runner: Arc<Mutex<MoeRunner>>,
}

impl MoeLayer {
    /// Layer number `layer` of a checkpoint, as it is stored.
    ///
    /// # Errors
    /// Where the checkpoint has no such layer, or it cannot be read or run: the library's own error,
    /// wrapped.
    pub fn open(checkpoint: &Checkpoint, layer: usize, options: &Options) -> Result<Self> {
        let entries = architecture::layers(checkpoint).map_err(Error::wrap)?;
        let Some(entry) = entries.iter().find(|entry| entry.spec.index == layer) else {
            let known: Vec<_> = entries.iter().map(|entry| entry.spec.index).collect();
            bail!("moe-runner: {layer} is no MoE layer of the checkpoint; those are {known:?}");
        };
        let loaded = LoadedLayer::load(checkpoint, entry).map_err(Error::wrap)?;
        let ready = loaded.into_ready(options, &mut |_| ()).map_err(Error::wrap)?;
        Ok(MoeRunner::new(ready).into())
    }

    /// The layer for rows `hidden` `[…, H]` whose routing is finished: `ids` `[…, k]` (U32 or I64; an id
    /// that is no expert's adds nothing) and `weights` `[…, k]` (F32).
    ///
    /// # Errors
    /// Where shapes, dtypes or devices do not fit.
    pub fn forward_routed(
        &self,
        hidden: &Tensor,
        ids: &Tensor,
        weights: &Tensor,
    ) -> Result<Tensor> {
        let (ids, weights) = (ids.contiguous()?, weights.contiguous()?);
        hidden.contiguous()?.apply_op3(&ids, &weights, self.clone())
    }

    fn pass(
        &self,
        hidden: (&CpuStorage, &Layout),
        routing: Option<(&[i32], &[f32])>,
    ) -> Result<(CpuStorage, Shape)> {
        mapped(hidden, |rows, out| {
            let input = match routing {
                None => ForwardInput::new(rows),
                Some((ids, weights)) => ForwardInput::routed(rows, ids, weights),
            };
            // an error leaves the runner ready for the next call
            let mut runner = self.runner.lock().unwrap_or_else(PoisonError::into_inner);
            runner.forward(&input, out).map(drop)
        })
    }
}

impl From<MoeRunner> for MoeLayer {
    fn from(runner: MoeRunner) -> Self {
        Self { runner: Arc::new(Mutex::new(runner)) }
    }
}

impl fmt::Debug for MoeLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MoeLayer").finish_non_exhaustive()
    }
}

impl Module for MoeLayer {
    fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        hidden.contiguous()?.apply_op1(self.clone())
    }
}

impl CustomOp1 for MoeLayer {
    fn name(&self) -> &'static str {
        "moe-runner"
    }

    fn cpu_fwd(&self, hidden: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.pass((hidden, layout), None)
    }
}

impl CustomOp3 for MoeLayer {
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
        self.pass((hidden, hidden_layout), Some((&ids, weights)))
    }
}
