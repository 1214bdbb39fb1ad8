//! Number formats, thread pool and SIMD kernels for mixture-of-experts layers, on plain slices.
//!
//! This crate knows nothing of layers, checkpoints or routing: slices go in, slices come out. It is
//! the only home of SIMD in the workspace.
#![warn(missing_docs)]

pub mod activation;
pub mod arena;
pub mod gemm;
pub mod isa;
pub mod kernel;
pub mod limits;
pub mod numerics;
pub mod operand;
pub mod pack;
pub mod pool;
pub mod region;
pub mod rows;
pub mod stored;

#[cfg(target_endian = "big")]
compile_error!("moe-kernels reads stored numbers in place: it needs a little-endian target");
