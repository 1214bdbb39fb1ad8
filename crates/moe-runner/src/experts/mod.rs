//! The experts' two products, and every kernel that computes them.
//!
//! A kernel gets rows and a [`Plan`]; it returns one row for each planned slot. Weights (unless the kernel
//! [`weighs`](Caps::WEIGHS), because it rounds after that) and sums are the exchange's
//! business, after the rows have come back to their token's rank, so that there is one order of
//! summation for all kernels and all splits.

pub mod cpu;
pub mod cuda;
mod desc;
pub mod emulation;
mod grouped;
mod pack_cache;
pub mod reference;
mod rows;

pub use crate::exchange::RowFormat;
pub use desc::{
    Archs, Arithmetic, Build, Caps, Determinism, Device, Extras, Formats, Functions, KernelDesc,
    ProductFormat, Scheme, Target,
};

pub use pack_cache::{PackCache, PackCacheUse};

use std::sync::Arc;
use std::time::Duration;

use moe_kernels::arena::Arena;
use moe_kernels::pool::{Inline, ThreadPool};

use crate::hidden::{ActivationDtype, DeviceRouting, Rows, RowsMut};
pub(crate) use rows::{dot_f64, rms_norm};

use crate::comm::Communicator;
use crate::exchange::{BetweenGpus, ExpertMap};
use crate::plan::Plan;
use crate::router::{LogicalId, Router, Routing};
use crate::weights::{Expert, LoadedLayer};
use crate::{Error, Result, spec};
use cpu::{
    CPU_AMX_BF16, CPU_AVX2, CPU_AVX2_Q8, CPU_AVX512, CPU_AVX512_BF16, CPU_AVX512_VNNI,
    CPU_AVX512_VNNI_Q8, CPU_PORTABLE,
};
use cuda::{CUDA_F32, CUDA_SM90_BF16, CUDA_SM90_FP8, CUDA_SM90_INT4, CUDA_SM90_MXFP4};
use emulation::{EMULATION_MXFP8, EMULATION_NVFP4, EMULATION_OCP_MX};
use reference::{REFERENCE, REFERENCE_MONOLITHIC};

/// Every kernel, in order of preference.
pub const KERNELS: &[&KernelDesc] = &[
    &CPU_AMX_BF16,
    &CPU_AVX512_VNNI,
    &CPU_AVX512_VNNI_Q8,
    &CPU_AVX512_BF16,
    &CPU_AVX2_Q8,
    &CPU_AVX512,
    &CPU_AVX2,
    &CPU_PORTABLE,
    &EMULATION_NVFP4,
    &EMULATION_OCP_MX,
    &EMULATION_MXFP8,
    &CUDA_SM90_BF16,
    &CUDA_SM90_FP8,
    &CUDA_SM90_MXFP4,
    &CUDA_SM90_INT4,
    &CUDA_F32,
    &REFERENCE,
    &REFERENCE_MONOLITHIC,
];

/// A kernel with its packed weights.
#[derive(Debug)]
pub enum BuiltKernel {
    /// Gets rows and a plan, returns a row for each slot.
    Modular(Box<dyn Experts>),
    /// Gets rows and logits, returns weighted sums.
    Monolithic(Box<dyn MonolithicExperts>),
    /// Gets hidden states, returns the layer's output: the whole pass, on a device of its own.
    Layer(Box<dyn LayerKernel>),
}

/// Packs `set` for the kernel that `desc` describes, on the calling thread. `dtype` is the
/// activations': kernels that store intermediate results round them to it.
///
/// # Errors
/// [`Error::NoKernel`] if the processor lacks the instruction set, or the
/// kernel cannot compute these experts.
pub fn build(
    desc: &'static KernelDesc,
    set: ExpertSet<'_>,
    dtype: ActivationDtype,
) -> Result<BuiltKernel> {
    let ExpertSet { spec, weight_on, experts } = set;
    let call = BuildCall {
        spec,
        weight_on,
        experts: experts.to_vec(),
        layer: None,
        dtype,
        rows: dtype,
        gpu: 0,
        spread: None,
        pack_cache: None,
        pool: &Inline,
        progress: &mut |_| (),
    };
    (desc.build)(desc, call)
}

/// What a kernel is built from.
pub struct BuildCall<'a> {
    /// Gated or not, activation, biases, norm.
    pub spec: &'a spec::ExpertSpec,
    /// Where weights are multiplied.
    pub weight_on: spec::WeightOn,
    /// This rank's experts, by local id. All have the same shapes. What is packed is let go of.
    pub experts: Vec<Expert>,
    /// The layer that they belong to, which may lack them: for kernels that take all of it.
    pub layer: Option<&'a LoadedLayer>,
    /// Dtype of the hidden states.
    pub dtype: ActivationDtype,
    /// Dtype that holds the experts' rows exactly: that of the hidden states, or f32 after a transform.
    pub rows: ActivationDtype,
    /// Which GPU, for kernels that run on one.
    pub gpu: usize,
    /// The ranks that hold the other experts, for a whole layer that sends rows to them by itself.
    pub spread: Option<Spread>,
    /// Where packed weights are kept from one start to the next; for kernels of processors.
    pub pack_cache: Option<&'a PackCache>,
    /// Threads to pack on.
    pub pool: &'a dyn ThreadPool,
    /// Told how far it is.
    pub progress: &'a mut (dyn FnMut(Progress) + Send),
}

/// Ranks that hold the experts of a layer, each some, and rows of their own.
#[derive(Clone)]
pub struct Spread {
    /// The ranks, in the order of `map`.
    pub group: Arc<dyn Communicator>,
    /// Who holds which.
    pub map: Arc<ExpertMap>,
    /// How rows go to them.
    pub way: BetweenGpus,
    /// Micro-batches whose rows are on their way while another's experts work.
    pub lanes: usize,
}

/// How far the packing of a layer's experts is, in projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Done.
    pub done: usize,
    /// Of so many.
    pub total: usize,
}

impl BuildCall<'_> {
    /// Sizes of the experts, for a kernel to report.
    pub fn shape(&self) -> ExpertShape {
        let Self { spec, weight_on, .. } = *self;
        ExpertSet { spec, weight_on, experts: &self.experts }.shape()
    }
}

/// What the experts of one rank are, for a kernel to pack.
#[derive(Clone, Copy, Debug)]
pub struct ExpertSet<'a> {
    /// Gated or not, activation, biases, norm.
    pub spec: &'a spec::ExpertSpec,
    /// Where weights are multiplied.
    pub weight_on: spec::WeightOn,
    /// This rank's experts, by local id. All have the same shapes.
    pub experts: &'a [Expert],
}

/// Sizes of the experts that a kernel holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertShape {
    /// How many.
    pub experts: usize,
    /// Width of the rows that go in and come out.
    pub hidden: usize,
    /// Width between the two products.
    pub intermediate: usize,
}

impl ExpertSet<'_> {
    /// Its sizes, for a kernel to report.
    pub fn shape(&self) -> ExpertShape {
        ExpertShape {
            experts: self.experts.len(),
            hidden: self.hidden(),
            intermediate: self.intermediate(),
        }
    }

    /// Width of the rows that go in and come out.
    pub fn hidden(&self) -> usize {
        self.experts.first().map_or(0, |expert| expert.up.cols())
    }

    /// Width between the two products.
    pub fn intermediate(&self) -> usize {
        self.experts.first().map_or(0, |expert| expert.up.rows())
    }
}

/// Replaces this rank's largest magnitudes, one for each planned slot, by those over all ranks that
/// hold slices of the same experts. All of them call it together, once in a forward pass.
pub type RowMax<'a> = &'a dyn Fn(&mut [f32]) -> Result<()>;

/// Rows for the experts of this rank.
pub struct ExpertCall<'a> {
    /// Input rows `[rows, H]`.
    pub rows: &'a [f32],
    /// The slots of these rows, by local expert.
    pub plan: &'a Plan,
    /// Weight of each slot `[rows · k]`; kernels use it where weights multiply the input, and where
    /// they [weigh](Caps::WEIGHS) their rows.
    pub weights: &'a [f32],
    /// One output row for each planned slot, `[places, H]`, in the plan's order. Overwritten.
    pub out: &'a mut [f32],
    /// The rows are quantised already, as the first product asks for it
    /// ([`Caps::QUANTISED_ROWS`]).
    pub quantised: bool,
    /// Given where experts are cut into slices and the rows between the two products are quantised
    /// with one scale for a whole row.
    pub row_max: Option<RowMax<'a>>,
    /// Threads to run on.
    pub pool: &'a dyn ThreadPool,
    /// Working memory, to be used again by others.
    pub arena: &'a mut Arena,
}

/// A kernel with its packed weights: computes `expert(row)` for each slot of the plan.
pub trait Experts: Send + Sync + std::fmt::Debug {
    /// What the kernel is and can do.
    fn desc(&self) -> &'static KernelDesc;

    /// Sizes of the experts that it holds.
    fn shape(&self) -> ExpertShape;

    /// Bytes of the arena that it needs for `slots` planned slots at most, on `threads` threads.
    fn scratch_bytes(&self, slots: usize, threads: usize) -> usize;

    /// Bytes of weights that are read for `plan`.
    fn weight_bytes(&self, plan: &Plan) -> usize;

    /// Computes one row for each planned slot.
    ///
    /// # Errors
    /// What the device or the numbers refuse. The shapes are the runner's responsibility.
    fn forward(&self, call: ExpertCall<'_>) -> Result<()>;
}

/// A kernel that routes by itself, and returns the weighted sums.
pub trait MonolithicExperts: Send + Sync + std::fmt::Debug {
    /// What the kernel is and can do.
    fn desc(&self) -> &'static KernelDesc;

    /// Sizes of the experts that it holds: all of the layer's.
    fn shape(&self) -> ExpertShape;

    /// Bytes of weights that are read for a batch routed as `routing`.
    fn weight_bytes(&self, routing: &Routing) -> usize;

    /// Routes the rows by their logits, into `routing`, and writes the weighted sum of the chosen
    /// experts for each row to `out`. Identity experts are left to the runner.
    ///
    /// # Errors
    /// As the router's.
    fn forward(&self, call: MonolithicCall<'_>) -> Result<()>;
}

/// Rows for a kernel that routes by itself: all inputs of a row together.
#[derive(Debug)]
pub struct MonolithicCall<'a> {
    /// `[T, H]`.
    pub rows: &'a [f32],
    /// `[T, E_total]`.
    pub logits: &'a [f32],
    /// `[T]`, where routing goes by token id.
    pub input_ids: Option<&'a [u32]>,
    /// The layer's router.
    pub router: &'a Router,
    /// Filled by the kernel: what was chosen.
    pub routing: &'a mut Routing,
    /// `[T, H]`, overwritten.
    pub out: &'a mut [f32],
}

/// Which of two streams waits for what is on the other one now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamOrder {
    /// Passes from here on wait for the other stream.
    PassesWait,
    /// What is put on the other stream from here on waits for the passes.
    PassesFirst,
}

/// A kernel that is the whole layer, on a device of its own: gate, routing, experts, shared experts and
/// what is done to their sum.
pub trait LayerKernel: Send + std::fmt::Debug {
    /// What the kernel is and can do.
    fn desc(&self) -> &'static KernelDesc;

    /// Sizes of the experts that it holds: all of the layer's.
    fn shape(&self) -> ExpertShape;

    /// Bytes of the device's working memory for a pass of `tokens` tokens of `top_k` slots. Layers on
    /// one device share it.
    fn workspace_bytes(&self, tokens: usize, top_k: usize) -> usize;

    /// Bytes of weights that are read for a batch routed as `routing`, as the checkpoint stores them.
    fn weight_bytes(&self, routing: &Routing) -> usize;

    /// Makes sure of the working memory for passes of up to `tokens` tokens of `top_k` slots, so that
    /// they allocate nothing.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn reserve(&mut self, tokens: usize, top_k: usize) -> Result<()>;

    /// The pass. With rows of the host, or with `seen`, the output is there when this returns, and what
    /// is wrong with the rows is an error. With rows of the device it is put on the device's stream;
    /// what is wrong with the rows is told by [`synchronize`](Self::synchronize).
    ///
    /// # Errors
    /// What the device or the numbers refuse. The shapes are the runner's responsibility.
    fn forward(&mut self, call: LayerCall<'_>) -> Result<()>;

    /// Waits until everything is done.
    ///
    /// # Errors
    /// What the device or the numbers of any pass since the last wait refused.
    fn synchronize(&mut self) -> Result<()>;

    /// The device's own handle of the stream that passes are put on: for CUDA a `CUstream`.
    fn stream(&self) -> usize;

    /// Orders the work of another stream of the same device, by its handle, and the passes: see [`StreamOrder`].
    ///
    /// # Safety
    /// `stream` is one of that device.
    ///
    /// # Errors
    /// What the device refuses.
    unsafe fn order(&self, stream: usize, order: StreamOrder) -> Result<()>;

    /// It holds some of the experts, and sends rows to the [others](BuildCall::spread) by itself: all ranks make
    /// every pass together, also with no rows.
    fn is_spread(&self) -> bool {
        false
    }

    /// Passes with rows of the device can be captured as a graph, once one of the size has been made: nothing in them
    /// waits for the host.
    fn can_be_captured(&self) -> bool {
        true
    }

    /// Begins to bring the experts of all ranks to where `map` says, from device to device, as they are held here. Passes
    /// go on with the old placement until [`finish_move`](Self::finish_move). All ranks call this between the same two
    /// passes.
    ///
    /// # Errors
    /// Of a kernel that holds all experts; what the device has no memory for; a rank that does not come.
    fn start_move(&mut self, _map: &Arc<ExpertMap>) -> Result<()> {
        Err(Error::input("expert placement", "this kernel's experts are on no other ranks"))
    }

    /// Passes from here on are of the new placement, which is returned. All ranks call this between the same two passes. What was captured
    /// as a graph before has the old weights, whose memory goes when the passes before are done.
    ///
    /// # Errors
    /// If no experts are on their way.
    fn finish_move(&mut self) -> Result<Arc<ExpertMap>> {
        Err(Error::input("expert placement", "no experts are on their way"))
    }

    /// Counts, from here on, for each expert of the layer the slots that chose it among this rank's rows, without a wait;
    /// or counts no longer.
    ///
    /// # Errors
    /// Of a kernel that holds all experts.
    fn count_load(&mut self, _on: bool) -> Result<()> {
        Err(Error::input("expert load", "this kernel does not count it"))
    }

    /// The counts `[experts]`, which begin again from zero. Waits for the device.
    ///
    /// # Errors
    /// If nobody counts.
    fn take_load(&mut self) -> Result<Vec<u64>> {
        Err(Error::input("expert load", "nobody counts it"))
    }

    /// The time of the last pass's exchange alone, the median of so many runs: all ranks ask together, right after a
    /// pass of so many tokens with so many slots. `None` where there is none.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    fn exchange_time(
        &mut self,
        _tokens: usize,
        _top_k: usize,
        _runs: usize,
    ) -> Result<Option<ExchangeTime>> {
        Ok(None)
    }
}

/// What an exchange takes on this rank, without the experts in between.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ExchangeTime {
    /// Seconds of dispatch and combine: sorting, counting, packing, both ways, and the sum.
    pub seconds: f64,
    /// Seconds of the same bytes to and from the same ranks, and nothing else.
    pub bare_seconds: f64,
    /// Bytes that go to other ranks, both ways.
    pub sent: usize,
}

/// Hidden states for a kernel that is the whole layer.
#[derive(Debug)]
pub struct LayerCall<'a> {
    /// T.
    pub tokens: usize,
    /// `[T, H]`; with `shared_rows` `[T, routed_hidden]`, transformed already.
    pub rows: Rows<'a>,
    /// `[T, H]`: what the gate and the shared experts see, where it is not `rows`.
    pub shared_rows: Option<Rows<'a>>,
    /// Where the experts of each token come from.
    pub source: RoutingSource<'a>,
    /// `[T, E_total]`, in place of the gate.
    pub logits: Option<&'a [f32]>,
    /// `[T]`, where routing goes by token id.
    pub input_ids: Option<&'a [u32]>,
    /// Rows that hold NaN or infinities are an error; else they go through.
    pub refuse_non_finite: bool,
    /// Multiplies the routed sum.
    pub routed_factor: f32,
    /// Multiplies the shared branch.
    pub shared_factor: f32,
    /// `[T, H]`, overwritten.
    pub out: RowsMut<'a>,
    /// What was decided on the way, for those who ask.
    pub seen: Option<Seen<'a>>,
    /// What the device did when, for those who ask: such a pass waits until it is done.
    pub spans: Option<&'a mut Vec<DeviceSpan>>,
}

/// Who routes.
#[derive(Clone, Copy, Debug)]
pub enum RoutingSource<'a> {
    /// The layer's router.
    Router,
    /// `[T, k]`: experts that were chosen elsewhere; the router weighs them.
    Ids(&'a [LogicalId]),
    /// Ids and weights `[T, k]` that were decided elsewhere, for any k; an id that is no choice of the
    /// layer means: not here. There are no logits.
    Finished(&'a [i32], &'a [f32]),
    /// The same in the device's own memory.
    Device(DeviceRouting<'a>),
    /// The same in place of what the router would choose: the gate runs all the same.
    Simulated(&'a [i32], &'a [f32]),
}

/// One stretch of a device's time in a pass.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSpan {
    /// "dispatch", "experts", …
    pub what: &'static str,
    /// The micro-batch it belongs to; `None`: to the whole batch.
    pub lane: Option<usize>,
    /// From the pass's begin on the device.
    pub start: Duration,
    /// From there.
    pub end: Duration,
}

/// What a pass decided on its way.
#[derive(Debug)]
pub struct Seen<'a> {
    /// `[T, E_total]`; empty where the routing was finished elsewhere.
    pub logits: &'a mut Vec<f32>,
    /// Ids and weights.
    pub routing: &'a mut Routing,
    /// `[T, H]`: what the shared experts add, before scaling.
    pub shared: &'a mut Option<Vec<f32>>,
}
