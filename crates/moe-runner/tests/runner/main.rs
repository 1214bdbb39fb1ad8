//! The runner's promises: the defects of other runners that must not come back, what may change no
//! bit, what must change the result, and what bad inputs are told.

#[path = "../layers/mod.rs"]
mod layers;

mod ablation;
mod counted;
mod defects;
mod doubles;
mod handmade;
mod inputs;
mod kernels;
mod model;
mod numbers;
mod pack_cache;
mod padding;
mod properties;
mod reduction;
mod scaling;
mod swap;
