//! Stored numbers of quantised weights, as f32 values.
//!
//! Two kinds cover all of them: [`Scaled`], codes with scales in an array of their own (every
//! safetensors format), and [`Blocks`], scales and codes side by side (GGUF). A new format of the
//! first kind is one more [`Element`] or one more type of scale.

mod blocks;
mod element;
mod scaled;
mod scales;

pub use blocks::Blocks;
pub use element::Element;
pub use scaled::{Global, Scaled, Zeros};
pub use scales::{ScaleType, Scales};
