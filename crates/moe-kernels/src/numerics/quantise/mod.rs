//! Quantisation: scales and codes of rows of f32.
//!
//! - [`Qdq`] quantises activations and takes them back to f32, in place: what the next product
//!   sees. Kernels with native arithmetic and their emulation round at the same points.
//!   Its `encode_row` and `decode_row` are the same in two halves, for rows that travel.
//! - [`weight`] quantises weight matrices to codes and scales.
//! - [`int8_row`] and [`fp8_row`] give the codes of a row with its own scale, for kernels that
//!   multiply codes.
//!
//! All arithmetic is f32, with the operations in the order that the docs state.

mod activation;
mod codes;
mod mx;
mod nvfp4;
pub mod weight;

pub use activation::{GroupScale, Qdq, fp8_row, int8_row};
pub(crate) use codes::{coded_bf16, coded_int8, sums_of_codes};
pub use mx::{Fp6, Mxfp8Rule};
pub use nvfp4::Nvfp4Rule;

/// The largest magnitude: 0 for no values, infinite or NaN if one of them is.
#[inline(always)]
pub(super) fn amax(values: &[f32]) -> f32 {
    // Without their signs, the bits of floats order like the magnitudes, NaN last.
    let bits = values.iter().fold(0, |max: u32, x| max.max(x.to_bits() & 0x7FFF_FFFF));
    f32::from_bits(bits)
}
