//! Dot products of four bytes with AVX2: `vpmaddubsw`, and `vpmaddwd` for several of them.
//!
//! As in [`strips`](super::strips) weights are unsigned bytes that are decoded once for many token rows, and
//! sums are exact. `vpmaddubsw` adds two products in 16 bits, which it must not overflow: with bytes from −128 to
//! 127 those of weights up to 15 leave room for eight such sums, those of a step; of weights up to 63 for two.
//! Greater weights are multiplied as two nibbles: the low ones, and sixteen times the high ones.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::avx2::{Avx2, Pair, both};
use super::header::Header;
use super::panel::{four, one, two};
use super::simd::{Simd, ahead};
use super::strips::{Quads, STRIP, Strip, WORDS, any_rows, decoded};
use super::tile::{Args, Shape, put};
use crate::pack::{Codes, Group, Offset, PANEL, lift};

any_rows!(Avx2, "avx2,fma,f16c");

/// Four bytes of each row of a panel.
type Word = Pair<__m256i>;

/// A kind of codes: an octet's two words.
macro_rules! quads {
    ($($name:ident, $Constants:ty: |$numbers:ident| $constants:expr,
        <$W:ident>|$table:ident, $at:ident, $octet:ident| $words:expr;)*) => {$(
        pub(super) struct $name;

        impl Quads<Avx2> for $name {
            const CODES: Codes = Codes::$name;
            type Constants = $Constants;

            #[inline(always)]
            unsafe fn constants($numbers: &[f32; 64]) -> Self::Constants {
                // SAFETY: the caller's.
                unsafe { $constants }
            }

            #[inline(always)]
            unsafe fn octet<const $W: usize>(
                $table: &Self::Constants,
                $at: *const u8,
                $octet: usize,
            ) -> [Word; 2] {
                // SAFETY: the caller's.
                unsafe { $words }
            }
        }
    )*};
}

quads! {
    Int8, __m256i: |_numbers| _mm256_set1_epi8(-128), <W>|sign, at, octet| {
        let at = at.add(2 * octet * W * 64);
        let (first, second) = (Avx2::words(at), Avx2::words(at.add(W * 64)));
        [both!(|first| _mm256_xor_si256(first, *sign)), both!(|second| _mm256_xor_si256(second, *sign))]
    };
    Table2, [__m256i; 2]: |numbers| {
        let bytes = lifted(numbers);
        [table(|i| bytes[i % 4]), table(|i| bytes[i / 4])]
    }, <W>|tables, at, octet| {
        let pairs = pairs::<W>(at, octet);
        [looked_up(tables[0], pairs), looked_up(tables[1], pairs)]
    };
    Table3, [__m256i; 3]: |numbers| {
        let bytes = lifted(numbers);
        [table(|i| i as u8 % 4), table(|i| i as u8 / 4), table(|i| bytes[i])]
    }, <W>|tables, at, octet| {
        let pairs = pairs::<W>(at, octet);
        let low = [looked_up(tables[0], pairs), looked_up(tables[1], pairs)];
        let [first, second] = joined(low, bits::<W>(_mm256_set1_epi8(4), at.add(2 * W * 64), octet));
        [looked_up(tables[2], first), looked_up(tables[2], second)]
    };
    Table4, __m256i: |numbers| {
        let bytes = lifted(numbers);
        table(|i| bytes[i])
    }, <W>|table, at, octet| {
        let [first, second] = nibbles(four::<Avx2, W>(at, octet));
        [looked_up(*table, first), looked_up(*table, second)]
    };
    Int5, __m256i: |_numbers| _mm256_set1_epi8(16), <W>|bit, at, octet| {
        joined(nibbles(four::<Avx2, W>(at, octet)), bits::<W>(*bit, at.add(4 * W * 64), octet))
    };
    Int6, [__m256i; 2]: |_numbers| high(), <W>|tables, at, octet| six::<W>(tables, at, octet);
    Table6, ([__m256i; 2], [__m256i; 4]): |numbers| {
        let bytes = lifted(numbers);
        let [a, b, c, d] = [0, 16, 32, 48];
        (high(), [table(|i| bytes[a + i]), table(|i| bytes[b + i]), table(|i| bytes[c + i]), table(|i| bytes[d + i])])
    }, <W>|tables, at, octet| {
        let [first, second] = six::<W>(&tables.0, at, octet);
        [looked_up64(&tables.1, first), looked_up64(&tables.1, second)]
    };
}

/// Whole numbers as unsigned bytes.
#[inline(always)]
fn lifted(numbers: &[f32; 64]) -> [u8; 64] {
    let lift = lift(numbers);
    numbers.map(|number| (number as i32 + lift) as u8)
}

/// Sixteen bytes to look up.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn table(byte: impl Fn(usize) -> u8) -> __m256i {
    let bytes: [u8; 16] = std::array::from_fn(byte);
    // SAFETY: the caller's; the bytes are a register.
    unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast())) }
}

/// The bits of a pair of two bits where 6-bit codes have them.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn high() -> [__m256i; 2] {
    // SAFETY: the caller's.
    unsafe { [table(|i| i as u8 % 4 * 16), table(|i| i as u8 / 4 * 16)] }
}

// SAFETY of all blocks below, up to the tile: the caller's, as for `Quads`; shuffles take any index.

/// The bytes of a table at indices below 16.
#[inline(always)]
unsafe fn looked_up(table: __m256i, indices: Word) -> Word {
    // SAFETY: see above.
    unsafe { both!(|indices| _mm256_shuffle_epi8(table, indices)) }
}

/// The bytes of four tables at indices below 64.
#[inline(always)]
unsafe fn looked_up64(tables: &[__m256i; 4], indices: Word) -> Word {
    // SAFETY: see above.
    unsafe {
        both!(|indices| {
            let mut found = _mm256_setzero_si256();
            for i in 0..4 {
                // An index of another table has its highest bit set, so that nothing is looked up.
                let own = _mm256_xor_si256(indices, _mm256_set1_epi8(16 * i as i8));
                let own = _mm256_adds_epu8(own, _mm256_set1_epi8(112));
                found = _mm256_or_si256(found, _mm256_shuffle_epi8(tables[i], own));
            }
            found
        })
    }
}

/// The low and the high nibbles of bytes.
#[inline(always)]
unsafe fn nibbles(line: Word) -> [Word; 2] {
    // SAFETY: see above.
    unsafe {
        let mask = _mm256_set1_epi8(15);
        let high = both!(|line| _mm256_srli_epi32::<4>(line));
        [both!(|line| _mm256_and_si256(line, mask)), both!(|high| _mm256_and_si256(high, mask))]
    }
}

/// The bits of `a` or of `b`.
#[inline(always)]
unsafe fn joined(a: [Word; 2], b: [Word; 2]) -> [Word; 2] {
    let ([a, c], [b, d]) = (a, b);
    // SAFETY: see above.
    unsafe { [both!(|a, b| _mm256_or_si256(a, b)), both!(|c, d| _mm256_or_si256(c, d))] }
}

/// 6-bit codes.
#[inline(always)]
unsafe fn six<const W: usize>(high: &[__m256i; 2], at: *const u8, octet: usize) -> [Word; 2] {
    // SAFETY: see above.
    unsafe {
        let pairs = pairs::<W>(at.add(4 * W * 64), octet);
        let high = [looked_up(high[0], pairs), looked_up(high[1], pairs)];
        joined(nibbles(four::<Avx2, W>(at, octet)), high)
    }
}

/// An octet's codes of two bits, two in a byte: the first word's in its lowest bits, the second's above them.
#[inline(always)]
unsafe fn pairs<const W: usize>(at: *const u8, octet: usize) -> Word {
    // SAFETY: see above.
    unsafe {
        let twice = spread(two::<Avx2, W>(at, octet), 0x0101_0000);
        let [low, high] = nibbles(twice);
        both!(|low, high| _mm256_blendv_epi8(low, high, _mm256_set1_epi16(-256)))
    }
}

/// An octet's single bits, each as `bit`.
#[inline(always)]
unsafe fn bits<const W: usize>(bit: __m256i, at: *const u8, octet: usize) -> [Word; 2] {
    // SAFETY: see above.
    unsafe {
        let all = spread(one::<Avx2, W>(at, octet), 0);
        macro_rules! each {
            ($bits:expr) => {{
                let bits = _mm256_set1_epi32($bits);
                both!(|all| {
                    let set = _mm256_cmpeq_epi8(_mm256_and_si256(all, bits), bits);
                    _mm256_and_si256(set, bit)
                })
            }};
        }
        [each!(0x4010_0401), each!(0x8020_0802_u32 as i32)]
    }
}

/// Bytes of each word: those that the bytes of `from` say.
#[inline(always)]
unsafe fn spread(words: Word, from: i32) -> Word {
    // SAFETY: see above.
    unsafe {
        let each = _mm256_set1_epi32(from);
        let first = _mm256_setr_epi32(
            0,
            0x0404_0404,
            0x0808_0808,
            0x0C0C_0C0C,
            0,
            0x0404_0404,
            0x0808_0808,
            0x0C0C_0C0C,
        );
        let from = _mm256_add_epi32(first, each);
        both!(|words| _mm256_shuffle_epi8(words, from))
    }
}

/// # Safety
/// As [`TileFn`](super::tile::TileFn); inlined into a function that enables the features.
#[inline(always)]
unsafe fn run<P: Quads<Avx2>, const W: usize>(args: &Args<'_>) {
    // SAFETY: the caller's; nothing is above what the codes hold.
    unsafe {
        match P::CODES {
            Codes::Table2 | Codes::Table3 => strips::<P, W, 8, 1>(args),
            Codes::Int5 | Codes::Int6 => strips::<P, W, 2, 1>(args),
            Codes::Table4 => match lifted(args.table).iter().max() {
                Some(..=15) => strips::<P, W, 8, 1>(args),
                Some(..=63) => strips::<P, W, 2, 1>(args),
                _ => strips::<P, W, 8, 2>(args),
            },
            _ => strips::<P, W, 8, 2>(args),
        }
    }
}

/// All token rows. In 16 bits `EACH` words are added up, of each of so many `PLANES` of weights: all bits, or the
/// nibbles.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn strips<P: Quads<Avx2>, const W: usize, const EACH: usize, const PLANES: usize>(
    args: &Args<'_>,
) {
    // SAFETY: the caller's.
    unsafe {
        let constants = P::constants(args.table);
        for start in (0..args.rows).step_by(STRIP) {
            let rows = start..args.rows.min(start + STRIP);
            strip::<P, W, EACH, PLANES>(args, &constants, rows);
        }
    }
}

/// What token rows have of a panel.
struct Sums {
    /// Of the group that is not at its end.
    group: [MaybeUninit<Word>; STRIP],
    all: [MaybeUninit<<Avx2 as Simd>::V>; STRIP],
}

/// Some of the token rows, at most [`STRIP`].
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn strip<P: Quads<Avx2>, const W: usize, const EACH: usize, const PLANES: usize>(
    args: &Args<'_>,
    constants: &P::Constants,
    rows: Range<usize>,
) {
    let layout = args.layout;
    let mut sums = [const {
        Sums { group: [MaybeUninit::uninit(); STRIP], all: [MaybeUninit::uninit(); STRIP] }
    }; W];
    // SAFETY: the unit holds all blocks with their headers and steps; the token rows hold the words of
    // each step, and a number of each kind for each group.
    unsafe {
        for sums in &mut sums {
            sums.all[..rows.len()].fill(MaybeUninit::new(Avx2::splat(0.0)));
        }
        let mut numbers = Header::<Avx2, W>::new(layout);
        let mut strip = Strip::of(args, &rows);
        let mut at = args.unit;
        let bytes = P::CODES.panel_bytes();
        for &steps in args.blocks {
            let steps = usize::from(steps);
            at = numbers.begin::<W>(at, steps, 0);
            for step in 0..steps {
                let (first, last) = match layout.group {
                    Group::Block => (step == 0, step + 1 == steps),
                    _ => (true, true),
                };
                let group = match layout.group {
                    Group::Block => 0,
                    Group::ThirtyTwo => step,
                    Group::Sixteen => 2 * step,
                };
                for q in 0..W {
                    ahead::<Avx2>(at.wrapping_add(q * bytes), bytes);
                    let words = planes(decoded::<Avx2, P, W>(constants, at, q));
                    let minima = matches!(layout.offset, Offset::Minimum(_));
                    let ends = (first, last);
                    let part = Part::of::<P, W>(&numbers, (group, q), ends, minima);
                    let sums = &mut sums[q];
                    if layout.group != Group::Sixteen {
                        part.multiply::<0, 8, EACH, PLANES>(&words, strip, sums);
                        continue;
                    }
                    part.multiply::<0, 4, EACH, PLANES>(&words, strip, sums);
                    let part = Part::of::<P, W>(&numbers, (group + 1, q), ends, minima);
                    let number = strip.number.add(1);
                    part.multiply::<4, 4, EACH, PLANES>(&words, Strip { number, ..strip }, sums);
                }
                strip.words = strip.words.add(WORDS);
                strip.number = strip.number.add(match layout.group {
                    Group::Sixteen => 2,
                    _ => usize::from(last),
                });
                at = at.add(W * bytes);
            }
        }
        for (q, sums) in sums.iter().enumerate() {
            for m in 0..rows.len() {
                let to = args.out.add((rows.start + m) * args.out_stride + q * PANEL);
                put::<Avx2>(args.finish, sums.all[m].assume_init(), to, args.columns - q * PANEL);
            }
        }
    }
}

/// All bits of words, or their nibbles.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn planes<const PLANES: usize>(words: [Word; WORDS]) -> [[Word; WORDS]; PLANES] {
    let mut planes = [words; PLANES];
    if PLANES == 2 {
        for i in 0..WORDS {
            // SAFETY: the caller's.
            [planes[0][i], planes[1][i]] = unsafe { nibbles(words[i]) };
        }
    }
    planes
}

/// Words of a panel within one group, and what the group's sums begin and end with.
struct Part {
    first: bool,
    zero: Option<Word>,
    ends: Option<(<Avx2 as Simd>::V, <Avx2 as Simd>::V)>,
    minima: bool,
}

impl Part {
    /// Of a group and panel `q`: the first of its group, the last.
    ///
    /// # Safety
    /// As [`Header::ends`].
    #[inline(always)]
    unsafe fn of<P: Quads<Avx2>, const W: usize>(
        numbers: &Header<Avx2, W>,
        (group, q): (usize, usize),
        (first, last): (bool, bool),
        minima: bool,
    ) -> Part {
        // SAFETY: the caller's.
        unsafe {
            let zero = match numbers.zeros(group) {
                Some(zeros) if first => {
                    let zero = zeros.add(q).read();
                    // other codes with zero points are not below zero
                    let lift = _mm256_set1_epi32(if P::CODES == Codes::Int8 { 128 } else { 0 });
                    Some(both!(|zero| _mm256_sub_epi32(_mm256_cvtps_epi32(zero), lift)))
                }
                _ => None,
            };
            let ends = if last { Some(numbers.ends(group, q)) } else { None };
            Part { first, zero, ends, minima }
        }
    }

    /// Multiplies `N` words from `FROM` on with those of all rows of `strip`.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn multiply<
        const FROM: usize,
        const N: usize,
        const EACH: usize,
        const PLANES: usize,
    >(
        &self,
        words: &[[Word; WORDS]; PLANES],
        strip: Strip,
        sums: &mut Sums,
    ) {
        let mut m = 0;
        // SAFETY: the caller's; there are so many rows.
        unsafe {
            while m + 4 <= strip.rows {
                self.rows::<FROM, N, EACH, PLANES, 4>(words, strip, m, sums);
                m += 4;
            }
            while m < strip.rows {
                self.rows::<FROM, N, EACH, PLANES, 1>(words, strip, m, sums);
                m += 1;
            }
        }
    }

    /// The same for `M` rows.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn rows<
        const FROM: usize,
        const N: usize,
        const EACH: usize,
        const PLANES: usize,
        const M: usize,
    >(
        &self,
        words: &[[Word; WORDS]; PLANES],
        strip: Strip,
        start: usize,
        sums: &mut Sums,
    ) {
        let Strip { stride, further, .. } = strip;
        // SAFETY: the caller's.
        unsafe {
            let x = strip.words.add(start * stride);
            let mut sum = dots::<FROM, N, EACH, M>(&words[0], x, stride);
            if PLANES == 2 {
                let high = dots::<FROM, N, EACH, M>(&words[1], x, stride);
                for m in 0..M {
                    let (low, high) = (sum[m], high[m]);
                    sum[m] = both!(|low, high| _mm256_add_epi32(low, _mm256_slli_epi32::<4>(high)));
                }
            }
            for m in 0..M {
                let number = strip.number.add((start + m) * stride);
                let begin = match (self.first, self.zero) {
                    (false, _) => sums.group[start + m].assume_init(),
                    (true, None) => everywhere(number),
                    (true, Some(zero)) => {
                        let sum_x = everywhere(number);
                        both!(|zero, sum_x| _mm256_mullo_epi32(zero, sum_x))
                    }
                };
                let part = sum[m];
                let sum = both!(|begin, part| _mm256_add_epi32(begin, part));
                let Some((scale, minimum)) = self.ends else {
                    sums.group[start + m].write(sum);
                    continue;
                };
                let all = sums.all[start + m].assume_init();
                let scale = Avx2::mul(scale, Avx2::splat(*number.add(further)));
                let mut all = Avx2::fma(scale, both!(|sum| _mm256_cvtepi32_ps(sum)), all);
                if self.minima {
                    all = Avx2::fma(minimum, Avx2::splat(*number.add(2 * further)), all);
                }
                sums.all[start + m].write(all);
            }
        }
    }
}

/// A word of a row in all lanes.
///
/// # Safety
/// As [`run`]; the word is there.
#[inline(always)]
unsafe fn everywhere(word: *const f32) -> Word {
    // SAFETY: the caller's.
    unsafe {
        let word = _mm256_set1_epi32(word.cast::<i32>().read());
        Pair(word, word)
    }
}

/// The dot products of `N` words from `FROM` on with those of `M` rows.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn dots<const FROM: usize, const N: usize, const EACH: usize, const M: usize>(
    words: &[Word; WORDS],
    x: *const f32,
    stride: usize,
) -> [Word; M] {
    // SAFETY: the caller's.
    unsafe {
        let zero = _mm256_setzero_si256();
        let mut sum = [Pair(zero, zero); M];
        let mut pairs = [Pair(zero, zero); M];
        for i in 0..N {
            let word = words[FROM + i];
            for m in 0..M {
                let (x, part) = (everywhere(x.add(m * stride + FROM + i)), pairs[m]);
                pairs[m] = match i % EACH {
                    0 => both!(|word, x| _mm256_maddubs_epi16(word, x)),
                    _ => {
                        both!(|word, x, part| _mm256_add_epi16(part, _mm256_maddubs_epi16(word, x)))
                    }
                };
            }
            if (i + 1) % EACH == 0 || i + 1 == N {
                for m in 0..M {
                    let (part, so_far) = (pairs[m], sum[m]);
                    let ones = _mm256_set1_epi16(1);
                    sum[m] = both!(|part, so_far| _mm256_add_epi32(
                        so_far,
                        _mm256_madd_epi16(part, ones)
                    ));
                }
            }
        }
        sum
    }
}
