//! The verbs on rows of slots, and on the rows of both branches at the end of a pass.

use crate::module::{Argument, Function, Launch, Modules};
use crate::plan::Plan;
use crate::rows::RawRows;
use crate::sources::SLOTS;
use crate::verbs::RowQuantiser;
use crate::{Error, Norm, Result, Rows, RowsMut, Stream, View, ViewMut};

/// The verbs, compiled and loaded.
pub struct SlotVerbs {
    gather: Function,
    quantise: Function,
    norm: Function,
    dense_ids: Function,
    fill: Function,
    sigmoid_gate: Function,
    finish: Function,
}

/// What [`SlotVerbs::finish`] does to the sum of the branches.
#[derive(Clone, Copy, Debug)]
pub struct Finish<'a> {
    /// `[T, H]` of the other branch, and what multiplies it.
    pub shared: Option<(f32, Rows<'a>)>,
    /// The sum of the branches is halved.
    pub average: bool,
    /// `[H]`: added then.
    pub bias: Option<View<'a, f32>>,
    /// The norm that follows, with its weight `[H]`; its factor is not used.
    pub norm: Option<(Norm, View<'a, f32>)>,
    /// Multiplies what comes of it.
    pub multiplier: f32,
    /// Added last: the token's own row, times the weights of its identity choices.
    pub identity: Option<Identity<'a>>,
}

/// Choices without weights of their own that return the token's row.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    /// `[T, H]`.
    pub rows: Rows<'a>,
    /// `[T, k]`.
    pub ids: View<'a, u32>,
    /// `[T, k]`.
    pub weights: View<'a, f32>,
    /// Ids from here on,
    pub experts: usize,
    /// and before this one.
    pub choices: usize,
}

#[repr(C)]
struct RawFinish {
    y: RawRows,
    shared: RawRows,
    x: RawRows,
    out: RawRows,
    bias: u64,
    norm: u64,
    ids: u64,
    weights: u64,
    top_k: u32,
    experts: u32,
    choices: u32,
    shared_factor: f32,
    half: f32,
    multiplier: f32,
    eps: f32,
    offset: u32,
    first: u32,
    padding: u32,
}

// SAFETY: `struct Finish` of slots.cu.
unsafe impl Argument for RawFinish {}

impl SlotVerbs {
    /// Compiles (or finds in the cache) and loads what the verbs need.
    ///
    /// # Errors
    /// If a kernel does not compile or load.
    pub fn new(modules: &Modules) -> Result<Self> {
        let get = |name| modules.function(&SLOTS, &[], name);
        Ok(Self {
            gather: get("gather_slots")?,
            quantise: get("quantise_slots")?,
            norm: get("norm_slots")?,
            dense_ids: get("dense_ids")?,
            fill: get("fill")?,
            sigmoid_gate: get("sigmoid_gate")?,
            finish: get("finish")?,
        })
    }

    /// Gather: row p of `to` `[slots, H]` is the row of the plan's p-th slot of `x` `[T, H]`, times its
    /// factor of `factors` `[T, k]` if they are given. Rows beyond the planned ones stay as they were.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub fn gather(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        plan: &Plan,
        factors: Option<View<'_, f32>>,
        to: &mut RowsMut<'_>,
    ) -> Result<()> {
        let slots = plan.slots_used;
        x.expect("gather", slots / plan.top_k, to.cols())?;
        expect("gather", "factors", factors.map(|f| f.len()), slots)?;
        self.gather_of(stream, x, (plan.order(), plan.top_k), plan, factors, to)
    }

    /// The same of rows that are named: `rows` is, for every planned slot in the plan's order, its row of `x`.
    ///
    /// # Safety
    /// Those rows are rows of `x`.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub unsafe fn gather_rows(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        rows: View<'_, u32>,
        plan: &Plan,
        to: &mut RowsMut<'_>,
    ) -> Result<()> {
        expect("gather", "rows", Some(rows.len()), plan.slots_used)?;
        self.gather_of(stream, x, (rows, 1), plan, None, to)
    }

    fn gather_of(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        (order, top_k): (View<'_, u32>, usize),
        plan: &Plan,
        factors: Option<View<'_, f32>>,
        to: &mut RowsMut<'_>,
    ) -> Result<()> {
        let slots = plan.slots_used;
        to.expect("gather", slots, x.cols())?;
        if slots == 0 {
            return Ok(());
        }
        let (order, offsets) = (order.pointer, plan.offsets().pointer);
        let (experts, top_k) = (plan.experts() as u32, top_k as u32);
        let factors = factors.map_or(0, |factors| factors.pointer);
        let launch = Launch::plain(slots.min(1 << 20) as u32, 256);
        // SAFETY: the parameters of `gather_slots`; the shapes were checked.
        unsafe {
            self.gather.launch(
                stream,
                launch,
                &[&x.raw, &order, &offsets, &experts, &top_k, &factors, &to.raw],
            )
        }
    }

    /// Quantises and dequantises the planned rows of `rows` `[slots, K]` in place. `scales` `[experts]`
    /// are those of a quantiser with a given scale; its own is then not used.
    ///
    /// # Errors
    /// If a shape does not fit, a group has no values, or an earlier step failed.
    pub fn quantise(
        &self,
        stream: &Stream,
        quantiser: RowQuantiser,
        scales: Option<View<'_, f32>>,
        plan: &Plan,
        rows: &mut RowsMut<'_>,
    ) -> Result<()> {
        rows.expect("quantise", plan.slots_used, rows.cols())?;
        let (kind, group, given) = quantiser.raw(rows.cols())?;
        let is_given = matches!(kind, 0 | 1);
        if is_given && scales.is_none() {
            return Err(Error::input("quantise", format!("no scales by expert, only {given}")));
        }
        expect("quantise", "scales", scales.map(|s| s.len()), plan.experts())?;
        let groups = rows.rows() * rows.cols().div_ceil(group as usize);
        if groups == 0 {
            return Ok(());
        }
        let (offsets, experts) = (plan.offsets().pointer, plan.experts() as u32);
        let scales = scales.filter(|_| is_given).map_or(0, |scales| scales.pointer);
        let launch = Launch::plain(groups.div_ceil(8) as u32, 256);
        // SAFETY: the parameters of `quantise_slots`; the shapes were checked.
        unsafe {
            self.quantise.launch(
                stream,
                launch,
                &[&rows.raw, &offsets, &experts, &kind, &group, &scales],
            )
        }
    }

    /// Norm of the experts' rows `y` `[T·k, H]` in place, by slot, each with its expert's weight of
    /// `weights` `[experts, H]`; the norm's factor is not used.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub fn norm(
        &self,
        stream: &Stream,
        norm: Norm,
        ids: View<'_, u32>,
        weights: View<'_, f32>,
        y: &mut RowsMut<'_>,
    ) -> Result<()> {
        y.expect("norm of experts", ids.len(), y.cols())?;
        let experts = weights.len().checked_div(y.cols()).unwrap_or(0);
        expect("norm of experts", "weights", Some(weights.len()), experts * y.cols())?;
        if ids.is_empty() {
            return Ok(());
        }
        let experts = experts as u32;
        let (offset, first) = (u32::from(norm.unit_offset), u32::from(norm.scale_first));
        let launch = Launch::plain(y.raw.rows, 256);
        // SAFETY: the parameters of `norm_slots`; the shapes were checked.
        unsafe {
            self.norm.launch(
                stream,
                launch,
                &[&y.raw, &ids.pointer, &experts, &weights.pointer, &norm.eps, &offset, &first],
            )
        }
    }

    /// The ids `[T, count]` of rows that have a slot at each of `count` experts.
    ///
    /// # Errors
    /// If an earlier step failed.
    pub fn dense_ids(&self, stream: &Stream, count: usize, ids: ViewMut<'_, u32>) -> Result<()> {
        let (n, count) = (ids.len() as u32, count.max(1) as u32);
        if n == 0 {
            return Ok(());
        }
        let launch = Launch::plain(n.div_ceil(256).min(1 << 16), 256);
        // SAFETY: the parameters of `dense_ids`.
        unsafe { self.dense_ids.launch(stream, launch, &[&ids.pointer, &n, &count]) }
    }

    /// Every element becomes `value`.
    ///
    /// # Errors
    /// If an earlier step failed.
    pub fn fill(&self, stream: &Stream, value: f32, to: ViewMut<'_, f32>) -> Result<()> {
        let n = to.len() as u32;
        if n == 0 {
            return Ok(());
        }
        let launch = Launch::plain(n.div_ceil(256).min(1 << 16), 256);
        // SAFETY: the parameters of `fill`.
        unsafe { self.fill.launch(stream, launch, &[&to.pointer, &n, &value]) }
    }

    /// `y[t] *= sigmoid(x[t] · gate)`, for `gate` `[K]`.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub fn sigmoid_gate(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        gate: View<'_, f32>,
        y: &mut RowsMut<'_>,
    ) -> Result<()> {
        x.expect("sigmoid gate", y.rows(), gate.len())?;
        if y.rows() == 0 {
            return Ok(());
        }
        let launch = Launch::plain(y.raw.rows, 256);
        // SAFETY: the parameters of `sigmoid_gate`; the shapes were checked.
        unsafe { self.sigmoid_gate.launch(stream, launch, &[&y.raw, &x.raw, &gate.pointer]) }
    }

    /// Everything after the branches, in one step: `y` `[T, H]` is the routed branch in f32, and is
    /// overwritten; `out` may be rows of any type, or `y`'s memory itself.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub fn finish(
        &self,
        stream: &Stream,
        finish: Finish<'_>,
        y: &mut RowsMut<'_>,
        out: &mut RowsMut<'_>,
    ) -> Result<()> {
        let (rows, cols) = (y.rows(), y.cols());
        out.expect("output", rows, cols)?;
        let Finish { shared, average, bias, norm, multiplier, identity } = finish;
        expect("output", "bias", bias.map(|b| b.len()), cols)?;
        expect("output", "weight of the norm", norm.map(|(_, w)| w.len()), cols)?;
        let mut none = y.raw;
        none.data = 0;
        let (mut x, mut ids, mut weights, mut counts) = (none, 0, 0, [0; 3]);
        if let Some(identity) = identity {
            identity.rows.expect("identity experts", rows, cols)?;
            let top_k = identity.ids.len().checked_div(rows).unwrap_or(0);
            let slots = (identity.ids.len(), identity.weights.len());
            if slots != (top_k * rows, top_k * rows) {
                return Err(Error::input("identity experts", format!("{slots:?} ids and weights")));
            }
            (x, ids, weights) = (identity.rows.raw, identity.ids.pointer, identity.weights.pointer);
            counts = [top_k as u32, identity.experts as u32, identity.choices as u32];
        }
        let (mut other, mut shared_factor) = (none, 0.0);
        if let Some((factor, shared)) = shared {
            shared.expect("the shared branch", rows, cols)?;
            (other, shared_factor) = (shared.raw, factor);
        }
        if rows == 0 {
            return Ok(());
        }
        let raw = RawFinish {
            y: y.raw,
            shared: other,
            x,
            out: out.raw,
            bias: bias.map_or(0, |bias| bias.pointer),
            norm: norm.map_or(0, |(_, weight)| weight.pointer),
            ids,
            weights,
            top_k: counts[0],
            experts: counts[1],
            choices: counts[2],
            shared_factor,
            half: if average { 0.5 } else { 1.0 },
            multiplier,
            eps: norm.map_or(0.0, |(norm, _)| norm.eps),
            offset: norm.map_or(0, |(norm, _)| u32::from(norm.unit_offset)),
            first: norm.map_or(0, |(norm, _)| u32::from(norm.scale_first)),
            padding: 0,
        };
        // SAFETY: the one parameter is `struct Finish`; the shapes were checked.
        unsafe { self.finish.launch(stream, Launch::plain(rows as u32, 256), &[&raw]) }
    }
}

fn expect(verb: &'static str, what: &str, is: Option<usize>, should: usize) -> Result<()> {
    match is {
        Some(is) if is != should => {
            Err(Error::input(verb, format!("{is} {what}, {should} are needed")))
        }
        _ => Ok(()),
    }
}
