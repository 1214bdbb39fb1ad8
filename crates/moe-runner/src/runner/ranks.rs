//! One rank's runner of a layer that is split over many.

use std::sync::Arc;

use super::ready::{Options, QuantMethod, build, rows_after};
use super::slices::Slices;
use super::{MoeRunner, MoeRunnerInterface, ReadyLayer};
use crate::comm::{self, Communicator, Groups};
use crate::exchange::{
    AllToAllExchange, BatchedExchange, Completeness, Exchange, ExpertMap, GatherExchange,
    LocalExchange, Wire,
};
use crate::experts::{self, BuildCall, BuiltKernel, Caps, Device, KernelDesc, RowFormat, Spread};
use crate::oracle::{self, Request};
use crate::parallel::{Parallel, Route, shard};
use crate::spec::LayerSpec;
use crate::weights::{Expert, LoadedLayer};
use crate::{Error, Result};

impl MoeRunner {
    /// The runner of this rank: its share of `layer` (which holds the weights of all ranks, as
    /// views), the exchange that `parallel` asks for, and the groups over which sums are reduced.
    /// All ranks call this together.
    ///
    /// # Errors
    /// [`Error::Spec`] where the layer cannot be cut so; [`Error::Input`] where the options
    /// contradict each other; and as [`LoadedLayer::ready`].
    pub fn on_rank(
        layer: &LoadedLayer,
        options: &Options,
        groups: &Groups,
        parallel: &Parallel,
    ) -> Result<Self> {
        let sizes = groups.sizes;
        let map = match sizes.use_ep() {
            true => parallel.placement.map(layer.experts.len(), sizes.ep())?,
            false => ExpertMap::one_rank(layer.experts.len()),
        };
        Self::on_rank_with(layer, options, groups, parallel, Arc::new(map))
    }

    /// [`Self::on_rank`] with a given placement of the experts, such as a balanced one.
    ///
    /// # Errors
    /// As [`Self::on_rank`].
    pub fn on_rank_with(
        layer: &LoadedLayer,
        options: &Options,
        groups: &Groups,
        parallel: &Parallel,
        map: Arc<ExpertMap>,
    ) -> Result<Self> {
        layer.validate()?;
        let (sizes, rank) = (groups.sizes, groups.world.rank());
        let mut share = shard(layer, sizes, rank, &map)?;
        // chosen by the whole layer, so that all ranks choose alike, even one without experts
        let request = Request {
            kernel: options.kernel.clone(),
            device: options.device,
            row_format: parallel.row_format,
            intermediate: share.experts.first().map_or(0, |expert| expert.up.rows()),
            routed_outside: (sizes.ranks() > 1)
                .then_some("the experts are split over ranks, which must agree on the routing"),
            ..Request::of(layer, options.dtype)
        };
        let choice = oracle::select(experts::KERNELS, &request, &options.machine)?;
        let wire = Wire::of_layer(layer, options.dtype);
        let wire =
            if choice.kernel.caps.has(Caps::QUANTISED_ROWS) { wire } else { wire.unquantised() };
        let spread = spread(layer, choice.kernel, groups, parallel, &map)?;
        let exchange = exchange(&layer.spec, wire, groups, parallel, map)?;
        let slices = |experts: &[Expert], sliced: bool, group: &Arc<dyn Communicator>| {
            let wide = experts.first().is_some_and(|expert| expert.down.input.is_row_wide());
            (sliced && wide).then(|| Slices::new(&layer.spec.name, group.clone()))
        };
        let routed_slices = slices(&share.experts, sizes.moe_tp() > 1, &groups.world);
        let shared_experts = share.shared.as_ref().map_or(&[][..], |shared| &shared.experts);
        let shared_slices = slices(shared_experts, sizes.tp > 1 && sizes.sp() == 1, &groups.tp);
        let mut experts = std::mem::take(&mut share.experts);
        if spread.is_some() && experts.is_empty() {
            // kernels have no sizes without any: one that no rank asks for
            experts.extend(layer.experts.first().cloned());
        }
        if choice.kernel.target.device() == Device::Cuda
            && (routed_slices.is_some() || shared_slices.is_some())
        {
            return Err(Error::Spec {
                layer: layer.spec.name.clone(),
                reason: "experts cannot be cut into slices on GPUs where a whole row between the \
                         products has one scale; whole experts can be dealt to ranks (expert \
                         parallelism)"
                    .into(),
            });
        }
        let kernel = match sizes.ranks() {
            1 => build(choice.kernel, &share, experts, options, None, &mut |_| ())?,
            _ if spread.is_some() => {
                build(choice.kernel, &share, experts, options, spread, &mut |_| ())?
            }
            _ => alone(choice.kernel, &layer.spec, experts, options)?,
        };
        let method = QuantMethod { kernel, exchange, shared: None };
        let ready: ReadyLayer = share.ready_with(choice, method, options)?;
        // under sequence parallelism every rank has its own rows: nothing is left to reduce
        let group = if sizes.sp() > 1 { comm::single() } else { groups.tp.clone() };
        let runner = Self::new(ready)
            .with_group(group)
            .with_order(parallel.order)
            .with_micro_batches(parallel.micro_batches);
        Ok(Self { routed_slices, shared_slices, wire, ..runner })
    }

    /// From the next forward pass on, this rank holds `experts`, and all experts are where `map`
    /// says: what follows [`move_experts`](crate::parallel::rebalance::move_experts). The kernel
    /// stays the same. All ranks do this between the same two passes, with the options and groups
    /// that their runners were made with. Returns how the old experts executed.
    ///
    /// # Errors
    /// As [`replace_quant_method`](MoeRunnerInterface::replace_quant_method); nothing has changed
    /// then.
    pub fn replace_experts(
        &mut self,
        experts: &[Expert],
        map: Arc<ExpertMap>,
        options: &Options,
        groups: &Groups,
        parallel: &Parallel,
    ) -> Result<QuantMethod> {
        let spec = self.layer.spec.clone();
        let desc = self.method().desc();
        let kernel = alone(desc, &spec, experts.to_vec(), options)?;
        let exchange = exchange(&spec, self.wire, groups, parallel, map)?;
        self.replace_quant_method(QuantMethod { kernel, exchange, shared: None })
    }

    /// Begins to bring the experts of all ranks to where `map` says, where rows [stay](Self::is_spread) on the ranks' GPUs:
    /// from GPU to GPU, as they are held there. Passes go on with the old placement until [`Self::finish_move`], and
    /// the output is the same bit by bit before and after. There must be memory for the experts of this layer twice.
    /// All ranks do this between the same two passes.
    ///
    /// # Errors
    /// [`Error::Input`] where rows do not stay on GPUs: experts then move as they are stored
    /// ([`move_experts`](crate::parallel::rebalance::move_experts)); what a GPU has no memory for; a rank that does not come.
    pub fn start_move(&mut self, map: &Arc<ExpertMap>) -> Result<()> {
        self.whole_layer("expert placement")?.start_move(map)
    }

    /// From the next pass on, all experts are where the map of [`Self::start_move`] said. All ranks do this between the
    /// same two passes, with the groups that their runners were made with. What was captured as a graph is to be captured
    /// again: it has the old weights, which go when the passes before are done.
    ///
    /// # Errors
    /// If no experts are on their way.
    pub fn finish_move(&mut self, groups: &Groups, parallel: &Parallel) -> Result<()> {
        let map = self.whole_layer("expert placement")?.finish_move()?;
        self.layer.method.exchange = exchange(&self.layer.spec, self.wire, groups, parallel, map)?;
        Ok(())
    }
}

/// Where the other experts are, if rows go to them from GPU to GPU. All ranks come to the same.
fn spread(
    layer: &LoadedLayer,
    kernel: &KernelDesc,
    groups: &Groups,
    parallel: &Parallel,
    map: &Arc<ExpertMap>,
) -> Result<Option<Spread>> {
    #[cfg(feature = "cuda")]
    {
        let peers = groups.ep.peers().filter(|_| kernel.target.device() == Device::Cuda);
        if let Some(peers) = peers
            && let Some(way) = parallel.between_gpus(&layer.spec, peers.reaches())?
        {
            let (group, map, lanes) = (groups.ep.clone(), map.clone(), parallel.micro_batches);
            return Ok(Some(Spread { group, map, way, lanes: lanes.max(1) }));
        }
    }
    let _ = (layer, kernel, groups, parallel, map);
    Ok(None)
}

/// Packs a rank's experts, without the layer around them: that is split over ranks.
fn alone(
    kernel: &'static KernelDesc,
    spec: &LayerSpec,
    experts: Vec<Expert>,
    options: &Options,
) -> Result<BuiltKernel> {
    let call = BuildCall {
        spec: &spec.expert,
        weight_on: spec.router.weight_on,
        experts,
        layer: None,
        dtype: options.dtype,
        rows: rows_after(spec.input_transform.is_identity(), options.dtype),
        gpu: options.gpu,
        spread: None,
        pack_cache: options.pack_cache.as_ref(),
        pool: &*options.pool,
        progress: &mut |_| (),
    };
    (kernel.build)(kernel, call)
}

/// The exchange for the route that `parallel` comes to. Where rows stay or are gathered, the sum is
/// partial over the tensor-parallel ranks; all-to-all completes it.
fn exchange(
    spec: &LayerSpec,
    wire: Wire,
    groups: &Groups,
    parallel: &Parallel,
    map: Arc<ExpertMap>,
) -> Result<Box<dyn Exchange>> {
    let (sizes, name) = (groups.sizes, spec.name.as_str());
    let completeness = match sizes.tp > 1 && sizes.sp() == 1 {
        true => Completeness::Partial,
        false => Completeness::Complete,
    };
    let rank = if sizes.use_ep() { groups.world.rank() } else { 0 };
    let exchange: Box<dyn Exchange> = match parallel.route()? {
        Route::AllToAll => {
            let same_rows = (sizes.tp > 1 && sizes.sp() == 1).then(|| groups.tp.clone());
            Box::new(AllToAllExchange::new(name, groups.ep.clone(), map, same_rows, wire))
        }
        Route::Gather => {
            let group = groups.rows.clone();
            Box::new(GatherExchange::new(name, group, (map, rank), completeness, wire))
        }
        Route::Local => Box::new(LocalExchange::of(map, rank, completeness)),
    };
    Ok(match parallel.row_format {
        RowFormat::Standard => exchange,
        RowFormat::Batched => Box::new(BatchedExchange::new(exchange, None)),
    })
}
