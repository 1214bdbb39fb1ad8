//! AVX2 with FMA and F16C: eight lanes, sixteen registers.

use std::arch::x86_64::*;
use std::hint::black_box;

use super::activation;
use super::lanes::Lanes;
use super::probe::{self, Probes};
use crate::activation::Activation;

/// To be entered only where the CPU has [`Features::V3`](crate::isa::Features::V3).
pub(super) const PROBES: Probes = Probes { read, multiply_add };

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn activate(kind: Activation, gate: &mut [f32], up: Option<&[f32]>) {
    // SAFETY: as above.
    unsafe { activation::activate::<Avx2>(kind, gate, up) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn read(data: &[f32]) -> f32 {
    // SAFETY: as above.
    unsafe { probe::read::<Avx2>(data) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_add(rounds: usize) -> u64 {
    // SAFETY: as above.
    unsafe { probe::multiply_add::<Avx2, 12>(rounds) }
}

/// Dot products of 8-bit integers in twelve independent sums of 16 bits. To be entered only where the CPU has
/// [`Features::V3`](crate::isa::Features::V3).
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn int8_dots(rounds: usize) -> u64 {
    const CHAINS: usize = 12;
    let quads = _mm256_set1_epi32(black_box(0x0101_0101));
    let mut sums = [quads; CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(*sum, quads));
        }
    }
    black_box(sums);
    (rounds * CHAINS * 8 * 8) as u64
}

struct Avx2;

// SAFETY of all blocks below: the CPU has AVX2, FMA and F16C, and the pointers are readable for eight
// elements, by the contract of `Lanes`.
impl Lanes for Avx2 {
    type V = __m256;
    const COUNT: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load_f32(from: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_loadu_ps(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(v: __m256, to: *mut f32) {
        // SAFETY: see above; the pointer is writable.
        unsafe { _mm256_storeu_ps(to, v) }
    }

    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn div(a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_div_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn at_least(v: __m256, bound: __m256) -> __m256 {
        // SAFETY: see above. The instruction gives its second operand where one is NaN.
        unsafe { _mm256_max_ps(bound, v) }
    }

    #[inline(always)]
    unsafe fn at_most(v: __m256, bound: __m256) -> __m256 {
        // SAFETY: see above. The instruction gives its second operand where one is NaN.
        unsafe { _mm256_min_ps(bound, v) }
    }

    #[inline(always)]
    unsafe fn select_less(a: __m256, b: __m256, yes: __m256, no: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) }
    }

    #[inline(always)]
    unsafe fn pow2(n: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        }
    }

    #[inline(always)]
    unsafe fn mul_error(a: __m256, b: __m256, product: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_fmsub_ps(a, b, product) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn sums([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
        // SAFETY: see above.
        unsafe { sums_of_halves([halves(a), halves(b), halves(c), halves(d)]) }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
}

/// Lanes 0..4 plus lanes 4..8.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
pub(super) unsafe fn halves(v: __m256) -> __m128 {
    // SAFETY: the caller's.
    unsafe { _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v)) }
}

/// `(v0 + v2) + (v1 + v3)` of each vector.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
pub(super) unsafe fn sums_of_halves([a, b, c, d]: [__m128; 4]) -> [f32; 4] {
    // SAFETY: the caller's; the store is into an array of four.
    unsafe {
        // Transposed, lane l of the four vectors becomes vector l.
        let (ab_01, cd_01) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
        let (ab_23, cd_23) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
        let (v0, v1) = (_mm_movelh_ps(ab_01, cd_01), _mm_movehl_ps(cd_01, ab_01));
        let (v2, v3) = (_mm_movelh_ps(ab_23, cd_23), _mm_movehl_ps(cd_23, ab_23));
        let mut sums = [0.0; 4];
        let sum = _mm_add_ps(_mm_add_ps(v0, v2), _mm_add_ps(v1, v3));
        _mm_storeu_ps(sums.as_mut_ptr(), sum);
        sums
    }
}
