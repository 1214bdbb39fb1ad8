//! One batch through one layer that is split over ranks: rows are dealt, every rank runs its share,
//! and every rank gets all results back, in the order of the rows.
//!
//! The same code for ranks as threads and as MPI processes, and for one rank.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{
    ForwardInput, ForwardOutput, MoeRunner, MoeRunnerInterface, Options, Report, Span, Timeline,
};
use crate::comm::{At, Communicator, Groups, Step, Traffic};
use crate::hidden::{Rows, RowsMut};
use crate::parallel::{Parallel, deal_rows};
use crate::router::Simulator;
use crate::weights::LoadedLayer;
use crate::{Error, Result};

/// All rows of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// `[T, H]`, in f32; rounded to the layer's dtype.
    pub hidden: &'a [f32],
    /// `[T, E_total]`, in place of the gate.
    pub router_logits: Option<&'a [f32]>,
    /// `[T]`, for layers that route by token id.
    pub input_ids: Option<&'a [u32]>,
}

/// What became of a batch, on every rank.
#[derive(Clone, Debug)]
pub struct BatchOutput {
    /// `[T, H]`: the true output (its scale undone), in f32.
    pub output: Vec<f32>,
    /// `[T, E_total]`.
    pub router_logits: Vec<f32>,
    /// `[T, k]`.
    pub topk_ids: Vec<u32>,
    /// `[T, k]`.
    pub topk_weights: Vec<f32>,
    /// `[T, H]`: what the shared experts add.
    pub shared: Option<Vec<f32>>,
    /// `output` is what ranks wrote times this (1 but for f16: [`scale`](super::scale)).
    pub output_scale: f32,
    /// Name of the kernel that ran.
    pub kernel: &'static str,
    /// Bytes of weights read, over all ranks.
    pub weight_bytes: usize,
    /// Floating-point operations, over all ranks.
    pub flops: f64,
    /// From the start of the slowest rank's pass to its end.
    pub time: Duration,
    /// What this rank did when, if the timeline was on.
    pub spans: Vec<Span>,
    /// What this rank sent and received during the pass, in all its groups.
    pub traffic: Traffic,
}

/// One timed pass, the same on every rank.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// From the start of the slowest rank's pass to its end.
    pub time: Duration,
    /// Bytes of weights read, over all ranks.
    pub weight_bytes: usize,
    /// Floating-point operations, over all ranks.
    pub flops: f64,
    /// Bytes that ranks sent to other ranks, over all ranks.
    pub moved: usize,
}

/// This rank's runner of a layer, for any number of batches. All ranks make theirs, and then call
/// its methods, together with the same arguments.
pub struct RankedRunner<'a> {
    runner: MoeRunner,
    groups: &'a Groups,
    /// This rank's rows of the output; its memory is kept from pass to pass.
    output: Vec<f32>,
    report: Report,
}

impl std::fmt::Debug for RankedRunner<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RankedRunner").field("runner", &self.runner).finish_non_exhaustive()
    }
}

impl<'a> RankedRunner<'a> {
    /// This rank's share of `layer`.
    ///
    /// # Errors
    /// As [`MoeRunner::on_rank`].
    pub fn new(
        layer: &LoadedLayer,
        options: &Options,
        groups: &'a Groups,
        parallel: &Parallel,
    ) -> Result<Self> {
        Ok(Self::of(MoeRunner::on_rank(layer, options, groups, parallel)?, groups))
    }

    /// Of this rank's runner, such as one with a placement of its own
    /// ([`MoeRunner::on_rank_with`]).
    pub fn of(runner: MoeRunner, groups: &'a Groups) -> Self {
        Self { runner, groups, output: Vec::new(), report: Report::default() }
    }

    /// Records what each pass does when.
    pub fn with_timeline(self, timeline: Timeline) -> Self {
        Self { runner: self.runner.with_timeline(timeline), ..self }
    }

    /// Replaces the router's choice by a simulated one, for benchmarks. Ranks that have the same
    /// rows need the same one.
    pub fn with_simulator(self, simulator: Option<Simulator>) -> Self {
        Self { runner: self.runner.with_simulator(simulator), ..self }
    }

    /// The runner of this rank.
    pub fn runner(&self) -> &MoeRunner {
        &self.runner
    }

    /// The same, for passes of this rank's own.
    pub fn runner_mut(&mut self) -> &mut MoeRunner {
        &mut self.runner
    }

    /// The rows that this rank has of a batch of `tokens`.
    pub fn rows(&self, tokens: usize) -> Range<usize> {
        deal_rows(tokens, self.groups.sizes)[self.groups.world.rank()].clone()
    }

    /// About what this rank needs for a batch of `tokens`: working memory, if tokens spread evenly
    /// over the experts, and the results of all ranks.
    pub fn workspace_bytes(&self, tokens: usize) -> usize {
        let spec = self.runner.spec();
        let sizes = self.groups.sizes;
        // without expert parallelism every rank computes its slice of every row
        let rows = if sizes.use_ep() { self.rows(tokens).len() } else { tokens };
        let shared = usize::from(spec.shared.is_some());
        let results =
            (1 + shared) * spec.dims.hidden + spec.router.logits() + 2 * spec.router.top_k;
        self.runner.workspace_bytes(rows) + tokens * results * 4
    }

    /// One pass for its time: the ranks start together, and outputs stay where they are.
    ///
    /// # Errors
    /// As [`MoeRunnerInterface::forward`].
    pub fn pass(&mut self, batch: &Batch<'_>) -> Result<Pass> {
        let Self { runner, groups, output, report } = self;
        let name = runner.spec().name.clone();
        let at = At::new(&name, Step::Finish);
        if groups.world.size() > 1 {
            groups.world.barrier(at)?;
        }
        own_rows(runner, groups, batch, (output, report))?.1.over_all_ranks(groups, at)
    }

    /// One pass, with all results on every rank. The timeline goes on from pass to pass.
    ///
    /// # Errors
    /// As [`MoeRunnerInterface::forward`].
    pub fn forward(&mut self, batch: &Batch<'_>) -> Result<BatchOutput> {
        let Self { runner, groups, output, report } = self;
        let (sizes, rank) = (groups.sizes, groups.world.rank());
        let name = runner.spec().name.clone();
        let at = |step| At::new(&name, step);
        let kernel = runner.method().desc().name;
        let (done, own) = own_rows(runner, groups, batch, (output, report))?;
        output.iter_mut().for_each(|v| *v *= done.output_scale);
        let mut shared = report.shared.clone();
        if let Some(shared) = &mut shared
            && !report.shared_complete
        {
            groups.tp.all_reduce(at(Step::ReduceShared), shared)?;
        }
        let ids: Vec<u32> = report.routing.ids.iter().map(|id| id.0).collect();
        let pass = own.over_all_ranks(groups, at(Step::Finish))?;
        // Ranks that have the same rows agree bit by bit: the first of them speaks for all.
        let speaks = sizes.sp() > 1 || sizes.tp_rank(rank) == 0;
        let gather = Gather { world: &groups.world, at: at(Step::Finish), speaks };
        Ok(BatchOutput {
            output: gather.rows(output)?,
            router_logits: gather.rows(&report.router_logits)?,
            topk_ids: gather.rows(&ids)?,
            topk_weights: gather.rows(&report.routing.weights)?,
            shared: shared.map(|rows| gather.rows(&rows)).transpose()?,
            output_scale: done.output_scale,
            kernel,
            weight_bytes: pass.weight_bytes,
            flops: pass.flops,
            time: pass.time,
            spans: runner.timeline().spans().to_vec(),
            traffic: own.traffic,
        })
    }
}

/// Runs `batch` through `layer`, once. All ranks of `groups` call this together with the same
/// arguments. `origin`: record the pass on a timeline that starts there.
///
/// # Errors
/// As [`MoeRunner::on_rank`] and [`MoeRunnerInterface::forward`]. The caller tells the other ranks of
/// an error of its own ([`Communicator::abort`]; [`run_ranks`](crate::comm::run_ranks) does so).
pub fn forward_batch(
    layer: &LoadedLayer,
    options: &Options,
    groups: &Groups,
    parallel: &Parallel,
    batch: &Batch<'_>,
    origin: Option<Instant>,
) -> Result<BatchOutput> {
    let timeline = origin.map_or_else(Timeline::off, Timeline::since);
    RankedRunner::new(layer, options, groups, parallel)?.with_timeline(timeline).forward(batch)
}

/// What one rank did in a pass.
struct Own {
    time: Duration,
    weight_bytes: usize,
    flops: f64,
    traffic: Traffic,
}

/// Runs this rank's rows of `batch`; `output` gets theirs, and `report` what was done.
fn own_rows(
    runner: &mut MoeRunner,
    groups: &Groups,
    batch: &Batch<'_>,
    (output, report): (&mut Vec<f32>, &mut Report),
) -> Result<(ForwardOutput, Own)> {
    let (hidden, logits) = (runner.spec().dims.hidden, runner.spec().router.logits());
    let tokens = Rows::F32(batch.hidden).tokens("hidden_states", hidden)?;
    check("router_logits", batch.router_logits.map(<[f32]>::len), tokens * logits)?;
    check("input_ids", batch.input_ids.map(<[u32]>::len), tokens)?;
    let rows = deal_rows(tokens, groups.sizes)[groups.world.rank()].clone();
    let input = ForwardInput {
        router_logits: batch.router_logits.map(|all| &all[rows.start * logits..rows.end * logits]),
        input_ids: batch.input_ids.map(|all| &all[rows.clone()]),
        ..ForwardInput::new(Rows::F32(&batch.hidden[rows.start * hidden..rows.end * hidden]))
    };
    output.resize(rows.len() * hidden, 0.0);
    let before = traffic(groups);
    let start = Instant::now();
    let done = runner.forward_reporting(&input, RowsMut::F32(output), Some(report))?;
    let time = start.elapsed();
    let traffic = traffic(groups).since(&before);
    Ok((done, Own { time, weight_bytes: report.weight_bytes, flops: report.flops, traffic }))
}

impl Own {
    /// What all ranks did together.
    fn over_all_ranks(&self, groups: &Groups, at: At<'_>) -> Result<Pass> {
        let nanos = u64::try_from(self.time.as_nanos()).unwrap_or(u64::MAX);
        let sent = self.traffic.total().sent;
        let mine = vec![nanos, self.weight_bytes as u64, sent, self.flops.to_bits()];
        let all = groups.world.all_gather(at, mine)?;
        let all = all.chunks_exact(4);
        let sum = |i: usize| all.clone().map(|rank| rank[i] as usize).sum();
        Ok(Pass {
            time: Duration::from_nanos(all.clone().map(|rank| rank[0]).max().unwrap_or(nanos)),
            weight_bytes: sum(1),
            moved: sum(2),
            flops: all.clone().map(|rank| f64::from_bits(rank[3])).sum(),
        })
    }
}

/// Collects rows from the ranks that speak, in rank order, which is the order of the rows.
struct Gather<'a> {
    world: &'a Arc<dyn Communicator>,
    at: At<'a>,
    speaks: bool,
}

impl Gather<'_> {
    fn rows<T: crate::comm::Element>(&self, mine: &[T]) -> Result<Vec<T>> {
        let mine = if self.speaks { mine } else { &[] };
        Ok(self.world.all_gather_v(self.at, mine)?.to_vec())
    }
}

fn check(what: &'static str, len: Option<usize>, want: usize) -> Result<()> {
    match len {
        Some(len) if len != want => {
            Err(Error::input(what, format!("{len} elements, {want} are needed")))
        }
        _ => Ok(()),
    }
}

/// What this rank has sent and received in the groups that a forward pass uses.
fn traffic(groups: &Groups) -> Traffic {
    let all = [&groups.world, &groups.ep, &groups.rows, &groups.tp];
    all.iter().fold(Traffic::default(), |sum, group| sum.plus(&group.traffic().read()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{Count, Kind, Sizes, TrafficCounter, run_ranks};

    /// The slowest rank's time, and the sum of all else: the same on every rank.
    #[test]
    fn ranks_tell_what_they_did_together() {
        let sizes = Sizes { dp: 3, ..Sizes::default() };
        let passes = run_ranks(3, |world| {
            let groups = Groups::new(world.clone(), sizes)?;
            let rank = world.rank();
            let counter = TrafficCounter::default();
            let sent = [1, 20, 300][rank];
            counter.add(Kind::AllToAllV, Count { calls: 1, sent, received: 7 });
            let own = Own {
                time: Duration::from_micros([30, 50, 20][rank]),
                weight_bytes: [4, 50, 600][rank],
                flops: [0.5, 7.0, 80.0][rank],
                traffic: counter.read(),
            };
            own.over_all_ranks(&groups, At::new("layer", Step::Finish))
        });
        for Pass { time, weight_bytes, flops, moved } in passes.unwrap() {
            assert_eq!(time, Duration::from_micros(50));
            assert_eq!((weight_bytes, moved, flops), (654, 321, 87.5));
        }
    }
}
