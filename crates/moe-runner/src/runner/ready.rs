//! From a loaded layer to one that can run: the kernel is chosen, the weights are packed for it.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use moe_kernels::isa::{Cpu, Features};
use moe_kernels::pool::{Pool, ThreadPool};

use super::gate::Gate;
use super::scale::{Scaling, scaling};
use super::transform::TransformOp;
use super::workspace::Workspaces;
use crate::exchange::{Exchange, LocalExchange};
use crate::experts::{
    self, BuildCall, BuiltKernel, Caps, Device, ExpertSet, Experts, KernelDesc, PackCache,
    Progress, Spread, Target,
};
use crate::hidden::ActivationDtype;
use crate::oracle::{self, Choice, Machine, Request};
use crate::router::{Router, RouterTensors};
use crate::shared_experts::SharedExperts;
use crate::spec::{ExpertSpec, LayerSpec, ScaleOn, WeightOn};
use crate::weights::{Expert, LoadedLayer};
use crate::{Error, Result};

/// Threads that layers share.
pub type SharedPool = Arc<dyn ThreadPool + Send + Sync>;

/// How layers are to run. Plain values: parsed once, part of every report.
#[derive(Clone)]
pub struct Options {
    /// Dtype of the hidden states and of the output.
    pub dtype: ActivationDtype,
    /// A kernel by name; `None`: the first that can.
    pub kernel: Option<String>,
    /// A device; `None`: any.
    pub device: Option<Device>,
    /// Which GPU, where it is one.
    pub gpu: usize,
    /// Where packed weights are kept from one start to the next.
    pub pack_cache: Option<PackCache>,
    /// The threads that passes run on.
    pub pool: SharedPool,
    /// What passes work in.
    pub workspaces: Workspaces,
    /// What is done about rows that hold NaN or infinities.
    pub non_finite: NonFinite,
    /// Whether whoever reads the output multiplies it by
    /// [`ForwardOutput::output_scale`](super::ForwardOutput::output_scale): an f16 layer may then write it
    /// divided by the routed factor ([`scale`](super::scale)). Otherwise what is written is the output.
    pub caller_scales: bool,
    /// The machine that kernels are chosen for.
    pub machine: Machine,
}

/// What is done about hidden states that hold NaN or infinities.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NonFinite {
    /// The pass ends with an error that names row and column.
    #[default]
    Refuse,
    /// They go through: what comes out for such a row is unspecified, other rows are as they would
    /// be without it. For engines whose padding rows hold anything.
    LetThrough,
}

impl Options {
    /// The same on NVIDIA GPU `gpu` of this machine.
    ///
    /// # Errors
    /// [`Error::Device`]: in one line, what is missing or too old.
    pub fn on_gpu(self, gpu: usize) -> Result<Self> {
        let machine = self.machine.with_gpu(gpu)?;
        Ok(Self { device: Some(Device::Cuda), gpu, machine, ..self })
    }

    /// Automatic choice for `dtype`, on `threads` threads of this machine. All layers of a process
    /// with as many threads share them, and all share one [`Workspaces`].
    ///
    /// # Errors
    /// If the threads cannot be started.
    pub fn new(dtype: ActivationDtype, threads: usize) -> Result<Self> {
        Ok(Self {
            dtype,
            kernel: None,
            device: None,
            gpu: 0,
            pack_cache: None,
            pool: pool_of_process(threads)?,
            workspaces: Workspaces::of_process(),
            non_finite: NonFinite::Refuse,
            caller_scales: false,
            machine: Machine::detect(),
        })
    }
}

/// The pool of so many threads that somebody in this process has, or a new one.
fn pool_of_process(threads: usize) -> Result<SharedPool> {
    static POOLS: Mutex<Vec<Weak<Pool>>> = Mutex::new(Vec::new());
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    pools.retain(|pool| pool.strong_count() > 0);
    let known =
        pools.iter().filter_map(Weak::upgrade).find(|pool| pool.threads() == threads.max(1));
    if let Some(pool) = known {
        return Ok(pool);
    }
    let pool = Pool::new(threads).map_err(|source| Error::Io {
        path: "threads".into(),
        action: "start",
        source,
    })?;
    let pool = Arc::new(pool);
    pools.push(Arc::downgrade(&pool));
    Ok(pool)
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("dtype", &self.dtype)
            .field("kernel", &self.kernel)
            .field("device", &self.device)
            .field("machine", &self.machine)
            .finish_non_exhaustive()
    }
}

/// How the experts execute: a kernel with its weights, and the exchange that brings rows to it. A
/// value: [`replace_quant_method`](super::MoeRunnerInterface::replace_quant_method) swaps it, and
/// nothing about it is remembered elsewhere.
#[derive(Debug)]
pub struct QuantMethod {
    /// The kernel, with its packed weights.
    pub kernel: BuiltKernel,
    /// Dispatch and combine.
    pub exchange: Box<dyn Exchange>,
    /// The shared experts, packed for the kernel that stands beside it; `None`: there are none, or
    /// they stay with the kernel that they have.
    pub shared: Option<Box<dyn Experts>>,
}

impl QuantMethod {
    /// What the kernel is.
    pub fn desc(&self) -> &'static KernelDesc {
        match &self.kernel {
            BuiltKernel::Modular(kernel) => kernel.desc(),
            BuiltKernel::Monolithic(kernel) => kernel.desc(),
            BuiltKernel::Layer(kernel) => kernel.desc(),
        }
    }

    /// Checks that the kernel, the exchange and the layer mean the same experts, as wide and as many,
    /// and that the kernel takes rows as the exchange and the layer hand them over.
    pub(super) fn check(&self, spec: &LayerSpec, dtype: ActivationDtype) -> Result<()> {
        let (desc, kernel) = (self.desc(), self.desc().name);
        let exchange = self.exchange.name();
        let fail = |reason: String| Err(Error::Spec { layer: spec.name.clone(), reason });
        if self.exchange.experts() != spec.router.experts {
            return fail(format!(
                "the {exchange} exchange knows {} experts, the layer has {}",
                self.exchange.experts(),
                spec.router.experts
            ));
        }
        let rows = self.exchange.row_format();
        if !desc.row_formats.contains(&rows) {
            return fail(format!("'{kernel}' takes no {} rows", rows.name()));
        }
        if !desc.dtypes.contains(&dtype) {
            return fail(format!("'{kernel}' takes no {} hidden states", dtype.name()));
        }
        if self.exchange.quantises_rows() && !desc.caps.has(Caps::QUANTISED_ROWS) {
            return fail(format!(
                "'{kernel}' quantises rows itself, the {exchange} exchange sends them quantised"
            ));
        }
        let (shape, held) = match &self.kernel {
            BuiltKernel::Modular(kernel) => (kernel.shape(), self.exchange.local_experts()),
            BuiltKernel::Monolithic(kernel) => (kernel.shape(), spec.router.experts),
            BuiltKernel::Layer(kernel) if kernel.is_spread() => {
                (kernel.shape(), self.exchange.local_experts())
            }
            BuiltKernel::Layer(kernel) => (kernel.shape(), spec.router.experts),
        };
        if shape.experts != held {
            return fail(format!(
                "'{kernel}' holds {} experts, it is to run {held} of {}",
                shape.experts, spec.router.experts
            ));
        }
        if let Some(experts) = &self.shared {
            let (shape, name) = (experts.shape(), experts.desc().name);
            let count = spec.shared.as_ref().map_or(0, |shared| shared.count);
            if (shape.experts, shape.hidden) != (count, spec.dims.hidden) {
                return fail(format!(
                    "'{name}' brings {} shared experts of {} columns, the layer has {count} of {}",
                    shape.experts, shape.hidden, spec.dims.hidden
                ));
            }
        }
        // a rank without experts has no width either
        if shape.experts > 0 && shape.hidden != spec.dims.routed_hidden {
            return fail(format!(
                "'{kernel}' takes rows of {} columns, the experts' rows have {}",
                shape.hidden, spec.dims.routed_hidden
            ));
        }
        // such a kernel's sums are complete: neither slices of experts nor a share of them will do
        let spread = matches!(&self.kernel, BuiltKernel::Layer(kernel) if kernel.is_spread());
        if !matches!(self.kernel, BuiltKernel::Modular(_)) {
            if self.exchange.moves_rows() && !spread {
                return fail(format!(
                    "'{kernel}' routes by itself, the {exchange} exchange sends rows by their \
                     experts"
                ));
            }
            if shape.intermediate < spec.dims.intermediate {
                return fail(format!(
                    "'{kernel}' routes by itself and needs whole experts of intermediate size {}, \
                     it holds slices of {}",
                    spec.dims.intermediate, shape.intermediate
                ));
            }
        }
        Ok(())
    }
}

/// A layer that can run: the last state of `LayerSpec` → [`LoadedLayer`] → `ReadyLayer`.
pub struct ReadyLayer {
    pub(super) spec: Arc<LayerSpec>,
    pub(super) dtype: ActivationDtype,
    pub(super) has_gate: bool,
    /// None where the kernel is the whole layer: then it has the gate, the transforms and the shared
    /// experts, too.
    pub(super) gate: Option<Gate>,
    pub(super) router: Router,
    pub(super) input_transform: TransformOp,
    pub(super) output_transform: TransformOp,
    pub(super) method: QuantMethod,
    pub(super) shared: Option<SharedExperts>,
    pub(super) output: crate::weights::OutputWeights,
    pub(super) choice: Choice,
    pub(super) pool: SharedPool,
    pub(super) workspaces: Workspaces,
    pub(super) non_finite: NonFinite,
    pub(super) caller_scales: bool,
}

impl ReadyLayer {
    /// Nothing but a factor is applied after the sum of the branches.
    pub(super) fn linear_output(&self) -> bool {
        !self.spec.output.bias && self.spec.output.norm.is_none()
    }

    /// Where the routed factor goes, with the sum of shared experts or without.
    pub(super) fn scaling(&self, shared: bool) -> Scaling {
        let may_divide = self.caller_scales && self.linear_output();
        scaling(self.spec.routed_scale, self.dtype, shared, may_divide)
    }
}

impl std::fmt::Debug for ReadyLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReadyLayer")
            .field("layer", &self.spec.name)
            .field("dtype", &self.dtype)
            .field("method", &self.method)
            .finish_non_exhaustive()
    }
}

impl LoadedLayer {
    /// Chooses a kernel for the layer, without packing anything.
    ///
    /// # Errors
    /// [`Error::NoKernel`] with every failing condition.
    pub fn choose(&self, options: &Options) -> Result<Choice> {
        let request = Request {
            kernel: options.kernel.clone(),
            device: options.device,
            ..Request::of(self, options.dtype)
        };
        oracle::select(experts::KERNELS, &request, &options.machine)
    }

    /// The routed experts' part of the layer, for [`QuantMethod`]s built by hand.
    pub fn expert_set(&self) -> ExpertSet<'_> {
        ExpertSet {
            spec: &self.spec.expert,
            weight_on: self.spec.router.weight_on,
            experts: &self.experts,
        }
    }

    /// Packs the experts for `kernel`, all on this rank: the routed ones, and the shared ones for what
    /// stands beside it.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn quant_method(
        &self,
        kernel: &'static KernelDesc,
        options: &Options,
    ) -> Result<QuantMethod> {
        let built = build(kernel, self, self.experts.clone(), options, None, &mut |_| ())?;
        let shared = match built {
            BuiltKernel::Layer(_) => None,
            BuiltKernel::Modular(_) | BuiltKernel::Monolithic(_) => {
                self.shared_for(kernel, options)?
            }
        };
        let exchange = Box::new(LocalExchange::new(self.experts.len()));
        Ok(QuantMethod { kernel: built, exchange, shared })
    }

    /// The shared experts, packed for what stands beside `kernel`.
    fn shared_for(
        &self,
        kernel: &'static KernelDesc,
        options: &Options,
    ) -> Result<Option<Box<dyn Experts>>> {
        let (Some(shared), Some(weights)) = (&self.spec.shared, &self.shared) else {
            return Ok(None);
        };
        let spec = ExpertSpec {
            gated: shared.gated,
            activation: shared.activation,
            bias: shared.bias,
            norm: None,
        };
        let dense = kernel.dense.unwrap_or(kernel);
        let call = BuildCall {
            spec: &spec,
            weight_on: WeightOn::Output,
            experts: weights.experts.clone(),
            layer: None,
            dtype: options.dtype,
            rows: rows_after(shared.input_norm.is_none(), options.dtype),
            gpu: options.gpu,
            spread: None,
            pack_cache: options.pack_cache.as_ref(),
            pool: &*options.pool,
            progress: &mut |_| (),
        };
        match (dense.build)(dense, call)? {
            BuiltKernel::Modular(experts) => Ok(Some(experts)),
            BuiltKernel::Monolithic(_) | BuiltKernel::Layer(_) => {
                Err(Error::NoKernel(format!("'{}' routes by itself", dense.name)))
            }
        }
    }

    /// Chooses a kernel and packs the weights for it, on all threads.
    ///
    /// # Errors
    /// [`Error::Spec`] for a contradictory description and for weights that are not as it
    /// [says](LoadedLayer::validate), [`Error::NoKernel`] where no kernel can run
    /// it or the named one cannot.
    pub fn ready(&self, options: &Options) -> Result<ReadyLayer> {
        self.clone().into_ready(options, &mut |_| ())
    }

    /// The same, letting go of the experts' stored numbers as they are packed, and telling
    /// `progress` how far it is.
    ///
    /// # Errors
    /// As [`ready`](Self::ready).
    pub fn into_ready(
        mut self,
        options: &Options,
        progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<ReadyLayer> {
        self.validate()?;
        let choice = self.choose(options)?;
        let experts = std::mem::take(&mut self.experts);
        let exchange = Box::new(LocalExchange::new(experts.len()));
        let kernel = build(choice.kernel, &self, experts, options, None, progress)?;
        self.ready_with(choice, QuantMethod { kernel, exchange, shared: None }, options)
    }

    pub(crate) fn ready_with(
        &self,
        choice: Choice,
        method: QuantMethod,
        options: &Options,
    ) -> Result<ReadyLayer> {
        let spec = &self.spec;
        method.check(spec, options.dtype)?;
        let features = dense_features(choice.kernel);
        let whole = matches!(method.kernel, BuiltKernel::Layer(_));
        let tensors = match &self.gate {
            Some(gate) => RouterTensors {
                correction: gate.correction.clone(),
                per_expert_scale: gate.per_expert_scale.clone(),
                hash_table: gate.hash_table.clone(),
            },
            None => RouterTensors::default(),
        };
        let scale = match spec.routed_scale.on {
            ScaleOn::Weights => spec.routed_scale.factor,
            ScaleOn::Output => 1.0,
        };
        let router = Router::new(spec.router.clone(), scale, tensors)
            .map_err(|error| Error::Spec { layer: spec.name.clone(), reason: error.to_string() })?;
        let shared = match (&spec.shared, &self.shared) {
            (Some(_), Some(_)) if whole => None,
            (Some(shared), Some(weights)) => self
                .shared_for(choice.kernel, options)?
                .map(|experts| SharedExperts::new(shared.clone(), weights, experts)),
            (None, None) => None,
            _ => {
                return Err(Error::Spec {
                    layer: spec.name.clone(),
                    reason: "shared experts are described but not loaded, or the reverse".into(),
                });
            }
        };
        let transform = |spec, weights| match whole {
            true => Ok(TransformOp::default()),
            false => TransformOp::new(spec, weights, features, options.pool.threads()),
        };
        Ok(ReadyLayer {
            spec: Arc::new(spec.clone()),
            dtype: options.dtype,
            has_gate: self.gate.is_some(),
            gate: self
                .gate
                .as_ref()
                .filter(|_| !whole)
                .map(|gate| Gate::new(spec.gate, gate, features, options.pool.threads()))
                .transpose()?,
            router,
            input_transform: transform(&spec.input_transform, &self.input_transform)?,
            output_transform: transform(&spec.output_transform, &self.output_transform)?,
            method,
            shared,
            output: self.output.clone(),
            choice,
            pool: options.pool.clone(),
            workspaces: options.workspaces.clone(),
            non_finite: options.non_finite,
            caller_scales: options.caller_scales,
        })
    }
}

/// Packs `experts`, some of `layer`'s, for `kernel`; the others are where `spread` says.
pub(super) fn build(
    kernel: &'static KernelDesc,
    layer: &LoadedLayer,
    experts: Vec<Expert>,
    options: &Options,
    spread: Option<Spread>,
    progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<BuiltKernel> {
    let (spec, weight_on) = (&layer.spec.expert, layer.spec.router.weight_on);
    let Options { dtype, gpu, .. } = *options;
    let rows = rows_after(layer.spec.input_transform.is_identity(), dtype);
    let (layer, pool) = (Some(layer), &*options.pool);
    let pack_cache = options.pack_cache.as_ref();
    let call = BuildCall {
        spec,
        weight_on,
        experts,
        layer,
        dtype,
        rows,
        gpu,
        spread,
        pack_cache,
        pool,
        progress,
    };
    (kernel.build)(kernel, call)
}

/// What holds hidden states of `dtype` exactly after a step that is the identity, or is not.
pub(super) fn rows_after(identity: bool, dtype: ActivationDtype) -> ActivationDtype {
    if identity { dtype } else { ActivationDtype::F32 }
}

/// What the dense products beside a kernel may use: the kernel's own features, so that a kernel named
/// for comparison is compared as a whole; the neighbours of those that exist to compare with, and of
/// a GPU's, use all there are.
fn dense_features(kernel: &KernelDesc) -> Features {
    match kernel.target {
        Target::Cpu(features) if !kernel.caps.has(Caps::BY_NAME_ONLY) => features,
        _ => Cpu::detect().features(),
    }
}
