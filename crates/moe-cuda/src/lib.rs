//! The verbs of a mixture-of-experts layer on NVIDIA GPUs.
//!
//! Building needs no CUDA. The driver (`libcuda`), the compiler (NVRTC) and, for many GPUs, NCCL are opened at run
//! time; a missing one, a driver that is too old, or a GPU older than Ampere is one clear error. Kernels are
//! CUDA C++ files of this crate, compiled for the GPU that is there and kept in a cache on disk.
//!
//! ```text
//! Gpu ─ Stream ─ Buffer         device, queue of work, memory
//! Compiler ─ Modules            kernels: compiled, cached, loaded
//! Verbs                         convert (widen, write), norm, linear (gate), plan, combine, scale-add
//! SlotVerbs                     gather, quantise, norm by expert; sigmoid gate; finish: what follows both branches
//! Router                        route
//! GroupedExperts                experts, of any stored format
//! FewExperts                    experts for few tokens, in one launch, behind a gate or not: bf16, FP8, INT4, MXFP4
//! ManyExperts                   experts for many tokens, on tensor cores: the same formats
//! Limits                        what the GPU can do at most
//! ExchangeVerbs                 rows to and from other ranks: sorted, packed, unpacked, summed
//! NcclLink                      bytes to and from the GPUs of other ranks, through host memory
//! NcclPeers                     the same between memories of GPUs
//! FaultWord                     what kernels found wrong with the data, read when asked for
//! ```
//!
//! Verbs take device pointers with shapes and put work on a stream: they do not wait, allocate, or
//! learn anything from the device, so that a pass can be captured as a graph ([`Stream::capture`])
//! and replayed with other rows and other routing. Faults of the data are sticky ([`FaultWord`]).
//!
//! The layer in moe-runner runs on it where its feature `cuda` is on.
#![warn(missing_docs)]

mod arena;
mod builds;
mod driver;
mod error;
mod exchange;
pub mod fault;
mod few;
mod gpu;
mod grouped;
mod limits;
mod many;
mod memory;
mod module;
mod nccl;
mod nvrtc;
mod one_sided;
mod plan;
pub mod router;
mod rows;
mod slots;
mod sources;
mod stream;
mod tensor_map;
mod verbs;
pub mod weights;
mod window;

pub use arena::{Arena, Cut, room};
pub use builds::{Build, builds};
pub use error::{Error, Result};
pub use exchange::{ExchangeVerbs, Homes, Packed, Parts, Room, SlotOutputs};
pub use fault::{Fault, FaultWord};
pub use few::{FewBatch, FewExperts, FewFormat, FewGate, FewShape, FewWorkspace};
pub use gpu::{Gpu, Properties};
pub use grouped::GroupedExperts;
pub use limits::Limits;
pub use many::{ManyExperts, ManyWorkspace, SlotHomes};
pub use memory::{Buffer, Pinned, Pod, View, ViewMut};
pub use module::{Argument, Function, Launch, Modules};
pub use nccl::{Leg, Nccl, NcclId, NcclLink, NcclPeers};
pub use nvrtc::{Compiled, Compiler, Resources, Source, resources};
pub use one_sided::{Meeting, OneSidedVerbs, Windows};
pub use plan::Plan;
pub use router::{Router, RouterOptions, RouterTensors};
pub use rows::{Float, Rows, RowsMut};
pub use slots::{Finish, Identity, SlotVerbs};
pub use stream::{Event, Graph, Stream};
pub use verbs::{Norm, RowQuantiser, Verbs};
pub use weights::{ExpertArray, ExpertWeights};
pub use window::{Offer, Opened, StopWord};
