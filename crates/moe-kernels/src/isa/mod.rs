//! What this CPU can do.
//!
//! A CPU has a *set* of [`Features`], and today's sets form no chain: one has AVX-512 without its
//! BF16, another VNNI without AVX-512. A kernel states the set that it needs, as data. Code that
//! uses features is entered only with a [`Cpu`], the proof that they are there: detection alone
//! makes one, and [`Cpu::only`] takes features away from it, so that every kernel can be forced.
//! Nothing here reads an environment variable.

mod cores;
mod features;

pub use cores::{cpus, physical_cores};
pub use features::{Cpu, Features};
