//! Every condition of a kernel: the one place where a description meets a request and a machine.

use super::machine::{Machine, archs_name, features_name, gpu_name};
use super::{Change, Entry, Reason, Request};
use crate::experts::{Caps, Extras, KernelDesc, ProductFormat, Scheme, Target};
use crate::spec::WeightOn;

/// Every condition of `kernel` that `request` on `machine` does not meet.
pub fn failing_conditions(
    kernel: &KernelDesc,
    request: &Request,
    machine: &Machine,
) -> Vec<Reason> {
    let mut reasons = Vec::new();
    let mut fail = |what: String, fix: Change| reasons.push(Reason { what, fix });
    let device_of = kernel.target.device();
    if let Some(device) = request.device
        && device != device_of
    {
        fail(
            format!("runs on {}, {} was asked for", device_of.name(), device.name()),
            Change::Device(device_of),
        );
    }
    let needs = kernel.target.features();
    if !machine.features.contains(needs) {
        fail(
            format!("needs {}, which {} does not have", features_name(needs), machine.name),
            Change::Processor(needs),
        );
    }
    if let Target::Cuda(archs) = kernel.target {
        match machine.compute_capability {
            None => {
                let why = machine.without_gpu.as_ref();
                let why = why.map_or_else(String::new, |reason| format!(": {reason}"));
                fail(
                    format!("needs an NVIDIA GPU, which {} does not have{why}", machine.name),
                    Change::Gpu(archs),
                );
            }
            Some(has) if !archs.contain(has) => fail(
                format!(
                    "needs an NVIDIA GPU of {}; {} has {}",
                    archs_name(archs),
                    machine.name,
                    gpu_name(has)
                ),
                Change::Gpu(archs),
            ),
            Some(_) => {}
        }
    }
    let mut formats = Vec::new();
    for product in &request.products {
        formats.extend(product_reasons(kernel, product));
    }
    // weights first; what several projections have in common is told once
    formats.sort_by_key(|reason| matches!(reason.fix, Change::Activations { .. }));
    for (i, reason) in formats.iter().enumerate() {
        if !formats[..i].contains(reason) {
            fail(reason.what.clone(), reason.fix.clone());
        }
    }
    if !kernel.functions.contain(request.function) {
        fail(
            format!("does not compute {:?} between the products", request.function),
            Change::Function(kernel.functions),
        );
    }
    if !kernel.dtypes.contains(&request.dtype) {
        fail(
            format!("does not take {} hidden states", request.dtype.name()),
            Change::Dtype(kernel.dtypes),
        );
    }
    let sizes = [
        ("a hidden", request.hidden, kernel.multiples.0, Change::Hidden as fn(usize) -> Change),
        ("an intermediate", request.intermediate, kernel.multiples.1, Change::Intermediate),
    ];
    for (what, size, multiple, change) in sizes {
        if multiple > 1 && !size.is_multiple_of(multiple) {
            fail(
                format!("needs {what} size in multiples of {multiple}; it is {size}"),
                change(size.next_multiple_of(multiple)),
            );
        }
    }
    if !request.gated && !kernel.caps.has(Caps::UNGATED) {
        fail("computes no experts without a gate projection".into(), Change::Gated);
    }
    if request.weight_on == WeightOn::Input && !kernel.caps.has(Caps::INPUT_WEIGHTS) {
        fail("does not apply weights to the experts' input".into(), Change::OutputWeights);
    }
    if request.biases && !kernel.caps.has(Caps::BIASES) {
        fail("adds no biases to the experts' products".into(), Change::WithoutBiases);
    }
    if request.norms && !kernel.caps.has(Caps::NORMS) {
        fail("does not normalise the experts' outputs".into(), Change::WithoutNorms);
    }
    if !kernel.row_formats.contains(&request.row_format) {
        let takes: Vec<&str> = kernel.row_formats.iter().map(|format| format.name()).collect();
        let (takes, gets) = (takes.join(" or "), request.row_format.name());
        fail(
            format!("takes {takes} rows, the exchange delivers {gets} ones"),
            Change::Rows(kernel.row_formats),
        );
    }
    if let Some(why) = request.routed_outside
        && kernel.caps.has(Caps::ROUTES)
        && !kernel.caps.has(Caps::ALONE)
    {
        fail(
            format!("routes by itself, but routing must happen outside: {why}"),
            Change::RoutingInside,
        );
    }
    reasons
}

/// What `kernel` does not take of `product`: what the entry with its weights does not or, where no
/// entry reads them, the first one.
fn product_reasons(kernel: &KernelDesc, product: &ProductFormat) -> Vec<Reason> {
    let mut reasons = Vec::new();
    let Some(scheme) = Scheme::nearest(kernel.schemes, product.weights) else { return reasons };
    let of = Entry { scheme, among: kernel.schemes };
    if !scheme.weights.contains(&product.weights) {
        reasons.push(Reason {
            what: format!("cannot read {} weights", product.weights),
            fix: Change::Weights { from: product.weights, to: scheme.weights },
        });
    }
    if let Some(group) = product.group
        && !scheme.groups.contains(&group)
    {
        reasons.push(Reason {
            what: format!("reads no weights of which {} × {} share a scale", group[0], group[1]),
            fix: Change::Groups { from: group, of },
        });
    }
    let extras = product.extras.without(scheme.extras);
    if extras != Extras::NONE {
        reasons.push(Reason {
            what: format!("reads no weights with {}", extras.list()),
            fix: Change::Extras { from: extras, of },
        });
    }
    if !scheme.rows.contains(&product.rows) {
        reasons.push(Reason {
            what: format!("does not take activations as {}", product.rows),
            fix: Change::Activations { from: product.rows, of },
        });
    }
    reasons
}
