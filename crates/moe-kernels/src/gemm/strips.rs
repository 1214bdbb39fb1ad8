//! Dot products of four bytes with weights that are decoded once for many token rows.
//!
//! ```text
//! for each step of 32 k, for each panel of the unit
//!     w = eight words of each of its sixteen rows, decoded once for all token rows
//!     for each token row
//!         sum = what it has of the group so far + eight dot products
//!         at the end of the group: acc = (scale · row scale) · sum + acc, acc = minimum · Σx + acc
//! ```
//!
//! As in [`avx512_vnni`](super::avx512_vnni) weights are unsigned bytes: those of formats with numbers below
//! zero are lifted above it, and rows bring along what a group's sum begins with, `-lift · Σx`; with zero
//! points, which codes from zero on have, it begins with `zero · Σx`.
//! So it ends as `Σ (number + zero) · x`, exactly: of at most 256 columns it is below 2^24, which f32
//! holds. An exact sum may stop anywhere: what token rows have of theirs waits in the first level of the
//! cache, so that decoded steps meet all of them. One or two token rows have it in registers, and read the
//! unit's panels together, in the order of memory.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::avx512::Avx512;
use super::header::Header;
use super::simd::{Simd, ahead};
use super::tile::{Args, put, write};
use crate::pack::{Codes, Group, Offset, PANEL, STEP};

/// The tiles of codes: any number of rows, of units of four panels and of one.
macro_rules! any_rows {
    ($S:ty, $features:literal) => {
        pub(in crate::gemm) const fn of<P: Quads<$S>>() -> &'static [Shape] {
            const ANY: usize = Shape::ANY;
            const {
                &[
                    Shape { rows: ANY, panels: 4, of: 4, units: 1, run: tile::<P, 4> },
                    Shape { rows: ANY, panels: 1, of: 1, units: 1, run: tile::<P, 1> },
                ]
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn tile<P: Quads<$S>, const W: usize>(args: &Args<'_>) {
            // SAFETY: the caller's, and the features are enabled here.
            unsafe { run::<P, W>(args) }
        }
    };
}
pub(super) use any_rows;

/// Words of a step, of four k each.
pub(super) const WORDS: usize = STEP / 4;

/// Token rows whose sums lie in the cache together.
pub(super) const STRIP: usize = 32;

/// A kind of codes.
///
/// # Safety
/// As [`Simd`]; `at` is readable for the panel's items of a step, of a unit of `W` panels;
/// `octet < 4`.
pub(super) trait Quads<S: Simd> {
    const CODES: Codes;
    /// What stays in registers.
    type Constants: Copy;

    unsafe fn constants(table: &[f32; 64]) -> Self::Constants;

    /// The two words of an octet of sixteen rows, as unsigned bytes, in the order of the token rows' bytes.
    /// `octet` is a literal once everything is inlined.
    unsafe fn octet<const W: usize>(
        constants: &Self::Constants,
        at: *const u8,
        octet: usize,
    ) -> [S::I; 2];
}

/// # Safety
/// As [`TileFn`](super::tile::TileFn); inlined into a function that enables the features of `P`.
#[inline(always)]
pub(super) unsafe fn run<P: Quads<Avx512>, const W: usize>(args: &Args<'_>) {
    // SAFETY: the caller's.
    unsafe {
        let constants = P::constants(args.table);
        match args.rows {
            1 => few::<P, 1, W>(args, &constants),
            2 => few::<P, 2, W>(args, &constants),
            rows => {
                for start in (0..rows).step_by(STRIP) {
                    strip::<P, W>(args, &constants, start..rows.min(start + STRIP));
                }
            }
        }
    }
}

/// The zero points of a group, of the `q`-th panel.
///
/// # Safety
/// As [`Header::ends`].
#[inline(always)]
unsafe fn zero<const W: usize>(
    numbers: &Header<Avx512, W>,
    group: usize,
    q: usize,
) -> Option<__m512i> {
    let zeros = numbers.zeros(group)?;
    // SAFETY: the caller's.
    Some(unsafe { _mm512_cvtps_epi32(zeros.add(q).read()) })
}

/// A word of a row in all lanes.
///
/// # Safety
/// As [`run`]; the word is there.
#[inline(always)]
unsafe fn everywhere(word: *const f32) -> __m512i {
    // SAFETY: the caller's.
    unsafe { _mm512_set1_epi32(word.cast::<i32>().read()) }
}

/// A sum at the end of its group. `number` is what the row began it with; so much `further` is the row's
/// scale, and as much again Σx times it.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn ended(
    (sum, acc): (__m512i, __m512),
    (scale, minimum): (__m512, Option<__m512>),
    (number, further): (*const f32, usize),
) -> __m512 {
    // SAFETY: the caller's.
    unsafe {
        let scale = _mm512_mul_ps(scale, _mm512_set1_ps(*number.add(further)));
        let acc = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sum), acc);
        match minimum {
            None => acc,
            Some(minimum) => {
                _mm512_fmadd_ps(minimum, _mm512_set1_ps(*number.add(2 * further)), acc)
            }
        }
    }
}

/// `M` token rows.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn few<P: Quads<Avx512>, const M: usize, const W: usize>(
    args: &Args<'_>,
    constants: &P::Constants,
) {
    let (layout, stride) = (args.layout, args.x_stride);
    let further = args.scales.unwrap_or(0);
    // SAFETY: the unit holds all blocks with their headers and steps; the token rows hold the words of
    // each step, and a number of each kind for each group.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); W]; M];
        let mut sum = [[_mm512_setzero_si512(); W]; M];
        let mut numbers = Header::<Avx512, W>::new(layout);
        let (mut at, mut x, mut number) = (args.unit, args.x, args.x.add(args.sums));
        for &steps in args.blocks {
            let steps = usize::from(steps);
            at = numbers.begin::<W>(at, steps, 0);
            let mut group = 0;
            for step in 0..steps {
                macro_rules! begin {
                    () => {
                        for q in 0..W {
                            let zero = zero(&numbers, group, q);
                            for m in 0..M {
                                let begin = everywhere(number.add(m * stride));
                                sum[m][q] = match zero {
                                    None => begin,
                                    Some(zero) => _mm512_mullo_epi32(zero, begin),
                                };
                            }
                        }
                    };
                }
                macro_rules! octets {
                    ($($octet:literal)*) => {$(
                        let bytes = W * P::CODES.panel_bytes() / 4;
                        ahead::<Avx512>(at.wrapping_add($octet * bytes), bytes);
                        for q in 0..W {
                            let words = P::octet::<W>(constants, at.add(q * 64), $octet);
                            for m in 0..M {
                                let x = x.add(m * stride + 2 * $octet);
                                sum[m][q] = _mm512_dpbusd_epi32(sum[m][q], words[0], everywhere(x));
                                let x = everywhere(x.add(1));
                                sum[m][q] = _mm512_dpbusd_epi32(sum[m][q], words[1], x);
                            }
                        }
                    )*};
                }
                macro_rules! end {
                    () => {
                        let minima = matches!(layout.offset, Offset::Minimum(_));
                        for q in 0..W {
                            let (scale, minimum) = numbers.ends(group, q);
                            for m in 0..M {
                                let number = (number.add(m * stride), further);
                                let both = (sum[m][q], acc[m][q]);
                                acc[m][q] = match minima {
                                    true => ended(both, (scale, Some(minimum)), number),
                                    false => ended(both, (scale, None), number),
                                };
                            }
                        }
                        group += 1;
                        number = number.add(1);
                    };
                }
                if layout.group != Group::Block || step == 0 {
                    begin!();
                }
                octets!(0 1);
                if layout.group == Group::Sixteen {
                    end!();
                    begin!();
                }
                octets!(2 3);
                if layout.group != Group::Block || step + 1 == steps {
                    end!();
                }
                x = x.add(WORDS);
                at = at.add(W * P::CODES.panel_bytes());
            }
        }
        write::<Avx512, M, W>(args, &acc);
    }
}

/// What token rows have of a panel.
struct Sums {
    /// Of the group that is not at its end.
    group: MaybeUninit<[__m512i; STRIP]>,
    all: MaybeUninit<[__m512; STRIP]>,
}

impl Sums {
    const NONE: Sums = Sums { group: MaybeUninit::uninit(), all: MaybeUninit::uninit() };

    #[inline(always)]
    fn group(&mut self) -> *mut __m512i {
        self.group.as_mut_ptr().cast()
    }

    #[inline(always)]
    fn all(&mut self) -> *mut __m512 {
        self.all.as_mut_ptr().cast()
    }
}

/// Token rows: how many, and where the first one has the words of a step, and its numbers of a group.
#[derive(Clone, Copy)]
pub(super) struct Strip {
    pub(super) rows: usize,
    /// From one to the next, in words.
    pub(super) stride: usize,
    pub(super) words: *const f32,
    /// As for [`ended`].
    pub(super) number: *const f32,
    pub(super) further: usize,
}

impl Strip {
    /// At the first step.
    #[inline(always)]
    pub(super) fn of(args: &Args<'_>, rows: &Range<usize>) -> Strip {
        let words = args.x.wrapping_add(rows.start * args.x_stride);
        Strip {
            rows: rows.len(),
            stride: args.x_stride,
            words,
            number: words.wrapping_add(args.sums),
            further: args.scales.unwrap_or(0),
        }
    }
}

/// Some of the token rows, at most [`STRIP`].
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn strip<P: Quads<Avx512>, const W: usize>(
    args: &Args<'_>,
    constants: &P::Constants,
    rows: Range<usize>,
) {
    let layout = args.layout;
    let mut sums = [const { Sums::NONE }; W];
    // SAFETY: as in `few`; there are sums for the rows of the strip.
    unsafe {
        for sums in &mut sums {
            for m in 0..rows.len() {
                sums.all().add(m).write(_mm512_setzero_ps());
            }
        }
        let mut strip = Strip::of(args, &rows);
        let mut numbers = Header::<Avx512, W>::new(layout);
        let mut at = args.unit;
        let bytes = W * P::CODES.panel_bytes();
        for &steps in args.blocks {
            let steps = usize::from(steps);
            at = numbers.begin::<W>(at, steps, 0);
            let mut step = 0;
            while step < steps {
                match layout.group {
                    Group::Sixteen => {
                        let group = 2 * step;
                        let later = Strip {
                            words: strip.words.add(WORDS / 2),
                            number: strip.number.add(1),
                            ..strip
                        };
                        for q in 0..W {
                            ahead::<Avx512>(at.wrapping_add(q * bytes / W), bytes / W);
                            let [a, b, c, d, e, f, g, h] =
                                decoded::<Avx512, P, W>(constants, at, q);
                            let begin = (true, zero(&numbers, group, q));
                            let end = Some(numbers.ends(group, q));
                            part::<4>(args, [a, b, c, d], begin, end, strip, &mut sums[q]);
                            let begin = (true, zero(&numbers, group + 1, q));
                            let end = Some(numbers.ends(group + 1, q));
                            part::<4>(args, [e, f, g, h], begin, end, later, &mut sums[q]);
                        }
                        strip.number = strip.number.add(2);
                    }
                    Group::ThirtyTwo => {
                        for q in 0..W {
                            ahead::<Avx512>(at.wrapping_add(q * bytes / W), bytes / W);
                            let words = decoded::<Avx512, P, W>(constants, at, q);
                            let begin = (true, zero(&numbers, step, q));
                            let end = Some(numbers.ends(step, q));
                            part::<8>(args, words, begin, end, strip, &mut sums[q]);
                        }
                        strip.number = strip.number.add(1);
                    }
                    Group::Block => {
                        let (first, two) = (step == 0, step + 1 < steps);
                        let last = step + 1 + usize::from(two) == steps;
                        for q in 0..W {
                            ahead::<Avx512>(at.wrapping_add(q * bytes / W), bytes / W);
                            let words = decoded::<Avx512, P, W>(constants, at, q);
                            let begin = (first, if first { zero(&numbers, 0, q) } else { None });
                            let end = if last { Some(numbers.ends(0, q)) } else { None };
                            let sums = &mut sums[q];
                            if !two {
                                part::<8>(args, words, begin, end, strip, sums);
                                continue;
                            }
                            // Twice as much between one look at the sums and the next.
                            let at = at.add(bytes);
                            ahead::<Avx512>(at.wrapping_add(q * bytes / W), bytes / W);
                            let more = decoded::<Avx512, P, W>(constants, at, q);
                            let mut both = [more[0]; 16];
                            both[..8].copy_from_slice(&words);
                            both[8..].copy_from_slice(&more);
                            part::<16>(args, both, begin, end, strip, sums);
                        }
                        if two {
                            step += 1;
                            strip.words = strip.words.add(WORDS);
                            at = at.add(bytes);
                        }
                        strip.number = strip.number.add(usize::from(last));
                    }
                }
                step += 1;
                strip.words = strip.words.add(WORDS);
                at = at.add(bytes);
            }
        }
        for (q, sums) in sums.iter_mut().enumerate() {
            for m in 0..rows.len() {
                let to = args.out.add((rows.start + m) * args.out_stride + q * PANEL);
                put::<Avx512>(args.finish, sums.all().add(m).read(), to, args.columns - q * PANEL);
            }
        }
    }
}

/// The words of a panel's step.
///
/// # Safety
/// As [`Quads`].
#[inline(always)]
pub(super) unsafe fn decoded<S: Simd, P: Quads<S>, const W: usize>(
    constants: &P::Constants,
    at: *const u8,
    panel: usize,
) -> [S::I; WORDS] {
    // SAFETY: the caller's.
    unsafe {
        let at = at.add(panel * 64);
        let [a, b] = P::octet::<W>(constants, at, 0);
        let [c, d] = P::octet::<W>(constants, at, 1);
        let [e, f] = P::octet::<W>(constants, at, 2);
        let [g, h] = P::octet::<W>(constants, at, 3);
        [a, b, c, d, e, f, g, h]
    }
}

/// Multiplies `words` with all rows of `strip`: the first ones of their group, which has a zero point or
/// not, and the last ones, if there is a scale and a minimum.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn part<const N: usize>(
    args: &Args<'_>,
    words: [__m512i; N],
    (mut first, zero): (bool, Option<__m512i>),
    end: Option<(__m512, __m512)>,
    strip: Strip,
    sums: &mut Sums,
) {
    let Strip { rows, stride, number, .. } = strip;
    // SAFETY: the caller's.
    unsafe {
        if let Some(zero) = zero {
            for m in 0..rows {
                let begin = _mm512_mullo_epi32(zero, everywhere(number.add(m * stride)));
                sums.group().add(m).write(begin);
            }
            first = false;
        }
        let minima = matches!(args.layout.offset, Offset::Minimum(_));
        match (first, end, minima) {
            (true, None, _) => products::<N, true, false, false>(words, end, strip, sums),
            (false, None, _) => products::<N, false, false, false>(words, end, strip, sums),
            (true, Some(_), true) => products::<N, true, true, true>(words, end, strip, sums),
            (false, Some(_), true) => products::<N, false, true, true>(words, end, strip, sums),
            (true, Some(_), false) => products::<N, true, true, false>(words, end, strip, sums),
            (false, Some(_), false) => products::<N, false, true, false>(words, end, strip, sums),
        }
    }
}

/// The products of words with all rows of a strip; the first of their group, the last, with minima.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn products<const N: usize, const FIRST: bool, const LAST: bool, const MINIMA: bool>(
    words: [__m512i; N],
    end: Option<(__m512, __m512)>,
    mut strip: Strip,
    sums: &mut Sums,
) {
    let (mut group, mut all) = (sums.group(), sums.all());
    // Chains of dot products of one row alone would fill what the processor looks at.
    macro_rules! together {
        ($M:literal) => {
            while strip.rows >= $M {
                // SAFETY: the rows have the words, and their numbers of the group; there are sums for them.
                unsafe {
                    rows::<N, $M, FIRST, LAST, MINIMA>(&words, end, strip, (group, all));
                    (group, all) = (group.add($M), all.add($M));
                }
                strip.rows -= $M;
                strip.words = strip.words.wrapping_add($M * strip.stride);
                strip.number = strip.number.wrapping_add($M * strip.stride);
            }
        };
    }
    together!(4);
    together!(1);
}

/// The same for the first `M` rows, whose sums are at these places.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn rows<
    const N: usize,
    const M: usize,
    const FIRST: bool,
    const LAST: bool,
    const MINIMA: bool,
>(
    words: &[__m512i; N],
    end: Option<(__m512, __m512)>,
    strip: Strip,
    (group, all): (*mut __m512i, *mut __m512),
) {
    let Strip { stride, words: x, number, further, .. } = strip;
    // SAFETY: the caller's.
    unsafe {
        let mut sum = [_mm512_setzero_si512(); M];
        for m in 0..M {
            sum[m] = match FIRST {
                true => everywhere(number.add(m * stride)),
                false => group.add(m).read(),
            };
        }
        for i in 0..N {
            for m in 0..M {
                sum[m] = _mm512_dpbusd_epi32(sum[m], words[i], everywhere(x.add(m * stride + i)));
            }
        }
        for m in 0..M {
            match end {
                Some((scale, minimum)) if LAST => {
                    let minimum = if MINIMA { Some(minimum) } else { None };
                    let both = (sum[m], all.add(m).read());
                    let number = (number.add(m * stride), further);
                    all.add(m).write(ended(both, (scale, minimum), number));
                }
                _ => group.add(m).write(sum[m]),
            }
        }
    }
}
