//! What the machine allows.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use moe_kernels::isa::Features;
use moe_kernels::kernel::Kernel;
use moe_kernels::limits::Limits;
use moe_kernels::pool::Pool;
use moe_runner::experts::{Archs, Arithmetic, Formats, KernelDesc, Target};
use moe_runner::spec::ActivationFormat;
use serde::Serialize;

use crate::gpu::{self, GpuLimits};
use crate::report::units::plural;

/// How long the limits are measured: a second is ample.
const LIMITS_BUDGET: Duration = Duration::from_secs(1);

/// What this machine can do at most, on these threads.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct MachineLimits {
    pub(crate) threads: usize,
    pub(crate) isa: &'static str,
    /// 10⁹ bytes/s of memory read.
    pub(crate) read_gbps: f64,
    /// 10⁹ f32 operations/s; multiply-adds count two.
    pub(crate) f32_gflops: f64,
    /// The same of bf16 dot products, where the processor has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bf16_gflops: Option<f64>,
    /// The same of dot products of 8-bit integers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) int8_gflops: Option<f64>,
    /// The same of bf16 tile products.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tile_gflops: Option<f64>,
    /// Of a GPU, where kernels run on one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gpu: Option<GpuLimits>,
}

impl MachineLimits {
    pub(crate) fn measure(pool: &Pool) -> Self {
        let kernel = Kernel::detect();
        let limits = Limits::measure(kernel, pool, LIMITS_BUDGET);
        let Limits { read_gbps, f32_gflops, bf16_gflops, int8_gflops, tile_gflops, threads } =
            limits;
        let isa = kernel.name();
        let gpu = None;
        Self { threads, isa, read_gbps, f32_gflops, bf16_gflops, int8_gflops, tile_gflops, gpu }
    }

    /// The same, with GPU `index`.
    pub(crate) fn with_gpu(self, index: usize) -> moe_runner::Result<Self> {
        Ok(Self { gpu: Some(gpu::limits(index)?), ..self })
    }

    /// 10⁹ bytes/s of memory read, of the device in use.
    pub(crate) fn device_read_gbps(&self) -> f64 {
        self.gpu.as_ref().map_or(self.read_gbps, |gpu| gpu.read_gbps)
    }

    /// 10⁹ operations/s of the device in use, by arithmetic.
    pub(crate) fn gflops(&self) -> BTreeMap<String, f64> {
        let all = match &self.gpu {
            None => vec![
                ("f32", Some(self.f32_gflops)),
                ("bf16", self.bf16_gflops),
                ("int8", self.int8_gflops),
                ("bf16_tiles", self.tile_gflops),
            ],
            Some(gpu) => vec![
                ("f32", Some(gpu.f32_gflops)),
                ("bf16", gpu.bf16_gflops),
                ("fp8", gpu.fp8_gflops),
            ],
        };
        all.into_iter().filter_map(|(name, rate)| Some((name.to_owned(), rate?))).collect()
    }

    /// The least time that this machine needs to read so many bytes and do so much arithmetic with a
    /// kernel.
    pub(crate) fn least_seconds(&self, kernel: &KernelDesc, bytes: f64, flops: f64) -> f64 {
        let (read_gbps, gflops) = match (&self.gpu, kernel.target) {
            (Some(gpu), Target::Cuda(archs)) => (gpu.read_gbps, gpu.gflops(kernel, archs)),
            _ => {
                let tiles = kernel.target.features().contains(Features::AMX_BF16);
                let dots = match kernel.arithmetic {
                    Arithmetic::Bf16 if tiles => self.tile_gflops,
                    Arithmetic::Bf16 => self.bf16_gflops,
                    Arithmetic::Int8 => self.int8_gflops,
                    _ => None,
                };
                (self.read_gbps, dots.unwrap_or(self.f32_gflops))
            }
        };
        (bytes / read_gbps).max(flops / gflops) / 1e9
    }
}

impl GpuLimits {
    /// Of the units that a kernel computes with: those for one architecture alone use its tensor cores.
    fn gflops(&self, kernel: &KernelDesc, archs: Archs) -> f64 {
        let fp8 = kernel
            .schemes
            .iter()
            .any(|scheme| matches!(scheme.rows, Formats::Only([ActivationFormat::Fp8Group])));
        let tensor = if fp8 { self.fp8_gflops } else { self.bf16_gflops };
        match archs {
            Archs::Exactly(_) => tensor.unwrap_or(self.f32_gflops),
            Archs::AtLeast(_) => self.f32_gflops,
        }
    }
}

impl fmt::Display for MachineLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(gpu) = &self.gpu {
            let GpuLimits { name, read_gbps, copy_gbps, f32_gflops, .. } = gpu;
            write!(
                f,
                "{name}: reads {read_gbps:.0} GB/s, copies {copy_gbps:.0}, computes {:.1} TFLOP/s in f32",
                f32_gflops / 1e3
            )?;
            for (what, rate) in [("bf16", gpu.bf16_gflops), ("fp8", gpu.fp8_gflops)] {
                if let Some(rate) = rate {
                    write!(f, ", {:.0} in {what}", rate / 1e3)?;
                }
            }
            return f.write_str(" (measured now)");
        }
        write!(
            f,
            "{}, {}: reads {:.1} GB/s, computes {:.0} GFLOP/s in f32",
            plural(self.threads, "thread"),
            self.isa,
            self.read_gbps,
            self.f32_gflops
        )?;
        for (what, rate) in [
            ("bf16", self.bf16_gflops),
            ("int8", self.int8_gflops),
            ("bf16 tiles", self.tile_gflops),
        ] {
            if let Some(gflops) = rate {
                write!(f, ", {gflops:.0} in {what}")?;
            }
        }
        f.write_str(" (measured now)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slower_of_reading_and_arithmetic_is_the_limit() {
        let limits = MachineLimits {
            threads: 1,
            isa: "portable",
            read_gbps: 10.0,
            f32_gflops: 100.0,
            bf16_gflops: Some(200.0),
            int8_gflops: Some(400.0),
            tile_gflops: Some(1000.0),
            gpu: None,
        };
        let kernel = &moe_runner::experts::cpu::CPU_PORTABLE;
        assert!((limits.least_seconds(kernel, 20e9, 50e9) - 2.0).abs() < 1e-9);
        assert!((limits.least_seconds(kernel, 1e9, 50e9) - 0.5).abs() < 1e-9);
        let kernel = &moe_runner::experts::cpu::CPU_AVX512_BF16;
        assert!((limits.least_seconds(kernel, 1e9, 50e9) - 0.25).abs() < 1e-9);
        let kernel = &moe_runner::experts::cpu::CPU_AVX512_VNNI;
        assert!((limits.least_seconds(kernel, 1e9, 100e9) - 0.25).abs() < 1e-9);
        let kernel = &moe_runner::experts::cpu::CPU_AMX_BF16;
        assert!((limits.least_seconds(kernel, 1e9, 500e9) - 0.5).abs() < 1e-9);
    }

    /// A kernel is held against the units that it uses, of the device that it runs on.
    #[test]
    fn a_gpus_kernels_have_its_limits() {
        use moe_runner::experts::cuda::{CUDA_F32, CUDA_SM90_BF16, CUDA_SM90_FP8};
        let gpu = GpuLimits {
            name: "made up".into(),
            copy_gbps: 900.0,
            read_gbps: 1000.0,
            f32_gflops: 10e3,
            bf16_gflops: Some(100e3),
            fp8_gflops: Some(200e3),
        };
        let limits = MachineLimits {
            threads: 1,
            isa: "portable",
            read_gbps: 10.0,
            f32_gflops: 100.0,
            bf16_gflops: Some(200.0),
            int8_gflops: Some(400.0),
            tile_gflops: Some(1000.0),
            gpu: Some(gpu),
        };
        for (kernel, seconds) in [(&CUDA_F32, 2.0), (&CUDA_SM90_BF16, 0.2), (&CUDA_SM90_FP8, 0.1)] {
            assert!((limits.least_seconds(kernel, 0.0, 20e12) - seconds).abs() < 1e-9);
        }
        let host = &moe_runner::experts::cpu::CPU_PORTABLE;
        assert!((limits.least_seconds(host, 20e9, 0.0) - 2.0).abs() < 1e-9);
    }
}
