//! A pass that a device makes as a whole: the kernel is the layer.

use super::pass::flops;
use super::{FinishedRouting, ForwardInput, ForwardOutput, MoeRunner, NonFinite, Report};
use crate::experts::{BuiltKernel, LayerCall, RoutingSource, Seen};
use crate::hidden::RowsMut;
use crate::router::Routing;
use crate::{Error, Result};

impl MoeRunner {
    /// The pass over `tokens` rows; `input` and `output` fit the layer.
    pub(super) fn device_pass(
        &mut self,
        tokens: usize,
        input: &ForwardInput<'_>,
        output: RowsMut<'_>,
        report: Option<&mut Report>,
    ) -> Result<ForwardOutput> {
        let layer = &mut self.layer;
        let scaling = layer.scaling(layer.spec.shared.is_some());
        let BuiltKernel::Layer(kernel) = &mut layer.method.kernel else {
            return Err(Error::input("quant method", "the kernel is not a whole layer"));
        };
        let spec = &layer.spec;
        let mut simulated = Routing::new();
        let mut ids = Vec::new();
        let given = match (input.routing, input.device_routing) {
            (Some(FinishedRouting { ids, weights }), _) => {
                Some(RoutingSource::Finished(ids, weights))
            }
            (None, Some(routing)) => Some(RoutingSource::Device(routing)),
            (None, None) => None,
        };
        let source = match (&mut self.simulator, input.expert_ids, given) {
            (_, _, Some(given)) => given,
            (_, Some(ids), None) => {
                layer.router.check_ids(ids, tokens)?;
                RoutingSource::Ids(ids)
            }
            (Some(simulator), None, None) => {
                simulator.route(&spec.router, tokens, &mut simulated)?;
                ids.extend(simulated.ids.iter().map(|id| id.0 as i32));
                RoutingSource::Simulated(&ids, &simulated.weights)
            }
            (None, None, None) => RoutingSource::Router,
        };
        let mut report = report;
        let mut on_device = self.timeline.of_device();
        let call = LayerCall {
            tokens,
            rows: input.hidden,
            shared_rows: input.shared_input,
            source,
            logits: input.router_logits,
            input_ids: input.input_ids,
            refuse_non_finite: layer.non_finite == NonFinite::Refuse,
            routed_factor: scaling.routed,
            shared_factor: scaling.shared,
            out: output,
            seen: report.as_deref_mut().map(|report| Seen {
                logits: &mut report.router_logits,
                routing: &mut report.routing,
                shared: &mut report.shared,
            }),
            spans: on_device.as_mut().map(|(_, spans)| spans),
        };
        self.timeline.span("layer", None, || kernel.forward(call))?;
        if let Some(on_device) = on_device {
            self.timeline.add(on_device);
        }
        if let Some(report) = report {
            report.shared_complete = true;
            report.flops = flops(spec, tokens, given.is_none(), &report.routing);
            report.weight_bytes = kernel.weight_bytes(&report.routing);
        }
        Ok(ForwardOutput { tokens, output_scale: scaling.output, complete: true })
    }
}
