//! The machine that kernels are chosen for: this one, or one described by a name.

use moe_kernels::isa::{Cpu, Features};

use crate::experts::{Archs, cuda};
use crate::{Error, Result};

/// What decides whether a kernel can run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// For messages: "this machine", or the name that it was described by.
    pub name: String,
    /// Features of its processor.
    pub features: Features,
    /// Compute capability of its NVIDIA GPU, ten times: 90 for sm90.
    pub compute_capability: Option<u32>,
    /// Why there is none, where one was looked for.
    pub without_gpu: Option<String>,
}

/// Processors by name, and their features.
const PROCESSORS: [(&str, Features); 6] = [
    ("portable", Features::NONE),
    ("avx2", Features::V3),
    ("avx512", Features::V4),
    ("avx512_vnni", Features::V4_VNNI),
    ("avx512_bf16", Features::V4_BF16),
    ("amx_bf16", Features::V4_AMX),
];

/// The processor that a GPU is taken to stand beside.
const HOST: Features = Features::V4;

/// NVIDIA's architectures with tensor cores: compute capability, ten times, and where it is found.
const GPUS: [(u32, &str); 12] = [
    (70, "Volta: V100"),
    (75, "Turing: T4, RTX 20"),
    (80, "Ampere: A100, A30"),
    (86, "Ampere: A10, A40, RTX 30"),
    (87, "Ampere: Jetson Orin"),
    (89, "Ada: L4, L40S, RTX 40"),
    (90, "Hopper: H100, H200, GH200"),
    (100, "Blackwell: B200, GB200"),
    (103, "Blackwell: B300, GB300"),
    (110, "Blackwell: Jetson Thor"),
    (120, "Blackwell: RTX PRO 6000, RTX 50"),
    (121, "Blackwell: GB10"),
];

/// "sm90 (Hopper: H100, H200, GH200)".
pub(super) fn gpu_name(capability: u32) -> String {
    match GPUS.iter().find(|(known, _)| *known == capability) {
        Some((_, found)) => format!("sm{capability} ({found})"),
        None => format!("sm{capability}"),
    }
}

/// "avx512" for all that x86-64-v4 is, and so on; the features' own names otherwise.
pub(super) fn features_name(features: Features) -> String {
    match PROCESSORS.iter().find(|(_, known)| *known == features) {
        Some((name, _)) => (*name).into(),
        None => features.to_string(),
    }
}

/// "sm100 (Blackwell: B200, GB200)", or several with "or" between them.
pub(super) fn archs_name(archs: Archs) -> String {
    match archs {
        Archs::AtLeast(least) => gpu_name(least),
        Archs::Exactly(archs) => {
            archs.iter().map(|arch| gpu_name(*arch)).collect::<Vec<_>>().join(" or ")
        }
    }
}

impl Machine {
    /// This machine's processor. No GPU is looked for: that would start its driver.
    pub fn detect() -> Self {
        Self {
            name: "this machine".into(),
            features: Cpu::detect().features(),
            compute_capability: None,
            without_gpu: None,
        }
    }

    /// The same with NVIDIA GPU `index` of this machine.
    ///
    /// # Errors
    /// [`Error::Device`]: in one line, what is missing or too old.
    pub fn with_gpu(self, index: usize) -> Result<Self> {
        let compute_capability = Some(cuda::capability(index)?);
        Ok(Self { compute_capability, ..self })
    }

    /// This machine with its first GPU or, where it has none, the reason.
    pub fn detect_all() -> Self {
        match Self::detect().with_gpu(0) {
            Ok(machine) => machine,
            Err(error) => Self { without_gpu: Some(error.to_string()), ..Self::detect() },
        }
    }

    /// Every name that [`Self::named`] knows, with what it stands for.
    pub fn names() -> Vec<(String, String)> {
        let processor =
            |(name, _): &(&str, _)| (name.to_string(), format!("a processor with {name}, no GPU"));
        let gpu = |(capability, found): &(u32, &str)| {
            let host = "in an x86-64 host with AVX-512";
            (format!("sm{capability}"), format!("an NVIDIA GPU ({found}) {host}"))
        };
        PROCESSORS.iter().map(processor).chain(GPUS.iter().map(gpu)).collect()
    }

    /// A machine by name: a processor's instruction set, or an NVIDIA GPU's architecture, as `sm90`,
    /// `sm_90` or, with features of that architecture alone, `sm90a`. Case does not matter.
    ///
    /// # Errors
    /// [`Error::Input`] listing the names.
    pub fn named(name: &str) -> Result<Self> {
        let lower = name.to_ascii_lowercase().replace('_', "");
        let known = |processor: &&(&str, _)| processor.0.replace('_', "") == lower;
        if let Some((name, features)) = PROCESSORS.iter().find(known) {
            return Ok(Self {
                name: (*name).into(),
                features: *features,
                compute_capability: None,
                without_gpu: None,
            });
        }
        let digits = lower.strip_prefix("sm").map(|rest| rest.strip_suffix('a').unwrap_or(rest));
        let capability = digits.and_then(|digits| digits.parse().ok());
        match GPUS.iter().find(|(known, _)| Some(*known) == capability) {
            Some((capability, _)) => Ok(Self {
                name: format!("sm{capability}"),
                features: HOST,
                compute_capability: Some(*capability),
                without_gpu: None,
            }),
            None => {
                let names: Vec<String> = Self::names().into_iter().map(|(name, _)| name).collect();
                Err(Error::input(
                    "machine",
                    format!("'{name}' is not known; names are: {}", names.join(", ")),
                ))
            }
        }
    }
}
