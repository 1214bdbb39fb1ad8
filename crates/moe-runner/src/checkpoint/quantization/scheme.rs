//! How one projection is stored, and how the rows that it multiplies are quantised: plain data.

use std::fmt;

/// What a checkpoint's configuration says about one module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    /// Its weights.
    pub weights: WeightScheme,
    /// The rows that they multiply.
    pub input: InputScheme,
}

impl Scheme {
    /// Neither is quantised.
    pub const FLOAT: Self = Self { weights: WeightScheme::Float, input: InputScheme::None };

    /// Quantised weights, rows as they are.
    pub const fn weights_only(weights: WeightScheme) -> Self {
        Self { weights, input: InputScheme::None }
    }
}

/// How weights `[N, K]` are stored. The table of tensor names is in `weights::quant`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WeightScheme {
    /// As floats.
    Float,
    /// One code of 8 bits for each weight `[N, K]`.
    Codes {
        /// What the codes are.
        number: Number,
        /// Which weights share a scale.
        scales: ScaleShape,
    },
    /// Integers of 4 or 8 bits packed along K into words of 32 bits, as compressed-tensors does.
    Packed {
        /// 4 or 8.
        bits: usize,
        /// Which weights share a scale.
        scales: ScaleShape,
        /// Without zero points.
        symmetric: bool,
    },
    /// FP4 with E4M3 scales of 16 and a scale for the tensor.
    Nvfp4,
    /// An OCP MX format: E8M0 scales of 32.
    Mx(MxElement),
    /// Integers packed along K, K first, as GPTQ does.
    Gptq {
        /// 4 or 8.
        bits: usize,
        /// Weights that share a scale; `None`: all of a row.
        group: Option<usize>,
        /// Without zero points; those that are stored say nothing.
        symmetric: bool,
        /// Stored zero points are one less than meant (the first version of the format).
        zeros_less_one: bool,
    },
    /// 4-bit integers packed along N, K first.
    KFirst {
        /// Weights that share a scale; `None`: all of a row.
        group: Option<usize>,
        /// Without zero points.
        symmetric: bool,
        /// Eight columns lie in a word in the order 0, 2, 4, 6, 1, 3, 5, 7 (AWQ), not in their own.
        interleaved: bool,
        /// Codes are signed (Quark's symmetric integers).
        signed: bool,
    },
    /// 4-bit signed integers, a scale for each row and one for the tensor (Quark's W4A8).
    Int4TwoScales,
    /// MLX's own, in words along K; shapes and dtypes of the tensors decide where they say otherwise.
    Mlx(MlxMode),
}

/// MLX's modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlxMode {
    /// Unsigned integers, for each group a scale and what is added to the weights.
    Affine {
        /// One of [`BITS`](Self::BITS).
        bits: usize,
        /// Weights that share a scale.
        group: usize,
    },
    /// FP4 with powers of two for 32.
    Mxfp4,
    /// FP8 with powers of two for 32.
    Mxfp8,
    /// FP4 with E4M3 scales of 16; a scale for the tensor may be there.
    Nvfp4,
}

impl MlxMode {
    /// What integers may have.
    pub const BITS: [usize; 7] = [1, 2, 3, 4, 5, 6, 8];
}

impl fmt::Display for MlxMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Affine { bits, group } => write!(f, "int{bits}, scale and minimum per {group}"),
            Self::Mxfp4 => f.write_str("mxfp4"),
            Self::Mxfp8 => f.write_str("mxfp8"),
            Self::Nvfp4 => f.write_str("nvfp4"),
        }
    }
}

/// Numbers of 8 bits, or in 8 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// FP8: E4M3 or E5M2, as the tensor's dtype says.
    Fp8,
    /// Signed integers.
    Int8,
    /// Signed integers from −8 to 7, each in a byte.
    Int4,
}

/// Elements of an OCP MX format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MxElement {
    /// E2M1.
    Fp4,
    /// E2M3.
    Fp6E2m3,
    /// E3M2.
    Fp6E3m2,
    /// E4M3.
    Fp8,
}

/// Which weights share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleShape {
    /// All.
    Tensor,
    /// A row.
    Channel,
    /// That many columns of a row.
    Group(usize),
    /// Blocks of rows and columns.
    Block([usize; 2]),
}

/// How rows are quantised before a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum InputScheme {
    /// Not at all.
    None,
    /// FP8 with a stored scale.
    Fp8Static,
    /// FP8 with a scale for each token. Also where the configuration asks for one scale for all
    /// tokens of a batch: see [`ActivationQuant`](crate::weights::ActivationQuant).
    Fp8Token,
    /// FP8 with a scale for each group of a token.
    Fp8Group {
        /// Channels of a group.
        size: usize,
        /// Scales are rounded up to powers of two.
        power_of_two: bool,
    },
    /// INT8 with a stored scale.
    Int8Static,
    /// INT8 with a scale for each token; also for one scale for all tokens of a batch.
    Int8Token,
    /// INT8 with a scale for each group of that many channels of a token.
    Int8Group(usize),
    /// NVFP4 with a stored global scale.
    Nvfp4,
    /// NVFP4 with a global scale for each token.
    Nvfp4Token,
    /// An OCP MX format.
    Mx(MxElement),
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.input {
            InputScheme::None => write!(f, "{}", self.weights),
            input => write!(f, "{}, activations {input}", self.weights),
        }
    }
}

impl fmt::Display for WeightScheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let group = |group: &Option<usize>| match group {
            Some(size) => ScaleShape::Group(*size),
            None => ScaleShape::Channel,
        };
        let zeros = |symmetric: &bool| if *symmetric { "" } else { ", zero points" };
        match self {
            Self::Float => f.write_str("float"),
            Self::Codes { number, scales } => write!(f, "{number}, scale per {scales}"),
            Self::Packed { bits, scales, symmetric } => {
                write!(f, "int{bits}, scale per {scales}{}", zeros(symmetric))
            }
            Self::Nvfp4 => f.write_str("nvfp4"),
            Self::Mx(element) => write!(f, "{element}"),
            Self::Gptq { bits, group: g, symmetric, .. } => {
                write!(f, "int{bits}, scale per {}{} (GPTQ)", group(g), zeros(symmetric))
            }
            Self::KFirst { group: g, symmetric, .. } => {
                write!(f, "int4, scale per {}{} (K first)", group(g), zeros(symmetric))
            }
            Self::Int4TwoScales => f.write_str("int4, scale per channel and tensor"),
            Self::Mlx(mode) => write!(f, "{mode} (MLX)"),
        }
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        })
    }
}

impl fmt::Display for MxElement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fp4 => "mxfp4",
            Self::Fp6E2m3 => "mxfp6 e2m3",
            Self::Fp6E3m2 => "mxfp6 e3m2",
            Self::Fp8 => "mxfp8",
        })
    }
}

impl fmt::Display for ScaleShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tensor => f.write_str("tensor"),
            Self::Channel => f.write_str("channel"),
            Self::Group(size) => write!(f, "group of {size}"),
            Self::Block([rows, cols]) => write!(f, "block of {rows}x{cols}"),
        }
    }
}

impl fmt::Display for InputScheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("not quantised"),
            Self::Fp8Static => f.write_str("fp8, stored scale"),
            Self::Fp8Token => f.write_str("fp8, scale per token"),
            Self::Fp8Group { size, power_of_two: false } => write!(f, "fp8, scale per {size}"),
            Self::Fp8Group { size, power_of_two: true } => {
                write!(f, "fp8, scale per {size}, a power of two")
            }
            Self::Int8Static => f.write_str("int8, stored scale"),
            Self::Int8Token => f.write_str("int8, scale per token"),
            Self::Int8Group(size) => write!(f, "int8, scale per {size}"),
            Self::Nvfp4 => f.write_str("nvfp4, stored global scale"),
            Self::Nvfp4Token => f.write_str("nvfp4, global scale per token"),
            Self::Mx(element) => write!(f, "{element}"),
        }
    }
}
