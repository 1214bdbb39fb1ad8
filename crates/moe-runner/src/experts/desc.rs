//! What a kernel is, as data: the oracle, `explain`, the tests and the documentation read the same.

use moe_kernels::isa::Features;

use super::{BuildCall, BuiltKernel};
use crate::Result;
use crate::exchange::RowFormat;
use crate::hidden::ActivationDtype;
use crate::spec::{Activation, ActivationFormat, WeightFormat};
use crate::weights::{Matrix, ScaleType};

/// A kernel: what it needs, what it can do, and how it is built.
#[derive(Clone, Copy, Debug)]
pub struct KernelDesc {
    /// The name that users write.
    pub name: &'static str,
    /// One line: what it is.
    pub summary: &'static str,
    /// Where it runs.
    pub target: Target,
    /// The number formats that it takes. Two entries have no format of weights in common.
    pub schemes: &'static [Scheme],
    /// Dtypes of hidden states.
    pub dtypes: &'static [ActivationDtype],
    /// The functions that it computes between the products.
    pub functions: Functions,
    /// The hidden and the intermediate size must be multiples of these.
    pub multiples: (usize, usize),
    /// How it computes: the error that is right follows from it.
    pub arithmetic: Arithmetic,
    /// What it can do beside the products.
    pub caps: Caps,
    /// How rows may come to it.
    pub row_formats: &'static [RowFormat],
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
        let rounds = self.arithmetic == Arithmetic::Rounded;
        match (dtype, quantised, rounds) {
            (ActivationDtype::F32, false, _) => 1e-11,
            (ActivationDtype::F16, false, _) => 1e-6,
            (ActivationDtype::Bf16, false, false) => 1e-5,
            (ActivationDtype::Bf16, false, true) => 1e-4,
            (_, true, false) | (ActivationDtype::F32, true, true) => 1e-4,
            (ActivationDtype::F16, true, true) => 5e-3,
            (ActivationDtype::Bf16, true, true) => 2e-2,
        }
    }

    /// Why this kernel is slower on a processor with `features` than one that is less preferred, if it is:
    /// it runs when named. Processors with tile registers (AMX) have dot products of bf16 at half the rate
    /// of f32 multiply-adds; and tiles wait for codes to be decoded into memory, which many tokens share. (One
    /// or two rows of an expert need no tiles, and take 1.1 times as long as in f32 where a scale is for many
    /// columns of INT4.)
    pub fn slow_on(&self, features: Features, products: &[ProductFormat]) -> Option<&'static str> {
        let tiles = self.target.features().contains(Features::AMX_BF16);
        let decodes = || !products.iter().all(ProductFormat::is_soon_on_tiles);
        match (self.arithmetic, self.target.device()) {
            (Arithmetic::Bf16, Device::Cpu) if tiles => {
                decodes().then_some("few tokens take longer with quantised weights")
            }
            (Arithmetic::Bf16, Device::Cpu) if features.contains(Features::AMX_TILE) => {
                Some("this processor multiplies f32 faster")
            }
            _ => None,
        }
    }

    /// The entry that takes `product`, if one does.
    pub fn scheme(&self, product: &ProductFormat) -> Option<&'static Scheme> {
        self.schemes.iter().find(|scheme| scheme.takes(product))
    }

    /// How the rows of `product` are quantised when this kernel multiplies them: as the checkpoint
    /// says, or where it says nothing, as the kernel does by itself. The reference quantises at the
    /// same points.
    pub fn rows_of(&self, product: &ProductFormat) -> ActivationFormat {
        match (product.rows, self.scheme(product).and_then(|scheme| scheme.itself)) {
            (ActivationFormat::Unquantised, Some(itself)) => itself,
            (rows, _) => rows,
        }
    }
}

/// The number formats of one projection: of its weights, and of the rows that it multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProductFormat {
    /// Of the weights.
    pub weights: WeightFormat,
    /// Rows and columns that share a scale, where the weights have scales.
    pub group: Option<[usize; 2]>,
    /// Of the rows.
    pub rows: ActivationFormat,
    /// What the weights have beside codes and scales.
    pub extras: Extras,
}

impl ProductFormat {
    /// Few tokens of it are nearly as fast on tile registers as in f32, and many faster.
    fn is_soon_on_tiles(&self) -> bool {
        match (self.weights, self.group, self.rows) {
            (WeightFormat::Bf16, ..) => true,
            (WeightFormat::Int4(_), Some([_, columns]), ActivationFormat::Unquantised) => {
                columns >= 128
            }
            _ => false,
        }
    }

    /// Of this projection.
    pub fn of(matrix: &Matrix) -> Self {
        Self {
            weights: matrix.format(),
            group: matrix.codes().map(|codes| codes.scales().block()),
            rows: matrix.input.format(),
            extras: Extras::of(matrix),
        }
    }
}

/// What integer codes may have beside a bf16 scale for each group, as a set. Kernels that read codes packed for
/// them do not take all of it. (Codes with zero points are a format of their own.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Extras(u8);

impl Extras {
    /// Nothing.
    pub const NONE: Extras = Extras(0);
    /// Columns whose groups are named one by one (act-order).
    pub const ORDER: Extras = Extras(1);
    /// Scales in f16 or f32: bf16 does not hold them.
    pub const FINE_SCALES: Extras = Extras(1 << 1);
    /// All of it.
    pub const ALL: Extras = Extras(3);
    /// Each in words, and its absence.
    const NAMES: [(Extras, &'static str, &'static str); 2] = [
        (Extras::ORDER, "columns in an order of their own (act-order)", "columns in order"),
        (Extras::FINE_SCALES, "scales that bf16 does not hold", "scales in bf16"),
    ];

    /// Of integer codes; floats and codes of other kinds have none that matter.
    fn of(matrix: &Matrix) -> Self {
        let integers = matches!(matrix.format(), WeightFormat::Int4(_) | WeightFormat::Int8(_));
        let Some(codes) = matrix.codes().filter(|_| integers) else { return Self::NONE };
        let fine = matches!(codes.scales().stored(), ScaleType::F16 | ScaleType::F32);
        [(codes.group_of().is_some(), Self::ORDER), (fine, Self::FINE_SCALES)]
            .into_iter()
            .filter(|(has, _)| *has)
            .fold(Self::NONE, |all, (_, extra)| Self(all.0 | extra.0))
    }

    /// Those that `other` has not.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Each, in words.
    pub fn list(self) -> String {
        self.words(|(_, there, _)| there)
    }

    /// What would be there in place of each, in words.
    pub(crate) fn absent(self) -> String {
        self.words(|(_, _, absent)| absent)
    }

    fn words(self, of: impl Fn(&'static (Extras, &str, &str)) -> &'static str) -> String {
        let mine = Self::NAMES.iter().filter(|(extra, ..)| self.0 & extra.0 != 0);
        mine.map(of).collect::<Vec<_>>().join(" and ")
    }
}

/// Number formats that a kernel takes together: any of the weights with any of the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    /// Of weights.
    pub weights: Formats<WeightFormat>,
    /// Rows and columns that share a scale.
    pub groups: Formats<[usize; 2]>,
    /// Of rows, as the checkpoint asks for them.
    pub rows: Formats<ActivationFormat>,
    /// What the weights may have beside codes and scales.
    pub extras: Extras,
    /// What the kernel makes of rows that the checkpoint leaves as they are.
    pub itself: Option<ActivationFormat>,
}

impl Scheme {
    /// Everything that can be loaded, rows as the checkpoint says.
    pub const ANY: Scheme = Scheme {
        weights: Formats::All,
        groups: Formats::All,
        rows: Formats::All,
        extras: Extras::ALL,
        itself: None,
    };

    /// The entry of `schemes` that reads `weights` or, where none does, the first.
    pub fn nearest(schemes: &'static [Scheme], weights: WeightFormat) -> Option<&'static Scheme> {
        let reads = |scheme: &&Scheme| scheme.weights.contains(&weights);
        schemes.iter().find(reads).or(schemes.first())
    }

    /// True if all of `product`'s formats are among these.
    pub fn takes(&self, product: &ProductFormat) -> bool {
        self.weights.contains(&product.weights)
            && product.group.is_none_or(|group| self.groups.contains(&group))
            && self.rows.contains(&product.rows)
            && product.extras.without(self.extras) == Extras::NONE
    }
}

/// Where a kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A processor with these features.
    Cpu(Features),
    /// An NVIDIA GPU.
    Cuda(Archs),
}

impl Target {
    /// The kind of device.
    pub fn device(&self) -> Device {
        match self {
            Self::Cpu(_) => Device::Cpu,
            Self::Cuda(_) => Device::Cuda,
        }
    }

    /// What it needs of the processor that it runs on or is launched from.
    pub fn features(&self) -> Features {
        match self {
            Self::Cpu(features) => *features,
            Self::Cuda(_) => Features::NONE,
        }
    }
}

/// NVIDIA's architectures, by compute capability times ten: 90 for sm_90.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Archs {
    /// This one and all newer ones.
    AtLeast(u32),
    /// These alone: code for sm_90a does not run on sm_100.
    Exactly(&'static [u32]),
}

impl Archs {
    /// True if a GPU of this compute capability runs the code.
    pub fn contain(&self, capability: u32) -> bool {
        match self {
            Self::AtLeast(least) => capability >= *least,
            Self::Exactly(archs) => archs.contains(&capability),
        }
    }
}

/// The functions between the products that a kernel computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Functions {
    /// All.
    All,
    /// These, whatever their parameters.
    Only(&'static [Activation]),
}

impl Functions {
    /// True if `function` is among them.
    pub fn contain(&self, function: Activation) -> bool {
        let same =
            |other: &Activation| std::mem::discriminant(other) == std::mem::discriminant(&function);
        match self {
            Self::All => true,
            Self::Only(functions) => functions.iter().any(same),
        }
    }
}

/// How a kernel computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// In float64, rounded to f32 once.
    F64,
    /// Products and sums in f32; nothing is rounded to 16 bits between the layer's ends.
    F32,
    /// The row between the products is rounded to bf16, where it is not quantised; products and sums in
    /// f32.
    Bf16,
    /// Integers are multiplied and added exactly, a group of columns at a time; those sums are scaled and
    /// added in f32.
    Int8,
    /// In f32, every intermediate result stored in the activations' dtype: that rounding is part of
    /// what the kernel computes, and of its distance to the reference.
    Rounded,
}

/// What a kernel can do, as a set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caps(u16);

impl Caps {
    /// Nothing beside the products.
    pub const NONE: Caps = Caps(0);
    /// Takes rows that are quantised already, as codes and scales travel between ranks.
    pub const QUANTISED_ROWS: Caps = Caps(1);
    /// Adds biases after the two products.
    pub const BIASES: Caps = Caps(1 << 1);
    /// Normalises the experts' outputs.
    pub const NORMS: Caps = Caps(1 << 2);
    /// Multiplies its rows by the router's weights, before it rounds them: the combine only adds.
    pub const WEIGHS: Caps = Caps(1 << 3);
    /// Monolithic: routes by itself; takes logits, returns weighted sums.
    pub const ROUTES: Caps = Caps(1 << 4);
    /// Can be captured in a graph of launches.
    pub const CAPTURES: Caps = Caps(1 << 5);
    /// Experts without a gate projection.
    pub const UNGATED: Caps = Caps(1 << 7);
    /// Applies the router's weights to the experts' input, where a layer asks for that.
    pub const INPUT_WEIGHTS: Caps = Caps(1 << 8);
    /// Routes by itself, and is also built for experts alone, where routing and exchanges happen outside:
    /// then it is modular.
    pub const ALONE: Caps = Caps(1 << 9);
    /// What an expert may have beside its products, all of it.
    pub const ALL_EXPERTS: Caps =
        Caps::BIASES.with(Caps::NORMS).with(Caps::UNGATED).with(Caps::INPUT_WEIGHTS);
    /// Chosen only when the user names it: it exists to compare with, not to be fast.
    pub const BY_NAME_ONLY: Caps = Caps(1 << 6);

    /// Those of either set.
    pub const fn with(self, other: Caps) -> Caps {
        Caps(self.0 | other.0)
    }

    /// Those that `other` has not.
    pub const fn without(self, other: Caps) -> Caps {
        Caps(self.0 & !other.0)
    }

    /// True if all of `other` are among them.
    pub const fn has(self, other: Caps) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A kind of device.
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
    /// All but these; and one that is left, for who must name one.
    Except(&'static [F], F),
}

impl<F: PartialEq> Formats<F> {
    /// True if `format` belongs to the set.
    pub fn contains(&self, format: &F) -> bool {
        match self {
            Self::All => true,
            Self::Only(formats) => formats.contains(format),
            Self::Except(formats, _) => !formats.contains(format),
        }
    }
}

impl<F: std::fmt::Display> Formats<F> {
    /// The formats, for people.
    pub fn list(&self) -> String {
        let list = |formats: &[F]| formats.iter().map(F::to_string).collect::<Vec<_>>().join(", ");
        match self {
            Self::All => "any format".into(),
            Self::Only(formats) => list(formats),
            Self::Except(formats, _) => format!("any format but {}", list(formats)),
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
