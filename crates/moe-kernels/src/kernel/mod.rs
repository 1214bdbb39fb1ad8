//! The kernels: products of token rows with weight rows, and the activations between them.
//!
//! A [`Kernel`] is a table of plain function pointers, chosen once for an instruction set. Its
//! product is that of a linear layer without bias, with weights as checkpoints store them, one row
//! of K numbers for each output feature:
//!
//! ```text
//! out[i][j] = Σ_k x[i][k] · w[j][k]        x [M, K] f32,  w [N, K] f32/f16/bf16,  out [M, N] f32
//! ```
//!
//! and [`Kernel::activate`] is what an expert applies between its two products.
//!
//! # The promise
//! Weights are widened to f32 exactly; products are accumulated in f32, by fused multiply-add where
//! the instruction set has it. Every element of `out` is computed in the same way: lane `l` of `L`
//! adds the products `k = l, l + L, l + 2L, …` in this order, and the lanes are added as one fixed
//! tree. Neither M, N, the tile that an element falls into, nor the number of threads has any part
//! in it, so on the same instruction set a row's result is the same bit by bit in any batch.

mod activation;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod dot;
mod lanes;
mod portable;
mod probe;

use std::fmt;

pub use crate::rows::{Rows, RowsMut, Tile, Tiles, WeightRows};
pub use crate::stored::FloatType as Float;
pub use activation::Activation;

use crate::isa::Isa;
use activation::ActivateFn;
use dot::{DotArgs, DotFns};
use probe::Probes;

/// The kernels of one instruction set.
#[derive(Clone, Copy)]
pub struct Kernel {
    isa: Isa,
    dot: DotFns,
    activate: ActivateFn,
    probes: Probes,
}

impl Kernel {
    /// The kernels of the best instruction set of this CPU.
    pub fn detect() -> Kernel {
        Kernel::of(Isa::detect())
    }

    /// The kernels of `isa`; `None` if this CPU lacks it.
    pub fn new(isa: Isa) -> Option<Kernel> {
        isa.is_available().then(|| Kernel::of(isa))
    }

    /// The kernels of an instruction set that this CPU has.
    fn of(isa: Isa) -> Kernel {
        let (dot, activate, probes): (DotFns, ActivateFn, Probes) = match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => (avx512::DOT, avx512::activate, avx512::PROBES),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => (avx2::DOT, avx2::activate, avx2::PROBES),
            _ => (portable::DOT, portable::activate, portable::PROBES),
        };
        Kernel { isa, dot, activate, probes }
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// `out[i][j] = Σ_k x[i][k] · w[j][k]`, as the module promises. Runs on the calling thread.
    ///
    /// # Panics
    /// If the shapes do not agree: `x` [M, K], `w` [N, K], `out` [M, N].
    pub fn dot(&self, x: Rows<'_>, w: WeightRows<'_>, out: &mut RowsMut<'_>) {
        let (m, n, k) = (x.rows(), w.rows(), w.cols());
        assert_eq!(x.cols(), k, "columns of x and w");
        assert_eq!((out.rows(), out.cols()), (m, n), "shape of out");
        let args = DotArgs {
            x: x.as_ptr(),
            x_stride: x.stride(),
            m,
            w: w.as_ptr(),
            w_stride: w.stride() * w.float().size(),
            n,
            k,
            out: out.as_mut_ptr(),
            out_stride: out.stride(),
        };
        let dot = match w.float() {
            Float::F32 => self.dot.f32,
            Float::F16 => self.dot.f16,
            Float::Bf16 => self.dot.bf16,
        };
        // SAFETY: a `Kernel` exists only for an instruction set that the CPU has. The views
        // own their memory: m rows of k elements, n rows of k, m rows of n, at their strides, and
        // `out` borrows its elements mutably.
        unsafe { dot(&args) }
    }

    /// `gate[i] = act(gate[i]) · up[i]`, or `act(gate[i])` without an up projection, within 4 ulp
    /// of the formula; NaN where an operand is NaN. Runs on the calling thread.
    ///
    /// # Panics
    /// If `up` has another length than `gate`.
    pub fn activate(&self, activation: Activation, gate: &mut [f32], up: Option<&[f32]>) {
        assert!(up.is_none_or(|up| up.len() == gate.len()), "elements of gate and up");
        // SAFETY: the CPU has the instruction set, as above; the lengths agree.
        unsafe { (self.activate)(activation, gate, up) }
    }

    /// Reads all of `data` and returns its sum, up to a last part that is smaller than a step.
    pub(crate) fn probe_read(&self, data: &[f32]) -> f32 {
        // SAFETY: the CPU has the instruction set, as above.
        unsafe { (self.probes.read)(data) }
    }

    /// Does `rounds` rounds of multiply-adds in registers; returns the number of f32 operations.
    pub(crate) fn probe_multiply_add(&self, rounds: usize) -> u64 {
        // SAFETY: the CPU has the instruction set, as above.
        unsafe { (self.probes.multiply_add)(rounds) }
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel").field("isa", &self.isa).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
