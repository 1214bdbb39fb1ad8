//! How a layer is split over ranks, and what the ranks are: threads of this process, or the
//! processes that a launcher started.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use moe_kernels::pool::Pool;
use moe_runner::Error;
use moe_runner::comm::{At, Groups, Sizes, Step, run_ranks};
use moe_runner::exchange::ExpertMap;
use moe_runner::experts::RowFormat;
use moe_runner::parallel::{ExchangeKind, Parallel, Placement};
use moe_runner::router::LogicalId;
use moe_runner::runner::{MoeRunner, Options, RankedRunner};
use moe_runner::weights::LoadedLayer;
use serde::Deserialize;

use crate::failure::unusable;
use crate::measure::MachineLimits;

/// Flags that split the layer over ranks.
#[derive(Args, Debug)]
#[command(next_help_heading = "Splitting over ranks")]
pub(crate) struct Splitting {
    /// Tensor parallelism: ranks that have the same rows and, without --ep, a slice of each expert.
    /// There are tp × dp × pcp ranks.
    #[arg(long, value_name = "N", default_value_t = 1)]
    tp: usize,
    /// Data parallelism: ranks with rows of their own.
    #[arg(long, value_name = "N", default_value_t = 1)]
    dp: usize,
    /// Expert parallelism: the ranks hold whole experts, each some, instead of a slice of each.
    #[arg(long)]
    ep: bool,
    /// Prefill context parallelism: ranks that have parts of the same sequence.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pcp: usize,
    /// Each tensor-parallel rank has its own chunk of the rows; needs --ep.
    #[arg(long)]
    sequence_parallel: bool,
    /// Micro-batches that overlap: one computes while another's rows travel; 2 is dual-batch
    /// overlap.
    #[arg(long, value_name = "N", default_value_t = 1)]
    dbo: usize,
    /// How rows reach the experts: naive, every rank gets all rows and sums are reduced; all-to-all,
    /// each row goes only to the ranks that own its experts (needs --ep); auto, all-to-all with
    /// --ep, else what the sizes require.
    #[arg(long, value_enum, value_name = "HOW", hide_possible_values = true)]
    #[arg(default_value_t = Exchange::Auto)]
    exchange: Exchange,
    /// How rows lie before the experts: standard, in any order; batched, each expert's together.
    #[arg(long, value_enum, value_name = "HOW", hide_possible_values = true)]
    #[arg(default_value_t = Rows::Standard)]
    row_format: Rows,
    /// Which rank holds which experts, with --ep: linear, runs of consecutive ones; round-robin,
    /// expert e is on rank e mod ranks; or a file that `plan --json` wrote.
    #[arg(long, value_name = "RULE|FILE", default_value = "linear", value_parser = placement)]
    placement: PlacementChoice,
    /// What the ranks are: threads of this process; with mpi, the processes that mpirun started; with
    /// nccl, GPUs (not in this build).
    #[arg(long, value_enum, value_name = "WHAT", hide_possible_values = true)]
    #[arg(default_value_t = Comm::Threads)]
    comm: Comm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Exchange {
    /// All-to-all with --ep, else what the sizes require.
    Auto,
    /// Every rank gets all rows, and sums are reduced.
    Naive,
    /// Each row goes only to the ranks that own its experts; needs --ep.
    AllToAll,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Rows {
    /// In any order.
    Standard,
    /// Each expert's rows together.
    Batched,
}

/// Where the experts are to be.
#[derive(Clone, Debug)]
enum PlacementChoice {
    Rule(Placement),
    /// What `plan` wrote.
    File(PathBuf),
}

fn placement(text: &str) -> Result<PlacementChoice, String> {
    match text {
        "linear" => Ok(PlacementChoice::Rule(Placement::Linear)),
        "round-robin" => Ok(PlacementChoice::Rule(Placement::RoundRobin)),
        file if Path::new(file).is_file() => Ok(PlacementChoice::File(file.into())),
        _ => Err("is neither linear, nor round-robin, nor a file that `plan --json` wrote".into()),
    }
}

/// The placements of a plan, by layer.
#[derive(Deserialize)]
struct PlanFile {
    layers: Vec<PlannedLayer>,
}

#[derive(Deserialize)]
struct PlannedLayer {
    layer: usize,
    /// Experts of each rank.
    placement: Vec<Vec<u32>>,
}

impl PlanFile {
    fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read(path).with_context(|| format!("{}: cannot read", path.display()))?;
        serde_json::from_slice(&text)
            .with_context(|| format!("{}: is not what `plan --json` writes", path.display()))
    }
}

/// How ranks talk to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Comm {
    /// Threads of this process.
    Threads,
    /// Processes that mpirun started.
    Mpi,
    /// GPUs through NCCL.
    Nccl,
}

/// The largest number of micro-batches: beyond it they only cost.
const MAX_DBO: usize = 64;

impl Splitting {
    /// The file that says where the experts are to be, if one does.
    pub(crate) fn placement_file(&self) -> Option<&Path> {
        match &self.placement {
            PlacementChoice::Rule(_) => None,
            PlacementChoice::File(path) => Some(path),
        }
    }

    /// What the flags ask for.
    pub(crate) fn parallel(&self) -> Result<Parallel> {
        let sizes = Sizes {
            tp: self.tp,
            dp: self.dp,
            pcp: self.pcp,
            expert_parallel: self.ep,
            sequence_parallel: self.sequence_parallel,
        };
        sizes.validate().map_err(|error| unusable(error.to_string()))?;
        if !(1..=MAX_DBO).contains(&self.dbo) {
            return Err(unusable(format!("--dbo {}: must be 1 to {MAX_DBO}", self.dbo)));
        }
        if matches!(self.placement, PlacementChoice::File(_)) && !(self.ep && sizes.ranks() > 1) {
            return Err(unusable("--placement FILE: needs --ep, and the plan's number of ranks"));
        }
        if self.exchange == Exchange::AllToAll && !self.ep {
            return Err(unusable(
                "--exchange all-to-all: needs --ep, experts that live on one rank",
            ));
        }
        Ok(Parallel {
            sizes,
            placement: match self.placement {
                PlacementChoice::Rule(rule) => rule,
                PlacementChoice::File(_) => Placement::Linear,
            },
            exchange: match self.exchange {
                Exchange::Auto => ExchangeKind::Auto,
                Exchange::Naive => ExchangeKind::Naive,
                Exchange::AllToAll => ExchangeKind::AllToAll,
            },
            row_format: match self.row_format {
                Rows::Standard => RowFormat::Standard,
                Rows::Batched => RowFormat::Batched,
            },
            micro_batches: self.dbo,
            ..Parallel::default()
        })
    }

    /// The ranks that the flags ask for.
    pub(crate) fn ranks(&self) -> Result<Ranks> {
        let sizes = self.parallel()?.sizes;
        let plan = match &self.placement {
            PlacementChoice::Rule(_) => None,
            PlacementChoice::File(path) => Some((path.clone(), PlanFile::read(path)?)),
        };
        let kind = match self.comm {
            Comm::Threads => RanksKind::Threads,
            Comm::Mpi => self.processes(sizes)?,
            Comm::Nccl => {
                return Err(unusable(
                    "--comm nccl: connects GPUs, and this build has no GPU kernels; use threads or \
                     mpi",
                ));
            }
        };
        Ok(Ranks { sizes, kind, plan })
    }

    /// Joins the processes that mpirun has started.
    #[cfg(all(unix, feature = "mpi"))]
    fn processes(&self, sizes: Sizes) -> Result<RanksKind> {
        let world = moe_runner::comm::mpi::open()?;
        if world.size() != sizes.ranks() {
            return Err(unusable(format!(
                "--tp × --dp × --pcp are {} ranks, but mpirun started {}",
                sizes.ranks(),
                world.size()
            )));
        }
        Ok(RanksKind::Mpi(Groups::new(world, sizes)?))
    }

    #[cfg(not(all(unix, feature = "mpi")))]
    fn processes(&self, _sizes: Sizes) -> Result<RanksKind> {
        Err(unusable("--comm mpi: this program was built without MPI"))
    }
}

/// Where the way out is another split: how to ask for it.
fn with_option(error: Error) -> Error {
    match error {
        Error::Spec { layer, reason } if reason.ends_with("(expert parallelism)") => {
            Error::Spec { layer, reason: format!("{reason}: --ep") }
        }
        other => other,
    }
}

/// The ranks of one run of the command.
pub(crate) struct Ranks {
    sizes: Sizes,
    kind: RanksKind,
    /// Where the experts are to be, if a file says so.
    plan: Option<(PathBuf, PlanFile)>,
}

enum RanksKind {
    /// Threads of this process.
    Threads,
    /// This process is one of them, in these groups: communicators that all layers share.
    #[cfg_attr(not(all(unix, feature = "mpi")), expect(dead_code, reason = "built without MPI"))]
    Mpi(Groups),
}

/// The sizes, for people.
pub(crate) fn describe(sizes: &Sizes) -> String {
    let counts = [("tp", sizes.tp), ("dp", sizes.dp), ("pcp", sizes.pcp)];
    let counts = counts.iter().filter(|(_, count)| *count > 1);
    let mut parts: Vec<String> = counts.map(|(name, count)| format!("{name} {count}")).collect();
    if sizes.expert_parallel {
        parts.push("whole experts (ep)".into());
    }
    if sizes.sequence_parallel {
        parts.push("sequence parallel".into());
    }
    format!("{} ranks: {}", sizes.ranks(), parts.join(", "))
}

impl Ranks {
    /// This process writes files and reports.
    pub(crate) fn reports(&self) -> bool {
        match &self.kind {
            RanksKind::Threads => true,
            RanksKind::Mpi(groups) => groups.world.rank() == 0,
        }
    }

    /// The ranks are processes of their own.
    pub(crate) fn are_processes(&self) -> bool {
        matches!(self.kind, RanksKind::Mpi(_))
    }

    /// This rank's runner of a layer, with its experts where a plan says, if there is one.
    pub(crate) fn runner<'a>(
        &self,
        layer: &LoadedLayer,
        options: &Options,
        groups: &'a Groups,
        parallel: &Parallel,
    ) -> moe_runner::Result<RankedRunner<'a>> {
        let Some((path, plan)) = &self.plan else {
            return RankedRunner::new(layer, options, groups, parallel).map_err(with_option);
        };
        let index = layer.spec.index;
        let Some(planned) = plan.layers.iter().find(|planned| planned.layer == index) else {
            return Err(Error::file(path, format!("has no placement for layer {index}")));
        };
        let (ranks, wanted) = (planned.placement.len(), groups.sizes.ep());
        if ranks != wanted {
            let reason = format!("places layer {index} on {ranks} ranks; there are {wanted}");
            return Err(Error::file(path, reason));
        }
        let ids = |rank: &Vec<u32>| rank.iter().map(|id| LogicalId(*id)).collect();
        let by_rank: Vec<Vec<LogicalId>> = planned.placement.iter().map(ids).collect();
        let map = ExpertMap::new(layer.experts.len(), &by_rank)
            .map_err(|error| Error::file(path, format!("layer {index}: {error}")))?;
        let runner = MoeRunner::on_rank_with(layer, options, groups, parallel, Arc::new(map))?;
        Ok(RankedRunner::of(runner, groups))
    }

    /// The sizes, where there is more than one rank.
    pub(crate) fn split(&self) -> Option<Sizes> {
        (self.sizes.ranks() > 1).then_some(self.sizes)
    }

    /// The ranks that share this process's memory.
    pub(crate) fn in_this_process(&self) -> usize {
        match self.kind {
            RanksKind::Threads => self.sizes.ranks(),
            RanksKind::Mpi(_) => 1,
        }
    }

    /// The threads of one rank: those of the process, dealt to its ranks.
    pub(crate) fn pool(&self, process: &Arc<Pool>) -> moe_runner::Result<Arc<Pool>> {
        let ranks = self.in_this_process();
        if ranks == 1 {
            return Ok(process.clone());
        }
        let pool = Pool::new((process.threads() / ranks).max(1));
        let pool = pool.map_err(|error| {
            Error::input("--threads", format!("cannot start threads ({error}); give fewer"))
        });
        Ok(Arc::new(pool?))
    }

    /// What the machines of all ranks can do together. Processes measure at the same time, so that
    /// those of one machine share it.
    pub(crate) fn measure(
        &self,
        pool: &Pool,
        gpu: Option<usize>,
    ) -> moe_runner::Result<MachineLimits> {
        if let Some(gpu) = gpu {
            return MachineLimits::measure(pool).with_gpu(gpu);
        }
        let RanksKind::Mpi(Groups { world, .. }) = &self.kind else {
            return Ok(MachineLimits::measure(pool));
        };
        let at = At::new("the machine", Step::Finish);
        world.barrier(at)?;
        let mine = MachineLimits::measure(pool);
        let all = world.all_gather(
            at,
            vec![
                mine.read_gbps.to_bits(),
                mine.f32_gflops.to_bits(),
                mine.bf16_gflops.unwrap_or_default().to_bits(),
                mine.threads as u64,
            ],
        )?;
        let ranks = all.chunks_exact(4);
        let sum = |i: usize| ranks.clone().map(|rank| f64::from_bits(rank[i])).sum();
        Ok(MachineLimits {
            read_gbps: sum(0),
            f32_gflops: sum(1),
            bf16_gflops: mine.bf16_gflops.map(|_| sum(2)),
            threads: ranks.clone().map(|rank| rank[3] as usize).sum(),
            ..mine
        })
    }

    /// Runs `work` on every rank, and returns the result of this process's first one.
    pub(crate) fn run<T: Send>(
        &self,
        work: impl Fn(&Groups) -> moe_runner::Result<T> + Sync,
    ) -> moe_runner::Result<T> {
        let sizes = self.sizes;
        match &self.kind {
            RanksKind::Threads => {
                let mut results =
                    run_ranks(sizes.ranks(), |world| work(&Groups::new(world.clone(), sizes)?))?;
                Ok(results.swap_remove(0))
            }
            RanksKind::Mpi(groups) => {
                let result = work(groups);
                if let Err(error) = &result {
                    // the others would wait for this rank
                    groups.world.abort(&error.to_string());
                }
                result
            }
        }
    }
}
