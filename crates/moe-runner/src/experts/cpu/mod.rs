//! The float kernels for processors: grouped products on all threads, for every format.
//!
//! ```text
//! gather:  rows of each active expert, one expert after the other        x [slots, H]
//! gate_up: tiles of (an expert's rows × some columns of I), in parallel  h [slots, I]
//! down:    tiles of (an expert's rows × some columns of H), in parallel  y [slots, H]
//! scatter: y to its slots
//! ```
//! Float weights are read where the checkpoint has them; other formats are decoded tile by tile to
//! f32, in cache. The order of every sum is the kernel crate's, so a row's result does not depend on
//! its neighbours or on the number of threads.

mod linear;
mod tile;

use std::ops::Range;
use std::sync::Arc;

use moe_kernels::isa::Isa;
use moe_kernels::kernel::{self, Kernel, Rows, RowsMut, Tile};
use moe_kernels::pool::ThreadPool;
use moe_kernels::region::for_each;

pub use linear::Linear;

use crate::experts::reference::stored_bytes;
use crate::experts::rms_norm;
use crate::experts::{
    Determinism, Device, ExpertCall, ExpertSet, ExpertShape, Experts, Formats, KernelDesc,
    RowFormat,
};
use crate::hidden::ActivationDtype;
use crate::plan::Plan;
use crate::spec::{Activation, ExpertSpec, WeightOn};
use crate::weights::Expert;
use crate::{Error, Result};

/// Threads that kernels share.
pub type SharedPool = Arc<dyn ThreadPool + Send + Sync>;

const fn desc(name: &'static str, summary: &'static str, isa: Isa) -> KernelDesc {
    KernelDesc {
        name,
        summary,
        device: Device::Cpu,
        isa,
        compute_capability: 0,
        weights: Formats::All,
        activations: Formats::All,
        dtypes: &[ActivationDtype::F32, ActivationDtype::Bf16, ActivationDtype::F16],
        multiples: (1, 1),
        row_formats: RowFormat::ALL,
        takes_quantised: true,
        biases: true,
        norms: true,
        rounds: false,
        weighs: false,
        monolithic: false,
        overlaps_shared: true,
        by_name_only: false,
        determinism: Determinism::AnyBatch,
    }
}

/// With AVX-512.
pub const CPU_AVX512: KernelDesc =
    desc("cpu_avx512", "f32 arithmetic on all threads, 16 lanes (AVX-512)", Isa::Avx512);

/// With AVX2.
pub const CPU_AVX2: KernelDesc =
    desc("cpu_avx2", "f32 arithmetic on all threads, 8 lanes (AVX2, FMA, F16C)", Isa::Avx2);

/// On any processor.
pub const CPU_PORTABLE: KernelDesc =
    desc("cpu_portable", "f32 arithmetic on all threads, any processor", Isa::Portable);

/// One of the float kernels, with its weights.
pub struct CpuExperts {
    desc: &'static KernelDesc,
    kernel: Kernel,
    pool: SharedPool,
    spec: ExpertSpec,
    weight_on: WeightOn,
    experts: Vec<Expert>,
    shape: ExpertShape,
    buffers: Buffers,
}

#[derive(Default)]
struct Buffers {
    x: Vec<f32>,
    h: Vec<f32>,
    y: Vec<f32>,
    max: Vec<f32>,
    blocks: Vec<Range<usize>>,
    active: Vec<usize>,
}

impl CpuExperts {
    /// Packs `set` for the kernel of `desc`.
    ///
    /// # Errors
    /// [`Error::NoKernel`] if this processor lacks the instruction set.
    pub fn new(desc: &'static KernelDesc, set: ExpertSet<'_>, pool: SharedPool) -> Result<Self> {
        let kernel = Kernel::new(desc.isa).ok_or_else(|| {
            Error::NoKernel(format!("{}: this processor has no {}", desc.name, desc.isa.name()))
        })?;
        Ok(Self {
            desc,
            kernel,
            pool,
            spec: *set.spec,
            weight_on: set.weight_on,
            experts: set.experts.iter().map(pack).collect(),
            shape: set.shape(),
            buffers: Buffers::default(),
        })
    }
}

/// `max|v|`, 0 of nothing.
pub(super) fn largest_magnitude(row: &[f32]) -> f32 {
    row.iter().fold(0.0, |max, v| v.abs().max(max))
}

/// Float projections with contiguous rows; they share the checkpoint's memory where it has them so.
fn pack(expert: &Expert) -> Expert {
    Expert {
        gate: expert.gate.as_ref().map(|gate| gate.packed()),
        up: expert.up.packed(),
        down: expert.down.packed(),
        ..expert.clone()
    }
}

/// The kernel crate's name for an activation: that crate knows nothing of layers.
fn kernel_activation(activation: Activation) -> kernel::Activation {
    match activation {
        Activation::Silu => kernel::Activation::Silu,
        Activation::Gelu => kernel::Activation::Gelu,
        Activation::GeluTanh => kernel::Activation::GeluTanh,
        Activation::Relu => kernel::Activation::Relu,
        Activation::Relu2 => kernel::Activation::Relu2,
        Activation::ClampedSwiglu { alpha, beta, limit } => {
            kernel::Activation::ClampedSwiglu { alpha, beta, limit }
        }
        Activation::SwigluStep { limit } => kernel::Activation::SwigluStep { limit },
        Activation::Situ { beta, lambda } => kernel::Activation::Situ { beta, lambda },
    }
}

impl std::fmt::Debug for CpuExperts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} with {} experts", self.desc.name, self.experts.len())
    }
}

impl Experts for CpuExperts {
    fn desc(&self) -> &'static KernelDesc {
        self.desc
    }

    fn shape(&self) -> ExpertShape {
        self.shape
    }

    fn workspace_bytes(&self, slots: usize) -> usize {
        slots * (2 * self.shape.hidden + self.shape.intermediate) * size_of::<f32>()
    }

    fn weight_bytes(&self, plan: &Plan) -> usize {
        plan.active().map(|e| stored_bytes(&self.experts[e])).sum()
    }

    fn forward(&mut self, call: ExpertCall<'_>) -> Result<()> {
        let ExpertCall { rows, stride, plan, weights, out, quantised, row_max } = call;
        let ExpertShape { hidden, intermediate, .. } = self.shape;
        let slots = plan.slots_planned();
        let Buffers { x, h, y, max, blocks, active } = &mut self.buffers;
        let row_max_given = row_max.is_some();
        active.clear();
        active.extend(plan.active());
        blocks.clear();
        blocks.extend(active.iter().map(|e| plan.range(*e)));
        x.resize(slots * hidden, 0.0);
        h.resize(slots * intermediate, 0.0);
        y.resize(slots * hidden, 0.0);

        let (experts, spec, weight_on) = (&self.experts, &self.spec, self.weight_on);
        let (kernel, pool) = (&self.kernel, &*self.pool);
        let active = &*active;
        let activation = kernel_activation(spec.activation);

        // gather; rows are quantised here where the expert's first product asks for it
        let mut x_rows = RowsMut::new(x, slots, hidden, hidden);
        for_each(
            pool,
            x_rows.tiles(blocks, hidden.max(1)),
            |Tile { block, out: mut tile, .. }| {
                let expert = &experts[active[block]];
                for (i, &slot) in plan.slots(active[block]).iter().enumerate() {
                    let to = tile.row_mut(i);
                    to.copy_from_slice(&rows[plan.row(slot) * stride..][..hidden]);
                    if weight_on == WeightOn::Input {
                        to.iter_mut().for_each(|v| *v *= weights[slot as usize]);
                    }
                    if !quantised {
                        expert.up.input.apply(to);
                    }
                }
            },
        );

        let x_rows = Rows::new(x, slots, hidden, hidden);
        let mut h_rows = RowsMut::new(h, slots, intermediate, intermediate);
        for_each(pool, h_rows.tiles(blocks, tile::COLUMNS), |Tile { block, cols, out }| {
            let expert = &experts[active[block]];
            let x = x_rows.slice(blocks[block].clone());
            tile::gate_up(kernel, expert, activation, x, cols, out);
        });
        if let Some(row_max) = row_max {
            max.clear();
            max.extend(h.chunks_exact(intermediate.max(1)).map(largest_magnitude));
            max.resize(slots, 0.0);
            row_max(max)?;
        }
        let (max, sliced) = (&*max, row_max_given);
        let mut h_rows = RowsMut::new(h, slots, intermediate, intermediate);
        for_each(
            pool,
            h_rows.tiles(blocks, intermediate.max(1)),
            |Tile { block, out: mut tile, .. }| {
                let input = experts[active[block]].down.input;
                let mut scratch = Vec::new();
                for (i, slot) in blocks[block].clone().enumerate() {
                    match sliced {
                        true => input.apply_slice(tile.row_mut(i), max[slot], &mut scratch),
                        false => input.apply(tile.row_mut(i)),
                    }
                }
            },
        );

        let h_rows = Rows::new(h, slots, intermediate, intermediate);
        let mut y_rows = RowsMut::new(y, slots, hidden, hidden);
        for_each(pool, y_rows.tiles(blocks, tile::COLUMNS), |Tile { block, cols, out }| {
            let expert = &experts[active[block]];
            let h = h_rows.slice(blocks[block].clone());
            tile::down(kernel, expert, h, cols, out);
        });

        for &e in active {
            for (i, &slot) in plan.range(e).zip(plan.slots(e)) {
                let to = &mut out[slot as usize * stride..][..hidden];
                to.copy_from_slice(&y[i * hidden..(i + 1) * hidden]);
                if let (Some(norm), Some(weight)) = (spec.norm, &experts[e].norm) {
                    rms_norm(norm, weight, to);
                }
            }
        }
        Ok(())
    }
}
