//! Measurements on a GPU: what it can do at most, and passes on rows of its own memory, replayed as a graph.

use std::sync::Arc;
use std::time::Duration;

use moe_runner::comm::Communicator;
use moe_runner::hidden::{ActivationDtype, Rows, RowsMut};
use serde::{Deserialize, Serialize};

use crate::times::Times;

/// What a GPU can do at most. Rates are 10⁹ a second; multiply-adds count two.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct GpuLimits {
    pub(crate) name: String,
    /// Bytes read and written by a copy.
    pub(crate) copy_gbps: f64,
    pub(crate) read_gbps: f64,
    /// Without tensor cores.
    pub(crate) f32_gflops: f64,
    /// Tensor cores, where they are measured.
    pub(crate) bf16_gflops: Option<f64>,
    pub(crate) fp8_gflops: Option<f64>,
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn limits(_: usize) -> moe_runner::Result<GpuLimits> {
    Err(moe_runner::Error::Device("this build was made without the feature 'cuda'".into()))
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn time(
    _: (usize, usize),
    _: (ActivationDtype, usize),
    _: &[&[f32]],
    _: impl FnMut(usize, Rows<'_>, RowsMut<'_>) -> moe_runner::Result<()>,
) -> moe_runner::Result<Times> {
    limits(0).map(|_| Times::default())
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn time_together(
    _: ((usize, usize), bool),
    _: (ActivationDtype, usize),
    _: &[&[f32]],
    _: impl FnMut(usize, Rows<'_>, RowsMut<'_>) -> moe_runner::Result<()>,
    _: impl FnMut() -> moe_runner::Result<()>,
    _: impl FnMut(Option<Duration>) -> moe_runner::Result<Duration>,
) -> moe_runner::Result<Times> {
    limits(0).map(|_| Times::default())
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn memory(_: usize) -> Option<u64> {
    None
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn count() -> usize {
    0
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn connect(
    _: Arc<dyn Communicator>,
    _: usize,
) -> moe_runner::Result<Arc<dyn Communicator>> {
    limits(0).map(|_| moe_runner::comm::single())
}

/// GPUs that the driver shows; none without one.
#[cfg(feature = "cuda")]
pub(crate) fn count() -> usize {
    moe_cuda::Gpu::count().unwrap_or(0)
}

/// Bytes of memory of GPU `index`, where there is one.
#[cfg(feature = "cuda")]
pub(crate) fn memory(index: usize) -> Option<u64> {
    Some(moe_cuda::Gpu::new(index).ok()?.memory().ok()?.1)
}

/// The same ranks, each with a GPU.
#[cfg(feature = "cuda")]
pub(crate) fn connect(
    world: Arc<dyn Communicator>,
    gpu: usize,
) -> moe_runner::Result<Arc<dyn Communicator>> {
    moe_runner::comm::nccl::open(world, gpu)
}

#[cfg(feature = "cuda")]
pub(crate) use measured::{limits, time, time_together};

#[cfg(feature = "cuda")]
mod measured {
    use std::path::PathBuf;

    use half::{bf16, f16};
    use moe_cuda::{Buffer, Compiler, Event, Gpu, Graph, Limits, Modules, Stream};
    use moe_runner::Error;
    use moe_runner::hidden::{DeviceRows, DeviceRowsMut};

    use super::*;
    use crate::times::times;

    /// How long a graph is replayed, if that is short.
    const BUDGET: Duration = Duration::from_millis(300);

    fn error(error: moe_cuda::Error) -> Error {
        Error::Device(error.to_string())
    }

    pub(crate) fn limits(index: usize) -> moe_runner::Result<GpuLimits> {
        let measure = || {
            let gpu = Gpu::new(index)?;
            let compiler = Compiler::open(std::env::var_os("NVRTC").map(PathBuf::from).as_deref())?;
            let modules = Modules::new(&gpu, compiler, Modules::user_cache());
            let limits = Limits::measure(&modules, &Stream::new(&gpu)?)?;
            let name = gpu.properties().name.clone();
            let Limits { read_gbps, copy_gbps, f32_gflops, tensor_gflops } = limits;
            let [bf16_gflops, fp8_gflops] =
                tensor_gflops.map_or([None; 2], |rates| rates.map(Some));
            Ok(GpuLimits { name, copy_gbps, read_gbps, f32_gflops, bf16_gflops, fp8_gflops })
        };
        measure().map_err(error)
    }

    /// Bytes of `values` in `dtype`.
    fn bytes(dtype: ActivationDtype, values: &[f32]) -> Vec<u8> {
        match dtype {
            ActivationDtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            ActivationDtype::F16 => {
                values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()
            }
            ActivationDtype::Bf16 => {
                values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()
            }
        }
    }

    /// The time of one of the passes that `forward` puts on `stream` of GPU `index`, one for each of
    /// `batches` `[T, width]`, all together in a graph. Nothing in them waits or copies from the host.
    pub(crate) fn time(
        (index, stream): (usize, usize),
        (dtype, width): (ActivationDtype, usize),
        batches: &[&[f32]],
        mut forward: impl FnMut(usize, Rows<'_>, RowsMut<'_>) -> moe_runner::Result<()>,
    ) -> moe_runner::Result<Times> {
        let gpu = Gpu::new(index).map_err(error)?;
        // SAFETY: the runner's stream, which lives as long as the runner that `forward` uses.
        let stream = unsafe { Stream::from_raw(&gpu, stream) };
        let mut buffers = buffers(&stream, dtype, batches)?;
        let graph = capture(&stream, (dtype, width), &mut buffers, &mut forward)?;
        let (begin, end) = (Event::new(&gpu).map_err(error)?, Event::new(&gpu).map_err(error)?);
        times(BUDGET, 5, || {
            let replay = || {
                stream.record(&begin)?;
                // SAFETY: rows, weights and working memory are as they were captured.
                unsafe { stream.replay(&graph)? };
                stream.record(&end)?;
                end.synchronize()?;
                end.microseconds_since(&begin)
            };
            let micros = replay().map_err(error)?;
            Ok(Duration::from_secs_f64(micros * 1e-6 / batches.len().max(1) as f64))
        })
    }

    /// Rows of the GPU with these values, and as many to write.
    type Pair = (Buffer<u8>, Buffer<u8>);

    fn buffers(
        stream: &Stream,
        dtype: ActivationDtype,
        batches: &[&[f32]],
    ) -> moe_runner::Result<Vec<Pair>> {
        let of = |rows: &&[f32]| {
            let from = Buffer::from_slice(stream, &bytes(dtype, rows), "rows")?;
            let to = Buffer::<u8>::new(stream.gpu(), from.len(), "rows")?;
            Ok((from, to))
        };
        batches.iter().map(of).collect::<moe_cuda::Result<_>>().map_err(error)
    }

    /// `forward` on every pair.
    fn passes(
        (dtype, width): (ActivationDtype, usize),
        buffers: &mut [Pair],
        forward: &mut impl FnMut(usize, Rows<'_>, RowsMut<'_>) -> moe_runner::Result<()>,
    ) -> moe_runner::Result<()> {
        for (call, (from, to)) in buffers.iter_mut().enumerate() {
            let shape = [from.len() / dtype.size() / width, width];
            let (from, to) = (from.view().address(), to.view_mut().address());
            // SAFETY: both hold as many numbers, and outlive what is done with them: a graph, or a wait.
            let rows = unsafe {
                let from = DeviceRows::new(from, dtype, shape, width);
                let to = DeviceRowsMut::new(to, dtype, shape, width);
                from.and_then(|from| Ok((Rows::Device(from), RowsMut::Device(to?))))
            };
            let (from, to) = rows?;
            forward(call, from, to)?;
        }
        Ok(())
    }

    /// The same as a graph.
    fn capture(
        stream: &Stream,
        of: (ActivationDtype, usize),
        buffers: &mut [Pair],
        forward: &mut impl FnMut(usize, Rows<'_>, RowsMut<'_>) -> moe_runner::Result<()>,
    ) -> moe_runner::Result<Graph> {
        let mut refused = None;
        let graph = stream.capture(|| {
            refused = passes(of, buffers, forward).err();
            Ok(())
        });
        match refused {
            Some(refused) => Err(refused),
            None => graph.map_err(error),
        }
    }

    /// As [`time`], of passes over ranks, which all begin together and end with a wait of `done`. Only passes that
    /// need no processor can be `captured`. `ranks` is a barrier without a time, and gives the longest of all ranks'.
    pub(crate) fn time_together(
        ((index, stream), captured): ((usize, usize), bool),
        of: (ActivationDtype, usize),
        batches: &[&[f32]],
        mut forward: impl FnMut(usize, Rows<'_>, RowsMut<'_>) -> moe_runner::Result<()>,
        mut done: impl FnMut() -> moe_runner::Result<()>,
        mut ranks: impl FnMut(Option<Duration>) -> moe_runner::Result<Duration>,
    ) -> moe_runner::Result<Times> {
        let gpu = Gpu::new(index).map_err(error)?;
        // SAFETY: the runner's stream, which lives as long as the runner that `forward` uses.
        let stream = unsafe { Stream::from_raw(&gpu, stream) };
        let mut buffers = buffers(&stream, of.0, batches)?;
        // whatever is made the first time, before it is captured
        passes(of, &mut buffers, &mut forward)?;
        done()?;
        let graph = match captured {
            true => Some(capture(&stream, of, &mut buffers, &mut forward)?),
            false => None,
        };
        let (begin, end) = (Event::new(&gpu).map_err(error)?, Event::new(&gpu).map_err(error)?);
        times(BUDGET, 20, || {
            ranks(None)?;
            stream.record(&begin).map_err(error)?;
            match &graph {
                // SAFETY: rows, weights and working memory are as they were captured.
                Some(graph) => unsafe { stream.replay(graph) }.map_err(error)?,
                None => passes(of, &mut buffers, &mut forward)?,
            }
            stream.record(&end).map_err(error)?;
            done()?;
            let micros = end.microseconds_since(&begin).map_err(error)?;
            ranks(Some(Duration::from_secs_f64(micros * 1e-6 / batches.len().max(1) as f64)))
        })
    }
}
