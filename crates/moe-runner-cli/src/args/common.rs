//! Flags that several commands have, each where it acts: as written, and resolved.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use moe_kernels::isa::{cpus, physical_cores};
use moe_kernels::pool::Pool;
use moe_runner::checkpoint::Checkpoint;
use moe_runner::experts::{Device, KERNELS, PackCache};
use moe_runner::hidden::ActivationDtype;
use moe_runner::oracle::Machine;
use moe_runner::runner::{NonFinite, Options, Workspaces};
use moe_runner::weights::LoadedLayer;

use crate::failure::{one_line, unusable};
use crate::report::units::{self, plural};

/// More threads than any machine has.
const MAX_THREADS: usize = 4096;

/// How many threads.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Common options")]
pub(crate) struct ThreadArgs {
    /// Threads to compute on [default: the physical cores that this process may use].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

impl ThreadArgs {
    /// A single one.
    pub(crate) fn one() -> Self {
        Self { threads: Some(1) }
    }

    /// Whether a number is given.
    pub(crate) fn is_given(&self) -> bool {
        self.threads.is_some()
    }

    /// The number, checked.
    pub(crate) fn count(&self) -> Result<usize> {
        let threads = self.threads.unwrap_or_else(physical_cores);
        match (1..=MAX_THREADS).contains(&threads) {
            true => Ok(threads),
            false => Err(unusable(format!("--threads {threads}: must be 1 to {MAX_THREADS}"))),
        }
    }
}

/// What passes run on, and what they start from.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Common options")]
pub(crate) struct HostArgs {
    #[command(flatten)]
    pub(crate) threads: ThreadArgs,
    /// Keep every thread on a processor of its own (Linux).
    #[arg(long)]
    pin_threads: bool,
    /// Keep packed weights in this folder, and map them at the next start: no packing, and one copy in
    /// memory for all processes of a machine (docs/performance.md).
    #[arg(long, value_name = "DIR")]
    pack_cache: Option<PathBuf>,
}

impl From<ThreadArgs> for HostArgs {
    fn from(threads: ThreadArgs) -> Self {
        Self { threads, pin_threads: false, pack_cache: None }
    }
}

impl HostArgs {
    /// The processors that threads are to stay on.
    fn cpus(&self, threads: usize) -> Result<Option<Vec<usize>>> {
        if !self.pin_threads {
            return Ok(None);
        }
        let Some(mut cpus) = cpus() else {
            return Err(unusable("--pin-threads: threads are pinned on Linux alone"));
        };
        if cpus.len() < threads {
            return Err(unusable(format!(
                "--pin-threads: there are {threads} threads, and this process may use {} processors",
                cpus.len()
            )));
        }
        cpus.truncate(threads);
        Ok(Some(cpus))
    }
}

/// What is random.
#[derive(clap::Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Common options")]
pub(crate) struct SeedArg {
    /// Seed of everything random.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

/// What the activations are.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Common options")]
pub(crate) struct DtypeArg {
    /// Dtype of the activations: auto, f32, bf16 or f16. auto: f32 for a GGUF file; else that of the
    /// experts' weights where they are stored in one of these, else bf16.
    #[arg(long, value_name = "DTYPE", default_value = "auto", value_parser = dtype_or_auto)]
    dtype: DtypeChoice,
}

impl DtypeArg {
    /// The dtype that is named; `None`: auto.
    pub(crate) fn named(&self) -> Option<ActivationDtype> {
        self.dtype.0
    }
}

/// What computes.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Common options")]
pub(crate) struct KernelArgs {
    /// The kernel: auto, or a name that `explain` lists. A named kernel is used or refused, never
    /// replaced.
    #[arg(long, value_name = "NAME", default_value = "auto")]
    kernel: String,
    /// Where to compute: auto, cpu, cuda or cuda:N, the N-th NVIDIA GPU. auto is the processor.
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = device)]
    device: DeviceChoice,
    /// Quantise rows to INT8 before products with weights that are integers of at most 8 bits, as llama.cpp
    /// does: faster, and less exact (docs/numerics.md). The reference of `check` does, too.
    #[arg(long)]
    int8_activations: bool,
    #[command(flatten)]
    pub(super) dtype: DtypeArg,
}

/// A device as the user names it, and which GPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceChoice(Option<Device>, usize);

impl DeviceChoice {
    /// Nothing is said.
    pub(crate) const AUTO: Self = Self(None, 0);

    /// The number of a GPU, where one is meant.
    pub(crate) fn gpu(self) -> Option<usize> {
        self.0.filter(|device| *device == Device::Cuda).map(|_| self.1)
    }
}

/// A dtype as the user names it; `None` is auto.
#[derive(Clone, Copy, Debug)]
struct DtypeChoice(Option<ActivationDtype>);

pub(super) fn device(text: &str) -> Result<DeviceChoice, String> {
    let known = match text.split_once(':') {
        None => match text {
            "auto" => Some(DeviceChoice(None, 0)),
            "cpu" => Some(DeviceChoice(Some(Device::Cpu), 0)),
            "cuda" => Some(DeviceChoice(Some(Device::Cuda), 0)),
            _ => None,
        },
        Some(("cuda", number)) => {
            number.parse().ok().map(|number| DeviceChoice(Some(Device::Cuda), number))
        }
        Some(_) => None,
    };
    known.ok_or_else(|| "devices are auto, cpu, cuda and cuda:N".into())
}

pub(super) fn dtype(text: &str) -> Result<ActivationDtype, String> {
    [ActivationDtype::F32, ActivationDtype::Bf16, ActivationDtype::F16]
        .into_iter()
        .find(|dtype| dtype.name() == text)
        .ok_or_else(|| "dtypes are f32, bf16 and f16".into())
}

fn dtype_or_auto(text: &str) -> Result<DtypeChoice, String> {
    match text {
        "auto" => Ok(DtypeChoice(None)),
        _ => dtype(text)
            .map(|dtype| DtypeChoice(Some(dtype)))
            .map_err(|_| "dtypes are auto, f32, bf16 and f16".into()),
    }
}

/// These flags, checked and turned into what they stand for.
#[derive(Clone)]
pub(crate) struct Common {
    /// Seed of everything random.
    pub(crate) seed: u64,
    /// `None`: auto.
    pub(crate) kernel: Option<String>,
    /// `None`: auto.
    pub(crate) device: Option<Device>,
    /// Which GPU, where it is one.
    pub(crate) gpu: usize,
    /// What kernels are chosen for.
    pub(crate) machine: Machine,
    /// Rows are quantised to INT8.
    int8_activations: bool,
    /// `None`: auto.
    pub(crate) dtype: Option<ActivationDtype>,
    /// The threads to compute on.
    pub(crate) pool: Arc<Pool>,
    /// The processors that they stay on, where that was asked for.
    pub(crate) cpus: Option<Vec<usize>>,
    /// Where packed weights are to be kept.
    pack_cache: Option<PathBuf>,
    /// The same for what is run.
    cache: Option<PackCache>,
}

impl Common {
    /// Checks the flags, and starts the threads.
    pub(crate) fn resolve(kernel: &KernelArgs, host: &HostArgs, seed: u64) -> Result<Self> {
        let threads = host.threads.count()?;
        let cpus = host.cpus(threads)?;
        let name = (kernel.kernel != "auto").then(|| kernel.kernel.clone());
        if let Some(name) = &name
            && !KERNELS.iter().any(|kernel| kernel.name == name)
        {
            let names: Vec<&str> = KERNELS.iter().map(|kernel| kernel.name).collect();
            return Err(unusable(format!(
                "--kernel {name}: no such kernel; there are {}",
                names.join(", ")
            )));
        }
        let pool = match &cpus {
            None => Pool::new(threads),
            Some(cpus) => Pool::pinned(cpus),
        };
        Ok(Self {
            seed,
            kernel: name,
            device: kernel.device.0,
            gpu: kernel.device.1,
            machine: Machine::detect(),
            int8_activations: kernel.int8_activations,
            dtype: kernel.dtype.named(),
            pool: Arc::new(pool.context("cannot start threads; try --threads 1")?),
            cpus,
            pack_cache: host.pack_cache.clone(),
            cache: None,
        })
    }

    /// The same, with the GPU taken into use if one is asked for, by its name or a kernel's: what is
    /// missing is told before anything is read.
    pub(crate) fn with_device(self) -> Result<Self> {
        let named = KERNELS.iter().find(|kernel| Some(kernel.name) == self.kernel.as_deref());
        let device = named.map_or(self.device, |kernel| Some(kernel.target.device()));
        match device {
            Some(Device::Cuda) => {
                Ok(Self { machine: self.machine.clone().with_gpu(self.gpu)?, ..self })
            }
            _ => Ok(self),
        }
    }

    /// The same, keeping packed weights of `checkpoint`, or of anything, where that was asked for.
    pub(crate) fn caching(&self, checkpoint: Option<&Checkpoint>) -> Result<Self> {
        let Some(folder) = &self.pack_cache else { return Ok(self.clone()) };
        let cache = match checkpoint {
            None => PackCache::new(folder),
            Some(checkpoint) => PackCache::of_checkpoint(folder, checkpoint)?,
        };
        Ok(Self { cache: Some(cache), ..self.clone() })
    }

    /// What the cache of packed weights was good for, for people; warnings first.
    pub(crate) fn tell_of_cache(&self) {
        let Some(cache) = &self.cache else { return };
        let used = cache.used();
        used.warnings
            .iter()
            .for_each(|warning| eprintln!("warning: pack cache: {}", one_line(warning)));
        let sets =
            |count, bytes| format!("{} of experts ({})", plural(count, "set"), units::bytes(bytes));
        let mut parts = Vec::new();
        if used.mapped > 0 {
            parts.push(format!("{} mapped", sets(used.mapped, used.mapped_bytes)));
        }
        if used.written > 0 {
            parts.push(format!("{} packed and kept", sets(used.written, used.written_bytes)));
        }
        if !parts.is_empty() {
            eprintln!("pack cache: {}", parts.join(", "));
        }
    }

    /// `layer` with its rows quantised, where that was asked for.
    pub(crate) fn quantising(&self, layer: LoadedLayer) -> Result<LoadedLayer> {
        match self.int8_activations {
            true => Ok(layer.with_int8_activations().context("--int8-activations")?),
            false => Ok(layer),
        }
    }

    /// The GPU in use, if there is one.
    pub(crate) fn gpu_in_use(&self) -> Option<usize> {
        self.machine.compute_capability.map(|_| self.gpu)
    }

    /// The library's options, for activations in `dtype`.
    pub(crate) fn options(&self, dtype: ActivationDtype) -> Options {
        Options {
            dtype,
            kernel: self.kernel.clone(),
            device: self.device,
            gpu: self.gpu,
            pack_cache: self.cache.clone(),
            pool: self.pool.clone(),
            workspaces: Workspaces::of_process(),
            non_finite: NonFinite::Refuse,
            caller_scales: true,
            machine: self.machine.clone(),
        }
    }
}
