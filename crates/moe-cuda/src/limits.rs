//! What a GPU can do at most, measured in the same process as what it does.

use crate::module::{Launch, Modules};
use crate::sources::{LIMITS, TENSOR};
use crate::{Buffer, Event, Result, Stream};

/// See the module. Rates are 10⁹ a second; multiply-adds count two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Bytes read.
    pub read_gbps: f64,
    /// Bytes read and written by a copy.
    pub copy_gbps: f64,
    /// Operations in f32, without tensor cores.
    pub f32_gflops: f64,
    /// Operations of the tensor cores in bf16 and in FP8: on Hopper.
    pub tensor_gflops: Option<[f64; 2]>,
}

impl Limits {
    /// Measures, in about a second.
    ///
    /// # Errors
    /// If the GPU has not two gigabytes free, or a step fails.
    pub fn measure(modules: &Modules, stream: &Stream) -> Result<Self> {
        const BYTES: usize = 1 << 30;
        let gpu = modules.gpu();
        let units = gpu.properties().multiprocessors;
        let mut out = Buffer::<u32>::new(gpu, 1, "the limits")?;
        let out = out.view_mut().address();
        let mut memory = Buffer::<u8>::new(gpu, 2 * BYTES, "the limits")?;
        stream.fill(memory.view_mut(), 1)?;

        let read = modules.function(&LIMITS, &[], "read_all")?;
        let all = memory.view().address();
        let count = (2 * BYTES / 16) as u64;
        let seconds = best(stream, || {
            // SAFETY: the parameters of `read_all`; the buffers hold what it reads and writes.
            unsafe {
                let launch = Launch::plain(units as u32 * 8, 512);
                read.launch(stream, launch, &[&all, &count, &out])
            }
        })?;
        let read_gbps = 2.0 * BYTES as f64 / seconds / 1e9;

        let (from, mut to) = (memory.view().part(0..BYTES), Buffer::new(gpu, BYTES, "the limits")?);
        let seconds = best(stream, || stream.copy(from, to.view_mut()))?;
        let copy_gbps = 2.0 * BYTES as f64 / seconds / 1e9;

        let multiply = modules.function(&LIMITS, &[], "multiply_add")?;
        let rounds = 4096u32;
        let (blocks, threads) = (units * 4, 512);
        let seconds = best(stream, || {
            // SAFETY: the parameters of `multiply_add`.
            unsafe {
                let launch = Launch::plain(blocks as u32, threads as u32);
                multiply.launch(stream, launch, &[&rounds, &0.999f32, &0.001f32, &out])
            }
        })?;
        let operations = 2.0 * 32.0 * f64::from(rounds) * (blocks * threads) as f64;
        let f32_gflops = operations / seconds / 1e9;

        let tensor_gflops = match gpu.properties().capability {
            (9, 0) => Some([tensor(modules, stream, 0, out)?, tensor(modules, stream, 1, out)?]),
            _ => None,
        };
        Ok(Self { read_gbps, copy_gbps, f32_gflops, tensor_gflops })
    }
}

/// Of the tensor cores, in bf16 (0) or FP8 (1).
fn tensor(modules: &Modules, stream: &Stream, format: usize, out: u64) -> Result<f64> {
    let kernel = modules.function(&TENSOR, &options(format), "tensor_peak")?;
    let (rows_b, k) = if format == 0 { (256, 16) } else { (128, 32) };
    let shared = ((128 + rows_b) * 128 + 1024) as u32;
    kernel.allow_shared(shared)?;
    let (rounds, blocks) = (16_384u32, modules.gpu().properties().multiprocessors as u32);
    let launch = Launch { grid: (blocks, 1), block: 256, shared, cooperative: false };
    // SAFETY: the parameters of `tensor_peak`.
    let seconds = best(stream, || unsafe { kernel.launch(stream, launch, &[&rounds, &out]) })?;
    // two warp groups of 64 rows, four steps a round
    let operations = 2.0 * 128.0 * rows_b as f64 * (4 * k) as f64 * f64::from(rounds);
    Ok(operations * f64::from(blocks) / seconds / 1e9)
}

pub(crate) fn options(format: usize) -> Vec<String> {
    vec![format!("-DFORMAT={format}")]
}

/// Seconds of the fastest of five runs, after one that is not counted.
fn best(stream: &Stream, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let (begin, end) = (Event::new(stream.gpu())?, Event::new(stream.gpu())?);
    run()?;
    let mut least = f64::INFINITY;
    for _ in 0..5 {
        stream.record(&begin)?;
        run()?;
        stream.record(&end)?;
        end.synchronize()?;
        least = least.min(end.microseconds_since(&begin)? * 1e-6);
    }
    Ok(least)
}
