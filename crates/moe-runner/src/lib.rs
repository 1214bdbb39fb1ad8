//! The mixture-of-experts (MoE) layer: from a published checkpoint to the layer's output.
//!
//! The modules stand in the order of the flow; a module uses those above it, never those below.
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

pub mod experts;
pub mod oracle;

pub mod comm;
pub mod exchange;

pub mod shared_experts;

pub mod parallel;

pub mod quantize;

pub mod runner;

pub mod doctor;

pub use error::{Error, Result};

// the README's example compiles as it is pasted
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
