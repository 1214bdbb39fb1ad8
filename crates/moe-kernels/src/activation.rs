//! The functions between an expert's two products, with their parameters, and their formulas in
//! float64. [`kernel`](crate::kernel) computes them on vectors.

/// The function between the two products. `g` is the gate projection, `u` the up projection;
/// without a gate projection the function is applied to `u` alone.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Activation {
    /// `g·σ(g) · u`
    Silu,
    /// `g/2·(1+erf(g/√2)) · u`
    Gelu,
    /// `g/2·(1+tanh(√(2/π)·(g+0.044715·g³))) · u`
    GeluTanh,
    /// `max(g,0) · u`
    Relu,
    /// `max(g,0)² · u`
    Relu2,
    /// `g' = min(g,limit)`, `u' = clamp(u,±limit)`: `g'·σ(alpha·g') · (u'+beta)`.
    /// gpt-oss: 1.702, 1, 7. Clamped SiLU: 1, 0, limit.
    ClampedSwiglu {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// Added to the up projection.
        beta: f32,
        /// Clamps both projections before the function.
        limit: f32,
    },
    /// `min(g·σ(g), limit) · clamp(u,±limit)`: clamped after the SiLU (step3).
    SwigluStep {
        /// Clamps SiLU's result and the up projection.
        limit: f32,
    },
    /// `β·tanh(g/β)·σ(g) · λ·tanh(u/λ)`; λ absent: `· u`.
    Situ {
        /// β, positive.
        beta: f32,
        /// λ, positive.
        lambda: Option<f32>,
    },
}

impl Activation {
    /// The gated form, `act(g) · u`, in float64.
    pub fn gated(self, g: f64, u: f64) -> f64 {
        match self {
            Self::ClampedSwiglu { alpha, beta, limit } => {
                let limit = f64::from(limit);
                let (g, u) = (at_most(g, limit), clamp(u, limit));
                g * sigmoid(f64::from(alpha) * g) * (u + f64::from(beta))
            }
            Self::SwigluStep { limit } => {
                let limit = f64::from(limit);
                self.plain(g) * clamp(u, limit)
            }
            Self::Situ { lambda: Some(lambda), .. } => {
                let lambda = f64::from(lambda);
                self.plain(g) * (lambda * (u / lambda).tanh())
            }
            _ => self.plain(g) * u,
        }
    }

    /// The form without an up projection, `act(x)`, in float64.
    pub fn plain(self, x: f64) -> f64 {
        match self {
            Self::Silu => x * sigmoid(x),
            Self::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
            Self::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                0.5 * x * (1.0 + inner.tanh())
            }
            Self::Relu => at_least(x, 0.0),
            Self::Relu2 => at_least(x, 0.0).powi(2),
            Self::ClampedSwiglu { alpha, limit, .. } => {
                let x = at_most(x, f64::from(limit));
                x * sigmoid(f64::from(alpha) * x)
            }
            Self::SwigluStep { limit } => at_most(x * sigmoid(x), f64::from(limit)),
            Self::Situ { beta, .. } => {
                let beta = f64::from(beta);
                beta * (x / beta).tanh() * sigmoid(x)
            }
        }
    }
}

// `f64::min`, `max` and `clamp` drop a NaN (or panic on a limit that is one). Here it stays: a bad
// number must reach the output.

fn at_most(x: f64, limit: f64) -> f64 {
    if x > limit { limit } else { x }
}

fn at_least(x: f64, limit: f64) -> f64 {
    if x < limit { limit } else { x }
}

fn clamp(x: f64, limit: f64) -> f64 {
    at_least(at_most(x, limit), -limit)
}

/// `1 / (1 + e^-x)`, without overflow for any x.
pub fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

/// The error function, to double precision: Maclaurin series for small |x|, and the continued
/// fraction of erfc (Abramowitz & Stegun 7.1.14, evaluated by Lentz's method) beyond.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a.is_nan() {
        return x;
    }
    if a > 6.0 {
        return x.signum();
    }
    if a < 2.5 {
        // 2/√π · Σ (-1)^n x^(2n+1) / (n!·(2n+1))
        let (mut term, mut sum, x2) = (x, x, x * x);
        for n in 1..100 {
            term *= -x2 / n as f64;
            let add = term / (2 * n + 1) as f64;
            sum += add;
            if add.abs() < 1e-17 * sum.abs() {
                break;
            }
        }
        return sum * std::f64::consts::FRAC_2_SQRT_PI;
    }
    // erfc(a) = exp(-a²)/√π · 1/(a + (1/2)/(a + (2/2)/(a + (3/2)/(a + …))))
    let mut fraction = a;
    for n in (1..=120).rev() {
        fraction = a + 0.5 * n as f64 / fraction;
    }
    let erfc = (-a * a).exp() / (std::f64::consts::PI.sqrt() * fraction);
    (1.0 - erfc).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of Wolfram's tables to 15 digits.
    #[test]
    fn erf_matches_tables() {
        for (x, want) in [
            (0.0, 0.0),
            (0.1, 0.1124629160182849),
            (0.5, 0.5204998778130465),
            (1.0, 0.8427007929497149),
            (2.0, 0.9953222650189527),
            (2.5, 0.999593047982555),
            (3.0, 0.9999779095030014),
            (5.0, 0.9999999999984625),
        ] {
            assert!((erf(x) - want).abs() < 2e-15, "erf({x}) = {}", erf(x));
            assert_eq!(erf(-x), -erf(x));
        }
    }

    #[test]
    fn hand_computed_activations() {
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a} is not {b}");
        close(Activation::Silu.gated(1.0, 2.0), 2.0 * 0.731058578630);
        close(Activation::Gelu.plain(1.0), 0.841344746068);
        close(Activation::GeluTanh.plain(1.0), 0.841191990608);
        close(Activation::Relu.plain(-1.0), 0.0);
        close(Activation::Relu2.plain(-3.0), 0.0);
        close(Activation::Relu2.plain(3.0), 9.0);
        // gate clamped above only, up clamped on both sides and shifted by one
        let oai = Activation::ClampedSwiglu { alpha: 1.702, beta: 1.0, limit: 7.0 };
        close(oai.gated(100.0, -100.0), 7.0 * sigmoid(1.702 * 7.0) * -6.0);
        close(oai.gated(-100.0, 0.0), -100.0 * sigmoid(-170.2));
        let step = Activation::SwigluStep { limit: 7.0 };
        close(step.gated(100.0, 9.0), 49.0);
        let situ = Activation::Situ { beta: 4.0, lambda: Some(25.0) };
        close(situ.gated(2.0, 50.0), 4.0 * 0.5f64.tanh() * sigmoid(2.0) * 25.0 * 2.0f64.tanh());
        let open = Activation::Situ { beta: 4.0, lambda: None };
        close(open.gated(2.0, 50.0), 4.0 * 0.5f64.tanh() * sigmoid(2.0) * 50.0);
    }

    #[test]
    fn nan_reaches_the_output_of_every_activation() {
        for activation in [
            Activation::Silu,
            Activation::Gelu,
            Activation::GeluTanh,
            Activation::Relu,
            Activation::Relu2,
            Activation::ClampedSwiglu { alpha: 1.702, beta: 1.0, limit: 7.0 },
            Activation::SwigluStep { limit: 7.0 },
            Activation::Situ { beta: 4.0, lambda: Some(25.0) },
            Activation::Situ { beta: 4.0, lambda: None },
        ] {
            assert!(activation.plain(f64::NAN).is_nan(), "{activation:?}");
            assert!(activation.gated(f64::NAN, 1.0).is_nan(), "{activation:?}: gate");
            assert!(activation.gated(1.0, f64::NAN).is_nan(), "{activation:?}: up");
        }
    }
}
