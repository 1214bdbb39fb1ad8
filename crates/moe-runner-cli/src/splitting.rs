//! How a layer is split over ranks.

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::failure::unusable;

/// Flags that split the layer over ranks.
#[derive(Args, Debug)]
#[command(next_help_heading = "Splitting over ranks")]
pub(crate) struct Splitting {
    /// Tensor parallelism: ranks that share each expert.
    #[arg(long, value_name = "N", default_value_t = 1)]
    tp: usize,
    /// Data parallelism: ranks with tokens of their own.
    #[arg(long, value_name = "N", default_value_t = 1)]
    dp: usize,
    /// Expert parallelism: ranks hold whole experts instead of parts of each.
    #[arg(long)]
    ep: bool,
    /// Prefill context parallelism: ranks that share a sequence.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pcp: usize,
    /// Spread the rows between the layers over the tensor-parallel ranks.
    #[arg(long)]
    sequence_parallel: bool,
    /// Dual-batch overlap: two halves of the batch, one computing while the other travels.
    #[arg(long)]
    dbo: bool,
    /// How ranks talk to each other; `threads`: all ranks are threads of this process.
    #[arg(long, value_enum, default_value_t = Comm::Threads)]
    comm: Comm,
}

/// How ranks talk to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Comm {
    /// Threads of this process.
    Threads,
    /// Processes under MPI.
    Mpi,
    /// GPUs through NCCL.
    Nccl,
}

impl Splitting {
    /// Refuses every split but none.
    pub(crate) fn single_rank(&self) -> Result<()> {
        let asked = [
            (self.tp != 1, "--tp"),
            (self.dp != 1, "--dp"),
            (self.ep, "--ep"),
            (self.pcp != 1, "--pcp"),
            (self.sequence_parallel, "--sequence-parallel"),
            (self.dbo, "--dbo"),
            (self.comm != Comm::Threads, "--comm"),
        ];
        match asked.into_iter().find(|(asked, _)| *asked) {
            None => Ok(()),
            Some((_, flag)) => Err(unusable(format!(
                "{flag}: this build runs a layer on one rank only; leave the splitting flags out"
            ))),
        }
    }
}
