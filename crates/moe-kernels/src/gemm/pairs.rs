//! How the lines of a panel become pairs of bf16, for AVX-512's dot products: value `j` of an octet
//! holds k `2j` and `2j + 1` of all sixteen rows, the first in the low halves.
//!
//! Every code of eight bits or fewer stands for a number that bf16 holds exactly: codes are looked up.
//!
//! There are no closures: they lack the features of the tile, and whether they become part of it depends on
//! how the crate is built.

use std::arch::asm;
use std::arch::x86_64::*;

use super::avx512::Avx512;
use super::panel::{Panel, four, one, two};
use super::simd::Simd;
use crate::pack::Codes;

/// A kind of codes; `$value` may use what is named before it.
macro_rules! pairs {
    (
        $name:ident,
        $Constants:ty, |$table:ident| $constants:expr,
        $Octet:ty, <$W:ident>|$at:ident, $octet:ident| $load:expr,
        $Zero:ty, |$numbers:ident| $zeros:expr,
        |$c:ident, $o:ident, $j:ident, $zero:ident| $value:expr
    ) => {
        pub(super) struct $name;

        #[allow(unused_unsafe, reason = "some expressions are safe")]
        impl Panel<Avx512> for $name {
            const CODES: Codes = Codes::$name;
            const ITEM: usize = 64;
            const K: usize = 2;
            const CODED: bool = true;
            type Constants = $Constants;
            type Octet = $Octet;
            type Zero = $Zero;
            type Value = __m512i;

            #[inline(always)]
            unsafe fn constants($table: &[f32; 64]) -> Self::Constants {
                // SAFETY: the caller's.
                unsafe { $constants }
            }

            #[inline(always)]
            unsafe fn octet<const $W: usize>($at: *const u8, $octet: usize) -> Self::Octet {
                // SAFETY: the caller's.
                unsafe { $load }
            }

            #[inline(always)]
            unsafe fn zero($numbers: __m512) -> Self::Zero {
                // SAFETY: the caller's.
                unsafe { $zeros }
            }

            #[inline(always)]
            unsafe fn value<const $W: usize>(
                $c: &Self::Constants,
                $o: &Self::Octet,
                $j: usize,
                $zero: Option<&Self::Zero>,
            ) -> __m512i {
                // SAFETY: the caller's.
                unsafe { $value }
            }

            #[inline(always)]
            unsafe fn product(value: __m512i, x: __m512, sum: __m512) -> __m512 {
                // SAFETY: the caller's.
                unsafe { dot(value, x, sum) }
            }
        }
    };
    // Without zero points.
    (
        $name:ident,
        $Constants:ty, |$table:ident| $constants:expr,
        $Octet:ty, <$W:ident>|$at:ident, $octet:ident| $load:expr,
        |$c:ident, $o:ident, $j:ident| $value:expr
    ) => {
        pairs!(
            $name,
            $Constants, |$table| $constants,
            $Octet, <$W>|$at, $octet| $load,
            (), |_numbers| (),
            |$c, $o, $j, _zero| $value
        );
    };
}

pairs!(
    Bf16,
    (), |_table| (),
    *const u8, <W>|at, octet| at.add(octet * 4 * W * 64),
    |_c, at, j| Avx512::words(at.add(j * W * 64))
);
pairs!(
    E4m3,
    Bytes, |_table| Bytes::new(&E4M3),
    [__m512i; 2], <W>|at, octet| quads::<W>(at, octet),
    |tables, quads, j| tables.floats(quads[j / 2], j)
);
pairs!(
    E5m2,
    Bytes, |_table| Bytes::new(&E5M2),
    [__m512i; 2], <W>|at, octet| quads::<W>(at, octet),
    |tables, quads, j| tables.floats(quads[j / 2], j)
);
pairs!(
    Int8,
    Bytes, |_table| Bytes::new(&INT8),
    [__m512i; 2], <W>|at, octet| quads::<W>(at, octet),
    __m512i, |zero| _mm512_cvtps_epi32(zero),
    |tables, quads, j, zero| match zero {
        None => tables.integers(quads[j / 2], j),
        Some(zero) => differences(quads[j / 2], *zero, j),
    }
);
pairs!(
    Table2,
    __m512i, |table| words(table.as_ptr()),
    __m512i, <W>|at, octet| spread::<8>(two::<Avx512, W>(at, octet)),
    |table, codes, j| _mm512_permutexvar_epi16(Avx512::shr(*codes, 2 * j as u32), *table)
);
pairs!(
    Table3,
    __m512i, |table| words(table.as_ptr()),
    [__m512i; 2], <W>|at, octet| [
        spread::<8>(two::<Avx512, W>(at, octet)),
        spread::<12>(one::<Avx512, W>(at.add(2 * W * 64), octet)),
    ],
    |table, planes, j| _mm512_permutexvar_epi16(joined::<2, 1>(planes, j), *table)
);
pairs!(
    Table4,
    [__m512i; 2], |table| [words(table.as_ptr()), words(DIFFERENCES.as_ptr())],
    __m512i, <W>|at, octet| four::<Avx512, W>(at, octet),
    // 16 less the zero point, in each byte.
    __m512i, |zero| {
        let difference = _mm512_add_epi32(_mm512_cvtps_epi32(zero), _mm512_set1_epi32(16));
        _mm512_mullo_epi32(difference, _mm512_set1_epi32(0x0101_0101))
    },
    |tables, codes, j, zero| match zero {
        None => _mm512_permutexvar_epi16(Avx512::shr(*codes, 4 * j as u32), tables[0]),
        Some(zero) => {
            // In bytes: the low nibbles are those of even pairs, the high ones of odd pairs.
            let nibbles = Avx512::shr(*codes, j as u32 % 2 * 4);
            let nibbles = _mm512_and_si512(nibbles, _mm512_set1_epi8(15));
            let differences = _mm512_add_epi8(nibbles, *zero);
            _mm512_permutexvar_epi16(Avx512::shr(differences, j as u32 / 2 * 8), tables[1])
        }
    }
);
pairs!(
    Int5,
    __m512i, |table| words(from(-table[0]).as_ptr()),
    [__m512i; 2], <W>|at, octet| [
        four::<Avx512, W>(at, octet),
        spread::<12>(one::<Avx512, W>(at.add(4 * W * 64), octet)),
    ],
    |table, planes, j| _mm512_permutexvar_epi16(joined::<4, 1>(planes, j), *table)
);
pairs!(
    Int6,
    [__m512i; 2], |table| both(&from(-table[0])),
    [__m512i; 2], <W>|at, octet| six::<W>(at, octet),
    |tables, planes, j| {
        _mm512_permutex2var_epi16(tables[0], joined::<4, 2>(planes, j), tables[1])
    }
);
pairs!(
    Table6,
    [__m512i; 2], |table| both(table),
    [__m512i; 2], <W>|at, octet| six::<W>(at, octet),
    |tables, planes, j| {
        _mm512_permutex2var_epi16(tables[0], joined::<4, 2>(planes, j), tables[1])
    }
);

/// `value · x + sum`: pairs of bf16, the odd one first.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot(value: __m512i, x: __m512, sum: __m512) -> __m512 {
    // SAFETY: 512 bits are 32 bf16. The assembly has no instruction: it keeps the compiler from loading
    // the words of all rows and columns of an octet before the first product, which spills them.
    unsafe {
        let (value, x) = (
            std::mem::transmute::<__m512i, __m512bh>(value),
            std::mem::transmute::<__m512, __m512bh>(x),
        );
        let mut sum = _mm512_dpbf16_ps(sum, value, x);
        asm!("/* {} */", inout(zmm_reg) sum, options(nostack, preserves_flags));
        sum
    }
}

/// Codes of four bits less their zero points, plus 16, are indices of it.
static DIFFERENCES: [f32; 64] = from(-16.0);

/// Integers from `first` on.
const fn from(first: f32) -> [f32; 64] {
    let mut numbers = [0.0; 64];
    let mut i = 0;
    while i < 64 {
        numbers[i] = first + i as f32;
        i += 1;
    }
    numbers
}

/// 32 numbers as bf16, which holds them exactly.
///
/// # Safety
/// As [`Simd`]; there are 32.
#[inline(always)]
unsafe fn words(numbers: *const f32) -> __m512i {
    // SAFETY: the caller's.
    unsafe {
        let (low, high) = (Avx512::words(numbers.cast()), Avx512::words(numbers.add(16).cast()));
        let low = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(low));
        let high = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(high));
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
    }
}

/// 64 numbers, in two registers.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn both(numbers: &[f32; 64]) -> [__m512i; 2] {
    // SAFETY: the caller's.
    unsafe { [words(numbers.as_ptr()), words(numbers.as_ptr().add(32))] }
}

/// Eight codes, in the low half of each word: the odd ones, `UP` bits below, come to the high half.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn spread<const UP: u32>(codes: __m512i) -> __m512i {
    // SAFETY: the caller's.
    unsafe { Avx512::blend(0xFFFF, codes, Avx512::shl(codes, UP)) }
}

/// The lines of an octet of 6-bit codes.
///
/// # Safety
/// As [`Panel`].
#[inline(always)]
unsafe fn six<const W: usize>(at: *const u8, octet: usize) -> [__m512i; 2] {
    // SAFETY: the caller's.
    unsafe {
        [four::<Avx512, W>(at, octet), spread::<8>(two::<Avx512, W>(at.add(4 * W * 64), octet))]
    }
}

/// The codes of pair `j` of both planes, `LOW` bits and above them `HIGH` bits; anything above those.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn joined<const LOW: usize, const HIGH: usize>(planes: &[__m512i; 2], j: usize) -> __m512i {
    // SAFETY: the caller's.
    unsafe {
        let low = Avx512::shr(planes[0], (LOW * j) as u32);
        let high = match HIGH * j >= LOW {
            true => Avx512::shr(planes[1], (HIGH * j - LOW) as u32),
            false => Avx512::shl(planes[1], (LOW - HIGH * j) as u32),
        };
        Avx512::blend(0x0001_0001 * ((1 << LOW) - 1), low, high)
    }
}

/// The items of an octet of bytes: words of four k.
///
/// # Safety
/// As [`Panel`].
#[inline(always)]
unsafe fn quads<const W: usize>(at: *const u8, octet: usize) -> [__m512i; 2] {
    // SAFETY: the caller's.
    unsafe {
        let at = at.add(2 * octet * W * 64);
        [Avx512::words(at), Avx512::words(at.add(W * 64))]
    }
}

/// The low and the high bytes of 128 bf16.
pub(super) struct Table {
    low: [u8; 128],
    high: [u8; 128],
}

impl Table {
    const fn of(numbers: [f32; 128]) -> Table {
        let mut table = Table { low: [0; 128], high: [0; 128] };
        let mut i = 0;
        while i < 128 {
            let bits = numbers[i].to_bits() >> 16;
            (table.low[i], table.high[i]) = (bits as u8, (bits >> 8) as u8);
            i += 1;
        }
        table
    }
}

/// E4M3 without its sign, times 2^-8.
static E4M3: Table = Table::of(small_floats(3, 1.0 / 131_072.0));

/// E5M2 without its sign.
static E5M2: Table = {
    let mut numbers = small_floats(2, 1.0 / 65_536.0);
    numbers[0x7C] = f32::INFINITY;
    let mut i = 0x7D;
    while i < 128 {
        numbers[i] = f32::NAN;
        i += 1;
    }
    Table::of(numbers)
};

/// Magnitudes of signed bytes; the first is that of -128.
static INT8: Table = {
    let mut numbers = [128.0; 128];
    let mut i = 1;
    while i < 128 {
        numbers[i] = i as f32;
        i += 1;
    }
    Table::of(numbers)
};

/// Floats of seven bits with a mantissa of `bits`; `least` is the smallest above zero.
const fn small_floats(bits: u32, least: f32) -> [f32; 128] {
    let mut numbers = [0.0; 128];
    let mut i = 0;
    while i < 128 {
        let (mut exponent, mantissa) = (i as u32 >> bits, i as u32 % (1 << bits));
        let mut number = mantissa as f32 * least;
        if exponent > 0 {
            number = (mantissa + (1 << bits)) as f32 * least;
        }
        while exponent > 1 {
            number *= 2.0;
            exponent -= 1;
        }
        numbers[i] = number;
        i += 1;
    }
    numbers
}

/// Bytes to look up.
#[derive(Clone, Copy)]
pub(super) struct Bytes {
    low: [__m512i; 2],
    high: [__m512i; 2],
}

impl Bytes {
    /// # Safety
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn new(table: &Table) -> Bytes {
        // SAFETY: the caller's; the tables have two registers each.
        unsafe {
            let (low, high) = (table.low.as_ptr(), table.high.as_ptr());
            Bytes {
                low: [Avx512::words(low), Avx512::words(low.add(64))],
                high: [Avx512::words(high), Avx512::words(high.add(64))],
            }
        }
    }

    /// Pair `j % 2` of words of four codes with a sign and seven bits of magnitude.
    ///
    /// # Safety
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn floats(&self, quads: __m512i, j: usize) -> __m512i {
        // SAFETY: the caller's.
        unsafe {
            let codes = in_pairs(quads);
            let low = _mm512_permutex2var_epi8(self.low[0], codes, self.low[1]);
            let high = _mm512_permutex2var_epi8(self.high[0], codes, self.high[1]);
            woven(low, high, codes, j)
        }
    }

    /// Pair `j % 2` of words of four signed bytes.
    ///
    /// # Safety
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn integers(&self, quads: __m512i, j: usize) -> __m512i {
        // SAFETY: the caller's.
        unsafe {
            let codes = in_pairs(quads);
            let (magnitudes, some) = (_mm512_abs_epi8(codes), _mm512_test_epi8_mask(codes, codes));
            let ([a, b], [c, d]) = (self.low, self.high);
            let low = _mm512_maskz_permutex2var_epi8(some, a, magnitudes, b);
            let high = _mm512_maskz_permutex2var_epi8(some, c, magnitudes, d);
            woven(low, high, codes, j)
        }
    }
}

/// The bytes of four rows' words in another order: all first pairs, all second pairs.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn in_pairs(quads: __m512i) -> __m512i {
    // SAFETY: the caller's.
    unsafe {
        let order = _mm_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0);
        _mm512_shuffle_epi8(quads, _mm512_broadcast_i32x4(order))
    }
}

/// bf16 of low bytes, high bytes and the signs of `codes`: the first pairs or the second ones.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn woven(low: __m512i, high: __m512i, codes: __m512i, j: usize) -> __m512i {
    // SAFETY: the caller's. The table of the function: high | codes & mask.
    unsafe {
        let high = _mm512_ternarylogic_epi32::<0xF8>(high, codes, _mm512_set1_epi8(-128));
        if j.is_multiple_of(2) {
            _mm512_unpacklo_epi8(low, high)
        } else {
            _mm512_unpackhi_epi8(low, high)
        }
    }
}

/// Pair `j % 2` of words of four signed bytes, `zero` added to each: at most 256 in magnitude.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn differences(quads: __m512i, zero: __m512i, j: usize) -> __m512i {
    // SAFETY: the caller's.
    unsafe {
        macro_rules! one {
            ($k:expr) => {{
                let code = _mm512_srai_epi32::<24>(Avx512::shl(quads, 24 - 8 * $k as u32));
                _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_add_epi32(code, zero)))
            }};
        }
        let (even, odd) = (one!(j % 2 * 2), one!(j % 2 * 2 + 1));
        Avx512::blend(0xFFFF, Avx512::shr(even, 16), odd)
    }
}
