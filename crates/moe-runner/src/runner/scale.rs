//! `routed_scaling_factor`: one owner, one total function.

use crate::hidden::ActivationDtype;
use crate::spec::{RoutedScale, ScaleOn};

/// What the factor multiplies in one forward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scaling {
    /// Multiplies the routed sum.
    pub routed: f32,
    /// Multiplies the shared output.
    pub shared: f32,
    /// The true output is the returned one times this: the decoder compensates for it.
    pub output: f32,
}

/// Where the factor goes.
///
/// With f16, `f · routed` can exceed the largest finite value where the model's own arithmetic
/// would not, so the layer returns `routed + shared / f`, its true output divided by f, and says so
/// (`output` is f). Without shared experts nothing would compensate: the routed sum really is
/// multiplied. `may_divide`: whoever reads the output multiplies it, and nothing but a factor is applied
/// after the sum; a bias or a norm there needs the true value, so the factor is then applied at once.
pub fn scaling(
    scale: RoutedScale,
    dtype: ActivationDtype,
    shared: bool,
    may_divide: bool,
) -> Scaling {
    let f = scale.factor;
    if scale.on == ScaleOn::Weights || f == 1.0 {
        return Scaling { routed: 1.0, shared: 1.0, output: 1.0 };
    }
    // a factor of zero cannot be divided by, and cannot overflow
    if dtype == ActivationDtype::F16 && shared && may_divide && f != 0.0 {
        return Scaling { routed: 1.0, shared: 1.0 / f, output: f };
    }
    Scaling { routed: f, shared: 1.0, output: 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ActivationDtype::{Bf16, F16, F32};

    /// The factor reaches the routed part exactly once, whatever the dtype, with shared experts or
    /// without: `output · (routed · r + shared · s)` is `f·r + s`.
    #[test]
    fn the_factor_is_applied_exactly_once() {
        for dtype in [F32, Bf16, F16] {
            for shared in [false, true] {
                for may_divide in [false, true] {
                    for factor in [1.0, 2.5, 16.0, 0.0] {
                        let scale = RoutedScale { factor, on: ScaleOn::Output };
                        let s = scaling(scale, dtype, shared, may_divide);
                        assert_eq!(s.output * s.routed, factor, "{dtype:?} {shared} {may_divide}");
                        assert!(may_divide || s.output == 1.0);
                        assert!((s.output * s.shared - 1.0).abs() < 1e-6);
                        let by_router = RoutedScale { factor, on: ScaleOn::Weights };
                        let s = scaling(by_router, dtype, shared, may_divide);
                        assert_eq!((s.routed, s.shared, s.output), (1.0, 1.0, 1.0));
                    }
                }
            }
        }
    }

    #[test]
    fn f16_with_shared_experts_returns_the_output_divided() {
        let scale = RoutedScale { factor: 16.0, on: ScaleOn::Output };
        assert_eq!(
            scaling(scale, F16, true, true),
            Scaling { routed: 1.0, shared: 1.0 / 16.0, output: 16.0 }
        );
        // nothing compensates without shared experts: the routed sum is multiplied
        assert_eq!(
            scaling(scale, F16, false, true),
            Scaling { routed: 16.0, shared: 1.0, output: 1.0 }
        );
    }
}
