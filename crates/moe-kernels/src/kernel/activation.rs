//! The functions between an expert's two products, in f32.
//!
//! Those of most models (SiLU and its clamped forms, ReLU) are f32 vectors of the instruction set; the
//! others are computed in f64, in loops without branches. All are within 4 ulp of the formula, all
//! give NaN for NaN, and each element is computed alike wherever it lies.

mod sigmoid;
mod tails;

use super::lanes::Lanes;
use crate::activation::Activation;
use sigmoid::times_sigmoid;
use tails::{half_erfc, sigmoid, sigmoid_fraction, tanh_fraction};

/// `gate[i] = act(gate[i]) · up[i]`, or `act(gate[i])` without `up`. Unsafe to call: the CPU must
/// have the function's instruction set. The slices are of equal length.
pub(super) type ActivateFn = unsafe fn(Activation, &mut [f32], Option<&[f32]>);

/// # Safety
/// As [`ActivateFn`]; inlined into a function that enables the instruction set of `S`.
#[inline(always)]
pub(super) unsafe fn activate<S: Lanes>(
    activation: Activation,
    gate: &mut [f32],
    up: Option<&[f32]>,
) {
    // SAFETY: the caller's.
    unsafe {
        match activation {
            Activation::Silu => apply::<S, _>(Silu, gate, up),
            Activation::Relu => apply::<S, _>(Relu, gate, up),
            Activation::Relu2 => apply::<S, _>(Relu2, gate, up),
            Activation::ClampedSwiglu { alpha, beta, limit } => {
                apply::<S, _>(ClampedSwiglu { alpha, beta, limit }, gate, up);
            }
            Activation::SwigluStep { limit } => apply::<S, _>(SwigluStep { limit }, gate, up),
            Activation::Gelu => {
                apply_f64(gate, up, |g| g * half_erfc(g * -std::f64::consts::FRAC_1_SQRT_2))
            }
            Activation::GeluTanh => {
                // 1 + tanh(z) = 2·σ(2z), which does not cancel.
                let scale = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
                let act = |g: f64| g * sigmoid(scale * (g + 0.044715 * g * g * g));
                apply_f64(gate, up, act);
            }
            Activation::Situ { beta, lambda } => situ(beta.into(), lambda.map(f64::from), gate, up),
        }
    }
}

/// `β·tanh(g/β)·σ(g) · λ·tanh(u/λ)`, or `· u` without `λ`.
#[inline(always)]
fn situ(beta: f64, lambda: Option<f64>, gate: &mut [f32], up: Option<&[f32]>) {
    let per_beta = 1.0 / beta;
    match (up, lambda) {
        (Some(up), Some(lambda)) => {
            let per_lambda = 1.0 / lambda;
            for (g, u) in gate.iter_mut().zip(up) {
                let (act, under_act) = situ_gate(beta, per_beta, f64::from(*g));
                let (t, under_t) = tanh_fraction(f64::from(*u) * per_lambda);
                *g = (act * (lambda * t) / (under_act * under_t)) as f32;
            }
        }
        (Some(up), None) => {
            for (g, u) in gate.iter_mut().zip(up) {
                let (act, under) = situ_gate(beta, per_beta, f64::from(*g));
                *g = (act / under * f64::from(*u)) as f32;
            }
        }
        (None, _) => gate.iter_mut().for_each(|g| {
            let (act, under) = situ_gate(beta, per_beta, f64::from(*g));
            *g = (act / under) as f32;
        }),
    }
}

/// `n / d = β·tanh(g/β)·σ(g)`. A function, not a closure: one that is called twice stays outside of the
/// loops, which then are no vectors.
#[inline(always)]
fn situ_gate(beta: f64, per_beta: f64, g: f64) -> (f64, f64) {
    let ((t, under_t), (s, under_s)) = (tanh_fraction(g * per_beta), sigmoid_fraction(g));
    (beta * t * s, under_t * under_s)
}

/// Element by element in f64, rounded once: a loop that the compiler makes vectors of.
#[inline(always)]
fn apply_f64(gate: &mut [f32], up: Option<&[f32]>, act: impl Fn(f64) -> f64) {
    match up {
        Some(up) => {
            for (g, u) in gate.iter_mut().zip(up) {
                *g = (act(f64::from(*g)) * f64::from(*u)) as f32;
            }
        }
        None => gate.iter_mut().for_each(|g| *g = act(f64::from(*g)) as f32),
    }
}

/// A function as vectors: `gate(g) · up(u)`.
trait Formula: Copy {
    /// # Safety
    /// As [`Lanes`].
    unsafe fn gate<S: Lanes>(self, g: S::V) -> S::V;

    /// # Safety
    /// As [`Lanes`].
    #[inline(always)]
    unsafe fn up<S: Lanes>(self, u: S::V) -> S::V {
        u
    }
}

/// Elements of the largest vector.
const ONE_VECTOR: usize = 16;

/// # Safety
/// As [`Lanes`]; `gate` and `up` are of equal length.
#[inline(always)]
unsafe fn apply<S: Lanes, F: Formula>(formula: F, gate: &mut [f32], up: Option<&[f32]>) {
    let full = gate.len() - gate.len() % S::COUNT;
    // SAFETY: whole vectors end at `full`; the rest goes by way of a buffer of one vector.
    unsafe {
        let mut i = 0;
        while i < full {
            let at = gate.as_mut_ptr().add(i);
            one::<S, F>(formula, at, up.map(|up| up.as_ptr().add(i)));
            i += S::COUNT;
        }
        let rest = gate.len() - full;
        if rest > 0 {
            const { assert!(S::COUNT <= ONE_VECTOR) }
            let (mut g, mut u) = ([0.0; ONE_VECTOR], [0.0; ONE_VECTOR]);
            g[..rest].copy_from_slice(&gate[full..]);
            let up = up.map(|up| {
                u[..rest].copy_from_slice(&up[full..]);
                u.as_ptr()
            });
            one::<S, F>(formula, g.as_mut_ptr(), up);
            gate[full..].copy_from_slice(&g[..rest]);
        }
    }
}

/// One vector.
///
/// # Safety
/// As [`Lanes`]; the pointers are good for `S::COUNT` elements.
#[inline(always)]
unsafe fn one<S: Lanes, F: Formula>(formula: F, gate: *mut f32, up: Option<*const f32>) {
    // SAFETY: the caller's.
    unsafe {
        let mut value = formula.gate::<S>(S::load_f32(gate.cast()));
        if let Some(up) = up {
            value = S::mul(value, formula.up::<S>(S::load_f32(up.cast())));
        }
        S::store(value, gate);
    }
}

/// `clamp(v, ±limit)`.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
unsafe fn clamp<S: Lanes>(v: S::V, limit: f32) -> S::V {
    // SAFETY: the caller's.
    unsafe { S::at_least(S::at_most(v, S::splat(limit)), S::splat(-limit)) }
}

#[derive(Clone, Copy)]
struct Silu;

impl Formula for Silu {
    #[inline(always)]
    unsafe fn gate<S: Lanes>(self, g: S::V) -> S::V {
        // SAFETY: the caller's.
        unsafe { times_sigmoid::<S>(g, g, S::splat(0.0)) }
    }
}

#[derive(Clone, Copy)]
struct ClampedSwiglu {
    alpha: f32,
    beta: f32,
    limit: f32,
}

impl Formula for ClampedSwiglu {
    #[inline(always)]
    unsafe fn gate<S: Lanes>(self, g: S::V) -> S::V {
        // SAFETY: the caller's.
        unsafe {
            let g = S::at_most(g, S::splat(self.limit));
            let alpha = S::splat(self.alpha);
            let z = S::mul(alpha, g);
            times_sigmoid::<S>(g, z, S::mul_error(alpha, g, z))
        }
    }

    #[inline(always)]
    unsafe fn up<S: Lanes>(self, u: S::V) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::add(clamp::<S>(u, self.limit), S::splat(self.beta)) }
    }
}

#[derive(Clone, Copy)]
struct SwigluStep {
    limit: f32,
}

impl Formula for SwigluStep {
    #[inline(always)]
    unsafe fn gate<S: Lanes>(self, g: S::V) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::at_most(Silu.gate::<S>(g), S::splat(self.limit)) }
    }

    #[inline(always)]
    unsafe fn up<S: Lanes>(self, u: S::V) -> S::V {
        // SAFETY: the caller's.
        unsafe { clamp::<S>(u, self.limit) }
    }
}

#[derive(Clone, Copy)]
struct Relu;

impl Formula for Relu {
    #[inline(always)]
    unsafe fn gate<S: Lanes>(self, g: S::V) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::at_least(g, S::splat(0.0)) }
    }
}

#[derive(Clone, Copy)]
struct Relu2;

impl Formula for Relu2 {
    #[inline(always)]
    unsafe fn gate<S: Lanes>(self, g: S::V) -> S::V {
        // SAFETY: the caller's.
        unsafe {
            let positive = Relu.gate::<S>(g);
            S::mul(positive, positive)
        }
    }
}

#[cfg(test)]
mod tests;
