//! What experts do between their two products, and the probes of a machine's limits.
//!
//! A [`Kernel`] is a table of plain function pointers, chosen once for an instruction set. Each
//! element is computed alike wherever it lies.

mod activation;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod lanes;
mod portable;
mod probe;

use std::fmt;

pub use activation::Activation;

use crate::isa::Isa;
use activation::ActivateFn;
use probe::Probes;

/// The kernels of one instruction set.
#[derive(Clone, Copy)]
pub struct Kernel {
    isa: Isa,
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
        let (activate, probes): (ActivateFn, Probes) = match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => (avx512::activate, avx512::PROBES),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => (avx2::activate, avx2::PROBES),
            _ => (portable::activate, portable::PROBES),
        };
        Kernel { isa, activate, probes }
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// `gate[i] = act(gate[i]) · up[i]`, or `act(gate[i])` without an up projection, within 4 ulp
    /// of the formula; NaN where an operand is NaN. Runs on the calling thread.
    ///
    /// # Panics
    /// If `up` has another length than `gate`.
    pub fn activate(&self, activation: Activation, gate: &mut [f32], up: Option<&[f32]>) {
        assert!(up.is_none_or(|up| up.len() == gate.len()), "elements of gate and up");
        // SAFETY: a `Kernel` exists only for an instruction set that the CPU has; the lengths agree.
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
