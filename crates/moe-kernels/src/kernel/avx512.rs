//! AVX-512: sixteen lanes, thirty-two registers.

use std::arch::x86_64::*;
use std::hint::black_box;

use super::activation;
use super::avx2::{halves, sums_of_halves};
use super::lanes::Lanes;
use super::probe::{self, Probes};
use crate::activation::Activation;

/// To be entered only where the CPU has [`Features::V4`](crate::isa::Features::V4).
pub(super) const PROBES: Probes = Probes { read, multiply_add };

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn activate(kind: Activation, gate: &mut [f32], up: Option<&[f32]>) {
    // SAFETY: as above.
    unsafe { activation::activate::<Avx512>(kind, gate, up) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn read(data: &[f32]) -> f32 {
    // SAFETY: as above.
    unsafe { probe::read::<Avx512>(data) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn multiply_add(rounds: usize) -> u64 {
    // SAFETY: as above.
    unsafe { probe::multiply_add::<Avx512, 16>(rounds) }
}

/// Dot products of bf16 in sixteen independent sums. To be entered only where the CPU has
/// [`Features::V4_BF16`](crate::isa::Features::V4_BF16).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn dots(rounds: usize) -> u64 {
    const CHAINS: usize = 16;
    let pairs = _mm512_set1_epi32(black_box(0x3F00_3F00)); // 0.5 and 0.5
    // SAFETY: 512 bits are 32 bf16.
    let pairs = unsafe { std::mem::transmute::<__m512i, __m512bh>(pairs) };
    let mut sums = [_mm512_set1_ps(1.0); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, pairs, pairs);
        }
    }
    black_box(sums);
    (rounds * CHAINS * 16 * 4) as u64
}

/// Dot products of 8-bit integers, likewise. To be entered only where the CPU has
/// [`Features::V4_VNNI`](crate::isa::Features::V4_VNNI).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn int8_dots(rounds: usize) -> u64 {
    const CHAINS: usize = 16;
    let quads = _mm512_set1_epi32(black_box(0x0101_0101));
    let mut sums = [_mm512_set1_epi32(1); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, quads, quads);
        }
    }
    black_box(sums);
    (rounds * CHAINS * 16 * 8) as u64
}

struct Avx512;

// SAFETY of all blocks below: the CPU has AVX-512 F, BW, DQ and VL, and the pointers are readable for
// sixteen elements, by the contract of `Lanes`.
impl Lanes for Avx512 {
    type V = __m512;
    const COUNT: usize = 16;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load_f32(from: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(v: __m512, to: *mut f32) {
        // SAFETY: see above; the pointer is writable.
        unsafe { _mm512_storeu_ps(to, v) }
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn at_least(v: __m512, bound: __m512) -> __m512 {
        // SAFETY: see above. The instruction gives its second operand where one is NaN.
        unsafe { _mm512_max_ps(bound, v) }
    }

    #[inline(always)]
    unsafe fn at_most(v: __m512, bound: __m512) -> __m512 {
        // SAFETY: see above. The instruction gives its second operand where one is NaN.
        unsafe { _mm512_min_ps(bound, v) }
    }

    #[inline(always)]
    unsafe fn select_less(a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes) }
    }

    #[inline(always)]
    unsafe fn pow2(n: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        }
    }

    #[inline(always)]
    unsafe fn mul_error(a: __m512, b: __m512, product: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmsub_ps(a, b, product) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn sums([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        // SAFETY: see above.
        unsafe { sums_of_halves([quarters(a), quarters(b), quarters(c), quarters(d)]) }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
}

/// Lanes l and l + 8 added, then l and l + 4.
///
/// # Safety
/// The CPU has AVX-512 F and DQ.
#[inline(always)]
unsafe fn quarters(v: __m512) -> __m128 {
    // SAFETY: the caller's.
    unsafe { halves(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v))) }
}
