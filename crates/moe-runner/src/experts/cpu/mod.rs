//! The float kernels for processors: products with packed weights, for every format. Most multiply in
//! f32; `cpu_avx512_bf16` and `cpu_amx_bf16` multiply rows of bf16, and round the row between the
//! products to it; rows that are quantised to bytes they multiply as codes, as do `cpu_avx512_vnni`,
//! `cpu_avx512_vnni_q8` and `cpu_avx2_q8`, in integers.
//!
//! Weights stay what they are in the checkpoint, codes with scales or floats; the products decode
//! them in registers. The order of every sum is the kernel crate's, so a row's result does not depend
//! on its neighbours or on the number of threads, nor on the processor.

mod linear;
mod packed;

use moe_kernels::isa::{Cpu, Features};
use moe_kernels::kernel::Kernel;
use moe_kernels::pack::UNIT;
use moe_kernels::rows::{RowsMut, Tile};

pub use linear::Linear;

use crate::experts::grouped::{self, Block, Product, Products};
use crate::experts::{
    Arithmetic, BuildCall, BuiltKernel, Caps, Determinism, ExpertCall, ExpertShape, Experts,
    Formats, Functions, KernelDesc, RowFormat, Scheme, Target, rms_norm,
};
use crate::hidden::ActivationDtype;
use crate::plan::Plan;
use crate::spec::{ActivationFormat, ExpertSpec, Granularity, WeightFormat, WeightOn};
use crate::weights::ActivationQuant;
use crate::{Error, Result};
use packed::PackedExpert;

const fn desc(name: &'static str, summary: &'static str, features: Features) -> KernelDesc {
    KernelDesc {
        name,
        summary,
        target: Target::Cpu(features),
        schemes: &[Scheme::ANY],
        dtypes: &[ActivationDtype::F32, ActivationDtype::Bf16, ActivationDtype::F16],
        functions: Functions::All,
        multiples: (1, 1),
        arithmetic: Arithmetic::F32,
        caps: Caps::QUANTISED_ROWS.with(Caps::ALL_EXPERTS),
        row_formats: RowFormat::ALL,
        determinism: Determinism::AnyBatch,
        build: |desc, call| Ok(BuiltKernel::Modular(Box::new(CpuExperts::new(desc, call)?))),
        dense: None,
    }
}

/// Rows of integers.
const INT8_ROWS: &[ActivationFormat] =
    &[ActivationFormat::Int8Token, ActivationFormat::Int8Group, ActivationFormat::Int8Static];

/// With AVX-512's dot products of 8-bit integers: weights and rows that the checkpoint quantises to them.
pub const CPU_AVX512_VNNI: KernelDesc = KernelDesc {
    schemes: &[Scheme {
        weights: Formats::Only(&[
            WeightFormat::Int8(Granularity::Channel),
            WeightFormat::Int8(Granularity::Group),
            WeightFormat::Int8(Granularity::Block),
            WeightFormat::Int8(Granularity::Tensor),
            WeightFormat::Int8Asymmetric(Granularity::Channel),
            WeightFormat::Int8Asymmetric(Granularity::Group),
            WeightFormat::Int8Asymmetric(Granularity::Block),
            WeightFormat::Int8Asymmetric(Granularity::Tensor),
        ]),
        rows: Formats::Only(INT8_ROWS),
        ..Scheme::ANY
    }],
    arithmetic: Arithmetic::Int8,
    ..desc(
        "cpu_avx512_vnni",
        "int8 dot products with exact sums on all threads (AVX-512 VNNI)",
        Features::V4_VNNI,
    )
};

/// The same with weights of fewer bits, too, and all of GGUF's: for rows that a checkpoint quantises to
/// integers or [the caller](crate::weights::LoadedLayer::with_int8_activations) wants quantised so.
pub const CPU_AVX512_VNNI_Q8: KernelDesc = KernelDesc {
    name: "cpu_avx512_vnni_q8",
    summary: "rows in int8, weights of 1 to 8 bits: dot products with exact sums on all threads \
              (AVX-512 VNNI, VBMI)",
    target: Target::Cpu(Features::V4_VNNI.with(Features::AVX512_VBMI)),
    schemes: &[Scheme {
        weights: Formats::Except(
            &[
                WeightFormat::F32,
                WeightFormat::F16,
                WeightFormat::Bf16,
                WeightFormat::Fp8(Granularity::Channel),
                WeightFormat::Fp8(Granularity::Group),
                WeightFormat::Fp8(Granularity::Block),
                WeightFormat::Fp8(Granularity::Tensor),
                WeightFormat::Fp8E5m2(Granularity::Channel),
                WeightFormat::Fp8E5m2(Granularity::Group),
                WeightFormat::Fp8E5m2(Granularity::Block),
                WeightFormat::Fp8E5m2(Granularity::Tensor),
                WeightFormat::Mxfp8,
                WeightFormat::Mxfp6E3m2,
            ],
            WeightFormat::Int4(Granularity::Group),
        ),
        rows: Formats::Only(INT8_ROWS),
        ..Scheme::ANY
    }],
    ..CPU_AVX512_VNNI
};

/// With AVX2's products of 8-bit integers, which are slower and give the same sums: any processor of the last
/// ten years.
pub const CPU_AVX2_Q8: KernelDesc = KernelDesc {
    name: "cpu_avx2_q8",
    summary: "rows in int8, weights of 1 to 8 bits: products with exact sums on all threads (AVX2)",
    target: Target::Cpu(Features::V3),
    ..CPU_AVX512_VNNI_Q8
};

/// With AVX-512's dot products of bf16: hidden states of bf16, weights whose codes bf16 holds, and rows
/// that are not quantised, or to codes or values that bf16 holds.
pub const CPU_AVX512_BF16: KernelDesc = KernelDesc {
    schemes: &[Scheme {
        weights: Formats::Except(&[WeightFormat::F32, WeightFormat::F16], WeightFormat::Bf16),
        rows: Formats::Except(
            &[ActivationFormat::Nvfp4, ActivationFormat::Nvfp4Token],
            ActivationFormat::Unquantised,
        ),
        ..Scheme::ANY
    }],
    dtypes: &[ActivationDtype::Bf16],
    arithmetic: Arithmetic::Bf16,
    ..desc(
        "cpu_avx512_bf16",
        "bf16 dot products with sums in f32 on all threads (AVX-512 BF16)",
        Features::V4_BF16,
    )
};

/// With tile products of bf16.
pub const CPU_AMX_BF16: KernelDesc = KernelDesc {
    name: "cpu_amx_bf16",
    summary: "bf16 tile products with sums in f32 on all threads (AMX)",
    target: Target::Cpu(Features::V4_AMX),
    ..CPU_AVX512_BF16
};

/// With AVX-512.
pub const CPU_AVX512: KernelDesc =
    desc("cpu_avx512", "f32 arithmetic on all threads, 16 lanes (AVX-512)", Features::V4);

/// With AVX2.
pub const CPU_AVX2: KernelDesc =
    desc("cpu_avx2", "f32 arithmetic on all threads, 8 lanes (AVX2, FMA, F16C)", Features::V3);

/// On any processor.
pub const CPU_PORTABLE: KernelDesc =
    desc("cpu_portable", "f32 arithmetic on all threads, any processor", Features::NONE);

/// Output features of a tile for products on tile registers: of several units, which share the rows
/// that they read.
const WIDE: usize = 4 * UNIT;

/// Rows of a tile register: with no more of an expert, weights are what is waited for.
const FEW: usize = 16;

/// One of the float kernels, with its weights.
pub struct CpuExperts {
    desc: &'static KernelDesc,
    kernel: Kernel,
    spec: ExpertSpec,
    weight_on: WeightOn,
    experts: Vec<PackedExpert>,
    shape: ExpertShape,
    /// Floats of a row as the first and the second product read it, at most.
    row_lens: [usize; 2],
}

impl CpuExperts {
    /// Packs the experts of `call` for the kernel of `desc`.
    ///
    /// # Errors
    /// [`Error::NoKernel`] if this processor lacks the instruction set, and for weights that no
    /// product reads.
    pub fn new(desc: &'static KernelDesc, call: BuildCall<'_>) -> Result<Self> {
        let needs = desc.target.features();
        if !Cpu::detect().has(needs) {
            return Err(Error::NoKernel(format!("{}: this processor has no {needs}", desc.name)));
        }
        let kernel = Kernel::new(Cpu::detect().only(needs));
        let (spec, weight_on, shape) = (*call.spec, call.weight_on, call.shape());
        let experts = packed::pack_all(desc, call)?;
        let most = |len: fn(&PackedExpert) -> usize| experts.iter().map(len).max().unwrap_or(0);
        let row_lens = [most(PackedExpert::first_len), most(|expert| expert.down.row_len())];
        Ok(Self { desc, kernel, spec, weight_on, experts, shape, row_lens })
    }

    /// Weights on the input multiply the first product's sums instead: rows that are rounded to bf16
    /// are bf16 already, and stay what they are. (Quantisation comes after the weight.)
    fn weighs_sums(&self, expert: usize) -> bool {
        self.weight_on == WeightOn::Input
            && self.desc.arithmetic == Arithmetic::Bf16
            && self.experts[expert].up_input == ActivationQuant::None
    }

    /// Output features that are multiplied together, at most: products on tile registers are fast
    /// enough to wait for rows that they read once for each 64.
    fn widest(&self) -> usize {
        if self.desc.target.features().contains(Features::AMX_BF16) { WIDE } else { UNIT }
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
        plan.active().map(|e| self.experts[e].stored_bytes).sum()
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
        match product {
            Product::First => self.row_lens[0],
            Product::Second => self.row_lens[1],
        }
    }

    fn tile(&self, product: Product, plan: &Plan, threads: usize) -> usize {
        let features = match product {
            Product::First => self.shape.intermediate,
            Product::Second => self.shape.hidden,
        };
        let (blocks, widest) = (plan.blocks().len(), self.widest());
        // Rows that several tiles of registers share, and tiles enough for an even end.
        let pays = plan.slots_planned() > FEW * blocks;
        if pays && blocks * features.div_ceil(widest) >= 4 * threads { widest } else { UNIT }
    }

    fn scratch(&self, rows: usize) -> usize {
        // the up projection's share of a tile
        rows * self.widest()
    }

    fn enter(&self, expert: usize, row: &mut [f32], weight: f32, quantised: bool) {
        if self.weight_on == WeightOn::Input && !self.weighs_sums(expert) {
            row.iter_mut().for_each(|v| *v *= weight);
        }
        if !quantised {
            self.experts[expert].up_input.apply(self.kernel.cpu(), row);
        }
    }

    fn between(&self, expert: usize, row: &mut [f32], whole: Option<f32>, scratch: &mut [f32]) {
        let input = self.experts[expert].down_input;
        match whole {
            Some(max) => input.apply_slice(self.kernel.cpu(), row, max, scratch),
            None => input.apply(self.kernel.cpu(), row),
        }
    }

    fn operand(
        &self,
        product: Product,
        expert: usize,
        row: &[f32],
        whole: Option<f32>,
        into: &mut [f32],
    ) {
        let expert = &self.experts[expert];
        match product {
            Product::Second => expert.down.write(row, whole, into),
            Product::First => {
                let (up, gate) = into.split_at_mut(expert.up.row_len());
                expert.up.write(row, whole, up);
                if let Some(own) = expert.gate_rows() {
                    own.write(row, whole, gate);
                }
            }
        }
    }

    fn operand_len(&self, product: Product, expert: usize) -> usize {
        let expert = &self.experts[expert];
        match product {
            Product::First => expert.first_len(),
            Product::Second => expert.down.row_len(),
        }
    }

    fn first(&self, block: Block<'_>, tile: &mut Tile<'_>, scratch: &mut [f32]) {
        let expert = &self.experts[block.expert];
        let activation = self.spec.activation;
        let (rows, stride) = (block.slots.len(), expert.first_len());
        let weighs = self.weighs_sums(block.expert);
        let weights = weighs.then_some((block.slots, block.weights));
        let Tile { cols, out, .. } = tile;
        let Some(gate) = &expert.gate else {
            expert.up.run((block.rows, stride), weights, cols, out);
            (0..rows).for_each(|i| self.kernel.activate(activation, out.row_mut(i), None));
            return;
        };
        let own = if expert.gate_rows().is_some() { expert.up.row_len() } else { 0 };
        gate.run((&block.rows[own..], stride), weights, cols, out);
        let width = cols.len();
        let mut up = RowsMut::new(scratch, rows, width, width);
        expert.up.run((block.rows, stride), weights, cols, &mut up);
        for i in 0..rows {
            self.kernel.activate(activation, out.row_mut(i), Some(up.row(i)));
        }
    }

    fn second(&self, block: Block<'_>, tile: &mut Tile<'_>, _scratch: &mut [f32]) {
        let down = &self.experts[block.expert].down;
        down.run((block.rows, down.row_len()), None, &tile.cols, &mut tile.out);
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
