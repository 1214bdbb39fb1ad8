//! Quantised checkpoints: what is loaded, against recorded outputs, hand-computed matrices and
//! independent decoders.

#[path = "../layers/mod.rs"]
mod layers;

mod broken;
mod configs;
mod formats;
mod golden;
mod models;
mod schemes;
