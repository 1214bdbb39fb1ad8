//! The router's weights as files hold them.

use moe_runner::spec::{LayerSpec, ScaleOn};

/// What turns the router's weights into those that the experts' outputs are multiplied with: the
/// routed scaling factor, where the runner and not the router applies it.
pub(crate) fn weight_factor(spec: &LayerSpec) -> f32 {
    match spec.routed_scale.on {
        ScaleOn::Weights => 1.0,
        ScaleOn::Output => spec.routed_scale.factor,
    }
}
