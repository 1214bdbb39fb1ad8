//! Every condition of a kernel: the one place where a description meets a request and a machine.

use super::machine::{Machine, gpu_name};
use super::{Change, Reason, Request};
use crate::experts::{Device, KernelDesc};

/// Every condition of `kernel` that `request` on `machine` does not meet.
pub fn failing_conditions(
    kernel: &KernelDesc,
    request: &Request,
    machine: &Machine,
) -> Vec<Reason> {
    let mut reasons = Vec::new();
    let mut fail = |what: String, fix: Change| reasons.push(Reason { what, fix });
    if let Some(device) = request.device
        && device != kernel.device
    {
        fail(
            format!("runs on {}, {} was asked for", kernel.device.name(), device.name()),
            Change::Device(kernel.device),
        );
    }
    if !machine.isas.contains(&kernel.isa) {
        fail(
            format!("needs {}, which {} does not have", kernel.isa.name(), machine.name),
            Change::Processor(kernel.isa),
        );
    }
    if kernel.device == Device::Cuda {
        let needed = kernel.compute_capability;
        match machine.compute_capability {
            None => fail(
                format!("needs an NVIDIA GPU, which {} does not have", machine.name),
                Change::Gpu(needed),
            ),
            Some(has) if has < needed => fail(
                format!(
                    "needs an NVIDIA GPU of {}; {} has {}",
                    gpu_name(needed),
                    machine.name,
                    gpu_name(has)
                ),
                Change::Gpu(needed),
            ),
            Some(_) => {}
        }
    }
    for format in request.weights.iter().filter(|format| !kernel.weights.contains(format)) {
        fail(
            format!("cannot read {format} weights"),
            Change::Weights { from: *format, to: kernel.weights },
        );
    }
    for format in request.activations.iter().filter(|f| !kernel.activations.contains(f)) {
        fail(
            format!("does not take activations as {format}"),
            Change::Activations { from: *format, to: kernel.activations },
        );
    }
    if !kernel.dtypes.contains(&request.dtype) {
        fail(
            format!("does not take {} hidden states", request.dtype.name()),
            Change::Dtype(kernel.dtypes),
        );
    }
    let sizes = [
        ("hidden", request.hidden, kernel.multiples.0, Change::Hidden as fn(usize) -> Change),
        ("intermediate", request.intermediate, kernel.multiples.1, Change::Intermediate),
    ];
    for (what, size, multiple, change) in sizes {
        if multiple > 1 && !size.is_multiple_of(multiple) {
            fail(
                format!("needs a {what} size in multiples of {multiple}; it is {size}"),
                change(size.next_multiple_of(multiple)),
            );
        }
    }
    if request.biases && !kernel.biases {
        fail("adds no biases to the experts' products".into(), Change::WithoutBiases);
    }
    if request.norms && !kernel.norms {
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
        && kernel.monolithic
    {
        fail(
            format!("routes by itself, but routing must happen outside: {why}"),
            Change::RoutingInside,
        );
    }
    reasons
}
