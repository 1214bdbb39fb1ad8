//! How a layer is split over ranks, and what the ranks are: threads of this process, or the
//! processes that a launcher started.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use moe_kernels::pool::{Pool, stay_on};
use moe_runner::Error;
use moe_runner::comm::{self, At, Communicator, Groups, Sizes, Step, run_ranks, tcp};
use moe_runner::exchange::ExpertMap;
use moe_runner::experts::RowFormat;
use moe_runner::hidden::ActivationDtype;
use moe_runner::parallel::{ExchangeKind, Parallel, Placement};
use moe_runner::router::LogicalId;
use moe_runner::runner::{MoeRunner, Options, RankedRunner};
use moe_runner::weights::LoadedLayer;
use serde::Deserialize;

use crate::args::common::Common;
use crate::failure::unusable;
use crate::gpu;
use crate::interrupt;
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
    /// With --comm nccl: room for so many times an even share of what every rank has for every other, in place of as
    /// much as it has. No processor then learns a count, and passes are captured as a graph. What has no room is an
    /// error.
    #[arg(long, value_name = "F")]
    capacity: Option<f64>,
    /// With --comm nccl: rows pass through the processor on their way, as they do in splits that need it.
    #[arg(long)]
    through_host: bool,
    /// With --comm nccl: rows go from GPU to GPU by sends and receives, also where the GPUs can write into each other's
    /// memory.
    #[arg(long)]
    two_sided: bool,
    #[command(flatten)]
    meeting: Meeting,
}

/// Flags that say what ranks are and how they meet.
#[derive(Args, Clone, Debug)]
pub(crate) struct Meeting {
    /// What the ranks are: threads of this process; with mpi, the processes that mpirun started; with
    /// tcp, processes that meet at --rendezvous; with nccl, any of these, each with a GPU, through which
    /// rows travel.
    #[arg(long, value_enum, value_name = "WHAT", hide_possible_values = true)]
    #[arg(default_value_t = Comm::Threads)]
    comm: Comm,
    /// Where processes meet: an address of the machine of rank 0. With --comm tcp or nccl.
    #[arg(long, value_name = "HOST:PORT", requires = "rank")]
    rendezvous: Option<String>,
    /// Which rank this process is, from 0. With --rendezvous.
    #[arg(long, value_name = "R", requires = "rendezvous")]
    rank: Option<usize>,
    /// How many processes meet: tp × dp × pcp, which is also taken where nothing is said.
    #[arg(long, value_name = "N", requires = "rendezvous")]
    world: Option<usize>,
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
    /// Processes that meet at an address.
    Tcp,
    /// Any of these, with GPUs through NCCL.
    Nccl,
}

/// The largest number of micro-batches: beyond it they only cost.
const MAX_DBO: usize = 64;

impl Meeting {
    /// Rows travel through GPUs.
    pub(crate) fn has_gpus(&self) -> bool {
        self.comm == Comm::Nccl
    }

    /// What connects the ranks, for people.
    pub(crate) fn name(&self) -> &'static str {
        match self.comm {
            Comm::Threads => "threads",
            Comm::Mpi => "mpi",
            Comm::Tcp => "tcp",
            Comm::Nccl => "nccl",
        }
    }
}

impl Splitting {
    /// One rank.
    pub(crate) fn none() -> Self {
        Self {
            tp: 1,
            dp: 1,
            ep: false,
            pcp: 1,
            sequence_parallel: false,
            dbo: 1,
            exchange: Exchange::Auto,
            row_format: Rows::Standard,
            placement: PlacementChoice::Rule(Placement::Linear),
            capacity: None,
            through_host: false,
            two_sided: false,
            meeting: Meeting { comm: Comm::Threads, rank: None, world: None, rendezvous: None },
        }
    }

    /// How the ranks meet.
    pub(crate) fn meeting(self) -> Meeting {
        self.meeting
    }

    /// So many ranks with whole experts and rows of their own.
    pub(crate) fn of_ranks(ranks: usize, meeting: Meeting) -> Self {
        Self { dp: ranks, ep: ranks > 1, meeting, ..Self::none() }
    }

    /// How much more room than an even share there is to be, if that is said.
    pub(crate) fn capacity(&self) -> Option<f64> {
        self.capacity
    }

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
        if let Some(bad) = self.capacity.filter(|factor| !(0.0..=1024.0).contains(factor)) {
            return Err(unusable(format!("--capacity {bad}: must be up to 1024")));
        }
        let of_nccl = self.capacity.is_some() || self.through_host || self.two_sided;
        if of_nccl && self.meeting.comm != Comm::Nccl {
            return Err(unusable(
                "--capacity, --two-sided and --through-host: are for --comm nccl",
            ));
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
            keeps_rows: !self.through_host,
            one_sided: !self.two_sided,
            ..Parallel::default()
        })
    }

    /// The ranks that the flags ask for; with GPUs, from `gpu` on.
    pub(crate) fn ranks(&self, gpu: usize) -> Result<Ranks> {
        let parallel = self.parallel()?;
        let sizes = parallel.sizes;
        let plan = match &self.placement {
            PlacementChoice::Rule(_) => None,
            PlacementChoice::File(path) => Some((path.clone(), PlanFile::read(path)?)),
        };
        let nccl = self.meeting.comm == Comm::Nccl;
        let world = match (self.meeting.comm, &self.meeting.rendezvous) {
            (Comm::Threads | Comm::Mpi, Some(_)) => {
                return Err(unusable("--rendezvous: is for --comm tcp and --comm nccl"));
            }
            (Comm::Tcp, None) => {
                return Err(unusable(
                    "--comm tcp: needs --rendezvous HOST:PORT, where the processes meet, and --rank R",
                ));
            }
            (Comm::Tcp | Comm::Nccl, Some(address)) => Some(self.meet(address, sizes)?),
            (Comm::Mpi, None) => Some(processes(sizes)?),
            (Comm::Nccl, None) if is_launched() => Some(processes(sizes)?),
            (Comm::Threads | Comm::Nccl, None) => None,
        };
        let mut ranks = Ranks { sizes, kind: RanksKind::Threads, nccl, gpu, plan };
        if let Some(world) = world {
            agree(&*world, &format!("{parallel:?}"))?;
            let world = ranks.connect(world, local_rank())?;
            if world.rank() != 0 {
                // rank 0 speaks for all
                interrupt::last_words(|| {});
            }
            ranks.kind = RanksKind::Processes(Groups::new(world, sizes)?);
        }
        Ok(ranks)
    }

    /// Meets the other processes at `address`.
    fn meet(&self, address: &str, sizes: Sizes) -> Result<Arc<dyn Communicator>> {
        let ranks = sizes.ranks();
        if let Some(world) = self.meeting.world.filter(|world| *world != ranks) {
            let reason = format!("--world {world}: --tp × --dp × --pcp are {ranks} ranks");
            return Err(unusable(reason));
        }
        let rank = self.meeting.rank.unwrap_or_default();
        if rank >= ranks {
            return Err(unusable(format!("--rank {rank}: there are {ranks} ranks, from 0 on")));
        }
        let at = tcp::Rendezvous { address: address.to_owned(), rank, ranks };
        Ok(tcp::open(&at, comm::Options::default())?)
    }
}

/// What launchers say to each process about its number on its machine.
const LOCAL_RANK: [&str; 4] =
    ["OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"];

/// This process's number on its machine; 0 where nobody said.
fn local_rank() -> usize {
    let said = |name: &&str| std::env::var(name).ok()?.parse().ok();
    LOCAL_RANK.iter().find_map(said).unwrap_or(0)
}

/// A launcher of MPI processes has started this one.
fn is_launched() -> bool {
    ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"]
        .iter()
        .any(|name| std::env::var_os(name).is_some())
}

/// Joins the processes that mpirun has started.
#[cfg(all(unix, feature = "mpi"))]
fn processes(sizes: Sizes) -> Result<Arc<dyn Communicator>> {
    let world = comm::mpi::open()?;
    if world.size() != sizes.ranks() {
        return Err(unusable(format!(
            "--tp × --dp × --pcp are {} ranks, but mpirun started {}",
            sizes.ranks(),
            world.size()
        )));
    }
    Ok(world)
}

#[cfg(not(all(unix, feature = "mpi")))]
fn processes(_: Sizes) -> Result<Arc<dyn Communicator>> {
    Err(unusable("--comm mpi: this program was built without MPI"))
}

/// Processes are started one by one: all must have been told the same.
fn agree(world: &dyn Communicator, told: &str) -> Result<()> {
    let at = At::new("the command line", Step::Setup);
    let all = world.all_gather_v(at, told.as_bytes())?;
    let other = (0..world.size()).find(|rank| all.part(*rank) != all.part(0));
    other.map_or(Ok(()), |rank| {
        let reason = format!(
            "ranks 0 and {rank} were started with different flags of splitting; give all the same"
        );
        world.abort(&reason);
        Err(unusable(reason))
    })
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
    /// Rows travel through GPUs.
    nccl: bool,
    /// The first GPU, where there are some.
    gpu: usize,
    /// Where the experts are to be, if a file says so.
    plan: Option<(PathBuf, PlanFile)>,
}

enum RanksKind {
    /// Threads of this process.
    Threads,
    /// This process is one of them, in these groups: communicators that all layers share.
    Processes(Groups),
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
            RanksKind::Processes(groups) => groups.world.rank() == 0,
        }
    }

    /// The ranks are processes of their own.
    pub(crate) fn are_processes(&self) -> bool {
        matches!(self.kind, RanksKind::Processes(_))
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
            RanksKind::Processes(_) => 1,
        }
    }

    /// The options of the rank whose groups these are.
    pub(crate) fn options(
        &self,
        common: &Common,
        dtype: ActivationDtype,
        groups: &Groups,
    ) -> moe_runner::Result<Options> {
        let options = common.options(dtype);
        let number = match self.kind {
            RanksKind::Threads => groups.world.rank(),
            RanksKind::Processes(_) => local_rank(),
        };
        let gpu = if common.gpu_in_use().is_some() { self.gpu(number) } else { options.gpu };
        Ok(Options { pool: self.pool(common, number)?, gpu, ..options })
    }

    /// The GPU of the rank with this number on its machine. Where there are fewer than ranks, they share.
    fn gpu(&self, number: usize) -> usize {
        (self.gpu + number) % gpu::count().max(1)
    }

    /// The same group, with rows that travel through GPUs if that was asked for.
    fn connect(
        &self,
        world: Arc<dyn Communicator>,
        number: usize,
    ) -> moe_runner::Result<Arc<dyn Communicator>> {
        match self.nccl {
            false => Ok(world),
            true => gpu::connect(world, self.gpu(number)),
        }
    }

    /// The threads of one rank: those of the process, dealt to its ranks.
    fn pool(&self, common: &Common, number: usize) -> moe_runner::Result<Arc<Pool>> {
        let (process, ranks) = (&common.pool, self.in_this_process());
        let threads = (process.threads() / ranks).max(1);
        let cpus = match &common.cpus {
            None => None,
            Some(_) if self.are_processes() => {
                let reason = "is for ranks of one process; the launcher binds processes";
                return Err(Error::input("--pin-threads", reason));
            }
            Some(cpus) => Some(cpus.chunks_exact(threads).nth(number).ok_or_else(|| {
                let reason = format!("{ranks} ranks of this process need a processor each");
                Error::input("--pin-threads", reason)
            })?),
        };
        if let Some(cpus) = cpus {
            let stays = stay_on(cpus[0]);
            stays.map_err(|error| Error::input("--pin-threads", error.to_string()))?;
        }
        if ranks == 1 {
            return Ok(process.clone());
        }
        let pool = cpus.map_or_else(|| Pool::new(threads), Pool::pinned);
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
        let RanksKind::Processes(Groups { world, .. }) = &self.kind else {
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
                mine.int8_gflops.unwrap_or_default().to_bits(),
                mine.tile_gflops.unwrap_or_default().to_bits(),
                mine.threads as u64,
            ],
        )?;
        let ranks = all.chunks_exact(6);
        let sum = |i: usize| ranks.clone().map(|rank| f64::from_bits(rank[i])).sum();
        Ok(MachineLimits {
            read_gbps: sum(0),
            f32_gflops: sum(1),
            bf16_gflops: mine.bf16_gflops.map(|_| sum(2)),
            int8_gflops: mine.int8_gflops.map(|_| sum(3)),
            tile_gflops: mine.tile_gflops.map(|_| sum(4)),
            threads: ranks.clone().map(|rank| rank[5] as usize).sum(),
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
                let mut results = run_ranks(sizes.ranks(), |world| {
                    let world = self.connect(world.clone(), world.rank())?;
                    work(&Groups::new(world, sizes)?)
                })?;
                Ok(results.swap_remove(0))
            }
            RanksKind::Processes(groups) => {
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
