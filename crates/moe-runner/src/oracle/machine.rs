//! The machine that kernels are chosen for: this one, or one described by a name.

use moe_kernels::isa::Isa;

use crate::{Error, Result};

/// What decides whether a kernel can run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// For messages: "this machine", or the name that it was described by.
    pub name: String,
    /// Instruction sets of its processor.
    pub isas: Vec<Isa>,
    /// Compute capability of its NVIDIA GPU, ten times: 90 for sm90.
    pub compute_capability: Option<u32>,
}

impl Machine {
    /// This machine.
    pub fn detect() -> Self {
        // CUDA kernels are not part of this build, so no GPU is looked for.
        Self { name: "this machine".into(), isas: Isa::available(), compute_capability: None }
    }

    /// Names that [`Self::named`] knows, as shown to users.
    pub const NAMES: &'static str = "portable, avx2, avx512, or smNN (an x86-64 host with AVX-512 and an NVIDIA GPU, such as sm90)";

    /// A machine by name: a processor's instruction set, or an NVIDIA GPU's architecture.
    ///
    /// # Errors
    /// [`Error::Input`] listing the names.
    pub fn named(name: &str) -> Result<Self> {
        let lower = name.to_ascii_lowercase();
        let isas = |isas: &[Isa]| isas.to_vec();
        let machine =
            |isas, compute_capability| Ok(Self { name: lower.clone(), isas, compute_capability });
        let all = [Isa::Portable, Isa::Avx2, Isa::Avx512];
        match lower.as_str() {
            "portable" => machine(isas(&all[..1]), None),
            "avx2" => machine(isas(&all[..2]), None),
            "avx512" => machine(isas(&all), None),
            _ => match lower.strip_prefix("sm").map(str::parse) {
                Some(Ok(capability @ 50..=199)) => machine(isas(&all), Some(capability)),
                _ => Err(Error::input(
                    "machine",
                    format!("'{name}' is not known; names are: {}", Self::NAMES),
                )),
            },
        }
    }
}
