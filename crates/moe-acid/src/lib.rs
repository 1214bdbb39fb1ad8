//! An acid test for the mixture-of-experts block of any engine: tiny checkpoints in published
//! layouts, whose log-probabilities spell out what the block computed.
//!
//! # How it works
//! A checkpoint is one decoder layer. The output projection of its attention is zero, so attention
//! adds exactly nothing whatever computes it, and every position of a prompt stands alone: one
//! prompt that lists all probes is one forward pass.
//!
//! ```text
//! h0 = embedding(token)     |h0|² = H and all norm weights are 1: the norm changes nothing
//! h1 = h0 + MoE(h0)         logits = lm_head · h1 / rms(h1)
//! ```
//!
//! A probe's embedding *is* its router logits ([`Probes`]). Every expert writes its weight to a
//! coordinate of its own, and known values of the activation to others ([`Block`]). The head reads
//! coordinates; two of its rows undo the last norm and the softmax's constant ([`Readings`]).
//!
//! A model of the block in which every known mistake is a switch ([`Mistake`]) gives the readings of
//! each mistake, of pairs and of triples; the one nearest to what was seen is the [`Verdict`], with
//! the multipliers of the routed and of the shared part. What engines may choose freely (where ties
//! go, logits rounded to 16 bits) is a note, not a fault.
//!
//! Nothing here runs a layer of `moe-runner`: the model of the block is written apart, in float64.

pub mod ask;
mod block;
mod family;
mod mistake;
mod probes;
mod readings;
mod verdict;
pub mod write;

pub use block::Block;
pub use family::{Act, FAMILIES, Family, Score, Shared};
pub use mistake::Mistake;
pub use probes::{Choice, Probes, Question};
pub use readings::{Readings, ReadingsFile};
pub use verdict::{Decoder, Note, Verdict};
