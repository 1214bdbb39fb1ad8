//! Memory that belongs to another language, as the layer's types: what all bindings share.
//!
//! Addresses come in with a length and a dtype. What can be checked about them is (null, alignment,
//! sizes that no allocation has); that the memory is there, and stays, is the caller's promise.

mod memory;
mod options;

pub use memory::{Foreign, apart, rows, rows_mut, slice, slice_mut};
pub use options::{
    Function, activation, activation_dtype, float_type, gate_up, on_device, options,
};
