//! Every number format of published checkpoints: exact scalar decode and encode, bulk conversion,
//! and quantisation.
//!
//! Two levels:
//! - *elements*: one module for each format ([`e4m3`], [`e5m2`], [`e8m0`], [`e3m2`], [`e2m3`],
//!   [`e2m1`], [`int8`], [`int4`], [`float16`]), which turn codes into f32 values and back;
//! - *blocks and scales*: [`ggml`] for the block types of GGUF, [`quantise`] for what puts scales
//!   and elements together, [`for_each_group`] and the global scales [`EncodeScale`] and
//!   [`DecodeScale`] to take them apart.
//!
//! Decoding is exact: f32 holds every value of every element format here. Encoding rounds to the
//! nearest value, ties to the even code, and saturates: what lies beyond the largest finite value,
//! infinities included, becomes the largest finite value. NaN stays NaN where the format has one;
//! each module says what it becomes where not. The 16-bit floats alone overflow to infinity.

pub mod e8m0;
pub mod float16;
pub mod ggml;
pub mod int4;
pub mod int8;
mod minifloat;
mod packed6;
pub mod quantise;
mod scale;
mod vectorised;

pub(crate) use vectorised::for_each_isa;

pub use minifloat::{e2m1, e2m3, e3m2, e4m3, e5m2};
pub use scale::{DecodeScale, EncodeScale, for_each_group};
