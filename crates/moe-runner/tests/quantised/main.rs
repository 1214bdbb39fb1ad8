//! Quantised checkpoints: what is loaded, against recorded outputs, hand-computed matrices and
//! independent decoders.

#[path = "../layers/mod.rs"]
mod layers;

mod broken;
mod configs;
mod formats;
mod golden;
mod mlx;
mod models;
mod schemes;
mod stacks;

use moe_runner::experts::{Arithmetic, KERNELS, KernelDesc};
use moe_runner::hidden::ActivationDtype::{Bf16, F32};
use moe_runner::oracle::{Machine, Request, failing_conditions};
use moe_runner::weights::LoadedLayer;

/// Kernels that can run `layer` on this machine: the float ones and the reference always can.
fn kernels(layer: &LoadedLayer) -> Vec<&'static str> {
    let (machine, request) = (Machine::detect(), Request::of(layer, F32));
    let able = KERNELS.iter().filter(|k| failing_conditions(k, &request, &machine).is_empty());
    let names: Vec<&str> = able.map(|kernel| kernel.name).collect();
    assert!(["cpu_portable", "reference"].iter().all(|name| names.contains(name)), "{names:?}");
    names
}

/// Kernels that multiply `layer` in 16 bits on this machine.
fn sixteen_bit_kernels(layer: &LoadedLayer) -> Vec<&'static KernelDesc> {
    let (machine, request) = (Machine::detect(), Request::of(layer, Bf16));
    let able = KERNELS.iter().filter(|k| failing_conditions(k, &request, &machine).is_empty());
    able.copied().filter(|kernel| kernel.arithmetic == Arithmetic::Bf16).collect()
}
