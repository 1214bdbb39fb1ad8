//! AVX-512: a vector is a register.

use std::arch::x86_64::*;

use super::header;
use super::panel::Panel;
use super::simd::{Kind, MAGIC, Simd};
use super::tile::{Args, Chain, Shape, shapes};

pub(super) const fn of<P: Panel<Avx512>>() -> &'static [Shape] {
    const {
        &shapes!(tile::<P>: (6, 4 of 4), (4, 4 of 4), (2, 4 of 4), (1, 4 of 4), (4, 1 of 1), (1, 1 of 1))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn tile<P: Panel<Avx512>, const M: usize, const N: usize, const W: usize>(args: &Args<'_>) {
    // SAFETY: the caller's, and the features are enabled here.
    unsafe { super::tile::tile::<Avx512, P, Chain, M, N, W>(args) }
}

/// For [`Simd::numbers`].
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn numbers(kind: &Kind, to: *mut <Avx512 as Simd>::V) {
    // SAFETY: the caller's, and the features are enabled here.
    unsafe { header::read::<Avx512>(kind, to) }
}

pub(super) struct Avx512;

// SAFETY of all blocks below: the CPU has the features and the pointers are good for sixteen
// elements, by the contract of `Simd`.
impl Simd for Avx512 {
    type V = __m512;
    type I = __m512i;
    type Table = __m512;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(at.cast()) }
    }

    #[inline(always)]
    unsafe fn store(v: __m512, at: *mut f32) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(at, v) }
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
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
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn f16(at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
    }

    #[inline(always)]
    unsafe fn bf16(at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe { Self::low_bf16(_mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()))) }
    }

    #[inline(always)]
    unsafe fn int8(at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast()))) }
    }

    #[inline(always)]
    unsafe fn low4(at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let low = _mm_and_si128(_mm_loadu_si128(at.cast()), _mm_set1_epi8(15));
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(low))
        }
    }

    #[inline(always)]
    unsafe fn high4(at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(at.cast()));
            _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(bytes))
        }
    }

    #[inline(always)]
    unsafe fn e4m3(at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe {
            // As f16: the exponent has one bit more, and its bias is greater by 8. The sign was
            // spread to the byte above, so that it ends in both of the highest two bits.
            let words = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(at.cast())));
            _mm512_cvtph_ps(_mm256_and_si256(words, _mm256_set1_epi16(0xBFFFu16 as i16)))
        }
    }

    #[inline(always)]
    unsafe fn e5m2(at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let words = _mm256_cvtepu8_epi16(_mm_loadu_si128(at.cast()));
            _mm512_cvtph_ps(_mm256_slli_epi16::<8>(words))
        }
    }

    #[inline(always)]
    unsafe fn e8m0(at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let exponents = _mm512_cvtepu8_epi32(_mm_loadu_si128(at.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponents))
        }
    }

    #[inline(always)]
    unsafe fn words(at: *const u8) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(at.cast()) }
    }

    #[inline(always)]
    unsafe fn low_bf16(words: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)) }
    }

    #[inline(always)]
    unsafe fn high_bf16(words: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(!0xFFFF))) }
    }

    #[inline(always)]
    unsafe fn shr(words: __m512i, bits: u32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_srl_epi32(words, _mm_cvtsi32_si128(bits as i32)) }
    }

    #[inline(always)]
    unsafe fn shl(words: __m512i, bits: u32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_sll_epi32(words, _mm_cvtsi32_si128(bits as i32)) }
    }

    #[inline(always)]
    unsafe fn blend(mask: u32, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above. The table of the function: mask ? a : b.
        unsafe { _mm512_ternarylogic_epi32::<0xCA>(_mm512_set1_epi32(mask as i32), a, b) }
    }

    #[inline(always)]
    unsafe fn integers(words: __m512i, mask: u32, bias: __m512) -> __m512 {
        // SAFETY: see above. The table of the function: words & mask | magic.
        unsafe {
            let magic = _mm512_set1_epi32(MAGIC.to_bits() as i32);
            let mask = _mm512_set1_epi32(mask as i32);
            let numbers = _mm512_ternarylogic_epi32::<0xEA>(words, mask, magic);
            _mm512_sub_ps(_mm512_castsi512_ps(numbers), bias)
        }
    }

    #[inline(always)]
    unsafe fn table(numbers: &[f32; 64]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(numbers.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn lookup16(table: __m512, words: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_permutexvar_ps(words, table) }
    }

    #[inline(always)]
    unsafe fn lookup64(numbers: &[f32; 64], words: __m512i) -> __m512 {
        // SAFETY: see above; the four parts lie in the table.
        unsafe {
            let at = numbers.as_ptr();
            let (a, b) = (_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16)));
            let (c, d) = (_mm512_loadu_ps(at.add(32)), _mm512_loadu_ps(at.add(48)));
            let low = _mm512_permutex2var_ps(a, words, b);
            let high = _mm512_permutex2var_ps(c, words, d);
            let upper = _mm512_test_epi32_mask(words, _mm512_set1_epi32(32));
            _mm512_mask_blend_ps(upper, low, high)
        }
    }

    #[inline(always)]
    unsafe fn numbers(kind: &Kind, to: *mut Self::V) {
        // SAFETY: see above.
        unsafe { numbers(kind, to) }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
