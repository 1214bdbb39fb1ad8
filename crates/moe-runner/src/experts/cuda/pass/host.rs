//! What goes to the host: rows, and what was decided on the way.

use bytemuck::{cast_slice, cast_slice_mut};
use moe_cuda::View;
use moe_kernels::numerics::float16;

use super::memory::Parts;
use super::{Pass, error};
use crate::Result;
use crate::experts::cuda::layer::CudaLayer;
use crate::experts::{LayerCall, RoutingSource, Seen};
use crate::hidden::{self, ActivationDtype};
use crate::router::{LogicalId, Routing};

impl Pass<'_> {
    /// Copies the staged output to rows of the host.
    pub(super) fn copy_out(
        &self,
        staged: View<'_, u8>,
        out: &mut hidden::RowsMut<'_>,
    ) -> Result<()> {
        let (stream, len) = (&self.layer.device.stream, out.len());
        let staged = staged.part(0..len * out.dtype().size());
        let bytes: &mut [u8] = match out {
            hidden::RowsMut::F32(out) => cast_slice_mut(out),
            hidden::RowsMut::F16(out) => cast_slice_mut(out),
            hidden::RowsMut::Bf16(out) => cast_slice_mut(out),
            out => {
                let mut bytes = vec![0; staged.len()];
                stream.copy_out(staged, &mut bytes).map_err(error)?;
                out.write(&widened(out.dtype(), &bytes));
                return Ok(());
            }
        };
        stream.copy_out(staged, bytes).map_err(error)
    }

    /// What was decided on the way.
    pub(super) fn see(
        &self,
        parts: &Parts<'_>,
        call: &LayerCall<'_>,
        seen: Seen<'_>,
    ) -> Result<()> {
        let stream = &self.layer.device.stream;
        let Seen { logits, routing, shared } = seen;
        logits.clear();
        if !matches!(call.source, RoutingSource::Finished(..) | RoutingSource::Device(_)) {
            logits.resize(parts.routing.logits.len(), 0.0);
            stream.copy_out(parts.routing.logits.as_view(), logits).map_err(error)?;
        }
        let mut ids = vec![0; parts.routing.ids.len()];
        stream.copy_out(parts.routing.ids.as_view(), &mut ids).map_err(error)?;
        set_routing(routing, self.tokens, self.top_k, &ids);
        routing.weights.resize(ids.len(), 0.0);
        stream.copy_out(parts.routing.weights.as_view(), &mut routing.weights).map_err(error)?;
        routing.shared_weights.resize(parts.routing.shared_weights.len(), 0.0);
        let to = &mut routing.shared_weights;
        stream.copy_out(parts.routing.shared_weights.as_view(), to).map_err(error)?;
        *shared = match (&parts.shared, &self.layer.shared) {
            (Some(parts), Some(layer)) => {
                let from = &parts.out[usize::from(layer.output_norm.is_some())];
                let mut rows = shared.take().unwrap_or_default();
                rows.resize(from.len(), 0.0);
                stream.copy_out(from.as_view(), &mut rows).map_err(error)?;
                Some(rows)
            }
            _ => None,
        };
        Ok(())
    }
}

/// Of a pass without tokens.
pub(super) fn nothing_seen(seen: Seen<'_>, layer: &CudaLayer, top_k: usize) -> Result<()> {
    let Seen { logits, routing, shared } = seen;
    logits.clear();
    set_routing(routing, 0, top_k, &[]);
    routing.weights.clear();
    routing.shared_weights.clear();
    *shared = layer.shared.is_some().then(Vec::new);
    Ok(())
}

fn set_routing(routing: &mut Routing, tokens: usize, top_k: usize, ids: &[u32]) {
    (routing.tokens, routing.top_k) = (tokens, top_k);
    routing.ids.clear();
    routing.ids.extend(ids.iter().map(|id| LogicalId(*id)));
}

/// `values` of this dtype, as bytes: exact, since they are such numbers.
pub(super) fn narrow(dtype: ActivationDtype, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.size()];
    match dtype {
        ActivationDtype::F32 => bytes.copy_from_slice(cast_slice(values)),
        ActivationDtype::F16 => {
            float16::f32_to_f16_bytes(values, &mut bytes);
        }
        ActivationDtype::Bf16 => {
            float16::f32_to_bf16_bytes(values, &mut bytes);
        }
    }
    bytes
}

/// Bytes of this dtype as f32.
fn widened(dtype: ActivationDtype, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / dtype.size()];
    match dtype {
        ActivationDtype::F32 => {
            let numbers = bytes.as_chunks().0.iter();
            values.iter_mut().zip(numbers).for_each(|(v, bytes)| *v = f32::from_le_bytes(*bytes));
        }
        ActivationDtype::F16 => {
            float16::f16_bytes_to_f32(bytes, &mut values);
        }
        ActivationDtype::Bf16 => {
            float16::bf16_bytes_to_f32(bytes, &mut values);
        }
    }
    values
}
