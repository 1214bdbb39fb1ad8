//! Experts for few tokens: the routed experts of a batch in one persistent launch that reads every
//! weight byte once. Hopper and newer.

use std::sync::Arc;

use crate::fault::FaultWord;
use crate::module::{Argument, Function, Launch, Modules};
use crate::plan::Plan;
use crate::router::{RawRouter, Router, RoutingMut, Selection};
use crate::rows::{Float, RawRows};
use crate::sources::{FEW, PACK};
use crate::tensor_map::{Matrix, TensorMap};
use crate::weights::{
    Activation, Element, ExpertArray, ExpertWeights, RawActivation, ScaleType, Stored,
};
use crate::{Buffer, Error, Gpu, Result, Rows, RowsMut, Stream, View, ViewMut};

/// Weight formats that have such a kernel; rows come in bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FewFormat {
    /// bf16, read where it lies.
    Bf16,
    /// E4M3 with f32 scales of 128 × 128, read where it lies. Rows are quantised to E4M3 in groups of 128
    /// before either product.
    Fp8Block,
    /// INT4, zero point 8, bf16 scales for groups of 128; packed.
    Int4,
    /// E2M1 with E8M0 scales for groups of 32; packed.
    Mxfp4,
}

impl FewFormat {
    /// The format of stored weights, or why there is none.
    pub(crate) fn of(stored: &Stored) -> Result<Self> {
        let scales = stored.scales.as_ref().map(|s| (s.scale, s.rows, s.cols));
        let plain = stored.zeros.is_none() && stored.global.is_none();
        match (stored.element, scales, stored.zero) {
            (Element::Bf16, None, 0.0) if plain => Ok(Self::Bf16),
            (Element::E4m3, Some((ScaleType::F32, 128, 128)), 0.0) if plain => Ok(Self::Fp8Block),
            (Element::Uint4, Some((ScaleType::Bf16, 1, 128)), 8.0) if plain => Ok(Self::Int4),
            (Element::E2m1, Some((ScaleType::E8m0, 1, 32)), 0.0) if plain => Ok(Self::Mxfp4),
            _ => {
                let format = format!("{:?} with scales {scales:?}", stored.element);
                Err(Error::input("fast experts", format!("there is no kernel for {format}")))
            }
        }
    }

    /// Weights are packed, not read where they lie.
    pub fn packed(self) -> bool {
        matches!(self, Self::Int4 | Self::Mxfp4)
    }

    /// Columns of a record.
    pub(crate) fn columns(self) -> usize {
        match self {
            Self::Bf16 | Self::Mxfp4 => 64,
            Self::Fp8Block | Self::Int4 => 128,
        }
    }

    /// Bytes of 16 rows of a record.
    pub(crate) fn tile_bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::Fp8Block => 2048,
            Self::Int4 => 1056,
            Self::Mxfp4 => 544,
        }
    }

    pub(crate) fn options(self) -> Vec<String> {
        vec![format!("-DFORMAT={}", self as u32)]
    }
}

/// How the kernel is cut: what a multiprocessor holds, and how K is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FewShape {
    /// Warps of a block, which share a unit.
    pub warps: usize,
    /// Records of a ring's stage.
    pub records: usize,
    /// Stages of a ring.
    pub stages: usize,
    /// Blocks of a multiprocessor.
    pub blocks: usize,
    /// Warps that share K in the second product; divides `warps`.
    pub split: usize,
}

impl FewShape {
    /// The shape for experts of `hidden` and `inner` columns.
    pub fn new(format: FewFormat, hidden: usize, inner: usize) -> Self {
        let all = hidden / format.columns();
        let (warps, records, stages, blocks): (usize, _, _, _) = match format {
            // Several blocks, which hide each other's barriers; of bf16 with long rows one large one.
            FewFormat::Fp8Block => (4, 1, 3, 3),
            FewFormat::Bf16 if all < 48 => (4, 1, 3, 3),
            FewFormat::Bf16 => (8, 1, 3, 1),
            FewFormat::Int4 => (4, 2, 3, 3),
            // Five warps where they share the records evenly and four do not.
            FewFormat::Mxfp4 if all.is_multiple_of(5) && !all.is_multiple_of(4) => (5, 3, 2, 3),
            FewFormat::Mxfp4 => (4, 3, 2, 3),
        };
        // Short rows of the second product are split among few warps, as far as the others divide
        // its features.
        let short = match format {
            FewFormat::Bf16 => true,
            FewFormat::Fp8Block => inner / format.columns() < 32,
            FewFormat::Int4 | FewFormat::Mxfp4 => inner / format.columns() < 16,
        };
        let least = if short { warps / 2 } else { warps };
        let divides = |split: &usize| {
            warps.is_multiple_of(*split) && (hidden / 32).is_multiple_of(warps / split)
        };
        let split = (least..=warps).find(divides).unwrap_or(warps);
        Self { warps, records, stages, blocks, split }
    }

    /// Of a kernel for experts `[experts, hidden, inner]` on so many multiprocessors. `router`: the gate and the routing
    /// come first, by these rules.
    pub(crate) fn options(
        self,
        format: FewFormat,
        [experts, hidden, inner]: [usize; 3],
        multiprocessors: usize,
        activation: Activation,
        router: Option<&RawRouter>,
    ) -> Vec<String> {
        let mut options = format.options();
        options.extend([
            format!("-DEXPERTS={experts}"),
            format!("-DHIDDEN={hidden}"),
            format!("-DINNER={inner}"),
            format!("-DSPLIT={}", self.split),
            format!("-DGRID={}", multiprocessors * self.blocks),
            format!("-DWARPS={}", self.warps),
            format!("-DRECORDS={}", self.records),
            format!("-DSTAGES={}", self.stages),
            format!("-DBLOCKS={}", self.blocks),
            format!("-DGATE={}", u32::from(router.is_some())),
            format!("-DACTIVATION={}", RawActivation::new(activation, true).kind),
        ]);
        options.extend(router.into_iter().flat_map(RawRouter::options));
        options
    }

    /// Dynamic shared memory, as few.cu lays it out.
    fn shared_bytes(self, format: FewFormat) -> usize {
        let ring = self.warps * self.stages * self.records * 2 * format.tile_bytes();
        let barriers = 8 * self.warps * self.stages;
        ring + self.partial_bytes() + barriers + 4 + 7 * FewExperts::MOST_SLOTS
    }

    /// Where the warps' sums lie; the router works there before.
    fn partial_bytes(self) -> usize {
        2 * self.warps * 256 * 4
    }
}

/// Options of kernels for the layers of Qwen3-30B-A3B, gpt-oss-120b and DeepSeek-V3 on an H100.
/// They have every shape that [`FewShape::new`] can give.
pub(crate) fn published(router: Option<&RawRouter>) -> Vec<Vec<String>> {
    let formats = [FewFormat::Bf16, FewFormat::Fp8Block, FewFormat::Int4, FewFormat::Mxfp4];
    let dims = [[128, 2048, 768], [128, 2880, 2880], [256, 7168, 2048]];
    let all = formats.iter().flat_map(|&format| {
        let whole = move |[_, hidden, inner]: &&[usize; 3]| {
            [hidden, inner].iter().all(|width| width.is_multiple_of(format.columns()))
        };
        dims.iter().filter(whole).map(move |&dims| {
            let shape = FewShape::new(format, dims[1], dims[2]);
            shape.options(format, dims, 132, Activation::Silu, router)
        })
    });
    all.collect()
}

/// Weights of both products as the kernels for 4 bits read them, in place of what they were packed from.
pub(crate) struct Packed {
    pub(crate) first: Buffer<u8>,
    pub(crate) second: Buffer<u8>,
}

impl Packed {
    /// Packs gated experts of a format that is packed.
    pub(crate) fn new(
        modules: &Modules,
        stream: &Stream,
        format: FewFormat,
        weights: &ExpertWeights,
    ) -> Result<Self> {
        let gate = weights.gate.as_ref().unwrap_or(&weights.up);
        Ok(Self {
            first: pack(modules, stream, format, gate, &weights.up, true)?,
            second: pack(modules, stream, format, &weights.down, &weights.down, false)?,
        })
    }
}

/// Routed experts for batches of up to [`Self::MOST_SLOTS`] slots.
pub struct FewExperts {
    format: FewFormat,
    shape: FewShape,
    weights: ExpertWeights,
    packed: Option<Arc<Packed>>,
    maps: [TensorMap; 3],
    kernel: (Function, Launch),
    /// The same behind a gate, and the rules of the router that it was compiled for.
    gated: Option<((Function, Launch), Vec<String>)>,
}

/// Memory that a pass lends to [`FewExperts`]; one pass at a time uses it.
#[derive(Debug)]
pub struct FewWorkspace {
    slots: usize,
    /// Rows between the products: bf16, or f32 where whoever reads them quantises them.
    h: Buffer<u16>,
    y: Buffer<f32>,
    counters: Buffer<u32>,
    /// Of FP8: codes of the tokens' rows with their scales.
    rows: Buffer<u16>,
    row_scales: Buffer<f32>,
}

impl FewWorkspace {
    /// Slots of the largest batch.
    pub fn slots(&self) -> usize {
        self.slots
    }
}

/// A batch of [`FewExperts`].
pub struct FewBatch<'a> {
    /// bf16 `[T, H]`.
    pub x: Rows<'a>,
    /// `[T, k]`: ids; those that are no expert here are left out.
    pub ids: View<'a, u32>,
    /// `[T, k]`: weights.
    pub weights: View<'a, f32>,
    /// Multiplies the sums.
    pub factor: f32,
    /// Raised by an output that is not finite.
    pub fault: &'a FaultWord,
}

/// A gate and a router in front of [`FewExperts`], in the same launch.
pub struct FewGate<'a> {
    /// `[logits, H]`, bf16 or f32.
    pub weight: Rows<'a>,
    /// `[logits]`.
    pub bias: Option<View<'a, f32>>,
    /// How experts are chosen; no hash table.
    pub router: &'a Router,
    /// `[T, logits]`: written.
    pub logits: ViewMut<'a, f32>,
    /// Written, as by [`Router::route`].
    pub routing: RoutingMut<'a>,
    /// Raised by rows and logits that are not finite.
    pub fault: &'a FaultWord,
}

impl FewExperts {
    /// The most slots (tokens · k) of a batch.
    pub const MOST_SLOTS: usize = 512;
    /// Slots up to which the kernel makes its plan by itself.
    pub const OWN_PLAN: usize = 128;
    /// Rows of a tile of the plan that larger batches need.
    pub const TILE: usize = 8;

    /// Experts of these weights; 4-bit ones are packed, on `stream`.
    ///
    /// # Errors
    /// If the GPU is older than Hopper, the format or the shape has no such kernel, or memory does not
    /// suffice.
    pub fn new(modules: &Modules, stream: &Stream, weights: ExpertWeights) -> Result<Self> {
        let format = FewFormat::of(&weights.up)?;
        let shape = FewShape::new(format, weights.hidden(), weights.intermediate());
        Self::with_shape(modules, stream, weights, shape)
    }

    /// As [`Self::new`], in a shape of the caller's choice.
    ///
    /// # Errors
    /// As [`Self::new`]; or if the shape does not fit the GPU.
    pub fn with_shape(
        modules: &Modules,
        stream: &Stream,
        weights: ExpertWeights,
        shape: FewShape,
    ) -> Result<Self> {
        let gpu = modules.gpu();
        weights.check()?;
        let Some(gate) = &weights.gate else {
            return refuse("there is no kernel for experts without a gate projection".into());
        };
        let (hidden, inner) = (weights.hidden(), weights.intermediate());
        let format = FewFormat::of(&weights.up)?;
        for other in [gate, &weights.down] {
            if FewFormat::of(other)? != format {
                return refuse("the projections have several formats".into());
            }
        }
        let step = |m: &Stored| m.scales.as_ref().map(|s| s.expert_bytes);
        if step(gate) != step(&weights.up) {
            return refuse("gate and up have their scales at different distances".into());
        }
        if gpu.properties().capability < (9, 0) {
            return refuse(format!(
                "{} has no copy engine; Hopper is needed",
                gpu.properties().name
            ));
        }
        let columns = format.columns();
        if !hidden.is_multiple_of(columns)
            || !inner.is_multiple_of(columns)
            || weights.up.experts > 65_535
        {
            return refuse(format!(
                "rows of {hidden} and {inner} columns are not multiples of {columns}"
            ));
        }
        let teams = shape.warps.checked_div(shape.split).unwrap_or(0);
        // A plan of one's own has a slot a thread.
        let threads = 32 * shape.warps;
        if threads < Self::OWN_PLAN
            || teams == 0
            || teams * shape.split != shape.warps
            || !(hidden / 32).is_multiple_of(teams)
        {
            return refuse(format!("{shape:?} does not divide {hidden} columns"));
        }
        let kernel = Self::kernel(modules, format, shape, &weights, None)?;
        let (weights, packed, maps) = if format.packed() {
            let packed = Packed::new(modules, stream, format, &weights)?;
            // there is one copy of the weights
            (weights.packed(gpu)?, Some(Arc::new(packed)), [TensorMap::unused(); 3])
        } else {
            let maps = maps(gpu, gate, &weights)?;
            (weights, None, maps)
        };
        Ok(Self { format, shape, weights, packed, maps, kernel, gated: None })
    }

    /// The same for so many experts, whose weights are anything yet: to be copied into [`Self::arrays`]. Without a gate.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_room(&self, modules: &Modules, experts: usize) -> Result<Self> {
        let (gpu, format, shape) = (modules.gpu(), self.format, self.shape);
        let weights = self.weights.with_room(gpu, experts)?;
        let kernel = Self::kernel(modules, format, shape, &weights, None)?;
        let room = |packed: &Buffer<u8>| {
            let each = packed.len() / self.weights.up.experts;
            Buffer::new(gpu, each * experts, "moved weights")
        };
        let packed = match &self.packed {
            Some(packed) => {
                let (first, second) = (room(&packed.first)?, room(&packed.second)?);
                Some(Arc::new(Packed { first, second }))
            }
            None => None,
        };
        let maps = match (&packed, &weights.gate) {
            (None, Some(gate)) => maps(gpu, gate, &weights)?,
            _ => [TensorMap::unused(); 3],
        };
        Ok(Self { format, shape, weights, packed, maps, kernel, gated: None })
    }

    /// All arrays that hold the experts.
    pub fn arrays(&self) -> Vec<ExpertArray> {
        let mut arrays = self.weights.arrays();
        let packed = self.packed.iter().flat_map(|packed| [&packed.first, &packed.second]);
        arrays.extend(packed.map(|packed| ExpertArray::of(packed, self.weights.up.experts)));
        arrays
    }

    /// Makes ready for [`Self::forward_gated`] with routers of the same rules as this one.
    ///
    /// # Errors
    /// If the kernel does not compile, or does not fit the GPU.
    pub fn with_gate(self, modules: &Modules, router: &Router) -> Result<Self> {
        let rules = router.raw();
        let gated = Self::kernel(modules, self.format, self.shape, &self.weights, Some(&rules))?;
        Ok(Self { gated: Some((gated, rules.options())), ..self })
    }

    fn kernel(
        modules: &Modules,
        format: FewFormat,
        shape: FewShape,
        weights: &ExpertWeights,
        router: Option<&RawRouter>,
    ) -> Result<(Function, Launch)> {
        let dims = [weights.up.experts, weights.hidden(), weights.intermediate()];
        let multiprocessors = modules.gpu().properties().multiprocessors;
        let options = shape.options(format, dims, multiprocessors, weights.activation, router);
        let kernel = modules.function(&FEW, &options, "few")?;
        let shared = shape.shared_bytes(format) as u32;
        kernel.allow_shared(shared)?;
        let threads = 32 * shape.warps as u32;
        // All blocks wait for each other's work: they must all be there.
        if kernel.resident_blocks(threads, shared)? < shape.blocks {
            let reason = format!("{shape:?} does not fit a multiprocessor");
            return Err(Error::input("experts for few tokens", reason));
        }
        let blocks = multiprocessors * shape.blocks;
        let launch = Launch { grid: (blocks as u32, 1), block: threads, shared, cooperative: true };
        Ok((kernel, launch))
    }

    /// Memory for batches of up to `slots` slots.
    ///
    /// # Errors
    /// If the GPU has not enough.
    pub fn workspace(&self, stream: &Stream, slots: usize) -> Result<FewWorkspace> {
        let (gpu, purpose) = (stream.gpu(), "the rows between the products");
        let (hidden, inner) = (self.weights.hidden(), self.weights.intermediate());
        let codes = if self.format == FewFormat::Fp8Block { slots } else { 0 };
        // Up to `TOLD` of few.cu, and logits that blocks tell each other.
        let count = 32 * (Self::MOST_SLOTS + 5) + Self::OWN_PLAN * 256;
        let mut counters = Buffer::new(gpu, count, purpose)?;
        stream.fill(counters.view_mut(), 0)?;
        Ok(FewWorkspace {
            slots,
            h: Buffer::new(gpu, (slots + codes) * inner, purpose)?,
            y: Buffer::new(gpu, slots * hidden, purpose)?,
            counters,
            rows: Buffer::new(gpu, codes * hidden, purpose)?,
            row_scales: Buffer::new(gpu, codes * hidden / 128, purpose)?,
        })
    }

    /// Bytes of such a workspace, but for its counters.
    pub fn work_bytes(format: FewFormat, slots: usize, hidden: usize, inner: usize) -> usize {
        let codes = if format == FewFormat::Fp8Block { 2 * (hidden + inner) } else { 0 };
        slots * (2 * inner + 4 * hidden + codes)
    }

    pub(crate) fn weights(&self) -> &ExpertWeights {
        &self.weights
    }

    pub(crate) fn packed(&self) -> Option<Arc<Packed>> {
        self.packed.clone()
    }

    /// Their format.
    pub fn format(&self) -> FewFormat {
        self.format
    }

    /// How the kernel is cut.
    pub fn shape(&self) -> FewShape {
        self.shape
    }

    /// `out[t] = factor · Σ_j weights[t, j] · expert(ids[t, j])(x[t])`, in slot order; `out` is bf16 or
    /// f32. Batches of more than [`Self::OWN_PLAN`] slots need the plan of these ids, in tiles of
    /// [`Self::TILE`].
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub fn forward(
        &self,
        stream: &Stream,
        batch: &FewBatch<'_>,
        plan: Option<&Plan>,
        work: &mut FewWorkspace,
        out: &mut RowsMut<'_>,
    ) -> Result<()> {
        let slots = batch.ids.len();
        let plan = match plan {
            _ if slots <= Self::OWN_PLAN => None,
            Some(plan)
                if (plan.experts(), plan.tile(), plan.slots_used)
                    == (self.weights.up.experts, Self::TILE, slots) =>
            {
                Some(plan)
            }
            _ => {
                return refuse(format!("{slots} slots need their plan in tiles of {}", Self::TILE));
            }
        };
        let Some(raw) = self.raw(batch, plan, work, out)? else { return Ok(()) };
        let [gate, up, down] = &self.maps;
        let (kernel, launch) = &self.kernel;
        // SAFETY: the parameters of `few`; shapes and sizes were checked.
        unsafe { kernel.launch(stream, *launch, &[&raw, gate, up, down]) }
    }

    /// Whether [`Self::forward_gated`] takes such a batch.
    pub fn takes_gate(
        &self,
        tokens: usize,
        x: &Rows<'_>,
        gate: &Rows<'_>,
        router: &Router,
    ) -> bool {
        let whole = |m: &Rows<'_>| {
            m.raw.data.is_multiple_of(16) && (m.stride() * m.float().bytes()).is_multiple_of(16)
        };
        self.gated.as_ref().is_some_and(|(_, rules)| *rules == router.raw().options())
            && tokens * router.options().top_k <= Self::OWN_PLAN
            && x.float() == Float::Bf16
            && gate.float() != Float::F16
            && whole(x)
            && whole(gate)
            && router.shared_bytes() <= self.shape.partial_bytes()
            && !matches!(router.options().selection, Selection::HashTable { .. })
    }

    /// As [`Self::forward`], of the experts that `gate` chooses: the batch's ids and weights are those of
    /// `gate.routing`. Logits and routing are, bit by bit, those of [`crate::Verbs::linear`] and
    /// [`Router::route`].
    ///
    /// # Errors
    /// As [`Self::forward`]; if the batch is none that [`Self::takes_gate`].
    pub fn forward_gated(
        &self,
        stream: &Stream,
        gate: FewGate<'_>,
        (x, factor, fault): (Rows<'_>, f32, &FaultWord),
        work: &mut FewWorkspace,
        out: &mut RowsMut<'_>,
    ) -> Result<()> {
        let FewGate { weight, bias, router, logits, routing, fault: of_rows } = gate;
        let (tokens, top_k) = (x.rows(), router.options().top_k);
        let RoutingMut { ids, weights, shared_weights } = routing;
        weight.expect("gate", router.logits(), self.weights.hidden())?;
        let lengths = [
            (logits.len(), tokens * router.logits()),
            (ids.len(), tokens * top_k),
            (weights.len(), tokens * top_k),
            (shared_weights.len(), tokens * router.options().shared),
            (bias.map_or(router.logits(), |bias| bias.len()), router.logits()),
        ];
        if lengths.iter().any(|(is, should)| is != should)
            || !self.takes_gate(tokens, &x, &weight, router)
        {
            return refuse(format!("no gate for {tokens} tokens with {lengths:?}"));
        }
        let batch = FewBatch { x, ids: ids.as_view(), weights: weights.as_view(), factor, fault };
        let Some(raw) = self.raw(&batch, None, work, out)? else { return Ok(()) };
        let Some(((kernel, launch), _)) = &self.gated else {
            return refuse("it was not made ready for a gate".into());
        };
        let front = RawGate {
            weight: weight.raw,
            bias: bias.map_or(0, |bias| bias.address()),
            logits: logits.address(),
            shared_weights: shared_weights.address(),
            fault: of_rows.view().address(),
            router: router.raw(),
        };
        let [gate, up, down] = &self.maps;
        // SAFETY: the parameters of `few` with GATE; shapes and sizes were checked.
        unsafe { kernel.launch(stream, *launch, &[&raw, &front, gate, up, down]) }
    }

    /// The kernel's parameters; none for a batch without slots.
    fn raw(
        &self,
        batch: &FewBatch<'_>,
        plan: Option<&Plan>,
        work: &mut FewWorkspace,
        out: &mut RowsMut<'_>,
    ) -> Result<Option<RawFew>> {
        let FewBatch { x, ids, weights, factor, fault } = batch;
        let w = &self.weights;
        let (hidden, inner) = (w.hidden(), w.intermediate());
        let (tokens, slots) = (x.rows(), ids.len());
        x.expect("rows of the experts", tokens, hidden)?;
        out.expect("output of the experts", tokens, hidden)?;
        let top_k = slots.checked_div(tokens).unwrap_or(0);
        if top_k * tokens != slots || weights.len() != slots || slots > Self::MOST_SLOTS {
            let most = Self::MOST_SLOTS;
            return refuse(format!("{slots} ids for {tokens} tokens; at most {most}"));
        }
        if x.float() != Float::Bf16
            || out.float() == Float::F16
            || !x.stride().is_multiple_of(8)
            || !x.raw.data.is_multiple_of(16)
        {
            return refuse("rows are bf16, aligned to 16 bytes; outputs bf16 or f32".into());
        }
        let codes = if self.format == FewFormat::Fp8Block { slots } else { 0 };
        if work.h.len() < (slots + codes) * inner
            || work.y.len() < slots * hidden
            || work.rows.len() < codes * hidden
        {
            return refuse(format!("the workspace is too small for {slots} slots"));
        }
        if slots == 0 {
            return Ok(None);
        }
        let gate = w.gate.as_ref().unwrap_or(&w.up);
        let scales = |m: &Stored| match (&m.scales, self.format) {
            (Some(scales), FewFormat::Fp8Block) => scales.bytes.pointer(),
            _ => 0,
        };
        let scale_step =
            |m: &Stored| m.scales.as_ref().map_or(0, |s| s.expert_bytes / s.scale.bytes()) as u32;
        let bias = |m: &Stored| m.bias.as_ref().map_or(0, |b| b.view().address());
        let expert_rows = |m: &Stored| (m.expert_bytes / m.row_bytes()) as u32;
        let packed = self.packed.as_ref();
        Ok(Some(RawFew {
            x: x.raw.data,
            x_stride: x.raw.stride,
            ids: ids.address(),
            weights: weights.address(),
            first: packed.map_or(0, |packed| packed.first.view().address()),
            second: packed.map_or(0, |packed| packed.second.view().address()),
            scales: [scales(gate), scales(&w.up), scales(&w.down)],
            biases: [bias(gate), bias(&w.up), bias(&w.down)],
            h: work.h.view_mut().address(),
            rows: work.rows.view_mut().address(),
            row_scales: work.row_scales.view_mut().address(),
            y: work.y.view_mut().address(),
            out: out.raw.data,
            out_stride: out.raw.stride,
            counters: work.counters.view_mut().address(),
            fault: fault.view().address(),
            offsets: plan.map_or(0, |p| p.offsets().address()),
            order: plan.map_or(0, |p| p.order().address()),
            tiles: plan.map_or(0, |p| p.tiles().address()),
            tile_count: plan.map_or(0, |p| p.tile_count().address()),
            slots: slots as u32,
            top_k: top_k as u32,
            rows_step: [expert_rows(gate), expert_rows(&w.up), expert_rows(&w.down)],
            scale_steps: [scale_step(&w.up), scale_step(&w.down)],
            out_type: out.raw.float,
            factor: *factor,
            activation: RawActivation::new(w.activation, true),
        }))
    }
}

fn refuse<T>(reason: String) -> Result<T> {
    Err(Error::input("experts for few tokens", reason))
}

#[repr(C)]
struct RawFew {
    x: u64,
    x_stride: u64,
    ids: u64,
    weights: u64,
    first: u64,
    second: u64,
    scales: [u64; 3],
    biases: [u64; 3],
    h: u64,
    rows: u64,
    row_scales: u64,
    y: u64,
    out: u64,
    out_stride: u64,
    counters: u64,
    fault: u64,
    offsets: u64,
    order: u64,
    tiles: u64,
    tile_count: u64,
    slots: u32,
    top_k: u32,
    rows_step: [u32; 3],
    scale_steps: [u32; 2],
    out_type: u32,
    factor: f32,
    activation: RawActivation,
}

// SAFETY: `struct Few` of few.cu.
unsafe impl Argument for RawFew {}

#[repr(C)]
struct RawGate {
    weight: RawRows,
    bias: u64,
    logits: u64,
    shared_weights: u64,
    fault: u64,
    router: RawRouter,
}

// SAFETY: `struct Gate` of few.cu.
unsafe impl Argument for RawGate {}

/// Tiles of a projection of all experts, read where it lies.
pub(crate) fn map(gpu: &Gpu, stored: &Stored, tile_rows: usize) -> Result<TensorMap> {
    let row_bytes = stored.row_bytes();
    if !stored.expert_bytes.is_multiple_of(row_bytes) {
        let reason = "experts do not follow each other in whole rows";
        return Err(Error::input("fast experts", reason));
    }
    let rows = (stored.experts - 1) * (stored.expert_bytes / row_bytes) + stored.rows;
    let bytes = stored.element.bits() / 8;
    TensorMap::new(
        gpu,
        &Matrix { address: stored.codes.pointer(), bytes, rows, cols: stored.cols },
        tile_rows,
    )
}

/// Of all three projections.
fn maps(gpu: &Gpu, gate: &Stored, weights: &ExpertWeights) -> Result<[TensorMap; 3]> {
    Ok([map(gpu, gate, 16)?, map(gpu, &weights.up, 16)?, map(gpu, &weights.down, 32)?])
}

/// Packs one product's weights of all experts.
fn pack(
    modules: &Modules,
    stream: &Stream,
    format: FewFormat,
    a: &Stored,
    b: &Stored,
    first: bool,
) -> Result<Buffer<u8>> {
    let kernel = modules.function(&PACK, &format.options(), "pack")?;
    // Of the first product, `a` and `b` are packed side by side.
    let tiles = a.experts * a.rows / 16 * if first { 2 } else { 1 } * (a.cols / format.columns());
    let mut out = Buffer::new(modules.gpu(), tiles * format.tile_bytes(), "packed weights")?;
    let (raw_a, raw_b, experts, first) = (a.raw(), b.raw(), a.experts as u32, u32::from(first));
    let blocks = (tiles * 32).div_ceil(256).min(1 << 16) as u32;
    let launch = Launch::plain(blocks, 256);
    let address = out.view_mut().address();
    // SAFETY: the parameters of `pack`; the stored bytes were checked, the buffer holds all tiles.
    unsafe { kernel.launch(stream, launch, &[&raw_a, &raw_b, &experts, &first, &address])? };
    Ok(out)
}
