//! AVX2 with FMA and F16C: a vector is two registers.

use std::arch::x86_64::*;

use super::header;
use super::panel::Panel;
use super::simd::{Kind, MAGIC, Simd};
use super::tile::{Args, Chain, Shape, shapes};

pub(super) const fn of<P: Panel<Avx2>>() -> &'static [Shape] {
    const { &shapes!(tile::<P>: (4, 1 of 4), (2, 2 of 4), (1, 4 of 4), (4, 1 of 1), (1, 1 of 1)) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<P: Panel<Avx2>, const M: usize, const N: usize, const W: usize>(args: &Args<'_>) {
    // SAFETY: the caller's, and the features are enabled here.
    unsafe { super::tile::tile::<Avx2, P, Chain, M, N, W>(args) }
}

/// For [`Simd::numbers`].
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn numbers(kind: &Kind, to: *mut <Avx2 as Simd>::V) {
    // SAFETY: the caller's, and the features are enabled here.
    unsafe { header::read::<Avx2>(kind, to) }
}

pub(super) struct Avx2;

/// Both registers by the same expression.
macro_rules! both {
    (|$($v:ident),+| $body:expr) => {{
        let low = { $(let $v = $v.0;)+ $body };
        let high = { $(let $v = $v.1;)+ $body };
        Pair(low, high)
    }};
}
pub(super) use both;

/// Lanes 0 to 7, and 8 to 15.
#[derive(Clone, Copy)]
pub(super) struct Pair<T>(pub(super) T, pub(super) T);

/// Words of half as many bits, from the low and the high half of `bytes`.
macro_rules! widen {
    ($convert:ident, $bytes:expr) => {{
        let bytes = $bytes;
        Pair($convert(bytes), $convert(_mm_srli_si128::<8>(bytes)))
    }};
}

// SAFETY of all blocks below: the CPU has the features and the pointers are good for sixteen
// elements, by the contract of `Simd`.
impl Simd for Avx2 {
    type V = Pair<__m256>;
    type I = Pair<__m256i>;
    type Table = Pair<__m256>;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::V {
        // SAFETY: see above.
        unsafe { Pair(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }

    #[inline(always)]
    unsafe fn load(at: *const u8) -> Self::V {
        // SAFETY: see above.
        unsafe { Pair(_mm256_loadu_ps(at.cast()), _mm256_loadu_ps(at.add(32).cast())) }
    }

    #[inline(always)]
    unsafe fn store(v: Self::V, at: *mut f32) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_ps(at, v.0);
            _mm256_storeu_ps(at.add(8), v.1);
        }
    }

    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { both!(|a, b| _mm256_add_ps(a, b)) }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { both!(|a, b| _mm256_mul_ps(a, b)) }
    }

    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { both!(|a, b| _mm256_div_ps(a, b)) }
    }

    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { both!(|a, b, c| _mm256_fmadd_ps(a, b, c)) }
    }

    #[inline(always)]
    unsafe fn f16(at: *const u8) -> Self::V {
        // SAFETY: see above.
        unsafe {
            let words = Pair(_mm_loadu_si128(at.cast()), _mm_loadu_si128(at.add(16).cast()));
            both!(|words| _mm256_cvtph_ps(words))
        }
    }

    #[inline(always)]
    unsafe fn bf16(at: *const u8) -> Self::V {
        // SAFETY: see above.
        unsafe {
            let words = Pair(_mm_loadu_si128(at.cast()), _mm_loadu_si128(at.add(16).cast()));
            Self::low_bf16(both!(|words| _mm256_cvtepu16_epi32(words)))
        }
    }

    #[inline(always)]
    unsafe fn int8(at: *const u8) -> Self::V {
        // SAFETY: see above.
        unsafe {
            let words = widen!(_mm256_cvtepi8_epi32, _mm_loadu_si128(at.cast()));
            both!(|words| _mm256_cvtepi32_ps(words))
        }
    }

    #[inline(always)]
    unsafe fn low4(at: *const u8) -> Self::V {
        // SAFETY: see above.
        unsafe {
            let low = _mm_and_si128(_mm_loadu_si128(at.cast()), _mm_set1_epi8(15));
            let words = widen!(_mm256_cvtepu8_epi32, low);
            both!(|words| _mm256_cvtepi32_ps(words))
        }
    }

    #[inline(always)]
    unsafe fn high4(at: *const u8) -> Self::V {
        // SAFETY: see above.
        unsafe {
            let words = widen!(_mm256_cvtepu8_epi32, _mm_loadu_si128(at.cast()));
            both!(|words| _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(words)))
        }
    }

    #[inline(always)]
    unsafe fn e4m3(at: *const u8) -> Self::V {
        // SAFETY: see above.
        unsafe {
            // As f16: the exponent has one bit more, and its bias is greater by 8. The sign was
            // spread to the byte above, so that it ends in both of the highest two bits.
            let words = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(at.cast())));
            let words = _mm256_and_si256(words, _mm256_set1_epi16(0xBFFFu16 as i16));
            halves(words)
        }
    }

    #[inline(always)]
    unsafe fn e5m2(at: *const u8) -> Self::V {
        // SAFETY: see above.
        unsafe {
            let words = _mm256_cvtepu8_epi16(_mm_loadu_si128(at.cast()));
            halves(_mm256_slli_epi16::<8>(words))
        }
    }

    #[inline(always)]
    unsafe fn e8m0(at: *const u8) -> Self::V {
        // SAFETY: see above.
        unsafe {
            let exponents = widen!(_mm256_cvtepu8_epi32, _mm_loadu_si128(at.cast()));
            both!(|exponents| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponents)))
        }
    }

    #[inline(always)]
    unsafe fn words(at: *const u8) -> Self::I {
        // SAFETY: see above.
        unsafe { Pair(_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast())) }
    }

    #[inline(always)]
    unsafe fn low_bf16(words: Self::I) -> Self::V {
        // SAFETY: see above.
        unsafe { both!(|words| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))) }
    }

    #[inline(always)]
    unsafe fn high_bf16(words: Self::I) -> Self::V {
        // SAFETY: see above.
        unsafe {
            let mask = _mm256_set1_epi32(!0xFFFF);
            both!(|words| _mm256_castsi256_ps(_mm256_and_si256(words, mask)))
        }
    }

    #[inline(always)]
    unsafe fn shr(words: Self::I, bits: u32) -> Self::I {
        // SAFETY: see above.
        unsafe {
            let bits = _mm_cvtsi32_si128(bits as i32);
            both!(|words| _mm256_srl_epi32(words, bits))
        }
    }

    #[inline(always)]
    unsafe fn shl(words: Self::I, bits: u32) -> Self::I {
        // SAFETY: see above.
        unsafe {
            let bits = _mm_cvtsi32_si128(bits as i32);
            both!(|words| _mm256_sll_epi32(words, bits))
        }
    }

    #[inline(always)]
    unsafe fn blend(mask: u32, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe {
            let mask = _mm256_set1_epi32(mask as i32);
            both!(|a, b| _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b)))
        }
    }

    #[inline(always)]
    unsafe fn integers(words: Self::I, mask: u32, bias: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe {
            let magic = _mm256_set1_epi32(MAGIC.to_bits() as i32);
            let mask = _mm256_set1_epi32(mask as i32);
            both!(|words, bias| {
                let numbers = _mm256_or_si256(_mm256_and_si256(words, mask), magic);
                _mm256_sub_ps(_mm256_castsi256_ps(numbers), bias)
            })
        }
    }

    #[inline(always)]
    unsafe fn table(numbers: &[f32; 64]) -> Self::Table {
        // SAFETY: see above.
        unsafe { Self::load(numbers.as_ptr().cast()) }
    }

    #[inline(always)]
    unsafe fn lookup16(table: Self::Table, words: Self::I) -> Self::V {
        // SAFETY: see above.
        unsafe {
            both!(|words| {
                let low = _mm256_permutevar8x32_ps(table.0, words);
                let high = _mm256_permutevar8x32_ps(table.1, words);
                // Bit 3 becomes the sign, which selects.
                let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(words));
                _mm256_blendv_ps(low, high, upper)
            })
        }
    }

    #[inline(always)]
    unsafe fn lookup64(numbers: &[f32; 64], words: Self::I) -> Self::V {
        // SAFETY: see above; the indices are below 64.
        unsafe {
            let mask = _mm256_set1_epi32(63);
            both!(|words| {
                let index = _mm256_and_si256(words, mask);
                _mm256_i32gather_ps::<4>(numbers.as_ptr(), index)
            })
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

/// Sixteen f16.
///
/// # Safety
/// The CPU has AVX2 and F16C.
#[inline(always)]
unsafe fn halves(words: __m256i) -> Pair<__m256> {
    // SAFETY: the caller's.
    unsafe {
        Pair(
            _mm256_cvtph_ps(_mm256_castsi256_si128(words)),
            _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(words)),
        )
    }
}
