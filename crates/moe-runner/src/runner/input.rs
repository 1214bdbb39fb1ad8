//! What comes in: checked against the layer, and as rows of f32.

use moe_kernels::arena::{Cut, room};
use moe_kernels::region::{for_each, rows_together};

use super::{FinishedRouting, ForwardInput, NonFinite, ReadyLayer};
use crate::experts::BuiltKernel;
use crate::hidden::{ActivationDtype, Rows, RowsMut};
use crate::router::{LogicalId, Routing};
use crate::{Error, Result};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Checks all inputs against the layer, but for their values. Returns T.
pub(super) fn check(
    layer: &ReadyLayer,
    input: &ForwardInput<'_>,
    output: &RowsMut<'_>,
) -> Result<usize> {
    let dims = layer.spec.dims;
    let hidden_width = if input.shared_input.is_some() { dims.routed_hidden } else { dims.hidden };
    let tokens = input.hidden.tokens("hidden_states", hidden_width)?;
    let expect = |what, len: usize, want: usize| match len == want {
        true => Ok(()),
        false => Err(Error::input(what, format!("{len} elements, {want} are needed"))),
    };
    output.expect_width("output", dims.hidden)?;
    expect("output", output.len(), tokens * dims.hidden)?;
    let rows_of_device = [
        ("hidden_states", input.hidden.is_on_device()),
        ("shared_input", input.shared_input.is_some_and(|rows| rows.is_on_device())),
        ("output", output.is_on_device()),
    ];
    if !matches!(layer.method.kernel, BuiltKernel::Layer(_))
        && let Some((what, _)) = rows_of_device.into_iter().find(|(_, on_device)| *on_device)
    {
        let kernel = layer.method.desc().name;
        return Err(Error::input(what, format!("the rows lie on a GPU, '{kernel}' does not")));
    }
    for (what, dtype) in [
        ("hidden_states", Some(input.hidden.dtype())),
        ("shared_input", input.shared_input.map(|shared| shared.dtype())),
        ("output", Some(output.dtype())),
    ] {
        // f32 carries every dtype's values; the layer's own dtype is the only other one
        if let Some(dtype) = dtype
            && dtype != layer.dtype
            && dtype != ActivationDtype::F32
        {
            let (rows, own) = (dtype.name(), layer.dtype.name());
            return Err(Error::input(
                what,
                format!("{rows} rows for a layer made ready for {own}"),
            ));
        }
    }
    if let Some(shared) = input.shared_input {
        shared.expect_width("shared_input", dims.hidden)?;
        expect("shared_input", shared.len(), tokens * dims.hidden)?;
    }
    if let Some(logits) = input.router_logits {
        expect("router_logits", logits.len(), tokens * layer.spec.router.logits())?;
    } else if !layer.has_gate && input.routing.is_none() && input.device_routing.is_none() {
        return Err(Error::input(
            "router_logits",
            "the layer has no gate; logits, or a finished routing, must be given",
        ));
    }
    if let Some(ids) = input.input_ids {
        expect("input_ids", ids.len(), tokens)?;
    }
    if let Some(routing) = input.device_routing {
        if !matches!(layer.method.kernel, BuiltKernel::Layer(_)) {
            let kernel = layer.method.desc().name;
            return Err(Error::input("routing", format!("it lies on a GPU, '{kernel}' does not")));
        }
        if routing.shape[0] != tokens {
            let reason = format!("it is for {} tokens, there are {tokens}", routing.shape[0]);
            return Err(Error::input("routing", reason));
        }
    }
    let finished = input.routing.is_some() || input.device_routing.is_some();
    if finished && (input.router_logits.is_some() || input.expert_ids.is_some())
        || input.routing.is_some() && input.device_routing.is_some()
    {
        return Err(Error::input(
            "routing",
            "it is finished: logits or ids beside it would not be used",
        ));
    }
    if let Some(routing) = input.routing {
        check_routing(routing, tokens, layer.non_finite)?;
    }
    Ok(tokens)
}

fn check_routing(
    FinishedRouting { ids, weights }: FinishedRouting<'_>,
    tokens: usize,
    non_finite: NonFinite,
) -> Result<()> {
    let whole = match tokens {
        0 => ids.is_empty(),
        _ => !ids.is_empty() && ids.len().is_multiple_of(tokens),
    };
    if !whole || ids.len() != weights.len() {
        return Err(Error::input(
            "routing",
            format!("{} ids and {} weights for {tokens} tokens", ids.len(), weights.len()),
        ));
    }
    match weights.iter().position(|weight| !weight.is_finite()) {
        Some(slot) if non_finite == NonFinite::Refuse => Err(Error::input(
            "routing",
            format!("the weight of slot {slot} is {}, not a finite number", weights[slot]),
        )),
        _ => Ok(()),
    }
}

/// Ids and weights as a router leaves them.
pub(super) fn take_routing(given: FinishedRouting<'_>, tokens: usize, out: &mut Routing) {
    out.tokens = tokens;
    out.top_k = given.ids.len().checked_div(tokens).unwrap_or(1);
    out.ids.clear();
    // a negative id is no expert's
    out.ids.extend(given.ids.iter().map(|id| LogicalId(u32::try_from(*id).unwrap_or(u32::MAX))));
    out.weights.clear();
    out.weights.extend_from_slice(given.weights);
    out.shared_weights.clear();
}

/// Which inputs come beside the hidden states, as far as memory depends on it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Given {
    pub(super) shared_input: bool,
    pub(super) logits: bool,
    /// f32 rows with gaps: they are copied, too.
    pub(super) gaps: bool,
}

impl Given {
    pub(super) fn of(input: &ForwardInput<'_>) -> Self {
        Self {
            shared_input: input.shared_input.is_some(),
            gaps: has_gaps(input.hidden) || input.shared_input.is_some_and(has_gaps),
            logits: input.router_logits.is_some()
                || input.routing.is_some()
                || input.device_routing.is_some(),
        }
    }
}

fn has_gaps(rows: Rows<'_>) -> bool {
    matches!(rows, Rows::Strided(_))
}

/// Floats of the buffers of a pass's own rows: counted here, cut from the arena in this order.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lengths {
    /// Hidden states in f32, where they do not come so.
    hidden: usize,
    shared_input: usize,
    transformed: [usize; 2],
    pub(super) normed: usize,
    pub(super) logits: usize,
    pub(super) routed: usize,
    pub(super) finished: [usize; 2],
    pub(super) shared: usize,
}

impl Lengths {
    pub(super) fn of(layer: &ReadyLayer, tokens: usize, given: &Given) -> Self {
        let dims = layer.spec.dims;
        let copied = layer.dtype != ActivationDtype::F32 || given.gaps;
        let gate = layer.gate.as_ref().filter(|_| !given.logits);
        let hidden = if given.shared_input { dims.routed_hidden } else { dims.hidden };
        let if_so = |so: bool, len: usize| if so { len } else { 0 };
        Self {
            hidden: if_so(copied, tokens * hidden),
            shared_input: if_so(copied && given.shared_input, tokens * dims.hidden),
            transformed: match given.shared_input {
                true => [0; 2],
                false => layer.input_transform.buffers(tokens, dims.hidden),
            },
            normed: gate.map_or(0, |gate| gate.normed_len(tokens)),
            logits: if_so(gate.is_some(), tokens * layer.spec.router.logits()),
            routed: tokens * dims.routed_hidden,
            finished: layer.output_transform.buffers(tokens, dims.routed_hidden),
            shared: if_so(layer.shared.is_some(), tokens * dims.hidden),
        }
    }

    /// Bytes of the arena.
    pub(super) fn bytes(&self) -> usize {
        let Self { hidden, shared_input, transformed, normed, logits, routed, finished, shared } =
            self;
        let single = [hidden, shared_input, normed, logits, routed, shared];
        single.into_iter().chain(transformed).chain(finished).map(|len| room::<f32>(*len)).sum()
    }

    /// The rows of `input` in f32: what the gate and the shared experts see `[T, H]`, and where the
    /// caller has transformed rows himself, those `[T, routed_hidden]`.
    pub(super) fn rows<'a>(
        &self,
        layer: &ReadyLayer,
        input: &ForwardInput<'a>,
        cut: &mut Cut<'a>,
    ) -> Result<(&'a [f32], Option<&'a [f32]>)> {
        let dims = layer.spec.dims;
        let Some(shared) = input.shared_input else {
            let rows = (input.hidden, "hidden_states", dims.hidden);
            return Ok((accept(layer, rows, cut.floats(self.hidden))?, None));
        };
        let rows = (input.hidden, "hidden_states", dims.routed_hidden);
        let transformed = accept(layer, rows, cut.floats(self.hidden))?;
        let rows = (shared, "shared_input", dims.hidden);
        Ok((accept(layer, rows, cut.floats(self.shared_input))?, Some(transformed)))
    }

    /// The buffers of the input transform.
    pub(super) fn transformed<'a>(&self, cut: &mut Cut<'a>) -> [&'a mut [f32]; 2] {
        self.transformed.map(|len| cut.floats(len))
    }
}

/// Rows in f32 with the values of the layer's dtype: those that came, or in `out`.
fn accept<'a>(
    layer: &ReadyLayer,
    (rows, what, width): (Rows<'a>, &'static str, usize),
    out: &'a mut [f32],
) -> Result<&'a [f32]> {
    let (dtype, pool) = (layer.dtype, &*layer.pool);
    let together = rows_together(rows.len() / width, width * size_of::<f32>(), pool.threads());
    let refuse = layer.non_finite == NonFinite::Refuse;
    let first_bad = AtomicUsize::new(usize::MAX);
    let check = |start: usize, values: &[f32]| {
        if refuse && let Some(at) = first_not_finite(values) {
            first_bad.fetch_min(start + at, Ordering::Relaxed);
        }
    };
    let step = together * width;
    let accepted = match rows {
        Rows::F32(rows) if dtype == ActivationDtype::F32 => {
            let parts = rows.chunks(step).enumerate();
            for_each(pool, parts, |(part, values)| check(part * step, values));
            rows
        }
        _ => {
            for_each(pool, out.chunks_mut(step).enumerate(), |(part, values)| {
                let start = part * step;
                rows.widen(start..start + values.len(), values);
                // 16-bit rows are the layer's own: rounding changes nothing in them
                dtype.round_all(values);
                check(start, values);
            });
            &*out
        }
    };
    match first_bad.into_inner() {
        usize::MAX => Ok(accepted),
        at => Err(Error::input(
            what,
            format!(
                "row {}, column {}: {} is not a finite number",
                at / width,
                at % width,
                accepted[at]
            ),
        )),
    }
}

/// The first NaN or infinity. One product of each with zero is zero but for those, so that whole
/// rows are looked at without a branch for each value.
fn first_not_finite(values: &[f32]) -> Option<usize> {
    let clean = values.chunks(1024).all(|chunk| chunk.iter().map(|v| v * 0.0).sum::<f32>() == 0.0);
    match clean {
        true => None,
        false => values.iter().position(|v| !v.is_finite()),
    }
}
