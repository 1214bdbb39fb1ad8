//! One batch through one layer that is split over ranks: rows are dealt, every rank runs its share,
//! and every rank gets all results back, in the order of the rows.
//!
//! The same code for ranks as threads and as MPI processes, and for one rank.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{ForwardInput, MoeRunner, MoeRunnerInterface, Options, Span, Timeline};
use crate::comm::{At, Communicator, Groups, Step, Traffic};
use crate::hidden::{Rows, RowsMut};
use crate::parallel::{Parallel, deal_rows};
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

/// Runs `batch` through `layer`. All ranks of `groups` call this together with the same arguments.
/// `origin`: record the pass on a timeline that starts there.
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
    let spec = &layer.spec;
    let (hidden, logits) = (spec.dims.hidden, spec.router.logits());
    let tokens = Rows::F32(batch.hidden).tokens("hidden_states", hidden)?;
    let (sizes, rank) = (groups.sizes, groups.world.rank());
    let rows = deal_rows(tokens, sizes)[rank].clone();
    check("router_logits", batch.router_logits.map(<[f32]>::len), tokens * logits)?;
    check("input_ids", batch.input_ids.map(<[u32]>::len), tokens)?;
    let input = ForwardInput {
        router_logits: batch.router_logits.map(|all| &all[rows.start * logits..rows.end * logits]),
        input_ids: batch.input_ids.map(|all| &all[rows.clone()]),
        ..ForwardInput::new(Rows::F32(&batch.hidden[rows.start * hidden..rows.end * hidden]))
    };
    let mut runner = MoeRunner::on_rank(layer, options, groups, parallel)?.with_timeline(timeline);
    let mut output = vec![0.0; rows.len() * hidden];
    let before = traffic(groups);
    let start = Instant::now();
    let done = runner.forward(&input, RowsMut::F32(&mut output))?;
    let time = start.elapsed();
    let sent = traffic(groups).since(&before);
    output.iter_mut().for_each(|v| *v *= done.output_scale);
    let mut shared = done.shared.map(<[f32]>::to_vec);
    let at = |step| At::new(&spec.name, step);
    if let Some(shared) = &mut shared
        && !done.shared_complete
    {
        groups.tp.all_reduce(at(Step::ReduceShared), shared)?;
    }
    let ids: Vec<u32> = done.routing.ids.iter().map(|id| id.0).collect();
    let (weight_bytes, flops) = (done.weight_bytes as f64, done.flops);

    // Ranks that have the same rows agree bit by bit: the first of them speaks for all.
    let speaks = sizes.sp() > 1 || sizes.tp_rank(rank) == 0;
    let gather = Gather { world: &groups.world, at: at(Step::Finish), speaks };
    let totals = groups.world.all_gather(
        at(Step::Finish),
        vec![weight_bytes as f32, (flops / 1e6) as f32, time.as_secs_f32()],
    )?;
    let sum = |i: usize| totals.chunks_exact(3).map(|rank| f64::from(rank[i])).sum::<f64>();
    let slowest = totals.chunks_exact(3).map(|rank| rank[2]).fold(0.0, f32::max);
    let single = groups.world.size() == 1;
    Ok(BatchOutput {
        output: gather.rows(output)?,
        router_logits: gather.rows(done.router_logits.to_vec())?,
        topk_ids: gather.rows(ids)?,
        topk_weights: gather.rows(done.routing.weights.clone())?,
        shared: shared.map(|rows| gather.rows(rows)).transpose()?,
        kernel: runner.method().desc().name,
        // f32 totals would round what one rank knows exactly
        weight_bytes: if single { weight_bytes as usize } else { sum(0) as usize },
        flops: if single { flops } else { sum(1) * 1e6 },
        time: if single { time } else { Duration::from_secs_f32(slowest) },
        spans: runner.timeline().spans().to_vec(),
        traffic: sent,
    })
}

/// Collects rows from the ranks that speak, in rank order, which is the order of the rows.
struct Gather<'a> {
    world: &'a Arc<dyn Communicator>,
    at: At<'a>,
    speaks: bool,
}

impl Gather<'_> {
    fn rows<T: crate::comm::Element>(&self, mine: Vec<T>) -> Result<Vec<T>> {
        let mine = if self.speaks { mine } else { Vec::new() };
        Ok(self.world.all_gather_v(self.at, mine)?.into_inner().0)
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
