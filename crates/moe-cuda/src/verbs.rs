//! The verbs of a pass that are one kernel each: what a layer does with rows between and around the
//! products of its experts. Every verb puts work on a stream and returns; none allocates.

use crate::fault::FaultWord;
use crate::module::{Function, Launch, Modules};
use crate::plan::{Plan, Planner};
use crate::sources::ROWS;
use crate::{Error, Result, Rows, RowsMut, Stream, View, ViewMut};

/// The verbs, compiled and loaded.
pub struct Verbs {
    convert: Function,
    rms_norm: Function,
    quantise: Function,
    /// For one row, some, and many.
    linear: [Function; 3],
    combine: Function,
    scale_add: Function,
    identity_weights: Function,
    planner: Planner,
}

/// A root-mean-square norm: `x / √(mean(x²) + eps) · w · factor`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Added to the mean square.
    pub eps: f32,
    /// The stored weight is an offset from one.
    pub unit_offset: bool,
    /// The weight multiplies before the mean square is taken, not after.
    pub scale_first: bool,
    /// Multiplies the result.
    pub factor: f32,
}

/// How activation rows are quantised, as moe-kernels' `Qdq` of the same name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RowQuantiser {
    /// E4M3 by a given scale.
    Fp8Static(f32),
    /// E4M3, one scale a row, at least 1 / (448 · 512).
    Fp8Token,
    /// E4M3, one scale a row, however small (`Qdq::Fp8Tensor` of a single row).
    Fp8Row,
    /// E4M3, one scale a group; rounded up to a power of two or not.
    Fp8Group {
        /// Values of a group.
        size: usize,
        /// The scale is rounded up to a power of two.
        power_of_two: bool,
    },
    /// INT8 by a given scale.
    Int8Static(f32),
    /// INT8, one scale a row.
    Int8Token,
    /// INT8, one scale a group.
    Int8Group {
        /// Values of a group.
        size: usize,
    },
}

impl RowQuantiser {
    /// Kind, values of a group and given scale as kernels take them, for rows of `cols` values.
    pub(crate) fn raw(self, cols: usize) -> Result<(u32, u32, f32)> {
        let (kind, group, given) = match self {
            Self::Fp8Static(scale) => (0, 128, scale),
            Self::Int8Static(scale) => (1, 128, scale),
            Self::Fp8Group { size, power_of_two: false } => (2, size, 0.0),
            Self::Int8Group { size } => (3, size, 0.0),
            Self::Int8Token => (3, cols.max(1), 0.0),
            Self::Fp8Group { size, power_of_two: true } => (4, size, 0.0),
            Self::Fp8Token => (5, cols.max(1), 0.0),
            Self::Fp8Row => (6, cols.max(1), 0.0),
        };
        match u32::try_from(group) {
            Ok(group) if group > 0 => Ok((kind, group, given)),
            _ => Err(Error::input("quantise", format!("groups of {group} values"))),
        }
    }
}

impl Verbs {
    /// Compiles (or finds in the cache) and loads what the verbs need.
    ///
    /// # Errors
    /// If a kernel does not compile or load.
    pub fn new(modules: &Modules) -> Result<Self> {
        let get = |name| modules.function(&ROWS, &[], name);
        Ok(Self {
            convert: get("convert")?,
            rms_norm: get("rms_norm")?,
            quantise: get("quantise_rows")?,
            linear: [get("linear_one")?, get("linear_few")?, get("linear_many")?],
            combine: get("combine")?,
            scale_add: get("scale_add")?,
            identity_weights: get("identity_weights")?,
            planner: Planner::new(modules)?,
        })
    }

    /// Widen and write: `to = from`, in another float type or layout. With a fault word, a value that
    /// is not finite raises it.
    ///
    /// # Errors
    /// If the shapes differ, or an earlier step failed.
    pub fn convert(
        &self,
        stream: &Stream,
        from: Rows<'_>,
        to: &mut RowsMut<'_>,
        fault: Option<&FaultWord>,
    ) -> Result<()> {
        to.expect("convert", from.rows(), from.cols())?;
        let fault = fault.map_or(0, |fault| fault.view().pointer);
        let Some(launch) = over(from.rows() * from.cols()) else { return Ok(()) };
        // SAFETY: the parameters of `convert`; both sides have the shape that they state.
        unsafe { self.convert.launch(stream, launch, &[&from.raw, &to.raw, &fault]) }
    }

    /// Norm: `to = norm(from)`, each row by itself; `weight` is `[cols]`, or ones. May be in place.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub fn norm(
        &self,
        stream: &Stream,
        norm: Norm,
        from: Rows<'_>,
        weight: Option<View<'_, f32>>,
        to: &mut RowsMut<'_>,
    ) -> Result<()> {
        to.expect("norm", from.rows(), from.cols())?;
        if weight.is_some_and(|weight| weight.len() != from.cols()) {
            return Err(Error::input("norm", "the weight has not one value a column"));
        }
        if from.rows() == 0 {
            return Ok(());
        }
        let weight = weight.map_or(0, |weight| weight.pointer);
        let (offset, first) = (u32::from(norm.unit_offset), u32::from(norm.scale_first));
        let launch = Launch::plain(from.raw.rows, 256);
        // SAFETY: the parameters of `rms_norm`; the lengths were checked.
        unsafe {
            self.rms_norm.launch(
                stream,
                launch,
                &[&from.raw, &to.raw, &weight, &norm.eps, &offset, &first, &norm.factor],
            )
        }
    }

    /// Quantises and dequantises rows in place.
    ///
    /// # Errors
    /// If a group has no values, or an earlier step failed.
    pub fn quantise(
        &self,
        stream: &Stream,
        quantiser: RowQuantiser,
        rows: &mut RowsMut<'_>,
    ) -> Result<()> {
        let cols = rows.cols();
        let (kind, group, given) = quantiser.raw(cols)?;
        let groups = rows.rows() * cols.div_ceil(group as usize);
        if groups == 0 {
            return Ok(());
        }
        let blocks = groups.div_ceil(8);
        let launch = Launch::plain(blocks as u32, 256);
        // SAFETY: the parameters of `quantise_rows`.
        unsafe { self.quantise.launch(stream, launch, &[&rows.raw, &kind, &group, &given]) }
    }

    /// Linear, of the gate: `out [T, N] = x [T, K] · w [N, K]ᵀ (+ bias [N])`, in f32. A row's result
    /// does not depend on the others.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub fn linear(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        w: Rows<'_>,
        bias: Option<View<'_, f32>>,
        out: &mut RowsMut<'_>,
    ) -> Result<()> {
        out.expect("linear", x.rows(), w.rows())?;
        w.expect("linear", w.rows(), x.cols())?;
        if bias.is_some_and(|bias| bias.len() != w.rows()) {
            return Err(Error::input("linear", "the bias has not one value an output"));
        }
        if out.rows() * out.cols() == 0 {
            return Ok(());
        }
        let bias = bias.map_or(0, |bias| bias.pointer);
        // how many rows and outputs a warp takes changes no bit
        let (function, rows, outputs) = match x.rows() {
            1 => (&self.linear[0], 1, 1),
            2..64 => (&self.linear[1], 4, 1),
            _ => (&self.linear[2], 8, 4),
        };
        let launch = Launch {
            grid: (w.raw.rows.div_ceil(4 * outputs), x.raw.rows.div_ceil(rows).min(65_535)),
            block: 128,
            shared: 0,
            cooperative: false,
        };
        let whole = |m: &Rows<'_>| {
            let row_bytes = m.stride() * m.float().bytes();
            m.raw.data.is_multiple_of(16) && row_bytes.is_multiple_of(16)
        };
        let whole = u32::from(x.cols().is_multiple_of(8) && whole(&x) && whole(&w));
        // SAFETY: the parameters of the functions; the shapes were checked.
        unsafe { function.launch(stream, launch, &[&x.raw, &w.raw, &bias, &whole, &out.raw]) }
    }

    /// Plan: sorts the slots of `ids` `[T, k]` by expert, for experts `0..plan.experts()`; other ids
    /// have no place in it.
    ///
    /// # Errors
    /// If the batch is larger than the plan, or an earlier step failed.
    pub fn plan(
        &self,
        stream: &Stream,
        ids: View<'_, u32>,
        top_k: usize,
        plan: &mut Plan,
    ) -> Result<()> {
        self.planner.plan(stream, ids, top_k, plan)
    }

    /// Combine: `out[t] = scale · Σ_j weights[t, j] · y[t·k + j]`, in slot order and f32. Slots whose
    /// id is not below `experts` are left out; without weights they are 1. A sum that is not finite
    /// raises the fault.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    #[allow(clippy::too_many_arguments, reason = "the operands of the sum")]
    pub fn combine(
        &self,
        stream: &Stream,
        y: Rows<'_>,
        ids: View<'_, u32>,
        weights: Option<View<'_, f32>>,
        experts: usize,
        scale: f32,
        out: &mut RowsMut<'_>,
        fault: &FaultWord,
    ) -> Result<()> {
        y.expect("combine", ids.len(), out.cols())?;
        let top_k = ids.len().checked_div(out.rows()).unwrap_or(0);
        if top_k * out.rows() != ids.len() || weights.is_some_and(|w| w.len() != ids.len()) {
            return Err(Error::input(
                "combine",
                format!("{} ids for {} tokens", ids.len(), out.rows()),
            ));
        }
        let weights = weights.map_or(0, |weights| weights.pointer);
        let (experts, top_k, fault) = (experts as u32, top_k as u32, fault.view().pointer);
        let Some(launch) = over(out.rows() * out.cols()) else { return Ok(()) };
        // SAFETY: the parameters of `combine`; the shapes were checked.
        unsafe {
            self.combine.launch(
                stream,
                launch,
                &[&y.raw, &ids.pointer, &weights, &experts, &top_k, &scale, &out.raw, &fault],
            )
        }
    }

    /// Scale and add: `y = a · y + b · by_row[t] · x`; `x` may be absent, and so may `by_row` `[T]`.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub fn scale_add(
        &self,
        stream: &Stream,
        y: &mut RowsMut<'_>,
        a: f32,
        x: Option<(f32, Rows<'_>, Option<View<'_, f32>>)>,
    ) -> Result<()> {
        let (mut b, mut raw, mut by_row) = (0.0, y.raw, 0);
        raw.data = 0;
        if let Some((factor, x, rows)) = x {
            x.expect("scale and add", y.rows(), y.cols())?;
            if rows.is_some_and(|rows| rows.len() != y.rows()) {
                return Err(Error::input("scale and add", "not one factor a row"));
            }
            (b, raw, by_row) = (factor, x.raw, rows.map_or(0, |rows| rows.pointer));
        }
        let Some(launch) = over(y.rows() * y.cols()) else { return Ok(()) };
        // SAFETY: the parameters of `scale_add`; the shapes were checked.
        unsafe { self.scale_add.launch(stream, launch, &[&y.raw, &raw, &by_row, &a, &b]) }
    }

    /// For identity experts: `out[t]` is the sum of the weights of the token's choices in
    /// `experts..choices`; [`Self::scale_add`] then adds the token's own row with it.
    ///
    /// # Errors
    /// If a length does not fit, or an earlier step failed.
    pub fn identity_weights(
        &self,
        stream: &Stream,
        ids: View<'_, u32>,
        weights: View<'_, f32>,
        experts: usize,
        choices: usize,
        out: ViewMut<'_, f32>,
    ) -> Result<()> {
        let tokens = out.len();
        let top_k = ids.len().checked_div(tokens).unwrap_or(0);
        if top_k * tokens != ids.len() || weights.len() != ids.len() {
            return Err(Error::input(
                "identity experts",
                format!("{} ids for {tokens} tokens", ids.len()),
            ));
        }
        let Some(launch) = over(tokens) else { return Ok(()) };
        let (experts, choices) = (experts as u32, choices as u32);
        let (tokens, top_k) = (tokens as u32, top_k as u32);
        // SAFETY: the parameters of `identity_weights`; the lengths were checked.
        unsafe {
            self.identity_weights.launch(
                stream,
                launch,
                &[
                    &ids.pointer,
                    &weights.pointer,
                    &experts,
                    &choices,
                    &tokens,
                    &top_k,
                    &out.pointer,
                ],
            )
        }
    }
}

/// One thread an element, in blocks of 256; kernels stride where there are very many.
fn over(elements: usize) -> Option<Launch> {
    let blocks = elements.div_ceil(256).min(1 << 20) as u32;
    (blocks > 0).then_some(Launch::plain(blocks, 256))
}
