//! One pass on the device, in the order of the flow. Every step is put on one stream; nothing waits, but
//! for rows that come from the host, go to the host, or are asked for.

mod host;
pub(super) mod memory;

use bytemuck::cast_slice;
use moe_cuda::router::RoutingMut;
use moe_cuda::{
    Cut, FaultWord, FewGate, Finish, Float, Identity, Plan, Rows, RowsMut, View, ViewMut,
};

use host::{narrow, nothing_seen};
use memory::{Parts, RoutingParts, SharedParts};

use super::device::{Forked, On, Plans, Work, error};
use super::layer::{CudaLayer, Experts, Gate, Shared, Step};
use super::marks::Marks;
use super::products::{Fast, FastWork, Products};
use super::ranks::{RanksBatch, RanksPass, RanksWork};
use super::upload::cuda_float;
use crate::experts::{ExchangeTime, LayerCall, RoutingSource};
use crate::hidden::{self, ActivationDtype, DevicePlace};
use crate::spec::{IdleExperts, Selection, SharedCombine};
use crate::weights::FloatType;
use crate::{Error, Result};

impl CudaLayer {
    /// Bytes of the device's memory that a pass works in.
    pub(super) fn bytes(&self, tokens: usize, top_k: usize) -> usize {
        let parts = self.branches(tokens, top_k).map(|(experts, slots)| {
            let (planned, tile) = experts.products.plan(slots);
            Plan::bytes(planned, experts.count(), tile) + experts.products.work_bytes(slots)
        });
        self.arena_bytes(tokens, top_k) + parts.sum::<usize>()
    }

    fn arena_bytes(&self, tokens: usize, top_k: usize) -> usize {
        Cut::measure(|cut| {
            Parts::cut(cut, self, tokens, top_k);
        })
    }

    /// The experts of both branches, and their slots.
    fn branches(&self, tokens: usize, top_k: usize) -> impl Iterator<Item = (&Experts, usize)> {
        let shared =
            self.shared.as_ref().map(|shared| (&shared.experts, tokens * shared.spec.count));
        [(&self.experts, tokens * top_k)].into_iter().chain(shared)
    }

    /// Makes sure of the memory.
    pub(super) fn prepare(&self, tokens: usize, top_k: usize) -> Result<()> {
        let (gpu, mut work) = (&self.device.gpu, self.device.work());
        let Work { arena, plans, fast, beside, .. } = &mut *work;
        arena.reserve(gpu, self.arena_bytes(tokens, top_k)).map_err(error)?;
        let works = [(plans, fast), (&mut beside.0, &mut beside.1)];
        for ((experts, slots), (plans, fast_work)) in self.branches(tokens, top_k).zip(works) {
            let (planned, tile) = experts.products.plan(slots);
            plans.reserve(gpu, planned, experts.count(), tile)?;
            if let Products::Sm90(fast) = &experts.products {
                fast.reserve(&self.device, slots, fast_work)?;
            }
        }
        Ok(())
    }

    /// The pass; see [`LayerKernel::forward`](crate::experts::LayerKernel::forward).
    pub(super) fn pass(&self, mut call: LayerCall<'_>) -> Result<()> {
        let tokens = call.tokens;
        let top_k = match call.source {
            RoutingSource::Finished(ids, _) | RoutingSource::Simulated(ids, _) => {
                ids.len().checked_div(tokens).unwrap_or(1)
            }
            RoutingSource::Device(routing) => routing.shape[1],
            RoutingSource::Router | RoutingSource::Ids(_) => self.spec.router.top_k,
        };
        if tokens == 0 && self.ranks.is_none() {
            return call.seen.map_or(Ok(()), |seen| nothing_seen(seen, self, top_k));
        }
        self.prepare(tokens, top_k)?;
        let mut work = self.device.work();
        let Work { arena, plans, fast, beside, ranks, fault, ignored } = &mut *work;
        self.device.stream.set_layer(self.name.clone());
        let mut parts = Parts::cut(&mut arena.cut(), self, tokens, top_k);
        let pass = Pass {
            layer: self,
            tokens,
            top_k,
            // what goes through is nobody's fault
            fault: if call.refuse_non_finite { fault } else { ignored },
            ignored,
            marks: &Marks::new(call.spans.is_some(), &self.device.stream)?,
        };
        let asked = call.seen.is_some() || call.spans.is_some();
        let waits = !call.out.is_on_device() || !call.rows.is_on_device() || asked;
        let (seen, spans) = (call.seen.take(), call.spans.take());
        if tokens == 0 {
            // the others' rows come here all the same
            pass.without_rows(&mut parts, (plans, fast, ranks), top_k)?;
            if let (Some(all), true) = (&self.ranks, waits) {
                all.wait(&self.device, ranks)?;
                all.note(&self.device, ranks, parts.routing.ids.as_view())?;
                spans.map_or(Ok(()), |spans| pass.marks.read(spans))?;
                self.device.check(&mut work)?;
            }
            return seen.map_or(Ok(()), |seen| nothing_seen(seen, self, top_k));
        }
        let host = pass.run(&mut parts, &mut call, (plans, fast, ranks), beside)?;
        if let (Some(all), true) = (&self.ranks, waits) {
            all.wait(&self.device, ranks)?;
        }
        if host {
            pass.copy_out(parts.staged.as_view(), &mut call.out)?;
        }
        if let Some(seen) = seen {
            pass.see(&parts, &call, seen)?;
            if let Some(all) = &self.ranks {
                all.note(&self.device, ranks, parts.routing.ids.as_view())?;
            }
        }
        if let Some(spans) = spans {
            self.device.stream.synchronize().map_err(error)?;
            pass.marks.read(spans)?;
        }
        if waits {
            self.device.check(&mut work)?;
        }
        Ok(())
    }
}

impl CudaLayer {
    /// See [`LayerKernel::exchange_time`](crate::experts::LayerKernel::exchange_time): with the rows and the routing
    /// that the pass before has left.
    pub(super) fn time_exchange(
        &self,
        tokens: usize,
        top_k: usize,
        runs: usize,
    ) -> Result<Option<ExchangeTime>> {
        let Some(ranks) = &self.ranks else { return Ok(None) };
        let mut work = self.device.work();
        let Work { arena, plans, fast, ranks: memory, fault, ignored, .. } = &mut *work;
        let mut parts = Parts::cut(&mut arena.cut(), self, tokens, top_k);
        let width = self.spec.dims.routed_hidden;
        let [own, _] = &mut parts.rows;
        let own = own.reborrow().part(0..tokens * width * self.dtype.size());
        let rows =
            Rows::of_bytes(own.as_view(), float(self.dtype), tokens, width).map_err(error)?;
        let on = (&*self.device, &self.device.stream);
        let x = self.experts.as_read(on, rows, &mut parts.slots)?;
        let (ids, weights) = (parts.routing.ids.as_view(), parts.routing.weights.as_view());
        let of = RanksBatch { x, ids, weights, top_k, factor: 1.0 };
        let mut out = f32_rows(parts.routed.reborrow(), tokens, width)?;
        let (device, experts, out) = (&*self.device, &self.experts, &mut out);
        let (faults, marks) = ((&*fault, &*ignored), &Marks::new(false, &device.stream)?);
        RanksPass { ranks, device, experts, of, plans, fast, out, faults, marks }
            .exchange_time(memory, runs)
    }
}

/// What every step of a pass needs.
struct Pass<'a> {
    layer: &'a CudaLayer,
    tokens: usize,
    top_k: usize,
    fault: &'a FaultWord,
    ignored: &'a FaultWord,
    marks: &'a Marks,
}

impl Pass<'_> {
    /// All steps; true if the output is staged for the host.
    fn run(
        &self,
        parts: &mut Parts<'_>,
        call: &mut LayerCall<'_>,
        work: (&mut Plans, &mut FastWork, &mut RanksWork),
        beside: &mut (Plans, FastWork),
    ) -> Result<bool> {
        let CudaLayer { device, spec, shared, .. } = self.layer;
        let (stream, tokens, dims) = (&device.stream, self.tokens, spec.dims);
        let on = (&**device, stream);
        let (plans, fast, ranks) = work;
        // 1. what comes in, in the layer's dtype
        let [own, other] = &mut parts.rows;
        let given = match call.shared_rows {
            None => None,
            Some(rows) => {
                let transformed =
                    self.accept(call.rows, dims.routed_hidden, &mut parts.staged, other)?;
                Some((rows, transformed))
            }
        };
        let (rows, transformed) = match &given {
            None => (call.rows, None),
            Some((rows, transformed)) => (*rows, Some(*transformed)),
        };
        // rows of the GPU that the experts' kernel can read are read where they lie, and checked by it
        let hidden = match self.in_place(rows)?.filter(|x| self.gate_in_front(call, x).is_some()) {
            Some(rows) => rows,
            None => self.accept(rows, dims.hidden, &mut parts.staged, own)?,
        };
        // 2. the input transform
        let rows = match transformed {
            Some(rows) => rows,
            None => self.transform(&self.layer.input_transform, hidden, &mut parts.transformed)?,
        };
        // where the output goes: with nothing after the sum of slots, the experts write it
        let (mut out, host) = match &call.out {
            hidden::RowsMut::Device(rows) => (device_rows_mut(rows.place())?, false),
            _ => {
                let float = float(call.out.dtype());
                let bytes = tokens * dims.hidden * float.bytes();
                let staged = parts.staged.reborrow().part(0..bytes);
                (RowsMut::of_bytes(staged, float, tokens, dims.hidden).map_err(error)?, true)
            }
        };
        let experts = &self.layer.experts;
        let last = self.layer.ends_with_the_sum() && experts.writes(&out);
        let mut sum = f32_rows(parts.routed.reborrow(), tokens, dims.routed_hidden)?;
        let routed = if last { &mut out } else { &mut sum };
        // 4. the shared experts run beside the rest: from here on or, where the router weighs them, once it has
        let mut to_come = shared.as_ref().zip(parts.shared.as_mut());
        let at_once = to_come.take_if(|(of, _)| of.spec.combine != SharedCombine::RouterWeighted);
        let mut forked = None;
        if let Some((shared, part)) = at_once {
            forked = Some(self.fork_shared(shared, hidden, None, part, &mut *beside)?);
        }
        // 3. gate and router, 5. the experts, and the sum over slots with the scaling factor
        let in_front = self.gate_in_front(call, &rows);
        if let Some((kernel, gate)) = in_front {
            let RoutingParts { logits, ids, weights, shared_weights, .. } = &mut parts.routing;
            let gate = FewGate {
                weight: gate.linear.weight()?,
                bias: gate.bias.as_ref().map(|bias| bias.view()),
                router: &self.layer.router,
                logits: logits.reborrow(),
                routing: RoutingMut {
                    ids: ids.reborrow(),
                    weights: weights.reborrow(),
                    shared_weights: shared_weights.reborrow(),
                },
                fault: self.fault,
            };
            let batch = (rows, call.routed_factor, self.ignored);
            self.marks.span(stream, "experts", None, || {
                kernel.run_gated(device, gate, batch, fast, routed)
            })?;
        } else {
            let routing = &mut parts.routing;
            self.marks.span(stream, "route", None, || self.route(routing, call, hidden))?;
        }
        let (ids, weights) = (parts.routing.ids.as_view(), parts.routing.weights.as_view());
        if let Some((shared, part)) = to_come {
            let weights = Some(parts.routing.shared_weights.as_view());
            forked = Some(self.fork_shared(shared, hidden, weights, part, beside)?);
        }
        match &self.layer.ranks {
            _ if in_front.is_some() => {}
            None => {
                let of = (rows, ids, Some(weights), call.routed_factor);
                self.marks.span(stream, "experts", None, || {
                    experts.run(on, of, &mut parts.slots, (plans, fast), routed, self.ignored)
                })?;
            }
            Some(all) => {
                let x = experts.as_read(on, rows, &mut parts.slots)?;
                let (top_k, factor) = (self.top_k, call.routed_factor);
                let of = RanksBatch { x, ids, weights, top_k, factor };
                let (faults, marks) = ((self.fault, self.ignored), self.marks);
                let out = routed;
                RanksPass { ranks: all, device, experts, of, plans, fast, out, faults, marks }
                    .run(ranks)?;
            }
        }
        if last {
            return Ok(host);
        }
        // 6. the output transform
        let steps = &self.layer.output_transform;
        let sum = self.transform(steps, sum.as_rows(), &mut parts.finished)?;
        // SAFETY: `sum` is `parts.routed` or one of the transform's buffers, all cut for this pass alone, and
        // read by nothing that follows.
        let mut sum = unsafe { sum.into_mut() };
        // 7. both branches, what follows them, and out
        let mut shared_out = None;
        if let Some((rows, running)) = forked {
            running.join()?;
            shared_out = Some(rows);
        }
        let identity = matches!(spec.router.idle, Some(IdleExperts::Identity { .. }));
        let finish = Finish {
            shared: shared_out.map(|rows| (call.shared_factor, rows)),
            average: spec
                .shared
                .as_ref()
                .is_some_and(|shared| shared.combine == SharedCombine::Average),
            bias: self.layer.bias.as_ref().map(|bias| bias.view()),
            norm: self.layer.norm.as_ref().map(|(norm, weight)| (*norm, weight.view())),
            multiplier: spec.output.multiplier,
            identity: identity.then_some(Identity {
                rows,
                ids,
                weights,
                experts: spec.router.experts,
                choices: spec.router.choices(),
            }),
        };
        device.slots.finish(stream, finish, &mut sum, &mut out).map_err(error)?;
        Ok(host)
    }

    /// Of a rank without rows of its own: its experts work for the others.
    fn without_rows(
        &self,
        parts: &mut Parts<'_>,
        (plans, fast, work): (&mut Plans, &mut FastWork, &mut RanksWork),
        top_k: usize,
    ) -> Result<()> {
        let CudaLayer { device, spec, experts, ranks, .. } = self.layer;
        let Some(ranks) = ranks else { return Ok(()) };
        let width = spec.dims.routed_hidden;
        let float = match (experts.is_fast(), self.layer.input_transform.is_empty()) {
            (true, _) => Fast::ROWS,
            (false, true) => float(self.layer.dtype),
            (false, false) => Float::F32,
        };
        let bytes = parts.rows[0].reborrow().part(0..0);
        let x = Rows::of_bytes(bytes.as_view(), float, 0, width).map_err(error)?;
        let (ids, weights) = (parts.routing.ids.as_view(), parts.routing.weights.as_view());
        let of = RanksBatch { x, ids, weights, top_k, factor: 1.0 };
        let out = &mut f32_rows(parts.routed.reborrow(), 0, width)?;
        let (faults, marks) = ((self.fault, self.ignored), self.marks);
        RanksPass { ranks, device, experts, of, plans, fast, out, faults, marks }.run(work)
    }

    /// Rows of the GPU in the layer's dtype.
    fn in_place<'b>(&self, rows: hidden::Rows<'b>) -> Result<Option<Rows<'b>>> {
        match rows {
            hidden::Rows::Device(rows) if rows.place().dtype == self.layer.dtype => {
                Ok(Some(device_rows(rows.place())?))
            }
            _ => Ok(None),
        }
    }

    /// The kernel that takes gate, routing and the experts of `x` in one launch, where there is one.
    fn gate_in_front(&self, call: &LayerCall<'_>, x: &Rows<'_>) -> Option<(&Fast, &Gate)> {
        let CudaLayer { gate, router, input_transform, experts, .. } = self.layer;
        let plain = matches!(call.source, RoutingSource::Router)
            && call.logits.is_none()
            && call.shared_rows.is_none()
            && input_transform.is_empty();
        let (Some(gate), Products::Sm90(fast)) = (gate, &experts.products) else { return None };
        let weight = gate.linear.weight().ok()?;
        let takes = plain && gate.norm.is_none() && fast.takes_gate(x, &weight, router);
        takes.then_some((&**fast, gate))
    }

    /// Rows `[T, width]` in the layer's dtype, in `to`.
    fn accept<'b>(
        &self,
        rows: hidden::Rows<'_>,
        width: usize,
        staged: &mut ViewMut<'_, u8>,
        to: &'b mut ViewMut<'_, u8>,
    ) -> Result<Rows<'b>> {
        let (device, tokens) = (&self.layer.device, self.tokens);
        let own = float(self.layer.dtype);
        let to = to.reborrow().part(0..tokens * width * own.bytes());
        let mut to = RowsMut::of_bytes(to, own, tokens, width).map_err(error)?;
        let of = float(rows.dtype());
        let from = match rows {
            hidden::Rows::Device(rows) => device_rows(rows.place())?,
            rows => {
                let staged = staged.reborrow().part(0..tokens * width * of.bytes());
                let gathered;
                let bytes: &[u8] = match rows {
                    hidden::Rows::F32(rows) => cast_slice(rows),
                    hidden::Rows::F16(rows) => cast_slice(rows),
                    hidden::Rows::Bf16(rows) => cast_slice(rows),
                    rows => {
                        let mut wide = vec![0.0; tokens * width];
                        rows.widen(0..wide.len(), &mut wide);
                        gathered = narrow(rows.dtype(), &wide);
                        &gathered
                    }
                };
                let pointer = staged.address();
                device.stream.copy_in(bytes, staged).map_err(error)?;
                // SAFETY: the part just filled, which the pass does not write before it is read.
                unsafe { Rows::from_raw(pointer, of, tokens, width, width) }.map_err(error)?
            }
        };
        device.verbs.convert(&device.stream, from, &mut to, Some(self.fault)).map_err(error)?;
        Ok(to.into_rows())
    }

    /// The rows after `steps`: `rows` themselves where there are none, else in one of `buffers`.
    fn transform<'b>(
        &self,
        steps: &[Step],
        rows: Rows<'b>,
        buffers: &'b mut [ViewMut<'_, f32>; 2],
    ) -> Result<Rows<'b>> {
        let (device, tokens) = (&self.layer.device, self.tokens);
        let (stream, verbs) = (&device.stream, &device.verbs);
        let mut from = rows;
        for (i, step) in steps.iter().enumerate() {
            let width = match step {
                Step::Linear(linear) => linear.features(),
                Step::Norm(..) => from.cols(),
            };
            // SAFETY: steps alternate between the two buffers: the one written here is not the one
            // that the step reads, and both are borrowed for 'b.
            let buffer = unsafe { ViewMut::from_raw(buffers[i % 2].address(), tokens * width) };
            let mut to = f32_rows(buffer, tokens, width)?;
            match step {
                Step::Linear(linear) => {
                    if linear.input.is_some() {
                        return Err(Error::NoKernel(
                            "no GPU kernel quantises the rows of a transform".into(),
                        ));
                    }
                    verbs.linear(stream, from, linear.weight()?, None, &mut to).map_err(error)?;
                }
                Step::Norm(norm, weight) => {
                    let weight = Some(weight.view());
                    verbs.norm(stream, *norm, from, weight, &mut to).map_err(error)?;
                }
            }
            from = to.into_rows();
        }
        Ok(from)
    }

    /// Logits, ids and weights.
    fn route(
        &self,
        parts: &mut RoutingParts<'_>,
        call: &LayerCall<'_>,
        hidden: Rows<'_>,
    ) -> Result<()> {
        let CudaLayer { device, spec, gate, router, .. } = self.layer;
        let (stream, tokens) = (&device.stream, self.tokens);
        if let RoutingSource::Finished(ids, weights) = call.source {
            return self.take_routing(parts, ids, weights);
        }
        if let RoutingSource::Device(routing) = call.source {
            let slots = tokens * self.top_k;
            // SAFETY: whoever made the routing has promised that both can be read.
            let (ids, weights) = unsafe {
                (View::from_raw(routing.ids, slots), View::from_raw(routing.weights, slots))
            };
            stream.copy(ids, parts.ids.reborrow()).map_err(error)?;
            return stream.copy(weights, parts.weights.reborrow()).map_err(error);
        }
        let width = spec.router.logits();
        match (call.logits, gate) {
            (Some(logits), _) => {
                stream.copy_in(logits, parts.logits.reborrow()).map_err(error)?;
            }
            (None, Some(gate)) => {
                let mut logits = f32_rows(parts.logits.reborrow(), tokens, width)?;
                self.gate(gate, hidden, &mut parts.normed, &mut logits)?;
            }
            (None, None) => return Err(Error::input("router_logits", "the layer has no gate")),
        }
        let logits = Rows::new(parts.logits.as_view(), Float::F32, tokens, width).map_err(error)?;
        let mut out = RoutingMut {
            ids: parts.ids.reborrow(),
            weights: parts.weights.reborrow(),
            shared_weights: parts.shared_weights.reborrow(),
        };
        if let RoutingSource::Ids(ids) = call.source {
            let ids: Vec<u32> = ids.iter().map(|id| id.0).collect();
            stream.copy_in(&ids, parts.given_ids.reborrow()).map_err(error)?;
            let given = parts.given_ids.as_view();
            return router.route_to(stream, logits, given, &mut out, self.fault).map_err(error);
        }
        if let RoutingSource::Simulated(ids, weights) = call.source {
            return self.take_routing(parts, ids, weights);
        }
        let mut token_ids = None;
        if matches!(spec.router.selection, Selection::HashTable { .. }) {
            let Some(ids) = call.input_ids else {
                return Err(Error::input(
                    "input ids",
                    "this layer routes by token id (hash table); pass the ids of the tokens",
                ));
            };
            stream.copy_in(ids, parts.token_ids.reborrow()).map_err(error)?;
            token_ids = Some(parts.token_ids.as_view());
        }
        router.route(stream, logits, token_ids, &mut out, self.fault).map_err(error)
    }

    fn take_routing(
        &self,
        parts: &mut RoutingParts<'_>,
        ids: &[i32],
        weights: &[f32],
    ) -> Result<()> {
        let stream = &self.layer.device.stream;
        // a negative id is no expert's, also as an unsigned number
        let ids: &[u32] = cast_slice(ids);
        stream.copy_in(ids, parts.ids.reborrow()).map_err(error)?;
        stream.copy_in(weights, parts.weights.reborrow()).map_err(error)
    }

    fn gate(
        &self,
        gate: &Gate,
        hidden: Rows<'_>,
        normed: &mut ViewMut<'_, f32>,
        logits: &mut RowsMut<'_>,
    ) -> Result<()> {
        let device = &self.layer.device;
        let (stream, verbs) = (&device.stream, &device.verbs);
        let bias = gate.bias.as_ref().map(|bias| bias.view());
        let weight = gate.linear.weight()?;
        let Some((norm, scale)) = &gate.norm else {
            return verbs.linear(stream, hidden, weight, bias, logits).map_err(error);
        };
        let mut normed = f32_rows(normed.reborrow(), self.tokens, hidden.cols())?;
        verbs.norm(stream, *norm, hidden, Some(scale.view()), &mut normed).map_err(error)?;
        verbs.linear(stream, normed.as_rows(), weight, bias, logits).map_err(error)
    }

    /// The shared experts on the second stream.
    fn fork_shared<'b>(
        &'b self,
        shared: &Shared,
        hidden: Rows<'_>,
        weights: Option<View<'_, f32>>,
        parts: &'b mut SharedParts<'_>,
        (plans, fast): &mut (Plans, FastWork),
    ) -> Result<(Rows<'b>, Forked<'b>)> {
        let device = &*self.layer.device;
        let forked = device.beside.fork(&device.stream)?;
        let on = (device, &device.beside.stream);
        let rows = self.marks.span(on.1, "shared experts", None, || {
            self.shared(on, shared, (hidden, weights), parts, (plans, fast))
        })?;
        Ok((rows, forked))
    }

    /// The shared experts' output `[T, H]`.
    fn shared<'b>(
        &self,
        on @ (device, stream): On<'_>,
        shared: &Shared,
        (hidden, weights): (Rows<'_>, Option<View<'_, f32>>),
        parts: &'b mut SharedParts<'_>,
        work: (&mut Plans, &mut FastWork),
    ) -> Result<Rows<'b>> {
        let (tokens, width) = (self.tokens, hidden.cols());
        let SharedParts { normed, ids, ones, slots, out: [out, finished] } = parts;
        let mut own = None;
        if let Some((norm, weight)) = &shared.input_norm {
            let mut rows = f32_rows(normed.reborrow(), tokens, width)?;
            let weight = Some(weight.view());
            device.verbs.norm(stream, *norm, hidden, weight, &mut rows).map_err(error)?;
            own = Some(rows);
        }
        let x = own.as_ref().map_or(hidden, |rows| rows.as_rows());
        device.slots.dense_ids(stream, shared.spec.count, ids.reborrow()).map_err(error)?;
        let mut out = f32_rows(out.reborrow(), tokens, width)?;
        let weights = match weights {
            None if shared.experts.is_fast() => {
                device.slots.fill(stream, 1.0, ones.reborrow()).map_err(error)?;
                Some(ones.as_view())
            }
            weights => weights,
        };
        let of = (x, ids.as_view(), weights, 1.0);
        shared.experts.run(on, of, slots, work, &mut out, self.ignored)?;
        if let Some(gate) = &shared.gate {
            device.slots.sigmoid_gate(stream, hidden, gate.view(), &mut out).map_err(error)?;
        }
        let Some((norm, weight)) = &shared.output_norm else { return Ok(out.into_rows()) };
        let mut finished = f32_rows(finished.reborrow(), tokens, width)?;
        let weight = Some(weight.view());
        device.verbs.norm(stream, *norm, out.as_rows(), weight, &mut finished).map_err(error)?;
        Ok(finished.into_rows())
    }
}

fn float(dtype: ActivationDtype) -> Float {
    cuda_float(match dtype {
        ActivationDtype::F32 => FloatType::F32,
        ActivationDtype::F16 => FloatType::F16,
        ActivationDtype::Bf16 => FloatType::Bf16,
    })
}

pub(super) fn f32_rows(view: ViewMut<'_, f32>, rows: usize, cols: usize) -> Result<RowsMut<'_>> {
    RowsMut::new(view, Float::F32, rows, cols).map_err(error)
}

fn device_rows<'a>(place: DevicePlace) -> Result<Rows<'a>> {
    let DevicePlace { pointer, dtype, shape: [rows, cols], stride } = place;
    // SAFETY: whoever made the place has promised that they can be read.
    unsafe { Rows::from_raw(pointer, float(dtype), rows, cols, stride) }.map_err(error)
}

fn device_rows_mut<'a>(place: DevicePlace) -> Result<RowsMut<'a>> {
    let DevicePlace { pointer, dtype, shape: [rows, cols], stride } = place;
    // SAFETY: whoever made the place has promised that they can be written.
    unsafe { RowsMut::from_raw(pointer, float(dtype), rows, cols, stride) }.map_err(error)
}
