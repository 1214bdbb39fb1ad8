//! Experts for few tokens: the routed experts of a batch in one persistent launch that reads every
//! weight byte once. Hopper and newer.

use crate::fault::FaultWord;
use crate::module::{Argument, Function, Launch, Modules};
use crate::plan::Plan;
use crate::rows::Float;
use crate::sources::{FEW, PACK};
use crate::tensor_map::{Matrix, TensorMap};
use crate::weights::{Activation, Element, ExpertWeights, RawActivation, ScaleType, Stored};
use crate::{Buffer, Error, Gpu, Result, Rows, RowsMut, Stream, View};

/// Weight formats that have such a kernel; rows are bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FewFormat {
    /// bf16, read where it lies.
    Bf16,
    /// E4M3 with f32 scales of 128 × 128, read where it lies. Rows are not quantised.
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
    fn columns(self) -> usize {
        match self {
            Self::Bf16 | Self::Mxfp4 => 64,
            Self::Fp8Block | Self::Int4 => 128,
        }
    }

    /// Bytes of 16 rows of a record.
    fn tile_bytes(self) -> usize {
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
            // Long rows: one large block. Short ones: several, which hide each other's barriers.
            FewFormat::Fp8Block if all < 32 => (4, 1, 3, 3),
            FewFormat::Bf16 | FewFormat::Fp8Block => (8, 1, 3, 1),
            FewFormat::Int4 => (4, 2, 3, 3),
            // Five warps where they share the records evenly and four do not.
            FewFormat::Mxfp4 if all.is_multiple_of(5) && !all.is_multiple_of(4) => (5, 3, 2, 3),
            FewFormat::Mxfp4 => (4, 3, 2, 3),
        };
        // Short rows of the second product are split among few warps, as far as the others divide
        // its features.
        let short = inner / format.columns() < 16;
        let least = if format.packed() && !short { warps } else { warps / 2 };
        let divides = |split: &usize| {
            warps.is_multiple_of(*split) && (hidden / 32).is_multiple_of(warps / split)
        };
        let split = (least..=warps).find(divides).unwrap_or(warps);
        Self { warps, records, stages, blocks, split }
    }

    pub(crate) fn options(self, format: FewFormat, activation: Activation) -> Vec<String> {
        let mut options = format.options();
        options.extend([
            format!("-DWARPS={}", self.warps),
            format!("-DRECORDS={}", self.records),
            format!("-DSTAGES={}", self.stages),
            format!("-DBLOCKS={}", self.blocks),
            format!("-DACTIVATION={}", RawActivation::new(activation, true).kind),
        ]);
        options
    }

    /// Dynamic shared memory, as few.cu lays it out.
    fn shared_bytes(self, format: FewFormat) -> usize {
        let ring = self.warps * self.stages * self.records * 2 * format.tile_bytes();
        let partial = 2 * self.warps * 256 * 4;
        let barriers = 8 * self.warps * self.stages;
        ring + partial + barriers + 4 + 7 * FewExperts::MOST_SLOTS
    }
}

/// The shapes that [`FewShape::new`] can give, and the format of each.
pub(crate) fn shapes() -> Vec<(FewFormat, FewShape)> {
    let formats = [FewFormat::Bf16, FewFormat::Fp8Block, FewFormat::Int4, FewFormat::Mxfp4];
    let hidden = [2048, 2880, 7168];
    let all = formats.iter().flat_map(|&format| {
        hidden.iter().map(move |&hidden| (format, FewShape::new(format, hidden, 8192)))
    });
    let mut found = Vec::new();
    for each in all {
        if !found.contains(&each) {
            found.push(each);
        }
    }
    found
}

/// Routed experts for batches of up to [`Self::MOST_SLOTS`] slots.
pub struct FewExperts {
    format: FewFormat,
    shape: FewShape,
    weights: ExpertWeights,
    /// Packed weights of both products; they keep nothing else alive.
    packed: Option<(Buffer<u8>, Buffer<u8>)>,
    maps: [TensorMap; 3],
    kernel: Function,
    launch: Launch,
}

/// Memory that a pass lends to [`FewExperts`]; one pass at a time uses it.
#[derive(Debug)]
pub struct FewWorkspace {
    slots: usize,
    h: Buffer<u16>,
    y: Buffer<f32>,
    counters: Buffer<u32>,
}

impl FewWorkspace {
    /// For batches of `slots` slots of experts with these dimensions, or smaller.
    ///
    /// # Errors
    /// If the GPU has not enough memory.
    pub fn new(stream: &Stream, slots: usize, hidden: usize, inner: usize) -> Result<Self> {
        let (gpu, purpose) = (stream.gpu(), "the rows between the products");
        let mut counters = Buffer::new(gpu, FewExperts::MOST_SLOTS + 2, purpose)?;
        stream.fill(counters.view_mut(), 0)?;
        Ok(Self {
            slots,
            h: Buffer::new(gpu, slots * inner, purpose)?,
            y: Buffer::new(gpu, slots * hidden, purpose)?,
            counters,
        })
    }
}

impl FewWorkspace {
    /// Slots of the largest batch.
    pub fn slots(&self) -> usize {
        self.slots
    }
}

impl FewExperts {
    /// The most slots (tokens · k) of a batch.
    pub const MOST_SLOTS: usize = 512;
    /// Slots up to which the kernel makes its plan by itself.
    pub const OWN_PLAN: usize = 32;
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
        let refuse = |reason: String| Err(Error::input("experts for few tokens", reason));
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
        if teams == 0 || teams * shape.split != shape.warps || !(hidden / 32).is_multiple_of(teams)
        {
            return refuse(format!("{shape:?} does not divide {hidden} columns"));
        }
        let kernel = modules.function(&FEW, &shape.options(format, weights.activation), "few")?;
        let shared = shape.shared_bytes(format) as u32;
        kernel.allow_shared(shared)?;
        let threads = 32 * shape.warps as u32;
        // All blocks wait for each other's work: they must all be there.
        let resident = kernel.resident_blocks(threads, shared)?;
        if resident == 0 {
            return refuse(format!("{shape:?} does not fit a multiprocessor"));
        }
        let blocks = gpu.properties().multiprocessors * resident.min(shape.blocks);
        let launch = Launch { grid: (blocks as u32, 1), block: threads, shared, cooperative: true };
        let (packed, maps) = if format.packed() {
            let up = pack(modules, stream, format, gate, &weights.up, true)?;
            let down = pack(modules, stream, format, &weights.down, &weights.down, false)?;
            (Some((up, down)), [TensorMap::unused(); 3])
        } else {
            let maps =
                [map(gpu, gate, 16)?, map(gpu, &weights.up, 16)?, map(gpu, &weights.down, 32)?];
            (None, maps)
        };
        Ok(Self { format, shape, weights, packed, maps, kernel, launch })
    }

    /// Their format.
    pub fn format(&self) -> FewFormat {
        self.format
    }

    /// How the kernel is cut.
    pub fn shape(&self) -> FewShape {
        self.shape
    }

    /// `out[t] = Σ_j weights[t, j] · expert(ids[t, j])(x[t])`, in slot order. `x` is bf16 `[T, H]`,
    /// `out` bf16 or f32; ids that are no expert here are left out. Batches of more than [`Self::OWN_PLAN`]
    /// slots need the plan of these ids, in tiles of [`Self::TILE`]. An output that is not finite
    /// raises the fault.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    #[allow(clippy::too_many_arguments, reason = "all that a pass has of its own")]
    pub fn forward(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        ids: View<'_, u32>,
        weights: View<'_, f32>,
        plan: Option<&Plan>,
        work: &mut FewWorkspace,
        out: &mut RowsMut<'_>,
        fault: &FaultWord,
    ) -> Result<()> {
        let refuse = |reason: String| Err(Error::input("experts for few tokens", reason));
        let (hidden, inner) = (self.weights.hidden(), self.weights.intermediate());
        let (tokens, slots) = (x.rows(), ids.len());
        x.expect("rows of the experts", tokens, hidden)?;
        out.expect("output of the experts", tokens, hidden)?;
        let top_k = slots.checked_div(tokens).unwrap_or(0);
        if top_k * tokens != slots || weights.len() != slots || slots > Self::MOST_SLOTS {
            return refuse(format!(
                "{slots} ids for {tokens} tokens; at most {}",
                Self::MOST_SLOTS
            ));
        }
        if x.float() != Float::Bf16
            || out.float() == Float::F16
            || !x.stride().is_multiple_of(8)
            || !x.raw.data.is_multiple_of(16)
        {
            return refuse("rows are bf16, aligned to 16 bytes; outputs bf16 or f32".into());
        }
        if work.h.len() < slots * inner || work.y.len() < slots * hidden {
            return refuse(format!("the workspace is too small for {slots} slots"));
        }
        if slots == 0 {
            return Ok(());
        }
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
        let raw = self.raw(x, ids, weights, plan, work, out, fault, top_k);
        let [gate, up, down] = &self.maps;
        // SAFETY: the parameters of `few`; shapes and sizes were checked.
        unsafe { self.kernel.launch(stream, self.launch, &[&raw, gate, up, down]) }
    }

    #[allow(clippy::too_many_arguments, reason = "as above")]
    fn raw(
        &self,
        x: Rows<'_>,
        ids: View<'_, u32>,
        weights: View<'_, f32>,
        plan: Option<&Plan>,
        work: &mut FewWorkspace,
        out: &mut RowsMut<'_>,
        fault: &FaultWord,
        top_k: usize,
    ) -> RawFew {
        let w = &self.weights;
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
        RawFew {
            x: x.raw.data,
            x_stride: x.raw.stride,
            ids: ids.address(),
            weights: weights.address(),
            first: packed.map_or(0, |(first, _)| first.view().address()),
            second: packed.map_or(0, |(_, second)| second.view().address()),
            scales: [scales(gate), scales(&w.up), scales(&w.down)],
            biases: [bias(gate), bias(&w.up), bias(&w.down)],
            h: work.h.view_mut().address(),
            y: work.y.view_mut().address(),
            out: out.raw.data,
            out_stride: out.raw.stride,
            counters: work.counters.view_mut().address(),
            fault: fault.view().address(),
            offsets: plan.map_or(0, |p| p.offsets().address()),
            order: plan.map_or(0, |p| p.order().address()),
            tiles: plan.map_or(0, |p| p.tiles().address()),
            tile_count: plan.map_or(0, |p| p.tile_count().address()),
            slots: ids.len() as u32,
            top_k: top_k as u32,
            experts: w.up.experts as u32,
            hidden: w.hidden() as u32,
            inner: w.intermediate() as u32,
            split: self.shape.split as u32,
            rows: [expert_rows(gate), expert_rows(&w.up), expert_rows(&w.down)],
            scale_steps: [scale_step(&w.up), scale_step(&w.down)],
            out_type: out.raw.float,
            activation: RawActivation::new(w.activation, true),
        }
    }
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
    experts: u32,
    hidden: u32,
    inner: u32,
    split: u32,
    rows: [u32; 3],
    scale_steps: [u32; 2],
    out_type: u32,
    activation: RawActivation,
}

// SAFETY: `struct Few` of few.cu.
unsafe impl Argument for RawFew {}

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
