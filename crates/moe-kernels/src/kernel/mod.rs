//! What experts do between their two products, and the probes of a machine's limits.
//!
//! A [`Kernel`] is a table of plain function pointers, chosen once for a set of CPU features. Each
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

use crate::activation::Activation;
use crate::isa::{Cpu, Features};
use activation::ActivateFn;
use probe::{Probes, Rounds};

/// The kernels of one set of features: [`Features::V4`], [`Features::V3`], or none.
#[derive(Clone, Copy)]
pub struct Kernel {
    name: &'static str,
    cpu: Cpu,
    activate: ActivateFn,
    probes: Probes,
    /// Dot products of bf16, where the CPU has them.
    dots: Option<Rounds>,
    /// Dot products of 8-bit integers, likewise.
    int8_dots: Option<Rounds>,
    /// Tile products of bf16, likewise.
    tiles: Option<Rounds>,
}

impl Kernel {
    /// The kernels of the best set of features of this CPU.
    pub fn detect() -> Kernel {
        Kernel::new(Cpu::detect())
    }

    /// The kernels of the best set of features that `cpu` may use.
    pub fn new(cpu: Cpu) -> Kernel {
        type Level = (&'static str, Features, ActivateFn, Probes);
        const LEVELS: &[Level] = &[
            #[cfg(target_arch = "x86_64")]
            ("avx512", Features::V4, avx512::activate, avx512::PROBES),
            #[cfg(target_arch = "x86_64")]
            ("avx2", Features::V3, avx2::activate, avx2::PROBES),
        ];
        const PORTABLE: Level = ("portable", Features::NONE, portable::activate, portable::PROBES);
        let able = LEVELS.iter().find(|(_, needs, ..)| cpu.has(*needs));
        let &(name, needs, activate, probes) = able.unwrap_or(&PORTABLE);
        #[cfg(target_arch = "x86_64")]
        let dots = cpu.has(Features::V4_BF16).then_some(avx512::dots as Rounds);
        #[cfg(target_arch = "x86_64")]
        let int8_dots = [
            (Features::V4_VNNI, avx512::int8_dots as Rounds),
            (Features::V3, avx2::int8_dots as Rounds),
        ];
        #[cfg(target_arch = "x86_64")]
        let int8_dots = int8_dots.iter().find(|(needs, _)| cpu.has(*needs)).map(|(_, dots)| *dots);
        #[cfg(target_arch = "x86_64")]
        let tiles = cpu.has(Features::V4_AMX).then_some(crate::gemm::probe_tiles as Rounds);
        #[cfg(not(target_arch = "x86_64"))]
        let (dots, int8_dots, tiles) = (None, None, None);
        Kernel { name, cpu: cpu.only(needs), activate, probes, dots, int8_dots, tiles }
    }

    /// The name in reports: `avx512`, `avx2`, `portable`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The CPU with the features that the kernels use, and no other.
    pub fn cpu(&self) -> Cpu {
        self.cpu
    }

    /// `gate[i] = act(gate[i]) · up[i]`, or `act(gate[i])` without an up projection, within 4 ulp
    /// of the formula; NaN where an operand is NaN. Runs on the calling thread.
    ///
    /// # Panics
    /// If `up` has another length than `gate`.
    pub fn activate(&self, activation: Activation, gate: &mut [f32], up: Option<&[f32]>) {
        assert!(up.is_none_or(|up| up.len() == gate.len()), "elements of gate and up");
        // SAFETY: the features were proven when the `Kernel` was made; the lengths agree.
        unsafe { (self.activate)(activation, gate, up) }
    }

    /// Reads all of `data` and returns its sum, up to a last part that is smaller than a step.
    pub(crate) fn probe_read(&self, data: &[f32]) -> f32 {
        // SAFETY: the CPU has the features, as above.
        unsafe { (self.probes.read)(data) }
    }

    /// Does `rounds` rounds of multiply-adds in registers; returns the number of f32 operations.
    pub(crate) fn probe_multiply_add(&self, rounds: usize) -> u64 {
        // SAFETY: the CPU has the features, as above.
        unsafe { (self.probes.multiply_add)(rounds) }
    }

    /// Does `rounds` rounds of bf16 dot products in registers, where the CPU has them; returns the
    /// number of operations.
    pub(crate) fn probe_dots(&self, rounds: usize) -> Option<u64> {
        // SAFETY: the CPU has the features, as above.
        self.dots.map(|dots| unsafe { dots(rounds) })
    }

    /// The same of dot products of 8-bit integers.
    pub(crate) fn probe_int8_dots(&self, rounds: usize) -> Option<u64> {
        // SAFETY: the CPU has the features, as above.
        self.int8_dots.map(|dots| unsafe { dots(rounds) })
    }

    /// The same of tile products of bf16.
    pub(crate) fn probe_tiles(&self, rounds: usize) -> Option<u64> {
        // SAFETY: the CPU has the features, as above.
        self.tiles.map(|tiles| unsafe { tiles(rounds) })
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel").field("cpu", &self.cpu).finish_non_exhaustive()
    }
}
