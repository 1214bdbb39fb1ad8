//! What this CPU can do.
//!
//! A CPU has a *set* of [`Features`], and today's sets form no chain: one has AVX-512 without its
//! BF16, another VNNI without AVX-512. A kernel states the set that it needs, as data. Code that
//! uses features is entered only with a [`Cpu`], the proof that they are there: detection alone
//! makes one, and [`Cpu::only`] takes features away from it, so that every kernel can be forced.
//! Nothing here reads an environment variable.

mod cores;
mod features;

pub use cores::physical_cores;
pub use features::{Cpu, Features};

use std::fmt;

/// The instruction sets that the float kernels are written for, in the order of preference: the
/// greatest available one is the fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust, on any CPU.
    Portable,
    /// x86-64 with AVX2, FMA and F16C (all of x86-64-v3).
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL (all of x86-64-v4).
    Avx512,
}

impl Isa {
    /// All instruction sets, whether this CPU has them or not, the least first.
    pub const ALL: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

    /// The best instruction set of this CPU.
    pub fn detect() -> Isa {
        Isa::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Isa::Portable)
    }

    /// The instruction sets of this CPU, the least first; `Portable` is always among them.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// Whether this CPU has the instruction set.
    pub fn is_available(self) -> bool {
        Cpu::detect().features().contains(self.features())
    }

    /// The features that it stands for.
    pub const fn features(self) -> Features {
        match self {
            Isa::Portable => Features::NONE,
            Isa::Avx2 => Features::V3,
            Isa::Avx512 => Features::V4,
        }
    }

    /// The name in reports: `portable`, `avx2`, `avx512`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detection_agrees_with_itself() {
        let available = Isa::available();
        assert_eq!(available.first(), Some(&Isa::Portable));
        assert_eq!(available.last(), Some(&Isa::detect()));
        assert!(available.is_sorted());
    }
}
