//! A layer on the device: its parts, uploaded.

use std::sync::Arc;

use moe_cuda::router as cuda;
use moe_cuda::weights::{ExpertWeights, Stored};
use moe_cuda::{Buffer, Event, Float, GroupedExperts, Norm, RowQuantiser, RowsMut, Stream};

use super::Method;
use super::device::{Device, device, error};
use super::moves::{Moving, Retired};
use super::products::Products;
use super::ranks::Ranks;
use super::rules::router;
use super::upload::{Linear, Upload, norm, quantisers};
use crate::exchange::ExpertMap;
use crate::experts::reference::stored_bytes;
use crate::experts::{
    BuildCall, ExchangeTime, ExpertShape, KernelDesc, LayerCall, LayerKernel, StreamOrder,
};
use crate::hidden::ActivationDtype;
use crate::router::Routing;
use crate::spec::{ExpertSpec, IdleExperts, LayerSpec, SharedSpec, WeightOn};
use crate::weights::{Expert, GateWeights, LoadedLayer, Matrix, StepWeights};
use crate::{Error, Result};

/// See the module.
pub(super) struct CudaLayer {
    pub(super) device: Arc<Device>,
    desc: &'static KernelDesc,
    pub(super) name: Arc<str>,
    pub(super) spec: LayerSpec,
    pub(super) dtype: ActivationDtype,
    pub(super) gate: Option<Gate>,
    pub(super) router: cuda::Router,
    pub(super) input_transform: Vec<Step>,
    pub(super) output_transform: Vec<Step>,
    pub(super) experts: Experts,
    /// Where the other experts are.
    pub(super) ranks: Option<Ranks>,
    /// Experts on their way, and those that earlier passes have used.
    pub(super) moving: Option<Moving>,
    pub(super) retired: Vec<Retired>,
    pub(super) shared: Option<Shared>,
    /// `[H]`: added to the sum of the branches.
    pub(super) bias: Option<Buffer<f32>>,
    /// Of that sum.
    pub(super) norm: Option<(Norm, Buffer<f32>)>,
    /// Bytes of each routed expert, and of the shared ones together, as they are stored.
    pub(super) stored: (Vec<usize>, usize),
}

/// `logits = norm(x) · Wᵀ + bias`.
pub(super) struct Gate {
    pub(super) linear: Linear,
    pub(super) bias: Option<Buffer<f32>>,
    /// Of the rows that it sees alone.
    pub(super) norm: Option<(Norm, Buffer<f32>)>,
}

/// A step of a transform.
pub(super) enum Step {
    Linear(Linear),
    Norm(Norm, Buffer<f32>),
}

/// Experts with what is done to their rows.
pub(super) struct Experts {
    pub(super) products: Products,
    /// In f32, before the first and the second product, with each expert's scale where that is given.
    pub(super) quantise: [Option<(RowQuantiser, Option<Buffer<f32>>)>; 2],
    /// Of each expert's output, `[experts, H]`.
    pub(super) norm: Option<(Norm, Buffer<f32>)>,
    /// Weights multiply the rows before the first product.
    pub(super) weight_on_input: bool,
}

/// The dense branch.
pub(super) struct Shared {
    pub(super) spec: SharedSpec,
    pub(super) experts: Experts,
    pub(super) gate: Option<Buffer<f32>>,
    pub(super) input_norm: Option<(Norm, Buffer<f32>)>,
    pub(super) output_norm: Option<(Norm, Buffer<f32>)>,
}

impl Experts {
    /// Their products are Hopper's.
    pub(super) fn is_fast(&self) -> bool {
        matches!(self.products, Products::Sm90(_))
    }

    /// They can write such an output themselves.
    pub(super) fn writes(&self, out: &RowsMut<'_>) -> bool {
        self.is_fast()
            && out.float() != Float::F16
            && out.address().is_multiple_of(16)
            && out.stride().is_multiple_of(8)
    }

    /// How many.
    pub(super) fn count(&self) -> usize {
        self.products.dims()[0]
    }

    /// Width of the rows that go in and come out.
    pub(super) fn hidden(&self) -> usize {
        self.products.dims()[1]
    }

    /// Width between the products.
    pub(super) fn intermediate(&self) -> usize {
        self.products.dims()[2]
    }

    pub(super) fn new(
        upload: &mut Upload<'_>,
        (device, method): (&Device, Method),
        spec: &ExpertSpec,
        weight_on: WeightOn,
        experts: Vec<Expert>,
        behind: Option<&cuda::Router>,
    ) -> Result<Self> {
        let quantise = [
            quantisers(experts.iter().map(|expert| &expert.up.input))?,
            quantisers(experts.iter().map(|expert| &expert.down.input))?,
        ];
        let scales = |(quantiser, scales): (RowQuantiser, Option<Vec<f32>>)| {
            let scales = scales.map(|scales| upload.vector(&scales)).transpose()?;
            Ok::<_, Error>((quantiser, scales))
        };
        let [first, second] = quantise.map(|quantise| quantise.map(scales).transpose());
        let quantise = [first?, second?];

        let (mut gates, mut ups, mut downs) = (Vec::new(), Vec::new(), Vec::new());
        let (mut biases, mut norms) = ([const { Vec::new() }; 3], Vec::new());
        for expert in experts {
            let Expert { gate, up, down, gate_bias, up_bias, down_bias, norm } = expert;
            let widths = [up.rows(), up.rows(), down.rows()];
            for ((all, bias), width) in
                biases.iter_mut().zip([gate_bias, up_bias, down_bias]).zip(widths)
            {
                // an expert without one adds nothing
                all.extend(bias.unwrap_or_else(|| vec![0.0; width]));
            }
            norms.extend(norm.into_iter().flatten());
            gates.extend(gate);
            ups.push(up);
            downs.push(down);
        }
        let [gate_bias, up_bias, down_bias] = biases;
        let bias = |upload: &Upload<'_>, stored: &mut Stored, bias: &[f32]| {
            if spec.bias {
                stored.bias = Some(Arc::new(upload.vector(bias)?));
            }
            Ok::<_, Error>(())
        };
        let stored = |upload: &mut Upload<'_>, matrices: &[Matrix], beside: &[Matrix]| match method
        {
            Method::F32 => upload.experts(matrices, beside),
            Method::Sm90(format) => upload.native(matrices, format),
        };
        let mut gate = None;
        if spec.gated {
            let mut gates = stored(upload, &gates, &ups)?;
            bias(upload, &mut gates, &gate_bias)?;
            gate = Some(gates);
        }
        let mut up = stored(upload, &ups, &gates)?;
        bias(upload, &mut up, &up_bias)?;
        drop((gates, ups));
        let mut down = stored(upload, &downs, &[])?;
        bias(upload, &mut down, &down_bias)?;
        let weights = ExpertWeights { gate, up, down, activation: spec.activation };
        let norm = match spec.norm {
            Some(of) => Some((norm(of), upload.vector(&norms)?)),
            None => None,
        };
        let products = match method {
            Method::F32 => Products::F32(Box::new(
                GroupedExperts::new(&device.modules, weights).map_err(error)?,
            )),
            Method::Sm90(_) => Products::fast(device, weights, behind)?,
        };
        let weight_on_input = weight_on == WeightOn::Input;
        Ok(Self { products, quantise, norm, weight_on_input })
    }
}

impl CudaLayer {
    /// Uploads `layer`, with the experts of `call`.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no such GPU or it has not enough memory; [`Error::NoKernel`] for
    /// what no kernel computes.
    pub(super) fn new(
        desc: &'static KernelDesc,
        method: Method,
        layer: &LoadedLayer,
        call: BuildCall<'_>,
    ) -> Result<Self> {
        let BuildCall { weight_on, experts, dtype, gpu, spread, pool, progress, .. } = call;
        let spec = &layer.spec;
        let device = device(gpu)?;
        device.stream.set_layer(spec.name.as_str().into());
        let shared = layer.shared.as_ref();
        let all = experts.len() + shared.map_or(0, |shared| shared.experts.len());
        let steps = layer.input_transform.len() + layer.output_transform.len();
        let mut upload = Upload::new(&device, pool, progress, 3 * all + steps + 1)?;
        let upload = &mut upload;
        let of_shared = shared.iter().flat_map(|shared| &shared.experts).map(stored_bytes).sum();
        let stored = (experts.iter().map(stored_bytes).collect(), of_shared);

        let of = (&*device, method);
        let router = router(upload, &device, spec, layer.gate.as_ref())?;
        let name = spec.name.as_str();
        let of_ranks = |spread| Ranks::new(&device, (name, spec.index), spread);
        let ranks = spread.map(of_ranks).transpose()?;
        let in_front = layer.gate.as_ref().map(|_| &router).filter(|_| ranks.is_none());
        let experts = Experts::new(upload, of, &spec.expert, weight_on, experts, in_front)?;
        let shared = match (&spec.shared, shared) {
            (Some(spec), Some(weights)) => {
                let expert = ExpertSpec {
                    gated: spec.gated,
                    activation: spec.activation,
                    bias: spec.bias,
                    norm: None,
                };
                let of_norm = |spec: Option<_>, weight: &Option<Vec<f32>>| match (spec, weight) {
                    (Some(spec), Some(weight)) => {
                        Ok::<_, Error>(Some((norm(spec), upload.vector(weight)?)))
                    }
                    _ => Ok(None),
                };
                let input_norm = of_norm(spec.input_norm, &weights.input_norm)?;
                let output_norm = of_norm(spec.output_norm, &weights.output_norm)?;
                let gate = weights.gate.as_ref().map(|gate| upload.vector(gate)).transpose()?;
                let experts = weights.experts.clone();
                let method = match method {
                    Method::Sm90(format) if spec.gated && format.takes(&experts) => method,
                    _ => Method::F32,
                };
                let of = (&*device, method);
                let experts = Experts::new(upload, of, &expert, WeightOn::Output, experts, None)?;
                Some(Shared { spec: spec.clone(), experts, gate, input_norm, output_norm })
            }
            _ => None,
        };
        let gate = layer.gate.as_ref();
        let output = &layer.output;
        Ok(Self {
            router,
            gate: gate.map(|gate| Gate::new(upload, spec, gate)).transpose()?,
            input_transform: transform(upload, spec.input_transform.steps.len(), layer, true)?,
            output_transform: transform(upload, spec.output_transform.steps.len(), layer, false)?,
            bias: output.bias.as_ref().map(|bias| upload.vector(bias)).transpose()?,
            norm: match (spec.output.norm, &output.norm) {
                (Some(of), Some(weight)) => Some((norm(of), upload.vector(weight)?)),
                _ => None,
            },
            device: device.clone(),
            desc,
            name: spec.name.as_str().into(),
            spec: spec.clone(),
            dtype,
            experts,
            ranks,
            moving: None,
            retired: Vec::new(),
            shared,
            stored,
        })
    }
}

impl CudaLayer {
    /// Nothing is done to the sum of the routed experts' slots.
    pub(super) fn ends_with_the_sum(&self) -> bool {
        self.output_transform.is_empty()
            && self.shared.is_none()
            && self.bias.is_none()
            && self.norm.is_none()
            && self.spec.output.multiplier == 1.0
            && !matches!(self.spec.router.idle, Some(IdleExperts::Identity { .. }))
    }
}

impl std::fmt::Debug for CudaLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (name, gpu) = (self.desc.name, &self.device.gpu);
        write!(f, "{name} with {} experts on {gpu:?}", self.experts.count())
    }
}

impl LayerKernel for CudaLayer {
    fn desc(&self) -> &'static KernelDesc {
        self.desc
    }

    fn shape(&self) -> ExpertShape {
        // memory may have room for more
        let held = self.ranks.as_ref().map(|ranks| ranks.map().held_by(ranks.homes().me()).len());
        ExpertShape {
            experts: held.unwrap_or(self.experts.count()),
            hidden: self.experts.hidden(),
            intermediate: self.experts.intermediate(),
        }
    }

    fn workspace_bytes(&self, tokens: usize, top_k: usize) -> usize {
        self.bytes(tokens, top_k)
    }

    fn weight_bytes(&self, routing: &Routing) -> usize {
        let (routed, shared) = &self.stored;
        let mut ids: Vec<usize> = match &self.ranks {
            None => routing.ids.iter().map(|id| id.index()).collect(),
            // also for the rows of others
            Some(ranks) => ranks.active().into_iter().map(|id| id as usize).collect(),
        };
        ids.sort_unstable();
        ids.dedup();
        let shared = if routing.tokens > 0 { *shared } else { 0 };
        ids.iter().filter_map(|id| routed.get(*id)).sum::<usize>() + shared
    }

    fn reserve(&mut self, tokens: usize, top_k: usize) -> Result<()> {
        self.prepare(tokens, top_k)
    }

    fn forward(&mut self, call: LayerCall<'_>) -> Result<()> {
        self.pass(call)
    }

    fn synchronize(&mut self) -> Result<()> {
        let mut work = self.device.work();
        if let Some(ranks) = &self.ranks {
            ranks.wait(&self.device, &mut work.ranks)?;
        }
        self.device.check(&mut work)
    }

    fn stream(&self) -> usize {
        self.device.stream.as_raw()
    }

    unsafe fn order(&self, stream: usize, order: StreamOrder) -> Result<()> {
        let (gpu, own) = (&self.device.gpu, &self.device.stream);
        // SAFETY: as the caller promises; it is used here alone.
        let other = unsafe { Stream::from_raw(gpu, stream) };
        let (first, then) = match order {
            StreamOrder::PassesWait => (&other, own),
            StreamOrder::PassesFirst => (own, &other),
        };
        let event = Event::new(gpu).map_err(error)?;
        first.record(&event).and_then(|()| then.wait(&event)).map_err(error)
    }

    fn is_spread(&self) -> bool {
        self.ranks.is_some()
    }

    fn can_be_captured(&self) -> bool {
        self.ranks.as_ref().is_none_or(Ranks::can_be_captured)
    }

    fn start_move(&mut self, map: &Arc<ExpertMap>) -> Result<()> {
        self.move_to(map)
    }

    fn finish_move(&mut self) -> Result<Arc<ExpertMap>> {
        self.use_moved()
    }

    fn count_load(&mut self, on: bool) -> Result<()> {
        match &mut self.ranks {
            Some(ranks) => ranks.count_load(&self.device, on),
            None => Err(Error::input("expert load", "all experts are on this GPU")),
        }
    }

    fn take_load(&mut self) -> Result<Vec<u64>> {
        match &mut self.ranks {
            Some(ranks) => ranks.take_load(&self.device),
            None => Err(Error::input("expert load", "all experts are on this GPU")),
        }
    }

    fn exchange_time(
        &mut self,
        tokens: usize,
        top_k: usize,
        runs: usize,
    ) -> Result<Option<ExchangeTime>> {
        // nobody's load
        let load = self.ranks.as_mut().and_then(Ranks::pause_load);
        let time = self.time_exchange(tokens, top_k, runs);
        if let Some(ranks) = &mut self.ranks {
            ranks.resume_load(load)?;
        }
        time
    }
}

impl Gate {
    fn new(upload: &mut Upload<'_>, spec: &LayerSpec, weights: &GateWeights) -> Result<Self> {
        let root = (weights.weight.cols() as f64).sqrt();
        let norm = match (spec.gate.scaled_rms_eps, &weights.input_scale) {
            (Some(eps), Some(scale)) => {
                let scale: Vec<f32> = scale.iter().map(|v| (f64::from(*v) / root) as f32).collect();
                let norm = Norm { eps, unit_offset: false, scale_first: false, factor: 1.0 };
                Some((norm, upload.vector(&scale)?))
            }
            _ => None,
        };
        Ok(Self {
            linear: upload.linear(&weights.weight)?,
            bias: weights.bias.as_ref().map(|bias| upload.vector(bias)).transpose()?,
            norm,
        })
    }
}

fn transform(
    upload: &mut Upload<'_>,
    described: usize,
    layer: &LoadedLayer,
    input: bool,
) -> Result<Vec<Step>> {
    let (spec, weights) = match input {
        true => (&layer.spec.input_transform, &layer.input_transform),
        false => (&layer.spec.output_transform, &layer.output_transform),
    };
    if described != weights.len() {
        return Err(Error::input("transform", "its steps and its weights differ in number"));
    }
    let steps = spec.steps.iter().zip(weights).map(|(step, weights)| {
        use crate::spec::TransformStep;
        match (step, weights) {
            (TransformStep::Linear { .. }, StepWeights::Linear(matrix)) => {
                Ok(Step::Linear(upload.linear(matrix)?))
            }
            (TransformStep::RmsNorm(of), StepWeights::RmsNorm(weight)) => {
                Ok(Step::Norm(norm(*of), upload.vector(weight)?))
            }
            _ => Err(Error::input("transform", "a step and its weights are of different kinds")),
        }
    });
    steps.collect()
}
