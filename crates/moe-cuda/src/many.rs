//! Experts for many tokens: both products as grouped products on Hopper's tensor cores.

use std::sync::Arc;

use crate::few::{FewBatch, FewExperts, FewFormat, Packed};
use crate::module::{Argument, Function, Launch, Modules};
use crate::plan::Plan;
use crate::rows::Float;
use crate::sources::{MANY, MANY4, MANY8, ROWS, SORTED};
use crate::tensor_map::{Matrix, TensorMap};
use crate::weights::{ExpertWeights, RawActivation, Stored};
use crate::{Buffer, Error, Result, Rows, RowsMut, SlotOutputs, Source, Stream, View};

/// Routed experts for batches of any size, best where experts have many rows each. Weights are read
/// where they lie: bf16, or E4M3 with scales of 128 × 128 and rows quantised to E4M3 in groups of 128,
/// before either product; those of 4 bits are packed as for [`FewExperts`], and rows are bf16. `sm_90` only.
pub struct ManyExperts {
    format: FewFormat,
    weights: ExpertWeights,
    packed: Option<Arc<Packed>>,
    maps: [TensorMap; 3],
    /// Sorts the rows by expert; quantises those of FP8.
    sort: Function,
    first: Function,
    second: Function,
    combine: Function,
    launch: Launch,
}

/// Memory that a pass lends to [`ManyExperts`]; one pass at a time uses it.
pub struct ManyWorkspace {
    slots: usize,
    /// Sorted rows, bf16 or codes with scales, and those between the products.
    rows: Buffer<u8>,
    row_scales: Buffer<f32>,
    inner: Buffer<u8>,
    inner_scales: Buffer<f32>,
    /// Rows of the slots before their sum, with their scales: see many.cuh. Of 4-bit weights f32.
    y: Buffer<u16>,
    y_scales: Buffer<f32>,
    rows_map: TensorMap,
    inner_map: TensorMap,
}

/// Where outputs of slots go: those of the first `slots` slots to the first address, and so on. Of the memory of ranks,
/// this one's or another GPU's.
#[derive(Clone, Copy, Debug)]
pub struct SlotHomes<'a> {
    /// Device pointers.
    pub addresses: View<'a, u64>,
    /// Slots of each.
    pub slots: usize,
    /// Where the scales of outputs begin, in bytes from an address.
    pub scales_at: usize,
}

impl ManyWorkspace {
    /// Slots of the largest batch.
    pub fn slots(&self) -> usize {
        self.slots
    }
}

impl ManyExperts {
    /// Rows of a tile of the plan for these products.
    pub const TILE: usize = 128;

    /// Experts of these weights; 4-bit ones are packed, on `stream`.
    ///
    /// # Errors
    /// If the GPU is not a Hopper, or the format or the shape has no such kernel.
    pub fn new(modules: &Modules, stream: &Stream, weights: ExpertWeights) -> Result<Self> {
        let format = FewFormat::of(&weights.up)?;
        weights.check()?;
        let pack = || Packed::new(modules, stream, format, &weights).map(Arc::new);
        let packed = format.packed().then(pack).transpose()?;
        let weights = if packed.is_some() { weights.packed(modules.gpu())? } else { weights };
        Self::with(modules, weights, packed)
    }

    /// The same experts as `few`, of one copy of the weights.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn beside(modules: &Modules, few: &FewExperts) -> Result<Self> {
        Self::with(modules, few.weights().clone(), few.packed())
    }

    /// Of checked weights.
    fn with(
        modules: &Modules,
        weights: ExpertWeights,
        packed: Option<Arc<Packed>>,
    ) -> Result<Self> {
        let gpu = modules.gpu();
        let Some(gate) = &weights.gate else {
            return refuse("there is no kernel for experts without a gate projection".into());
        };
        let format = FewFormat::of(&weights.up)?;
        for other in [gate, &weights.down] {
            if FewFormat::of(other)? != format {
                return refuse("the projections have several formats".into());
            }
        }
        if gpu.properties().capability != (9, 0) {
            return refuse(format!("{} is no Hopper", gpu.properties().name));
        }
        // FP8 rows are quantised in whole groups of 128; bf16 rows are aligned for the copy engine.
        let multiple = if format == FewFormat::Bf16 { 8 } else { format.columns() };
        let (hidden, inner) = (weights.hidden(), weights.intermediate());
        if !hidden.is_multiple_of(multiple) || !inner.is_multiple_of(multiple) {
            return refuse(format!("{hidden} or {inner} columns are no multiple of {multiple}"));
        }
        let step = |m: &Stored| m.scales.as_ref().map(|s| s.expert_bytes);
        if step(gate) != step(&weights.up) {
            return refuse("gate and up have their scales at different distances".into());
        }
        let activation =
            format!("-DACTIVATION={}", RawActivation::new(weights.activation, true).kind);
        let (source, name) = product(format);
        let get = |second: usize, name| {
            modules.function(source, &options(format, second, activation.clone()), name)
        };
        let (first, second) = (get(0, name)?, get(1, name)?);
        let (sort, combine) = match format.packed() {
            true => (get(0, "gather4")?, modules.function(&ROWS, &[], "combine")?),
            false => {
                let get = |name| modules.function(&SORTED, &format.options(), name);
                (get("sort_rows")?, get("combine_slots")?)
            }
        };
        let shared = shared_bytes(format) as u32;
        first.allow_shared(shared)?;
        second.allow_shared(shared)?;
        let blocks = gpu.properties().multiprocessors as u32;
        let launch = Launch { grid: (blocks, 1), block: 384, shared, cooperative: false };
        let map = |m| crate::few::map(gpu, m, if format == FewFormat::Bf16 { 128 } else { 64 });
        let maps = match format.packed() {
            true => [TensorMap::unused(); 3],
            false => [map(gate)?, map(&weights.up)?, map(&weights.down)?],
        };
        Ok(Self { format, weights, packed, maps, sort, first, second, combine, launch })
    }

    /// Memory for batches of up to `slots` slots.
    ///
    /// # Errors
    /// If the GPU has not enough.
    pub fn workspace(&self, stream: &Stream, slots: usize) -> Result<ManyWorkspace> {
        let gpu = stream.gpu();
        let (hidden, inner) = (self.weights.hidden(), self.weights.intermediate());
        let (fp8, packed) = (self.format == FewFormat::Fp8Block, self.format.packed());
        let bytes = if fp8 { 1 } else { 2 };
        let purpose = "the experts' rows";
        let scales =
            |cols: usize| Buffer::new(gpu, if fp8 { slots * cols / 128 } else { 0 }, purpose);
        let rows = Buffer::new(gpu, slots * hidden * bytes, purpose)?;
        let inner_rows = Buffer::new(gpu, slots * inner * bytes, purpose)?;
        // Of a tile many4.cu loads as many quarters as have rows, many8.cu one half or both.
        let tile = match self.format {
            FewFormat::Bf16 => Self::TILE,
            FewFormat::Fp8Block => Self::TILE / 2,
            FewFormat::Int4 | FewFormat::Mxfp4 => Self::TILE / 4,
        };
        let map = |rows: &Buffer<u8>, cols| {
            let address = rows.view().address();
            TensorMap::new(gpu, &Matrix { address, bytes, rows: slots, cols }, tile)
        };
        let tiles = if packed { 0 } else { hidden.div_ceil(tile_features(self.format)) };
        Ok(ManyWorkspace {
            slots,
            rows_map: map(&rows, hidden)?,
            inner_map: map(&inner_rows, inner)?,
            y: Buffer::new(gpu, slots * hidden * if packed { 2 } else { 1 }, purpose)?,
            y_scales: Buffer::new(gpu, slots * tiles, purpose)?,
            rows,
            row_scales: scales(hidden)?,
            inner: inner_rows,
            inner_scales: scales(inner)?,
        })
    }

    /// Bytes of such a workspace, but for scales.
    pub fn work_bytes(format: FewFormat, slots: usize, hidden: usize, inner: usize) -> usize {
        // sorted rows, those between the products, and those after
        slots
            * match format {
                FewFormat::Bf16 => 4 * hidden + 2 * inner,
                FewFormat::Fp8Block => 3 * hidden + inner,
                FewFormat::Int4 | FewFormat::Mxfp4 => 6 * hidden + 2 * inner,
            }
    }

    /// `out[t] = factor · Σ_j weights[t, j] · expert(ids[t, j])(x[t])`, in slot order; `out` is bf16 or
    /// f32, `plan` the plan of the batch's ids in tiles of [`Self::TILE`].
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub fn forward(
        &self,
        stream: &Stream,
        batch: &FewBatch<'_>,
        plan: &Plan,
        work: &mut ManyWorkspace,
        out: &mut RowsMut<'_>,
    ) -> Result<()> {
        let FewBatch { x, ids, weights, factor, fault } = *batch;
        let (hidden, slots) = (self.weights.hidden(), ids.len());
        x.expect("rows of the experts", slots / plan.top_k, hidden)?;
        out.expect("output of the experts", slots / plan.top_k, hidden)?;
        if out.float() == Float::F16 || !aligned(out.raw.data, out.raw.stride) {
            return refuse("outputs are bf16 or f32, aligned to 16 bytes".into());
        }
        if weights.len() != slots {
            return refuse(format!("{slots} ids, {} weights", weights.len()));
        }
        let y = self.products(stream, x, None, (slots, plan), work, None)?;
        if slots == 0 {
            return Ok(());
        }
        let (experts, top_k) = (plan.experts() as u32, plan.top_k as u32);
        let (ids, weights, fault) = (ids.address(), weights.address(), fault.view().address());
        if self.format.packed() {
            // SAFETY: the workspace has f32 rows for all slots.
            let y = unsafe { Rows::from_raw(y.values, Float::F32, slots, hidden, hidden)? };
            let blocks = (out.rows() * hidden).div_ceil(256).min(1 << 20) as u32;
            let arguments: [&dyn Argument; 8] =
                [&y.raw, &ids, &weights, &experts, &top_k, &factor, &out.raw, &fault];
            // SAFETY: the parameters of `combine`; shapes and sizes were checked.
            return unsafe { self.combine.launch(stream, Launch::plain(blocks, 256), &arguments) };
        }
        let blocks = (out.rows() * hidden / 8).div_ceil(256).min(1 << 20) as u32;
        let arguments: [&dyn Argument; 9] =
            [&y.values, &y.scales, &ids, &weights, &experts, &top_k, &factor, &out.raw, &fault];
        // SAFETY: the parameters of `combine_slots`; shapes and sizes were checked.
        unsafe { self.combine.launch_early(stream, Launch::plain(blocks, 256), &arguments) }
    }

    /// The outputs of slots, by slot, before any sum; those of slots without an expert hold anything. `rows` is, for
    /// every planned slot in the plan's order, its row of `x`.
    ///
    /// # Safety
    /// Those rows are rows of `x`.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub unsafe fn slots(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        rows: View<'_, u32>,
        plan: &Plan,
        work: &mut ManyWorkspace,
    ) -> Result<SlotOutputs> {
        let slots = plan.slots_used;
        if rows.len() != slots || x.cols() != self.weights.hidden() {
            return refuse(format!("{slots} slots, rows of {} columns", x.cols()));
        }
        self.products(stream, x, Some(rows), (slots, plan), work, None)
    }

    /// The same for slots of `plan.top_k` to a row of `x`, with outputs that go to `homes`.
    ///
    /// # Safety
    /// There is memory for the outputs of all planned slots, and nothing else uses it meanwhile.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub unsafe fn slots_to(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        plan: &Plan,
        work: &mut ManyWorkspace,
        homes: SlotHomes<'_>,
    ) -> Result<()> {
        let slots = plan.slots_used;
        x.expect("rows of the experts", slots / plan.top_k, self.weights.hidden())?;
        if homes.slots * homes.addresses.len() != slots {
            return refuse(format!(
                "{slots} slots, homes for {} of each of {} ranks",
                homes.slots,
                homes.addresses.len()
            ));
        }
        self.products(stream, x, None, (slots, plan), work, Some(homes)).map(drop)
    }

    /// Both products, for slots of `plan.top_k` to a row of `x`, or for a row that is named for the plan's p-th slot.
    fn products(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        named: Option<View<'_, u32>>,
        (slots, plan): (usize, &Plan),
        work: &mut ManyWorkspace,
        homes: Option<SlotHomes<'_>>,
    ) -> Result<SlotOutputs> {
        let w = &self.weights;
        if x.float() != Float::Bf16 || !aligned(x.raw.data, x.raw.stride) {
            return refuse("rows are bf16, aligned to 16 bytes".into());
        }
        let fits = (plan.experts(), plan.tile()) == (w.up.experts, Self::TILE);
        if plan.slots_used != slots || !fits || slots > work.slots {
            return refuse(format!(
                "{slots} slots, {} planned in tiles of {} over {}",
                plan.slots_used,
                plan.tile(),
                plan.experts()
            ));
        }
        let outputs = self.outputs(work);
        if slots == 0 {
            return Ok(outputs);
        }
        let gate = w.gate.as_ref().unwrap_or(&w.up);
        self.sort(stream, x, named, plan, work)?;
        let h = work.inner.view_mut().address();
        if let Some(packed) = &self.packed {
            let first = RawMany4::new(plan, &packed.first, [gate, &w.up], h, w);
            let downs = [&w.down, &w.down];
            let second = RawMany4::new(plan, &packed.second, downs, outputs.values, w).to(homes);
            // SAFETY: the parameters of `many4`; shapes and sizes were checked.
            unsafe {
                self.first.launch(stream, self.launch, &[&first, &work.rows_map])?;
                self.second.launch(stream, self.launch, &[&second, &work.inner_map])?;
            }
            return Ok(outputs);
        }
        let [gate_map, up_map, down_map] = &self.maps;
        let scales = [&work.row_scales, &work.inner_scales].map(|scales| scales.view().address());
        let first = RawMany {
            row_scales: scales[0],
            out: h,
            out_scales: scales[1],
            ..self.raw(plan, [gate, &w.up])
        };
        let second = RawMany {
            row_scales: scales[1],
            out: outputs.values,
            out_scales: outputs.scales,
            ..self.raw(plan, [&w.down, &w.down])
        }
        .to(homes);
        let first_maps = [&work.rows_map, gate_map, up_map];
        let second_maps = [&work.inner_map, down_map, down_map];
        for (function, raw, [rows, a, b]) in
            [(&self.first, &first, first_maps), (&self.second, &second, second_maps)]
        {
            let arguments: [&dyn Argument; 4] = [raw, rows, a, b];
            // SAFETY: the parameters of `many` and `many8`; shapes and sizes were checked. many8 waits.
            unsafe {
                match self.format {
                    FewFormat::Fp8Block => {
                        function.launch_early(stream, self.launch, &arguments)?
                    }
                    _ => function.launch(stream, self.launch, &arguments)?,
                }
            }
        }
        Ok(outputs)
    }

    /// Where the outputs of slots are, and what a slot's take.
    pub fn outputs(&self, work: &ManyWorkspace) -> SlotOutputs {
        let (values, scales) = (work.y.view().address(), work.y_scales.view().address());
        SlotOutputs { values, scales, ..self.output_of_slot() }
    }

    /// What the outputs of a slot are, nowhere yet.
    pub fn output_of_slot(&self) -> SlotOutputs {
        let hidden = self.weights.hidden();
        let tile = if self.format.packed() { 0 } else { tile_features(self.format) };
        SlotOutputs {
            values: 0,
            value_bytes: hidden * if tile == 0 { 4 } else { 2 },
            scales: 0,
            scale_bytes: if tile == 0 { 0 } else { 4 * hidden.div_ceil(tile) },
            tile,
        }
    }

    /// Rows by sorted position, as the first product reads them.
    fn sort(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        named: Option<View<'_, u32>>,
        plan: &Plan,
        work: &mut ManyWorkspace,
    ) -> Result<()> {
        let (from, stride, cols) = (x.raw.data, x.raw.stride, x.cols() as u32);
        let (offsets, experts) = (plan.offsets().address(), plan.experts() as u32);
        let (to, slots) = (work.rows.view_mut().address(), plan.slots_used);
        if self.packed.is_some() {
            // In pieces of 16 bytes.
            let (stride, pieces) = (stride / 8, cols / 8);
            let (order, top_k) = match named {
                None => (plan.order().address(), plan.top_k as u32),
                Some(rows) => (rows.address(), 1),
            };
            let arguments: [&dyn Argument; 8] =
                [&from, &stride, &order, &offsets, &experts, &top_k, &pieces, &to];
            let launch = Launch::plain(slots.div_ceil(8) as u32, 256);
            // SAFETY: the parameters of `gather4`; the workspace holds all slots.
            return unsafe { self.sort.launch(stream, launch, &arguments) };
        }
        let (blocks, rows, places, top_k) = match named {
            None => (slots / plan.top_k, 0, plan.place().address(), plan.top_k as u32),
            Some(rows) => (slots, rows.address(), 0, 1),
        };
        let scales = work.row_scales.view_mut().address();
        let arguments: [&dyn Argument; 10] =
            [&from, &stride, &rows, &places, &offsets, &experts, &top_k, &cols, &to, &scales];
        // SAFETY: the parameters of `sort_rows`; the workspace holds all slots.
        unsafe { self.sort.launch_early(stream, Launch::plain(blocks as u32, 256), &arguments) }
    }

    /// What both products have in common; `matrices` are gate and up, or down twice.
    fn raw(&self, plan: &Plan, matrices: [&Stored; 2]) -> RawMany {
        let scales = |m: &Stored| match (&m.scales, self.format) {
            (Some(scales), FewFormat::Fp8Block) => scales.bytes.pointer(),
            _ => 0,
        };
        let step = |m: &Stored| m.scales.as_ref().map_or(0, |s| s.expert_bytes / s.scale.bytes());
        let [a, b] = matrices;
        RawMany {
            offsets: plan.offsets().address(),
            order: plan.order().address(),
            tiles: plan.tiles().address(),
            tile_count: plan.tile_count().address(),
            row_scales: 0,
            scales: matrices.map(scales),
            biases: matrices.map(|m| m.bias.as_ref().map_or(0, |b| b.view().address())),
            out: 0,
            out_scales: 0,
            homes: 0,
            home_scales: 0,
            home_slots: 1,
            features: a.rows as u32,
            k: a.cols as u32,
            rows: [a, b].map(|m| (m.expert_bytes / m.row_bytes()) as u32),
            scale_step: step(a) as u32,
            activation: RawActivation::new(self.weights.activation, true),
        }
    }
}

fn refuse<T>(reason: String) -> Result<T> {
    Err(Error::input("experts for many tokens", reason))
}

/// As the copy engine and loads of 16 bytes want rows of 16-bit numbers.
fn aligned(address: u64, stride: u64) -> bool {
    address.is_multiple_of(16) && stride.is_multiple_of(8)
}

/// The source of the products, and the kernel's name.
pub(crate) fn product(format: FewFormat) -> (&'static Source, &'static str) {
    match format {
        FewFormat::Bf16 => (&MANY, "many"),
        FewFormat::Fp8Block => (&MANY8, "many8"),
        FewFormat::Int4 | FewFormat::Mxfp4 => (&MANY4, "many4"),
    }
}

/// How a product is compiled.
pub(crate) fn options(format: FewFormat, second: usize, activation: String) -> Vec<String> {
    let mut options = format.options();
    options.extend([format!("-DSECOND={second}"), activation]);
    options
}

impl RawMany4 {
    fn new(
        plan: &Plan,
        packed: &Buffer<u8>,
        matrices: [&Stored; 2],
        out: u64,
        weights: &ExpertWeights,
    ) -> Self {
        Self {
            offsets: plan.offsets().address(),
            order: plan.order().address(),
            tiles: plan.tiles().address(),
            tile_count: plan.tile_count().address(),
            weights: packed.view().address(),
            biases: matrices.map(|m| m.bias.as_ref().map_or(0, |b| b.view().address())),
            out,
            homes: 0,
            home_slots: 1,
            features: matrices[0].rows as u32,
            k: matrices[0].cols as u32,
            activation: RawActivation::new(weights.activation, true),
        }
    }

    fn to(self, homes: Option<SlotHomes<'_>>) -> Self {
        match homes {
            None => self,
            Some(to) => Self { homes: to.addresses.address(), home_slots: to.slots as u32, ..self },
        }
    }
}

impl RawMany {
    fn to(self, homes: Option<SlotHomes<'_>>) -> Self {
        let Some(to) = homes else { return self };
        let (homes, home_scales) = (to.addresses.address(), to.scales_at as u64);
        Self { homes, home_scales, home_slots: to.slots as u32, ..self }
    }
}

/// Features of an output that share a scale: SCALED of many.cuh.
fn tile_features(format: FewFormat) -> usize {
    if format == FewFormat::Fp8Block { 128 } else { 256 }
}

/// Stages of a ring, its barriers and what is announced of pieces, as many.cu and many8.cu lay them out.
fn shared_bytes(format: FewFormat) -> usize {
    match format {
        FewFormat::Bf16 => 4 * ((128 + 256) * 128 + 16),
        FewFormat::Fp8Block => 4 * ((128 + 256) * 128 + 16) + 8 * 20,
        // many4.cu: rows and groups of weights of a record
        FewFormat::Int4 => 5 * (2 * 128 * 128 + 4 * 2 * format.tile_bytes() + 16),
        FewFormat::Mxfp4 => 8 * (128 * 128 + 8 * 2 * format.tile_bytes() + 16),
    }
}

#[repr(C)]
struct RawMany {
    offsets: u64,
    order: u64,
    tiles: u64,
    tile_count: u64,
    row_scales: u64,
    scales: [u64; 2],
    biases: [u64; 2],
    out: u64,
    out_scales: u64,
    homes: u64,
    home_scales: u64,
    home_slots: u32,
    features: u32,
    k: u32,
    rows: [u32; 2],
    scale_step: u32,
    activation: RawActivation,
}

// SAFETY: `struct Many` of many.cuh.
unsafe impl Argument for RawMany {}

#[repr(C)]
struct RawMany4 {
    offsets: u64,
    order: u64,
    tiles: u64,
    tile_count: u64,
    weights: u64,
    biases: [u64; 2],
    out: u64,
    homes: u64,
    home_slots: u32,
    features: u32,
    k: u32,
    activation: RawActivation,
}

// SAFETY: `struct Many4` of many4.cu.
unsafe impl Argument for RawMany4 {}
