//! Which kernel runs, why, and why no other.
//!
//! One oracle for all formats. It knows kernels only by their [`KernelDesc`]: the request and the
//! machine go in; the chosen kernel comes out, with *every* failing condition of every other one and
//! what would remove it. A kernel that the user names is used or refused, never replaced.

mod conditions;
mod explain;
mod machine;
mod reason;

pub use conditions::failing_conditions;
pub use explain::{Able, Explanation, Rejected};
pub use machine::Machine;
pub use reason::{Change, Entry, Reason, Rejection};

use crate::experts::{Caps, Device, KernelDesc, ProductFormat, RowFormat};
use crate::hidden::ActivationDtype;
use crate::spec::{Activation, WeightOn};
use crate::weights::LoadedLayer;
use crate::{Error, Result};

/// What a layer needs from a kernel, and what the user asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// The layer's name, for messages.
    pub layer: String,
    /// A kernel by name; `None`: the first that can.
    pub kernel: Option<String>,
    /// A device; `None`: any.
    pub device: Option<Device>,
    /// Dtype of the hidden states.
    pub dtype: ActivationDtype,
    /// Number formats of the routed experts' projections, each once.
    pub products: Vec<ProductFormat>,
    /// The function between the products.
    pub function: Activation,
    /// Width of the experts' rows.
    pub hidden: usize,
    /// Width between the two products, on this rank.
    pub intermediate: usize,
    /// The experts have a gate projection.
    pub gated: bool,
    /// What the router's weights multiply.
    pub weight_on: WeightOn,
    /// The experts have biases.
    pub biases: bool,
    /// The experts' outputs are normalised.
    pub norms: bool,
    /// How the exchange hands over rows.
    pub row_format: RowFormat,
    /// Routing must happen outside the kernel, and why (a replayed routing, a dispatch by expert).
    pub routed_outside: Option<&'static str>,
}

impl Request {
    /// What `layer` needs; automatic choice, on any device, rows in any order.
    pub fn of(layer: &LoadedLayer, dtype: ActivationDtype) -> Self {
        let mut products = Vec::new();
        let matrices = layer.experts.iter().flat_map(|e| e.gate.iter().chain([&e.up, &e.down]));
        for matrix in matrices {
            products.push(ProductFormat::of(matrix));
        }
        products.sort_unstable();
        products.dedup();
        let first = layer.experts.first();
        Self {
            layer: layer.spec.name.clone(),
            kernel: None,
            device: None,
            dtype,
            products,
            function: layer.spec.expert.activation,
            hidden: first.map_or(layer.spec.dims.routed_hidden, |e| e.up.cols()),
            intermediate: first.map_or(layer.spec.dims.intermediate, |e| e.up.rows()),
            gated: layer.spec.expert.gated,
            weight_on: layer.spec.router.weight_on,
            biases: layer.spec.expert.bias,
            norms: layer.spec.expert.norm.is_some(),
            row_format: RowFormat::Standard,
            routed_outside: None,
        }
    }
}

/// The oracle's answer.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The kernel that runs.
    pub kernel: &'static KernelDesc,
    /// Why this one.
    pub why: String,
    /// Kernels that could run too, in order of preference, and why they do not.
    pub able: Vec<(&'static KernelDesc, String)>,
    /// Kernels that cannot run.
    pub rejected: Vec<Rejection>,
}

/// Chooses among `kernels`, which stand in order of preference.
///
/// # Errors
/// [`Error::NoKernel`] with every failing condition: of the named kernel, or of all of them. A name
/// that no kernel has is answered with the list of names.
pub fn select(
    kernels: &[&'static KernelDesc],
    request: &Request,
    machine: &Machine,
) -> Result<Choice> {
    let mut able = Vec::new();
    let mut rejected = Vec::new();
    for kernel in kernels {
        let reasons = failing_conditions(kernel, request, machine);
        if reasons.is_empty() {
            able.push(*kernel);
        } else {
            rejected.push(Rejection { kernel, reasons });
        }
    }
    let (chosen, why) = match &request.kernel {
        Some(name) => (named(kernels, name, &able, &rejected, request)?, "named".to_owned()),
        None => match able.iter().find(|kernel| chosen_unnamed(kernel, request, machine)) {
            Some(kernel) => (*kernel, format!("{} on {}", among(able.len()), machine.name)),
            None => return Err(none_able(request, machine, &able, &rejected)),
        },
    };
    let able = able
        .into_iter()
        .filter(|kernel| kernel.name != chosen.name)
        .map(|kernel| (kernel, why_not(kernel, chosen, request, machine)))
        .collect();
    Ok(Choice { kernel: chosen, why, able, rejected })
}

fn chosen_unnamed(kernel: &KernelDesc, request: &Request, machine: &Machine) -> bool {
    !kernel.caps.has(Caps::BY_NAME_ONLY)
        && kernel.slow_on(machine.features, &request.products).is_none()
}

/// What a choice without a name was made from.
fn among(able: usize) -> String {
    match able {
        1 => "the only one that can run it".into(),
        _ => format!("the preferred one of {able} that can run it"),
    }
}

fn named(
    kernels: &[&'static KernelDesc],
    name: &str,
    able: &[&'static KernelDesc],
    rejected: &[Rejection],
    request: &Request,
) -> Result<&'static KernelDesc> {
    if let Some(kernel) = able.iter().find(|kernel| kernel.name == name) {
        return Ok(kernel);
    }
    if let Some(rejection) = rejected.iter().find(|rejection| rejection.kernel.name == name) {
        return Err(Error::NoKernel(format!("layer '{}': kernel {rejection}", request.layer)));
    }
    let names: Vec<&str> = kernels.iter().map(|kernel| kernel.name).collect();
    Err(Error::NoKernel(format!("no kernel '{name}'; there are: {}", names.join(", "))))
}

fn none_able(
    request: &Request,
    machine: &Machine,
    able: &[&'static KernelDesc],
    rejected: &[Rejection],
) -> Error {
    let mut text = format!("layer '{}': no kernel can run it on {}", request.layer, machine.name);
    for kernel in able {
        text.push_str(&format!("; {}: runs only when named", kernel.name));
    }
    for rejection in rejected {
        text.push_str(&format!("; {rejection}"));
    }
    Error::NoKernel(text)
}

fn why_not(
    kernel: &KernelDesc,
    chosen: &KernelDesc,
    request: &Request,
    machine: &Machine,
) -> String {
    if request.kernel.is_some() {
        format!("could run, but '{}' was named", chosen.name)
    } else if kernel.caps.has(Caps::BY_NAME_ONLY) {
        "could run, but only when named".into()
    } else if let Some(reason) = kernel.slow_on(machine.features, &request.products) {
        format!("could run, but only when named: {reason}")
    } else {
        format!("could run, but '{}' is preferred", chosen.name)
    }
}
