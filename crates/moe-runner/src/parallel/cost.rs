//! What a split costs before anything runs: bytes of weights on every rank, and every collective of
//! a forward pass, byte by byte what the ranks' traffic counters will say.

use crate::comm::{Count, Kind, Traffic, TrafficCounter, all_reduce_sent};
use crate::exchange::one_sided::Places;
use crate::exchange::resident::{ResidentWire, Ways};
use crate::exchange::{BetweenGpus, ExpertMap, Wire, share};
use crate::experts::{KernelDesc, cuda};
use crate::hidden::ActivationDtype;
use crate::router::LogicalId;
use crate::spec::{Granularity, LayerSpec, WeightFormat};
use crate::weights::{Expert, LoadedLayer, Matrix};
use crate::{Error, Result};

use super::{Parallel, Route, deal_rows, shard};

/// Bytes of weights on one rank, as they are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WeightBytes {
    /// The routed experts, copies included.
    pub routed: usize,
    /// The shared experts.
    pub shared: usize,
}

/// Bytes of the experts' projections on every rank, by flat rank. `map` says which whole experts are
/// where, under expert parallelism.
///
/// # Errors
/// Where the layer cannot be cut so.
pub fn weight_bytes(
    layer: &LoadedLayer,
    parallel: &Parallel,
    map: &ExpertMap,
) -> Result<Vec<WeightBytes>> {
    weight_bytes_by(bytes_of, layer, parallel, map)
}

/// The same, where experts take as many bytes as `of` says: as a kernel holds them.
///
/// # Errors
/// As [`weight_bytes`].
pub fn weight_bytes_by(
    of: impl Fn(&[Expert]) -> usize,
    layer: &LoadedLayer,
    parallel: &Parallel,
    map: &ExpertMap,
) -> Result<Vec<WeightBytes>> {
    let on = |rank| {
        let held = shard(layer, parallel.sizes, rank, map)?;
        let shared = held.shared.as_ref().map_or(&[][..], |shared| &shared.experts);
        Ok(WeightBytes { routed: of(&held.experts), shared: of(shared) })
    };
    (0..parallel.sizes.ranks()).map(on).collect()
}

/// Bytes of the experts' projections, as they are stored.
pub fn bytes_of(experts: &[Expert]) -> usize {
    let matrices = experts.iter().flat_map(|e| e.gate.iter().chain([&e.up, &e.down]));
    matrices.map(Matrix::stored_bytes).sum()
}

/// One forward pass of one layer over ranks.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    spec: &'a LayerSpec,
    parallel: &'a Parallel,
    map: &'a ExpertMap,
    wire: Wire,
    /// Rows stay on the ranks' GPUs.
    resident: Option<(ResidentWire, BetweenGpus)>,
    route: Route,
    row_scales: bool,
    shared_row_scales: bool,
}

impl<'a> Pass<'a> {
    /// A pass of `layer` with activations in `dtype`, split as `parallel` says; `map` places the
    /// experts, under expert parallelism.
    ///
    /// # Errors
    /// As [`MoeRunner::on_rank`](crate::runner::MoeRunner::on_rank) for the sizes and the exchange.
    pub fn new(
        layer: &'a LoadedLayer,
        dtype: ActivationDtype,
        parallel: &'a Parallel,
        map: &'a ExpertMap,
    ) -> Result<Self> {
        let (spec, sizes) = (&layer.spec, parallel.sizes);
        sizes.validate()?;
        if sizes.use_ep() && (map.ranks(), map.experts()) != (sizes.ep(), spec.router.experts) {
            return Err(Error::input(
                "expert placement",
                format!(
                    "{} experts on {} ranks, for {} on {}",
                    map.experts(),
                    map.ranks(),
                    spec.router.experts,
                    sizes.ep()
                ),
            ));
        }
        let route = parallel.route()?;
        let wide = |experts: &[Expert]| experts.first().is_some_and(|e| e.down.input.is_row_wide());
        let shared = layer.shared.as_ref().is_some_and(|shared| wide(&shared.experts));
        Ok(Self {
            spec,
            parallel,
            map,
            wire: Wire::of_layer(layer, dtype),
            resident: None,
            route,
            row_scales: sizes.moe_tp() > 1 && wide(&layer.experts),
            shared_row_scales: sizes.tp > 1 && sizes.sp() == 1 && shared,
        })
    }

    /// The same, where rows stay on the ranks' GPUs and travel as `wire`, the way that
    /// [`Parallel::between_gpus`] says.
    pub fn on_gpus(self, wire: ResidentWire, way: BetweenGpus) -> Self {
        Self { resident: Some((wire, way)), ..self }
    }

    /// What crosses between the GPUs of a layer like this for a row and for a slot's output, as `kernel` keeps them
    /// where there are many tokens.
    pub fn gpu_wire(
        layer: &LoadedLayer,
        dtype: ActivationDtype,
        kernel: &KernelDesc,
    ) -> ResidentWire {
        let width = layer.spec.dims.routed_hidden;
        if kernel.name == cuda::CUDA_F32.name {
            let plain = layer.spec.input_transform.is_identity();
            let bytes = if plain { dtype.size() } else { size_of::<f32>() };
            return ResidentWire { row: bytes * width, output: 4 * width };
        }
        let format = layer.experts.first().map(|expert| expert.up.format());
        // 16-bit integers with a scale for so many columns; else f32
        let tile = match format {
            Some(WeightFormat::Bf16) => 256,
            Some(WeightFormat::Fp8(Granularity::Block)) => 128,
            _ => return ResidentWire { row: 2 * width, output: 4 * width },
        };
        ResidentWire { row: 2 * width, output: 2 * width + 4 * width.div_ceil(tile) }
    }

    /// What each rank sends and receives, by flat rank, for a batch whose tokens chose the experts
    /// `ids` `[T, k]`.
    pub fn traffic(&self, ids: &[LogicalId]) -> Vec<Traffic> {
        let sizes = self.parallel.sizes;
        let sheet =
            Sheet { ranks: (0..sizes.ranks()).map(|_| TrafficCounter::default()).collect() };
        let lanes = self.parallel.micro_batches.max(1);
        for lane in 0..lanes {
            match self.route {
                Route::Local => {}
                Route::Gather => self.gather(&self.lane(ids, lane), &sheet),
                Route::AllToAll => match self.resident {
                    None => self.all_to_all(&self.lane(ids, lane), &sheet),
                    Some(way) => self.between_gpus(way, &self.lane(ids, lane), &sheet),
                },
            }
            if self.row_scales {
                self.row_maxima(&self.lane(ids, lane), &sheet);
            }
        }
        for (rank, rows) in deal_rows(self.tokens(ids), sizes).into_iter().enumerate() {
            self.reductions(rank, rows.len(), &sheet);
        }
        sheet.ranks.iter().map(TrafficCounter::read).collect()
    }

    /// Rows that each rank sends to each other one (itself included: those stay) by all-to-all, to
    /// have them computed there: `[ranks][ranks]`. Nothing for the other exchanges.
    pub fn rows_sent(&self, ids: &[LogicalId]) -> Vec<Vec<usize>> {
        let ranks = self.parallel.sizes.ranks();
        let mut rows = vec![vec![0; ranks]; ranks];
        if self.route == Route::AllToAll {
            for lane in 0..self.parallel.micro_batches.max(1) {
                for (from, lane) in self.lane(ids, lane).iter().enumerate() {
                    let sent = self.sent_by(from, lane);
                    rows[from].iter_mut().zip(sent).for_each(|(sum, (rows, _))| *sum += rows);
                }
            }
        }
        rows
    }

    fn top_k(&self) -> usize {
        self.spec.router.top_k.max(1)
    }

    fn tokens(&self, ids: &[LogicalId]) -> usize {
        ids.len() / self.top_k()
    }

    /// The ids of every rank's rows in one micro-batch.
    fn lane<'i>(&self, ids: &'i [LogicalId], lane: usize) -> Vec<&'i [LogicalId]> {
        let lanes = self.parallel.micro_batches.max(1);
        let deal = deal_rows(self.tokens(ids), self.parallel.sizes);
        let of = |rows: std::ops::Range<usize>| {
            let part = share(rows.len(), lane, lanes);
            &ids[(rows.start + part.start) * self.top_k()..(rows.start + part.end) * self.top_k()]
        };
        deal.into_iter().map(of).collect()
    }

    fn row_bytes(&self) -> usize {
        self.wire.row_bytes(self.spec.router.top_k, self.spec.dims.routed_hidden)
    }

    fn sum_bytes(&self) -> usize {
        self.spec.dims.routed_hidden * size_of::<f32>()
    }

    /// Ranks whose rows together are the batch, of which `rank` is one.
    fn rows_group(&self, rank: usize) -> Vec<usize> {
        let sizes = self.parallel.sizes;
        let same = |other: &usize| sizes.sp() > 1 || sizes.tp_rank(*other) == sizes.tp_rank(rank);
        (0..sizes.ranks()).filter(same).collect()
    }

    /// All rows to all ranks of the group; sums back.
    fn gather(&self, lane: &[&[LogicalId]], sheet: &Sheet) {
        let rows = |rank: usize| lane[rank].len() / self.top_k();
        for rank in 0..lane.len() {
            let group = self.rows_group(rank);
            let others: usize =
                group.iter().filter(|o| **o != rank).map(|other| rows(*other)).sum();
            let mine = rows(rank) * (group.len() - 1);
            let (row, sum) = (self.row_bytes(), self.sum_bytes());
            sheet.add(rank, Kind::AllGatherV, (mine * row, others * row));
            sheet.add(rank, Kind::ReduceScatterV, (others * sum, mine * sum));
        }
    }

    /// This rank's share of its rows: ranks with the same rows deal them out among themselves.
    fn own(&self, rank: usize, rows: usize) -> std::ops::Range<usize> {
        let sizes = self.parallel.sizes;
        match sizes.sp() {
            1 => share(rows, sizes.tp_rank(rank), sizes.tp),
            _ => 0..rows,
        }
    }

    /// For each rank: rows and slots that `rank` sends to it.
    fn sent_by(&self, rank: usize, ids: &[LogicalId]) -> Vec<(usize, usize)> {
        let k = self.top_k();
        let mut sent = vec![(0, 0); self.parallel.sizes.ranks()];
        let mut last = vec![usize::MAX; sent.len()];
        for row in self.own(rank, ids.len() / k) {
            for home in ids[row * k..(row + 1) * k].iter().filter_map(|id| self.map.home(*id, row))
            {
                let (rows, slots) = &mut sent[home.rank];
                *rows += usize::from(std::mem::replace(&mut last[home.rank], row) != row);
                *slots += 1;
            }
        }
        sent
    }

    /// Each row to the ranks of its experts; a row for each slot back; the sums to those that have
    /// the same rows.
    fn all_to_all(&self, lane: &[&[LogicalId]], sheet: &Sheet) {
        let (row, sum, sizes) = (self.row_bytes(), self.sum_bytes(), self.parallel.sizes);
        let mut flow = vec![[0; 4]; lane.len()];
        for (from, ids) in lane.iter().enumerate() {
            for (to, (rows, slots)) in self.sent_by(from, ids).into_iter().enumerate() {
                if to != from {
                    flow[from][0] += rows * row;
                    flow[to][1] += rows * row;
                    flow[to][2] += slots * sum;
                    flow[from][3] += slots * sum;
                }
            }
        }
        for (rank, [sent, received, sent_back, returned]) in flow.into_iter().enumerate() {
            sheet.add(rank, Kind::AllToAllV, (sent, received));
            sheet.add(rank, Kind::AllToAllV, (sent_back, returned));
            if sizes.tp > 1 && sizes.sp() == 1 {
                let all = lane[rank].len() / self.top_k();
                let own = self.own(rank, all).len();
                let bytes = (own * (sizes.tp - 1) * sum, (all - own) * sum);
                sheet.add(rank, Kind::AllGatherV, bytes);
            }
        }
    }

    /// The counts of all; each row, and each of its slots, to the ranks of its experts; an output for each slot back.
    fn between_gpus(
        &self,
        (wire, way): (ResidentWire, BetweenGpus),
        lane: &[&[LogicalId]],
        sheet: &Sheet,
    ) {
        let ranks = lane.len();
        let most = lane.iter().map(|ids| ids.len() / self.top_k()).max().unwrap_or(0);
        if most == 0 && way == BetweenGpus::OneSided {
            // nobody meets
            return;
        }
        let sent: Vec<Vec<(usize, usize)>> =
            lane.iter().enumerate().map(|(rank, ids)| self.sent_by(rank, ids)).collect();
        let mut counts = Vec::with_capacity(2 * ranks * ranks);
        for line in &sent {
            counts.extend(line.iter().map(|(_, slots)| *slots as u32));
            counts.extend(line.iter().map(|(rows, _)| *rows as u32));
        }
        for rank in 0..ranks {
            let ways = match way {
                BetweenGpus::WithRoom(room) => Ways::with_room(room, rank, ranks),
                BetweenGpus::OneSided | BetweenGpus::Counted => Ways::counted(&counts, rank, ranks),
            };
            let traffic = match way {
                BetweenGpus::WithRoom(_) | BetweenGpus::Counted => ways.traffic(wire, ranks),
                BetweenGpus::OneSided => {
                    let places = Places { ranks, most, top_k: self.top_k() };
                    let [there, back] = places.traffic(&ways, wire);
                    [None, Some(there), Some(back)]
                }
            };
            let kinds = [Kind::AllGather, Kind::AllToAllV, Kind::AllToAllV];
            for (kind, bytes) in kinds.into_iter().zip(traffic) {
                bytes.into_iter().for_each(|bytes| sheet.add(rank, kind, bytes));
            }
        }
    }

    /// Ranks with slices of the same experts agree on the scale of each slot's row.
    fn row_maxima(&self, lane: &[&[LogicalId]], sheet: &Sheet) {
        let experts = self.spec.router.experts;
        let real = |rank: &usize| lane[*rank].iter().filter(|id| id.index() < experts).count();
        for rank in 0..lane.len() {
            let slots: usize = match self.route {
                Route::Gather => self.rows_group(rank).iter().map(real).sum(),
                _ => real(&rank),
            };
            let bytes = slots * size_of::<f32>() * (lane.len() - 1);
            sheet.add(rank, Kind::AllGather, (bytes, bytes));
        }
    }

    /// Sums over the tensor-parallel group, in the order of the runner's steps.
    fn reductions(&self, rank: usize, rows: usize, sheet: &Sheet) {
        let (sizes, dims) = (self.parallel.sizes, self.spec.dims);
        if sizes.tp == 1 || sizes.sp() > 1 {
            return;
        }
        let reduce = |width: usize| {
            let bytes =
                all_reduce_sent(sizes.tp, sizes.tp_rank(rank), rows * width, size_of::<f32>());
            sheet.add(rank, Kind::AllReduce, (bytes, bytes));
        };
        let mut routed_partial = self.route != Route::AllToAll;
        if routed_partial && !self.spec.output_transform.is_linear() {
            reduce(dims.routed_hidden);
            routed_partial = false;
        }
        if let Some(shared) = &self.spec.shared {
            if self.shared_row_scales {
                let bytes = rows * shared.count * size_of::<f32>() * (sizes.tp - 1);
                sheet.add(rank, Kind::AllGather, (bytes, bytes));
            }
            if !routed_partial || shared.output_norm.is_some() {
                reduce(dims.hidden);
                if routed_partial {
                    reduce(dims.hidden);
                    routed_partial = false;
                }
            }
        }
        if routed_partial {
            reduce(dims.hidden);
        }
    }
}

/// The counters of all ranks.
struct Sheet {
    ranks: Vec<TrafficCounter>,
}

impl Sheet {
    /// One call of `kind` on `rank`.
    fn add(&self, rank: usize, kind: Kind, (sent, received): (usize, usize)) {
        let count = Count { calls: 1, sent: sent as u64, received: received as u64 };
        self.ranks[rank].add(kind, count);
    }
}
