//! Streams: work in order, errors named by their steps; events; graphs.

use std::fmt;
use std::sync::{Arc, Mutex};

use crate::driver::{Driver, Handle, call};
use crate::memory::Pod;
use crate::{Error, Gpu, Pinned, Result, View, ViewMut};

/// A queue of work on one GPU. Work of one stream runs in order; calls return before it is done.
///
/// Kernels fail after they were launched, so an error surfaces at a later call. Each stream keeps
/// the layer and the names of the steps launched since it was last known to be well, and says them.
pub struct Stream {
    gpu: Gpu,
    handle: Handle,
    /// Made here, and destroyed with it.
    owned: bool,
    steps: Mutex<Steps>,
}

#[derive(Default)]
struct Steps {
    layer: Option<Arc<str>>,
    /// The first and the last step since all was well, with the layers they belong to.
    first: Option<Step>,
    last: Option<Step>,
}

#[derive(Clone)]
struct Step {
    layer: Option<Arc<str>>,
    name: &'static str,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.layer {
            Some(layer) => write!(f, "{layer}, {}", self.name),
            None => f.write_str(self.name),
        }
    }
}

impl Stream {
    /// A new stream, which does not wait for others.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn new(gpu: &Gpu) -> Result<Self> {
        let driver = gpu.bind()?;
        const NON_BLOCKING: u32 = 1;
        let mut handle = 0;
        // SAFETY: the pointer is good for one handle.
        call!(driver.cuStreamCreate(&mut handle, NON_BLOCKING))?;
        Ok(Self { gpu: gpu.clone(), handle, owned: true, steps: Mutex::default() })
    }

    /// Somebody else's stream, such as an engine's.
    ///
    /// # Safety
    /// `raw` is a `CUstream` of this GPU's primary context that exists for as long as this and all that
    /// is put on it.
    pub unsafe fn from_raw(gpu: &Gpu, raw: usize) -> Self {
        Self { gpu: gpu.clone(), handle: raw, owned: false, steps: Mutex::default() }
    }

    /// The GPU it runs on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The driver's `CUstream`, for an engine that shares it.
    pub fn as_raw(&self) -> usize {
        self.handle
    }

    /// Steps from here on belong to `layer`.
    pub fn set_layer(&self, layer: Arc<str>) {
        self.lock().layer = Some(layer);
    }

    /// Waits until everything is done.
    ///
    /// # Errors
    /// If any of it failed; the message names the steps among which the failed one is.
    pub fn synchronize(&self) -> Result<()> {
        let driver = self.gpu.bind()?;
        // SAFETY: the stream lives.
        let code = unsafe { (driver.cuStreamSynchronize)(self.handle) };
        self.check(driver, "cuStreamSynchronize", code)?;
        let mut steps = self.lock();
        (steps.first, steps.last) = (None, None);
        Ok(())
    }

    /// Copies host memory in; done when this returns.
    ///
    /// # Errors
    /// If the lengths differ, or an earlier step failed.
    pub fn copy_in<T: Pod>(&self, from: &[T], to: ViewMut<'_, T>) -> Result<()> {
        same_length(from.len(), to.len)?;
        let driver = self.enter("copy in")?;
        if !from.is_empty() {
            // SAFETY: both sides hold as many bytes, and are kept until the wait below is over.
            let code = unsafe {
                let bytes = size_of_val(from);
                (driver.cuMemcpyHtoDAsync_v2)(to.pointer, from.as_ptr().cast(), bytes, self.handle)
            };
            self.check(driver, "cuMemcpyHtoDAsync_v2", code)?;
        }
        self.synchronize()
    }

    /// Starts to copy pinned memory in.
    ///
    /// # Errors
    /// As [`Self::copy_in`].
    ///
    /// # Safety
    /// `from` is pinned, and stays as it is until an event that is recorded after this is reached.
    pub unsafe fn start_copy_in<T: Pod>(&self, from: &[T], to: ViewMut<'_, T>) -> Result<()> {
        same_length(from.len(), to.len)?;
        let driver = self.enter("copy in")?;
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: both sides hold as many bytes; the caller keeps the host's.
        let code = unsafe {
            let bytes = size_of_val(from);
            (driver.cuMemcpyHtoDAsync_v2)(to.pointer, from.as_ptr().cast(), bytes, self.handle)
        };
        self.check(driver, "cuMemcpyHtoDAsync_v2", code)
    }

    /// Copies device memory out; done when this returns.
    ///
    /// # Errors
    /// As [`Self::copy_in`].
    pub fn copy_out<T: Pod>(&self, from: View<'_, T>, to: &mut [T]) -> Result<()> {
        same_length(from.len, to.len())?;
        let driver = self.enter("copy out")?;
        if !to.is_empty() {
            // SAFETY: both sides hold as many bytes, and are kept until the wait below is over;
            // any bits are values of `T`.
            let code = unsafe {
                let bytes = size_of_val(to);
                (driver.cuMemcpyDtoHAsync_v2)(
                    to.as_mut_ptr().cast(),
                    from.pointer,
                    bytes,
                    self.handle,
                )
            };
            self.check(driver, "cuMemcpyDtoHAsync_v2", code)?;
        }
        self.synchronize()
    }

    /// Copies device memory to pinned memory of the host, in the stream's order: it is there once an event
    /// [recorded](Self::record) after it is reached.
    ///
    /// # Errors
    /// If the lengths differ, or an earlier step failed.
    pub fn copy_to<T: Pod>(&self, from: View<'_, T>, to: &mut Pinned<T>) -> Result<()> {
        let to = to.as_mut_slice();
        same_length(from.len, to.len())?;
        let driver = self.enter("copy out")?;
        let (bytes, pointer) = (size_of_val(to), to.as_mut_ptr());
        // SAFETY: both sides hold as many bytes; pinned memory is freed once the GPU is idle.
        let code = unsafe {
            (driver.cuMemcpyDtoHAsync_v2)(pointer.cast(), from.pointer, bytes, self.handle)
        };
        self.check(driver, "cuMemcpyDtoHAsync_v2", code)
    }

    /// Copies within the GPU, in the stream's order.
    ///
    /// # Errors
    /// If the lengths differ, or an earlier step failed.
    pub fn copy<T: Pod>(&self, from: View<'_, T>, to: ViewMut<'_, T>) -> Result<()> {
        same_length(from.len, to.len)?;
        let driver = self.enter("copy")?;
        if from.len == 0 {
            return Ok(());
        }
        let bytes = from.len * size_of::<T>();
        // SAFETY: both sides hold as many bytes.
        let code =
            unsafe { (driver.cuMemcpyDtoDAsync_v2)(to.pointer, from.pointer, bytes, self.handle) };
        self.check(driver, "cuMemcpyDtoDAsync_v2", code)
    }

    /// Sets every byte, in the stream's order.
    ///
    /// # Errors
    /// If an earlier step failed.
    pub fn fill<T: Pod>(&self, to: ViewMut<'_, T>, byte: u8) -> Result<()> {
        let driver = self.enter("fill")?;
        if to.len == 0 {
            return Ok(());
        }
        let bytes = to.len * size_of::<T>();
        // SAFETY: the view holds as many bytes; any bits are values of `T`.
        let code = unsafe { (driver.cuMemsetD8Async)(to.pointer, byte, bytes, self.handle) };
        self.check(driver, "cuMemsetD8Async", code)
    }

    /// Marks a point of this stream.
    ///
    /// # Errors
    /// If an earlier step failed.
    pub fn record(&self, event: &Event) -> Result<()> {
        let driver = self.enter("record event")?;
        // SAFETY: both live.
        let code = unsafe { (driver.cuEventRecord)(event.handle, self.handle) };
        self.check(driver, "cuEventRecord", code)
    }

    /// What comes later on this stream starts after `event`'s point of another.
    ///
    /// # Errors
    /// If an earlier step failed.
    pub fn wait(&self, event: &Event) -> Result<()> {
        let driver = self.enter("wait for event")?;
        // SAFETY: both live.
        let code = unsafe { (driver.cuStreamWaitEvent)(self.handle, event.handle, 0) };
        self.check(driver, "cuStreamWaitEvent", code)
    }

    /// Records what `work` puts on this stream (and on streams that wait for it and are waited for)
    /// without running it.
    ///
    /// # Errors
    /// What `work` returns; or if it did something that cannot be recorded, such as waiting.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let driver = self.enter("capture")?;
        const RELAXED: i32 = 2;
        // SAFETY: the stream lives.
        let code = unsafe { (driver.cuStreamBeginCapture_v2)(self.handle, RELAXED) };
        self.check(driver, "cuStreamBeginCapture_v2", code)?;
        let done = work();
        let mut graph = 0;
        // Ends also where `work` failed: the stream would stay in capture otherwise.
        // SAFETY: the pointer is good for one handle.
        let code = unsafe { (driver.cuStreamEndCapture)(self.handle, &mut graph) };
        done?;
        self.check(driver, "cuStreamEndCapture", code)?;
        let mut executable = 0;
        // SAFETY: the pointer is good for one handle, the graph was just made.
        let made = call!(driver.cuGraphInstantiateWithFlags(&mut executable, graph, 0));
        // SAFETY: made above, and no longer needed.
        call!(driver.cuGraphDestroy(graph))?;
        made?;
        Ok(Graph { gpu: self.gpu.clone(), handle: executable })
    }

    /// Runs a captured graph.
    ///
    /// # Safety
    /// All device memory that the captured calls were given still exists.
    ///
    /// # Errors
    /// If an earlier step failed.
    pub unsafe fn replay(&self, graph: &Graph) -> Result<()> {
        let driver = self.enter("graph")?;
        // SAFETY: both live; memory as the caller promises.
        let code = unsafe { (driver.cuGraphLaunch)(graph.handle, self.handle) };
        self.check(driver, "cuGraphLaunch", code)
    }

    /// Notes a step and makes the GPU this thread's.
    pub(crate) fn enter(&self, name: &'static str) -> Result<&'static Driver> {
        let mut steps = self.lock();
        let step = Step { layer: steps.layer.clone(), name };
        steps.first.get_or_insert_with(|| step.clone());
        steps.last = Some(step);
        drop(steps);
        self.gpu.bind()
    }

    /// `code` as a result that names the steps.
    pub(crate) fn check(&self, driver: &Driver, call: &'static str, code: i32) -> Result<()> {
        driver.check_at(call, code, || {
            let steps = self.lock();
            match (&steps.first, &steps.last) {
                (Some(first), Some(last)) => {
                    format!("; in one of the steps from '{first}' to '{last}'")
                }
                _ => String::new(),
            }
        })
    }

    pub(crate) fn handle(&self) -> Handle {
        self.handle
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Steps> {
        self.steps.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.owned
            && let Ok(driver) = self.gpu.bind()
        {
            // SAFETY: made once, destroyed once; the driver finishes its work first.
            let _ = unsafe { (driver.cuStreamDestroy_v2)(self.handle) };
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream of {:?}", self.gpu)
    }
}

/// A point of a stream, with its time.
pub struct Event {
    gpu: Gpu,
    handle: Handle,
}

impl Event {
    /// An event that nothing has recorded yet.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn new(gpu: &Gpu) -> Result<Self> {
        let driver = gpu.bind()?;
        let mut handle = 0;
        // SAFETY: the pointer is good for one handle.
        call!(driver.cuEventCreate(&mut handle, 0))?;
        Ok(Self { gpu: gpu.clone(), handle })
    }

    /// Waits until its point is reached.
    ///
    /// # Errors
    /// If work before it failed.
    pub fn synchronize(&self) -> Result<()> {
        let driver = self.gpu.bind()?;
        // SAFETY: the event lives.
        call!(driver.cuEventSynchronize(self.handle))
    }

    /// Whether its point is reached. Does not wait.
    ///
    /// # Errors
    /// If work before it failed.
    pub fn is_reached(&self) -> Result<bool> {
        const NOT_READY: i32 = 600;
        let driver = self.gpu.bind()?;
        // SAFETY: the event lives.
        match unsafe { (driver.cuEventQuery)(self.handle) } {
            NOT_READY => Ok(false),
            code => driver.check("cuEventQuery", code).map(|()| true),
        }
    }

    /// Microseconds from `earlier` to this one; both have been reached.
    ///
    /// # Errors
    /// If one has not been recorded or reached.
    pub fn microseconds_since(&self, earlier: &Event) -> Result<f64> {
        let driver = self.gpu.bind()?;
        let mut milliseconds = 0.0;
        // SAFETY: the pointer is good for one float; both events live.
        call!(driver.cuEventElapsedTime(&mut milliseconds, earlier.handle, self.handle))?;
        Ok(f64::from(milliseconds) * 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(driver) = self.gpu.bind() {
            // SAFETY: made once, destroyed once.
            let _ = unsafe { (driver.cuEventDestroy_v2)(self.handle) };
        }
    }
}

/// Captured work, ready to run again and again.
pub struct Graph {
    gpu: Gpu,
    handle: Handle,
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Ok(driver) = self.gpu.bind() {
            // SAFETY: made once, destroyed once.
            let _ = unsafe { (driver.cuGraphExecDestroy)(self.handle) };
        }
    }
}

fn same_length(from: usize, to: usize) -> Result<()> {
    if from == to {
        return Ok(());
    }
    Err(Error::input("copy", format!("{from} elements to a place for {to}")))
}
