//! Why a kernel cannot run, and what would change that.

use std::fmt;

use moe_kernels::isa::Isa;

use super::Request;
use super::machine::{Machine, gpu_name};
use crate::experts::{Device, Formats, KernelDesc, RowFormat};
use crate::hidden::ActivationDtype;
use crate::spec::{ActivationFormat, WeightFormat};

/// One condition that a kernel fails, and the smallest change that would remove it.
#[derive(Clone, Debug, PartialEq, Eq)]
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Ask for another device.
    Device(Device),
    /// A processor with this instruction set.
    Processor(Isa),
    /// An NVIDIA GPU of at least this compute capability, ten times; 0: any.
    Gpu(u32),
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
        /// Those that it takes.
        to: Formats<ActivationFormat>,
    },
    /// Hidden states of one of these dtypes.
    Dtype(&'static [ActivationDtype]),
    /// Another width of the experts' rows: the next larger one that fits.
    Hidden(usize),
    /// Another width between the two products.
    Intermediate(usize),
    /// Experts without biases.
    WithoutBiases,
    /// Experts whose outputs are not normalised.
    WithoutNorms,
    /// An exchange that hands over rows in one of these ways.
    Rows(&'static [RowFormat]),
    /// A run in which nothing else needs to know the routing beforehand.
    RoutingInside,
}

impl Change {
    /// Makes the change.
    pub fn apply(&self, request: &mut Request, machine: &mut Machine) {
        match *self {
            Self::Device(device) => request.device = Some(device),
            Self::Processor(isa) => machine.isas.push(isa),
            Self::Gpu(capability) => {
                machine.compute_capability = machine.compute_capability.max(Some(capability));
            }
            Self::Weights { from, to } => replace(&mut request.weights, from, to),
            Self::Activations { from, to } => replace(&mut request.activations, from, to),
            Self::Dtype(dtypes) => request.dtype = dtypes.first().copied().unwrap_or(request.dtype),
            Self::Hidden(size) => request.hidden = size,
            Self::Intermediate(size) => request.intermediate = size,
            Self::WithoutBiases => request.biases = false,
            Self::WithoutNorms => request.norms = false,
            Self::Rows(formats) => {
                request.row_format = formats.first().copied().unwrap_or(request.row_format);
            }
            Self::RoutingInside => request.routed_outside = None,
        }
    }
}

fn replace<F: Copy + PartialEq>(formats: &mut [F], from: F, to: Formats<F>) {
    if let Formats::Only(&[first, ..]) = to {
        formats.iter_mut().filter(|format| **format == from).for_each(|format| *format = first);
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(device) => write!(f, "--device {}", device.name()),
            Self::Processor(isa) => write!(f, "a processor with {}", isa.name()),
            Self::Gpu(0) => f.write_str("a machine with an NVIDIA GPU and its driver"),
            Self::Gpu(capability) => {
                write!(f, "an NVIDIA GPU of {} or newer", gpu_name(*capability))
            }
            Self::Weights { to, .. } => write!(f, "a checkpoint in {}", to.list()),
            Self::Activations { to, .. } => {
                write!(f, "a checkpoint with activations as {}", to.list())
            }
            Self::Dtype(dtypes) => {
                let names: Vec<&str> = dtypes.iter().map(|dtype| dtype.name()).collect();
                write!(f, "--dtype {}", names.join(" or "))
            }
            Self::Hidden(size) => write!(f, "a hidden size of {size}"),
            Self::Intermediate(size) => write!(f, "an intermediate size of {size}"),
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
