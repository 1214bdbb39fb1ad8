#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod experts;
mod layer;
mod rows;

pub use experts::{MoeExperts, Stacks};
pub use layer::MoeLayer;
