//! The layer behind a C ABI: opaque handles, plain pointers, a status for every call.
//!
//! `include/moe_runner.h` is this crate as C sees it. Here and in the header shapes are those of the
//! library: hidden states `[T, H]`, ids and weights `[T, k]`, row after row.
// what a function needs to be safe is said where C reads it, in the text before it
#![allow(clippy::missing_safety_doc)]

mod boundary;
mod checkpoint;
mod experts;
mod forward;
mod layer;
mod options;
mod pool;

pub use boundary::{Status, moe_last_error};
pub use checkpoint::{Checkpoint, moe_checkpoint_free, moe_checkpoint_layers, moe_checkpoint_open};
pub use experts::{
    Experts, Layout, StackedExperts, moe_experts_explain, moe_experts_forward, moe_experts_free,
    moe_experts_from_memory, moe_experts_open,
};
pub use layer::{
    Layer, moe_layer_explain, moe_layer_forward, moe_layer_forward_routed, moe_layer_free,
    moe_layer_hidden_size, moe_layer_open,
};
pub use options::{Dtype, Options};
pub use pool::{Task, ThreadPool};

use std::ffi::c_char;

/// Rises when something in this header is no longer what it was. What is added does not raise it.
pub const MOE_ABI_VERSION: u32 = 1;

/// The MOE_ABI_VERSION of the library that is loaded.
#[unsafe(no_mangle)]
pub extern "C" fn moe_abi_version() -> u32 {
    MOE_ABI_VERSION
}

/// The library's own version, such as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn moe_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}
