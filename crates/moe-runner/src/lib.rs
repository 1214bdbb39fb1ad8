//! The mixture-of-experts (MoE) layer: from a published checkpoint to the layer's output.
//!
//! The [names at the root](prelude) are those that most programs need: [`Checkpoint`] and
//! [`LoadedLayer`], [`Options`] and [`MoeRunner`], [`Rows`] in and [`RowsMut`] out. The rest is in the
//! modules, which stand in the order of the flow; a module uses those above it, never those below.
//!
//! ```text
//! hidden [T,H] ─ input transform ─ gate ─ route ─ dispatch ─ experts ─ combine ─┐
//!       └──────────── shared experts (order decided once) ──────────────────────┴ scale · transform · add · reduce ─ out [T,H]
//! ```
#![warn(missing_docs)]

pub mod error;
pub mod hidden;
pub mod random;
pub mod spec;

pub mod checkpoint;

pub mod router;

pub mod plan;

pub mod weights;

pub mod comm;
pub mod exchange;

pub mod experts;
pub mod oracle;

pub mod shared_experts;

pub mod parallel;

pub mod quantize;

pub mod runner;

pub mod doctor;

/// The threads that layers run on, and the trait that pools of others implement.
pub use moe_kernels::pool;

pub use error::{Error, Result};
#[doc(inline)]
pub use prelude::*;

/// What most programs need of this crate, for `use moe_runner::prelude::*`; it is at the root, too.
pub mod prelude {
    // from a checkpoint, or by hand
    pub use crate::checkpoint::Checkpoint;
    pub use crate::checkpoint::architecture::{self, LayerEntry};
    pub use crate::spec::{Activation, Dims, ExpertSpec, LayerSpec, RouterSpec};
    pub use crate::weights::{Expert, LoadedLayer, Matrix, StackedExperts};
    // to a layer that runs
    pub use crate::hidden::{ActivationDtype, Rows, RowsMut};
    pub use crate::oracle::{Choice, Machine};
    pub use crate::pool::{Pool, ThreadPool};
    pub use crate::runner::{
        FinishedRouting, ForwardInput, ForwardOutput, MoeRunner, MoeRunnerInterface, NonFinite,
        Options, ReadyLayer, Report, RoutedExperts, Workspaces,
    };
    // on many ranks
    pub use crate::comm::{Communicator, Groups, Sizes, run_ranks};
    pub use crate::parallel::Parallel;
    pub use crate::runner::{Batch, RankedRunner};
}

// the README's example compiles as it is pasted
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
