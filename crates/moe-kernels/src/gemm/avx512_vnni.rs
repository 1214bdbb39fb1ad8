//! AVX-512 with dot products of four bytes: `vpdpbusd`.
//!
//! The instruction multiplies unsigned bytes by signed ones and adds up 32-bit integers. Rows are the
//! signed ones. Weights are codes plus 128, and a group's sum begins with what that is too much,
//! `-128 · Σx`, which rows bring along, or with its zero points: `(zero − 128) · Σx`. So it ends as
//! `Σ (code + zero) · x`, exactly: of at most 256 columns it is below 2^24, which f32 holds.

use std::arch::asm;
use std::arch::x86_64::*;

use super::avx512::Avx512;
use super::panel::Panel;
use super::tile::{Args, Chain, Shape, shapes};
use crate::pack::Codes;

pub(super) const fn of<P: Panel<Avx512>>() -> &'static [Shape] {
    const { &shapes!(tile::<P>: (8, 2 of 4), (4, 4 of 4), (2, 4 of 4), (1, 4 of 4), (1, 1 of 1)) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn tile<P: Panel<Avx512>, const M: usize, const N: usize, const W: usize>(args: &Args<'_>) {
    // SAFETY: the caller's, and the features are enabled here.
    unsafe { super::tile::tile::<Avx512, P, Chain, M, N, W>(args) }
}

/// Signed bytes, four k to a word of each row.
pub(super) struct Int8;

// SAFETY of all blocks below: the CPU has the features and the pointers are good for what they are read
// for, by the contract of `Panel`.
impl Panel<Avx512> for Int8 {
    const CODES: Codes = Codes::Int8;
    const ITEM: usize = 64;
    const K: usize = 4;
    const CODED: bool = true;
    const INTEGERS: bool = true;
    type Constants = ();
    type Octet = *const u8;
    type Zero = __m512i;
    type Value = __m512i;

    #[inline(always)]
    unsafe fn constants(_: &[f32; 64]) {}

    #[inline(always)]
    unsafe fn octet<const W: usize>(at: *const u8, octet: usize) -> *const u8 {
        // SAFETY: see above.
        unsafe { at.add(2 * octet * W * 64) }
    }

    #[inline(always)]
    unsafe fn zero(numbers: __m512) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_cvtps_epi32(numbers) }
    }

    /// Plus 128.
    #[inline(always)]
    unsafe fn value<const W: usize>(
        _: &(),
        octet: &*const u8,
        j: usize,
        _zero: Option<&__m512i>,
    ) -> __m512i {
        // SAFETY: see above.
        unsafe {
            let codes = _mm512_loadu_si512(octet.add(j * W * 64).cast());
            _mm512_xor_si512(codes, _mm512_set1_epi8(-128))
        }
    }

    /// The sums are integers.
    #[inline(always)]
    unsafe fn product(value: __m512i, x: __m512, sum: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { dot(value, x, sum) }
    }

    #[inline(always)]
    unsafe fn begin(zero: Option<&__m512i>, x: *const f32) -> __m512 {
        // SAFETY: see above; a row has such a sum for each group.
        unsafe {
            let sum_x = x.cast::<i32>().read();
            _mm512_castsi512_ps(match zero {
                None => _mm512_set1_epi32(sum_x),
                Some(zero) => {
                    let over = _mm512_sub_epi32(*zero, _mm512_set1_epi32(128));
                    _mm512_mullo_epi32(over, _mm512_set1_epi32(sum_x))
                }
            })
        }
    }

    #[inline(always)]
    unsafe fn end(sum: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(_mm512_castps_si512(sum)) }
    }
}

/// `value · x + sum`: four unsigned bytes by four signed ones, 32-bit sums.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dot(value: __m512i, x: __m512, sum: __m512) -> __m512 {
    let sum = _mm512_dpbusd_epi32(_mm512_castps_si512(sum), value, _mm512_castps_si512(x));
    let mut sum = _mm512_castsi512_ps(sum);
    // SAFETY: there is no instruction: it keeps products where they are written (see `pairs`).
    unsafe { asm!("/* {} */", inout(zmm_reg) sum, options(nostack, preserves_flags)) };
    sum
}
