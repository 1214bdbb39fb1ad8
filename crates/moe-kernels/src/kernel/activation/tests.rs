//! Every activation against its formula in float64, over the whole range of f32.

use super::*;
use crate::isa::Cpu;
use crate::kernel::Kernel;

const ALL: [Activation; 10] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::Relu2,
    Activation::ClampedSwiglu { alpha: 1.702, beta: 1.0, limit: 7.0 },
    Activation::ClampedSwiglu { alpha: 1.0, beta: 0.0, limit: 10.0 },
    Activation::SwigluStep { limit: 7.0 },
    Activation::Situ { beta: 4.0, lambda: Some(25.0) },
    Activation::Situ { beta: 4.0, lambda: None },
];

/// `e^x / (1 + e^x)` in the form that keeps the digits of small results.
fn logistic(x: f64) -> f64 {
    if x < 0.0 { x.exp() / (1.0 + x.exp()) } else { 1.0 / (1.0 + (-x).exp()) }
}

/// erfc for any z: `1 - erf` by the Maclaurin series up to 2.5, a continued fraction beyond.
fn erfc(z: f64) -> f64 {
    if z < 0.0 {
        return 2.0 - erfc(-z);
    }
    if z < 2.5 {
        let (mut term, mut sum) = (z, z);
        for n in 1..80 {
            term *= -z * z / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return 1.0 - sum * std::f64::consts::FRAC_2_SQRT_PI;
    }
    let fraction = (1..=120).rev().fold(z, |fraction, n| z + 0.5 * f64::from(n) / fraction);
    (-z * z).exp() / (std::f64::consts::PI.sqrt() * fraction)
}

/// NaN wins, unlike in `f64::min`.
fn min(a: f64, b: f64) -> f64 {
    if a.is_nan() { a } else { a.min(b) }
}

fn max(a: f64, b: f64) -> f64 {
    if a.is_nan() { a } else { a.max(b) }
}

/// The formulas as the documentation of [`Activation`] states them.
fn formula(activation: Activation, g: f64, u: Option<f64>) -> f64 {
    let (of_gate, of_up) = match activation {
        Activation::Silu => (g * logistic(g), u),
        Activation::Gelu => (g / 2.0 * erfc(-g / 2f64.sqrt()), u),
        Activation::GeluTanh => {
            let z = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
            (g * logistic(2.0 * z), u)
        }
        Activation::Relu => (max(g, 0.0), u),
        Activation::Relu2 => (max(g, 0.0).powi(2), u),
        Activation::ClampedSwiglu { alpha, beta, limit } => {
            let (alpha, beta, limit) = (f64::from(alpha), f64::from(beta), f64::from(limit));
            let g = min(g, limit);
            (g * logistic(alpha * g), u.map(|u| u.clamp(-limit, limit) + beta))
        }
        Activation::SwigluStep { limit } => {
            let limit = f64::from(limit);
            (min(g * logistic(g), limit), u.map(|u| u.clamp(-limit, limit)))
        }
        Activation::Situ { beta, lambda } => {
            let beta = f64::from(beta);
            let of_up = lambda.map(f64::from).map_or(u, |l| u.map(|u| l * (u / l).tanh()));
            (beta * (g / beta).tanh() * logistic(g), of_up)
        }
    };
    of_gate * of_up.unwrap_or(1.0)
}

/// Ordinary values densely, then every magnitude of either sign, and the special ones.
fn inputs() -> Vec<f32> {
    let mut values: Vec<f32> = (-4000..=4000).map(|i| i as f32 * 0.0317).collect();
    for exponent in -149..128 {
        for mantissa in [1.0, 1.37, 1.9] {
            let value = (mantissa * 2f64.powi(exponent)) as f32;
            values.extend([value, -value]);
        }
    }
    values.extend([0.0, -0.0, 1e30, -1e30, f32::MAX, f32::MIN, f32::MIN_POSITIVE]);
    values.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN]);
    values
}

/// The distance from `x` to the next f32 of greater magnitude.
fn ulp(x: f64) -> f64 {
    let x = (x.abs() as f32).min(f32::MAX);
    f64::from(f32::from_bits(x.to_bits() + 1).min(f32::MAX))
        - f64::from(f32::from_bits(x.to_bits()))
}

#[test]
fn within_four_ulp_of_the_formula() {
    let gates = inputs();
    for cpu in Cpu::levels() {
        let kernel = Kernel::new(cpu);
        for activation in ALL {
            for u in [None, Some(1.0f32), Some(-0.37), Some(12.5), Some(1e-3), Some(1e30)] {
                let mut got = gates.clone();
                let up = u.map(|u| vec![u; got.len()]);
                kernel.activate(activation, &mut got, up.as_deref());
                for (g, got) in gates.iter().zip(got) {
                    let want = formula(activation, f64::from(*g), u.map(f64::from));
                    let context =
                        format!("{cpu:?} {activation:?} g={g:e} u={u:?}: {got:e}, {want:e}");
                    if want.is_nan() {
                        assert!(got.is_nan(), "{context}");
                        continue;
                    }
                    // What the activation alone loses below the normal numbers, times u.
                    let tiny = 2f64.powi(-148) * (1.0 + f64::from(u.unwrap_or(1.0)).abs());
                    let tolerance = 4.0 * ulp(want) + tiny;
                    let close = (f64::from(got) - want).abs() <= tolerance;
                    // Where act(g) alone is beyond f32, so may be the product with a small u.
                    let alone = formula(activation, f64::from(*g), None) as f32;
                    let beyond = got.is_infinite() && alone.is_infinite();
                    assert!(close || got == want as f32 || beyond, "{context}");
                }
            }
        }
    }
}

/// The up projection, over its whole range.
#[test]
fn within_four_ulp_for_any_up() {
    let ups = inputs();
    for cpu in Cpu::levels() {
        let kernel = Kernel::new(cpu);
        for activation in ALL {
            for g in [1.25f32, -2.5, 9.0] {
                let mut got = vec![g; ups.len()];
                kernel.activate(activation, &mut got, Some(&ups));
                for (u, got) in ups.iter().zip(got) {
                    let want = formula(activation, f64::from(g), Some(f64::from(*u)));
                    let context =
                        format!("{cpu:?} {activation:?} g={g} u={u:e}: {got:e}, {want:e}");
                    let tolerance = 4.0 * ulp(want) + 2f64.powi(-149);
                    let close = (f64::from(got) - want).abs() <= tolerance;
                    assert!(
                        close || got == want as f32 || got.is_nan() && want.is_nan(),
                        "{context}"
                    );
                }
            }
        }
    }
}

/// An element's result does not depend on where it lies, nor on its neighbours.
#[test]
fn the_same_bits_at_any_place() {
    let values: Vec<f32> = (0..37).map(|i| (i as f32 - 18.0) * 0.71).collect();
    for cpu in Cpu::levels() {
        let kernel = Kernel::new(cpu);
        for activation in ALL {
            let mut whole = values.clone();
            kernel.activate(activation, &mut whole, Some(&values));
            for (value, want) in values.iter().zip(whole) {
                let mut single = [*value];
                kernel.activate(activation, &mut single, Some(&[*value]));
                assert_eq!(single[0].to_bits(), want.to_bits(), "{cpu:?} {activation:?} {value}");
            }
        }
    }
}

/// What is computed in f64 has the same bits on every set of features; the rest where multiply-adds
/// are fused.
#[test]
fn the_same_bits_on_every_set() {
    let values = inputs();
    for activation in ALL {
        let in_f64 =
            matches!(activation, Activation::Gelu | Activation::GeluTanh | Activation::Situ { .. });
        let mut sets = Cpu::levels().filter(|cpu| in_f64 || cpu.has(crate::isa::Features::V3));
        let run = |cpu| {
            let mut out = values.clone();
            Kernel::new(cpu).activate(activation, &mut out, Some(&values));
            out.iter().map(|v| if v.is_nan() { u32::MAX } else { v.to_bits() }).collect::<Vec<_>>()
        };
        let Some(first) = sets.next().map(run) else { continue };
        assert!(sets.all(|cpu| run(cpu) == first), "{activation:?}");
    }
}

#[test]
fn erfc_keeps_its_relative_error() {
    for i in -600..=2600 {
        let z = f64::from(i) * 0.01;
        let (got, want) = (half_erfc(z), erfc(z) / 2.0);
        assert!((got - want).abs() <= 1.2e-8 * want, "{z}: {got:e} is not {want:e}");
    }
    assert_eq!((half_erfc(f64::INFINITY), half_erfc(f64::NEG_INFINITY)), (0.0, 1.0));
    assert!(half_erfc(f64::NAN).is_nan());
}
