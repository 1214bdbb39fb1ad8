//! Why a kernel cannot run, and what would change that.

use std::fmt;

use moe_kernels::isa::Features;

use super::Request;
use super::machine::{Machine, archs_name, features_name};
use crate::experts::{
    Archs, Device, Extras, Formats, Functions, KernelDesc, ProductFormat, RowFormat, Scheme,
};
use crate::hidden::ActivationDtype;
use crate::spec::{ActivationFormat, WeightFormat, WeightOn};

/// One condition that a kernel fails, and the smallest change that would remove it.
#[derive(Clone, Debug, PartialEq)]
pub struct Reason {
    /// The condition, with what is needed and what is there.
    pub what: String,
    /// The change.
    pub fix: Change,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.what, self.fix)
    }
}

/// A kernel that cannot run, with every condition that it fails.
#[derive(Clone, Debug)]
pub struct Rejection {
    /// The kernel.
    pub kernel: &'static KernelDesc,
    /// All failing conditions; never empty.
    pub reasons: Vec<Reason>,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.kernel.name)?;
        for (i, reason) in self.reasons.iter().enumerate() {
            write!(f, "{}{reason}", if i == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

/// A change of the request or of the machine that removes one [`Reason`], and brings no other.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Ask for another device.
    Device(Device),
    /// A processor with these features.
    Processor(Features),
    /// An NVIDIA GPU of one of these architectures.
    Gpu(Archs),
    /// Weights stored in another format.
    Weights {
        /// The format that the kernel does not read.
        from: WeightFormat,
        /// Those that it reads.
        to: Formats<WeightFormat>,
    },
    /// Activations quantised in another way.
    Activations {
        /// The way that the kernel does not take.
        from: ActivationFormat,
        /// The entry that says which ones it takes.
        of: Entry,
    },
    /// Scales for other blocks of weights.
    Groups {
        /// Rows and columns that the kernel does not read.
        from: [usize; 2],
        /// The entry that says which ones it reads.
        of: Entry,
    },
    /// Weights without these beside codes and scales.
    Extras {
        /// What the kernel does not read.
        from: Extras,
        /// The entry that says what it reads.
        of: Entry,
    },
    /// One of these functions between the products.
    Function(Functions),
    /// Hidden states of one of these dtypes.
    Dtype(&'static [ActivationDtype]),
    /// Another width of the experts' rows: the next larger one that fits.
    Hidden(usize),
    /// Another width between the two products.
    Intermediate(usize),
    /// Experts with a gate projection.
    Gated,
    /// Weights that multiply the experts' output.
    OutputWeights,
    /// Experts without biases.
    WithoutBiases,
    /// Experts whose outputs are not normalised.
    WithoutNorms,
    /// An exchange that hands over rows in one of these ways.
    Rows(&'static [RowFormat]),
    /// A run in which nothing else needs to know the routing beforehand.
    RoutingInside,
}

/// An entry of a kernel's schemes, among the others: it speaks for the projections whose weights it
/// reads, or is the nearest to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The entry.
    pub scheme: &'static Scheme,
    /// All of the kernel's.
    pub among: &'static [Scheme],
}

impl Entry {
    fn products(self, request: &mut Request) -> impl Iterator<Item = &mut ProductFormat> {
        let mine = move |product: &&mut ProductFormat| {
            Scheme::nearest(self.among, product.weights) == Some(self.scheme)
        };
        request.products.iter_mut().filter(mine)
    }
}

impl Change {
    /// Makes the change.
    pub fn apply(&self, request: &mut Request, machine: &mut Machine) {
        match *self {
            Self::Device(device) => request.device = Some(device),
            Self::Processor(features) => machine.features = machine.features.with(features),
            Self::Gpu(archs) => {
                machine.compute_capability = match archs {
                    Archs::AtLeast(least) => machine.compute_capability.max(Some(least)),
                    Archs::Exactly(archs) => archs.first().copied(),
                };
            }
            Self::Weights { from, to } => {
                replace(request.products.iter_mut().map(|product| &mut product.weights), from, to);
            }
            Self::Activations { from, of } => {
                replace(of.products(request).map(|p| &mut p.rows), from, of.scheme.rows);
            }
            Self::Groups { from, of } => {
                let groups = of.products(request).filter_map(|p| p.group.as_mut());
                replace(groups, from, of.scheme.groups);
            }
            Self::Extras { from, of } => {
                of.products(request).for_each(|p| p.extras = p.extras.without(from));
            }
            Self::Function(functions) => {
                if let Functions::Only(&[first, ..]) = functions {
                    request.function = first;
                }
            }
            Self::Dtype(dtypes) => request.dtype = dtypes.first().copied().unwrap_or(request.dtype),
            Self::Hidden(size) => request.hidden = size,
            Self::Intermediate(size) => request.intermediate = size,
            Self::Gated => request.gated = true,
            Self::OutputWeights => request.weight_on = WeightOn::Output,
            Self::WithoutBiases => request.biases = false,
            Self::WithoutNorms => request.norms = false,
            Self::Rows(formats) => {
                request.row_format = formats.first().copied().unwrap_or(request.row_format);
            }
            Self::RoutingInside => request.routed_outside = None,
        }
    }
}

fn replace<'a, F: Copy + PartialEq + 'a>(
    formats: impl Iterator<Item = &'a mut F>,
    from: F,
    to: Formats<F>,
) {
    if let Formats::Only(&[one, ..]) | Formats::Except(_, one) = to {
        formats.filter(|format| **format == from).for_each(|format| *format = one);
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(device) => write!(f, "the device {}", device.name()),
            Self::Processor(features) => {
                write!(f, "a processor with {}", features_name(*features))?;
                match features.contains(Features::AMX_BF16) {
                    true => f.write_str(" and a system that lets this process use its tiles"),
                    false => Ok(()),
                }
            }
            Self::Gpu(Archs::AtLeast(0)) => {
                f.write_str("a machine with an NVIDIA GPU and its driver")
            }
            Self::Gpu(archs @ Archs::AtLeast(_)) => {
                write!(f, "an NVIDIA GPU of {} or newer", archs_name(*archs))
            }
            Self::Gpu(archs) => write!(f, "an NVIDIA GPU of {}", archs_name(*archs)),
            Self::Groups { of, .. } => {
                let list = |groups: &[[usize; 2]]| {
                    let each = groups.iter().map(|[rows, cols]| format!("{rows} × {cols}"));
                    each.collect::<Vec<_>>().join(" or ")
                };
                match of.scheme.groups {
                    Formats::All => f.write_str("a checkpoint with any scales"),
                    Formats::Only(groups) => {
                        write!(f, "a checkpoint with a scale for each {}", list(groups))
                    }
                    Formats::Except(groups, _) => {
                        write!(f, "a checkpoint with no scale for each {}", list(groups))
                    }
                }
            }
            Self::Extras { from, .. } => write!(f, "a checkpoint with {}", from.absent()),
            Self::Function(Functions::All) => f.write_str("any function"),
            Self::Function(Functions::Only(functions)) => {
                let names: Vec<String> = functions.iter().map(|f| format!("{f:?}")).collect();
                write!(f, "experts with {}", names.join(" or "))
            }
            Self::Weights { to, .. } => write!(f, "a checkpoint in {}", to.list()),
            Self::Activations { of, .. } => {
                write!(f, "a checkpoint with activations as {}", of.scheme.rows.list())
            }
            Self::Dtype(dtypes) => {
                let names: Vec<&str> = dtypes.iter().map(|dtype| dtype.name()).collect();
                write!(f, "hidden states in {}", names.join(" or "))
            }
            Self::Hidden(size) => write!(f, "a hidden size of {size}"),
            Self::Intermediate(size) => write!(f, "an intermediate size of {size}"),
            Self::Gated => f.write_str("experts with one"),
            Self::OutputWeights => f.write_str("a layer that weighs their output"),
            Self::WithoutBiases => f.write_str("experts without biases"),
            Self::WithoutNorms => f.write_str("experts without a norm"),
            Self::Rows(formats) => {
                let names: Vec<&str> = formats.iter().map(|format| format.name()).collect();
                write!(f, "an exchange that delivers {} rows", names.join(" or "))
            }
            Self::RoutingInside => f.write_str("a run without that"),
        }
    }
}
