//! What a kernel is, as data: the oracle, `explain`, the tests and the documentation read the same.

use moe_kernels::isa::Isa;

use super::{BuildCall, BuiltKernel};
use crate::Result;
use crate::hidden::ActivationDtype;
use crate::spec::{ActivationFormat, WeightFormat};

/// A kernel's properties.
#[derive(Clone, Copy, Debug)]
pub struct KernelDesc {
    /// The name that users write.
    pub name: &'static str,
    /// One line: what it is.
    pub summary: &'static str,
    /// Where it runs.
    pub device: Device,
    /// The instruction set it needs, of the processor that it runs on or is launched from.
    pub isa: Isa,
    /// The compute capability that it needs of an NVIDIA GPU, ten times: 90 for sm90.
    pub compute_capability: u32,
    /// The number formats of weights it can read.
    pub weights: Formats<WeightFormat>,
    /// The quantisations of activations it can apply.
    pub activations: Formats<ActivationFormat>,
    /// Dtypes of hidden states.
    pub dtypes: &'static [ActivationDtype],
    /// The hidden and the intermediate size must be multiples of these.
    pub multiples: (usize, usize),
    /// Takes rows that are quantised already, as codes and scales travel between ranks.
    pub takes_quantised: bool,
    /// How rows may come to it.
    pub row_formats: &'static [RowFormat],
    /// Adds biases after the two products.
    pub biases: bool,
    /// Normalises the experts' outputs.
    pub norms: bool,
    /// Stores every intermediate result in the activations' dtype: that rounding is part of what it
    /// computes, and of its distance to the reference.
    pub rounds: bool,
    /// Multiplies its rows by the router's weights, before it rounds them: the combine only adds.
    pub weighs: bool,
    /// Routes by itself; takes logits, returns weighted sums.
    pub monolithic: bool,
    /// Shared experts may run while this kernel's rows are on their way.
    pub overlaps_shared: bool,
    /// Chosen only when the user names it: it exists to compare with, not to be fast.
    pub by_name_only: bool,
    /// How far its results repeat.
    pub determinism: Determinism,
    /// Builds it.
    pub build: Build,
    /// The kernel for experts that every token takes, where this one routes by itself.
    pub dense: Option<&'static KernelDesc>,
}

/// Builds the kernel that the description, its own, describes.
pub type Build = fn(&'static KernelDesc, BuildCall<'_>) -> Result<BuiltKernel>;

impl KernelDesc {
    /// The largest NMSE of a layer's output, to the float64 reference that quantises activations at
    /// the same points, that is right. `quantised`: the layer does quantise them.
    ///
    /// Where activations are quantised between the two products, a last bit there may move a value
    /// to the next quantised one; where intermediate results are rounded to 16 bits, it does so for
    /// one or two values of a hundred. The bounds hold for a single token, in which a few such values
    /// weigh most: too wide there to notice a small defect. The same kernel in f32 notices it.
    pub fn bound(&self, dtype: ActivationDtype, quantised: bool) -> f64 {
        match (dtype, quantised, self.rounds) {
            (ActivationDtype::F32, false, _) => 1e-11,
            (ActivationDtype::F16, false, _) => 1e-6,
            (ActivationDtype::Bf16, false, false) => 1e-5,
            (ActivationDtype::Bf16, false, true) => 1e-4,
            (_, true, false) | (ActivationDtype::F32, true, true) => 1e-4,
            (ActivationDtype::F16, true, true) => 5e-3,
            (ActivationDtype::Bf16, true, true) => 2e-2,
        }
    }
}

/// Where a kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

impl Device {
    /// "cpu" or "cuda".
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

/// A set of formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Formats<F: 'static> {
    /// Everything that can be loaded.
    All,
    /// These.
    Only(&'static [F]),
}

impl<F: PartialEq + std::fmt::Display> Formats<F> {
    /// True if `format` belongs to the set.
    pub fn contains(&self, format: &F) -> bool {
        match self {
            Self::All => true,
            Self::Only(formats) => formats.contains(format),
        }
    }

    /// The formats, for people.
    pub fn list(&self) -> String {
        match self {
            Self::All => "any format".into(),
            Self::Only(formats) => formats.iter().map(F::to_string).collect::<Vec<_>>().join(", "),
        }
    }
}

/// How rows come to a kernel. Either way a plan says which rows belong to which expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFormat {
    /// `[rows, H]` in any order.
    Standard,
    /// `[experts, capacity, H]`, each expert's rows together.
    Batched,
}

impl RowFormat {
    /// Both.
    pub const ALL: &'static [Self] = &[Self::Standard, Self::Batched];

    /// "standard" or "batched".
    pub fn name(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Batched => "batched",
        }
    }
}

/// How far a kernel's results repeat; each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Determinism {
    /// Nothing is promised.
    None,
    /// The same call gives the same bits.
    RunToRun,
    /// …for any number of threads.
    AnyThreads,
    /// …and for any other rows in the batch, and any placement of whole experts on ranks.
    AnyBatch,
}
