//! AMX: products of tiles of bf16, `tdpbf16ps`.
//!
//! The compiler has no stable functions for these instructions, so they are assembled here, one by
//! one. It never uses tile registers itself.

use std::arch::asm;

use super::avx512::Avx512;
use super::panel::Panel;
use super::registers::{self, Config, Tiles};
use super::tile::{Args, Shape};
use super::tiles::{self, UNITS};
use super::turns;

pub(super) const fn of<P: Panel<Avx512, Value = std::arch::x86_64::__m512i>>() -> &'static [Shape] {
    const {
        &[
            Shape { rows: Shape::ANY, panels: 4, of: 4, units: UNITS, run: product::<P, 4, 2> },
            Shape { rows: Shape::ANY, panels: 1, of: 1, units: 1, run: product::<P, 1, 1> },
        ]
    }
}

unsafe fn product<P, const W: usize, const N: usize>(args: &Args<'_>)
where
    P: Panel<Avx512, Value = std::arch::x86_64::__m512i>,
{
    // SAFETY: the caller's.
    unsafe {
        match turns::suits(args) {
            true => turns::product::<P, W>(args),
            false => tiles::product::<Amx, P, W, N>(args, &mut Amx),
        }
    }
}

/// `rounds` rounds of products of whole tiles in registers; returns the number of operations. To be
/// called only where the CPU has [`Features::V4_AMX`](crate::isa::Features::V4_AMX).
pub(crate) unsafe fn probe(rounds: usize) -> u64 {
    // SAFETY: the caller's.
    unsafe { registers::probe(rounds, &mut Amx) }
}

/// The tile registers of this thread.
struct Amx;

impl Drop for Amx {
    fn drop(&mut self) {
        // SAFETY: the CPU has tiles: the caller of `product` knows.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) }
    }
}

// SAFETY of all blocks below: the CPU has tiles that the operating system lets this process use, and
// the addresses are good for the rows and bytes of the configured tile, by the contract of `Tiles`.
impl Tiles for Amx {
    #[inline(always)]
    unsafe fn configure(&mut self, config: &Config) {
        // SAFETY: see above.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) config, options(nostack, readonly, preserves_flags))
        }
    }

    #[inline(always)]
    unsafe fn zero<const T: usize>(&mut self) {
        // SAFETY: see above.
        unsafe { asm!("tilezero tmm{}", const T, options(nostack, nomem, preserves_flags)) }
    }

    #[inline(always)]
    unsafe fn load<const T: usize>(&mut self, at: *const u8, stride: usize) {
        // SAFETY: see above.
        unsafe {
            asm!("tileloadd tmm{}, [{} + {}*1]", const T, in(reg) at, in(reg) stride,
                options(nostack, readonly, preserves_flags));
        }
    }

    #[inline(always)]
    unsafe fn store<const T: usize>(&mut self, at: *mut f32, stride: usize) {
        // SAFETY: see above.
        unsafe {
            asm!("tilestored [{} + {}*1], tmm{}", in(reg) at, in(reg) stride, const T,
                options(nostack, preserves_flags));
        }
    }

    #[inline(always)]
    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: see above.
        unsafe {
            asm!("tdpbf16ps tmm{}, tmm{}, tmm{}", const C, const A, const B,
                options(nostack, nomem, preserves_flags));
        }
    }
}
