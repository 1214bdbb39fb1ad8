//! The float kernels for processors: products in f32, for every format.
//!
//! Float weights are read where the checkpoint has them; other formats are decoded tile by tile to
//! f32, in cache. The order of every sum is the kernel crate's, so a row's result does not depend on
//! its neighbours or on the number of threads.

mod linear;
mod tile;

use std::sync::Arc;

use moe_kernels::isa::Isa;
use moe_kernels::kernel::{self, Kernel, Rows, Tile};
use moe_kernels::pool::ThreadPool;

pub use linear::Linear;

use crate::experts::grouped::{self, Block, Product, Products};
use crate::experts::reference::stored_bytes;
use crate::experts::{
    Determinism, Device, ExpertCall, ExpertSet, ExpertShape, Experts, Formats, KernelDesc,
    RowFormat, rms_norm,
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
    spec: ExpertSpec,
    weight_on: WeightOn,
    experts: Vec<Expert>,
    shape: ExpertShape,
}

impl CpuExperts {
    /// Packs `set` for the kernel of `desc`.
    ///
    /// # Errors
    /// [`Error::NoKernel`] if this processor lacks the instruction set.
    pub fn new(desc: &'static KernelDesc, set: ExpertSet<'_>) -> Result<Self> {
        let kernel = Kernel::new(desc.isa).ok_or_else(|| {
            Error::NoKernel(format!("{}: this processor has no {}", desc.name, desc.isa.name()))
        })?;
        Ok(Self {
            desc,
            kernel,
            spec: *set.spec,
            weight_on: set.weight_on,
            experts: set.experts.iter().map(pack).collect(),
            shape: set.shape(),
        })
    }

    fn cols(&self, product: Product) -> usize {
        match product {
            Product::First => self.shape.hidden,
            Product::Second => self.shape.intermediate,
        }
    }

    fn rows<'a>(&self, product: Product, block: Block<'a>) -> Rows<'a> {
        let cols = self.cols(product);
        Rows::new(block.rows, block.slots.len(), cols, cols)
    }
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

    fn scratch_bytes(&self, slots: usize, threads: usize) -> usize {
        grouped::scratch_bytes(self, slots, threads)
    }

    fn weight_bytes(&self, plan: &Plan) -> usize {
        plan.active().map(|e| stored_bytes(&self.experts[e])).sum()
    }

    fn forward(&self, call: ExpertCall<'_>) -> Result<()> {
        grouped::forward(self, call)
    }
}

impl Products for CpuExperts {
    fn shape(&self) -> ExpertShape {
        self.shape
    }

    fn row_len(&self, product: Product) -> usize {
        self.cols(product)
    }

    fn tile(&self) -> usize {
        tile::COLUMNS
    }

    fn scratch(&self, rows: usize) -> usize {
        tile::scratch(self.shape, rows)
    }

    fn enter(&self, expert: usize, row: &mut [f32], weight: f32, quantised: bool) {
        if self.weight_on == WeightOn::Input {
            row.iter_mut().for_each(|v| *v *= weight);
        }
        if !quantised {
            self.experts[expert].up.input.apply(row);
        }
    }

    fn between(&self, expert: usize, row: &mut [f32], whole: Option<f32>, scratch: &mut [f32]) {
        let input = self.experts[expert].down.input;
        match whole {
            Some(max) => input.apply_slice(row, max, scratch),
            None => input.apply(row),
        }
    }

    fn operand(&self, _product: Product, _expert: usize, row: &[f32], into: &mut [f32]) {
        into.copy_from_slice(row);
    }

    fn operand_len(&self, product: Product, _expert: usize) -> usize {
        self.cols(product)
    }

    fn first(&self, block: Block<'_>, tile: &mut Tile<'_>, scratch: &mut [f32]) {
        let activation = kernel_activation(self.spec.activation);
        let x = self.rows(Product::First, block);
        let expert = &self.experts[block.expert];
        tile::gate_up(&self.kernel, expert, activation, x, tile, scratch);
    }

    fn second(&self, block: Block<'_>, tile: &mut Tile<'_>, scratch: &mut [f32]) {
        let h = self.rows(Product::Second, block);
        tile::down(&self.kernel, &self.experts[block.expert], h, tile, scratch);
    }

    fn normalises(&self) -> bool {
        self.spec.norm.is_some()
    }

    fn normalise(&self, expert: usize, row: &mut [f32]) {
        if let (Some(norm), Some(weight)) = (self.spec.norm, &self.experts[expert].norm) {
            rms_norm(norm, weight, row);
        }
    }
}
