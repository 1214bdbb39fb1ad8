//! How codes of six bits and fewer become bytes for dot products of four: looked up in one register.
//!
//! A table has 64 numbers, codes of fewer bits over and over, so that nothing is taken off an index. In
//! an octet `k` 0, 4, 1 and 5 are the low nibbles of a word's bytes, and 2, 6, 3 and 7 the high ones: the
//! token rows' bytes stand in that order. Planes of one and two bits are spread to bytes by
//! `vpmultishiftqb`, which takes eight bits from anywhere for each.

use std::arch::x86_64::*;

use super::avx512::Avx512;
use super::panel::{four, one, two};
use super::simd::Simd;
use super::strips::{Quads, any_rows, run};
use super::tile::{Args, Shape};
use crate::pack::{Codes, lift};

any_rows!(Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c");

/// A kind of codes: the indices of an octet's two words.
macro_rules! quads {
    ($($name:ident: <$W:ident>|$at:ident, $octet:ident| $indices:expr;)*) => {$(
        pub(super) struct $name;

        impl Quads<Avx512> for $name {
            const CODES: Codes = Codes::$name;
            type Constants = __m512i;

            #[inline(always)]
            unsafe fn constants(table: &[f32; 64]) -> __m512i {
                // SAFETY: the caller's.
                unsafe { bytes(table) }
            }

            #[inline(always)]
            unsafe fn octet<const $W: usize>(
                table: &__m512i,
                $at: *const u8,
                $octet: usize,
            ) -> [__m512i; 2] {
                // SAFETY: the caller's.
                unsafe {
                    let [first, second]: [__m512i; 2] = $indices;
                    let first = _mm512_permutexvar_epi8(first, *table);
                    [first, _mm512_permutexvar_epi8(second, *table)]
                }
            }
        }
    )*};
}

quads! {
    Table4: <W>|at, octet| nibbles::<W>(at, octet);
    Int5: <W>|at, octet| {
        let plane = one::<Avx512, W>(at.add(4 * W * 64), octet);
        joined(15, nibbles::<W>(at, octet), [spread::<2, -4>(plane), spread::<2, -3>(plane)])
    };
    Int6: <W>|at, octet| six::<W>(at, octet);
    Table6: <W>|at, octet| six::<W>(at, octet);
    Table3: <W>|at, octet| {
        let low = two::<Avx512, W>(at, octet);
        let high = one::<Avx512, W>(at.add(2 * W * 64), octet);
        let low = [spread::<4, 0>(low), spread::<4, 2>(low)];
        joined(3, low, [spread::<2, -2>(high), spread::<2, -1>(high)])
    };
    Table2: <W>|at, octet| {
        let plane = two::<Avx512, W>(at, octet);
        [spread::<4, 0>(plane), spread::<4, 2>(plane)]
    };
}

/// Whole numbers as unsigned bytes.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn bytes(table: &[f32; 64]) -> __m512i {
    // SAFETY: the table has four registers.
    unsafe {
        let lift = _mm512_set1_epi32(lift(table));
        macro_rules! part {
            ($i:literal) => {{
                let numbers = _mm512_cvtps_epi32(_mm512_loadu_ps(table.as_ptr().add(16 * $i)));
                _mm512_cvtepi32_epi8(_mm512_add_epi32(numbers, lift))
            }};
        }
        let bytes = _mm512_castsi128_si512(part!(0));
        let bytes = _mm512_inserti32x4::<1>(bytes, part!(1));
        let bytes = _mm512_inserti32x4::<2>(bytes, part!(2));
        _mm512_inserti32x4::<3>(bytes, part!(3))
    }
}

/// 4-bit codes; anything above them.
///
/// # Safety
/// As [`Quads`].
#[inline(always)]
unsafe fn nibbles<const W: usize>(at: *const u8, octet: usize) -> [__m512i; 2] {
    // SAFETY: the caller's.
    unsafe {
        let line = four::<Avx512, W>(at, octet);
        [line, _mm512_srli_epi32::<4>(line)]
    }
}

/// 6-bit codes; anything above them.
///
/// # Safety
/// As [`Quads`].
#[inline(always)]
unsafe fn six<const W: usize>(at: *const u8, octet: usize) -> [__m512i; 2] {
    // SAFETY: the caller's.
    unsafe {
        let plane = two::<Avx512, W>(at.add(4 * W * 64), octet);
        joined(15, nibbles::<W>(at, octet), [spread::<4, -4>(plane), spread::<4, -2>(plane)])
    }
}

/// Eight bits for each of a word's four bytes, `EACH` bits apart, those of the first from bit `FROM` on.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn spread<const EACH: usize, const FROM: i32>(words: __m512i) -> __m512i {
    struct From<const EACH: usize, const FROM: i32>;
    impl<const EACH: usize, const FROM: i32> From<EACH, FROM> {
        const BITS: [u8; 64] = {
            let mut bits = [0; 64];
            let mut i = 0;
            while i < 64 {
                // a register's lanes of 64 bits are two words
                let bit = (32 * (i / 4 % 2) + EACH * (i % 4)) as i32 + FROM;
                bits[i] = bit.rem_euclid(64) as u8;
                i += 1;
            }
            bits
        };
    }
    // SAFETY: the caller's; the bits are a register.
    unsafe {
        let bits = Avx512::words(const { &From::<EACH, FROM>::BITS }.as_ptr());
        _mm512_multishift_epi64_epi8(bits, words)
    }
}

/// The bits of `low` that `mask` has, and of `high` all others.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn joined(mask: u32, low: [__m512i; 2], high: [__m512i; 2]) -> [__m512i; 2] {
    let mask = mask * 0x0101_0101;
    // SAFETY: the caller's.
    unsafe { [Avx512::blend(mask, low[0], high[0]), Avx512::blend(mask, low[1], high[1])] }
}
