//! A few token rows on vector registers, with the bits of tile products.
//!
//! Few rows wait for weights: decoded in registers they are multiplied sooner than from a buffer that tiles
//! can read, unless scales are for so few columns that the flags below change all the time. What
//! [`tiles`](super::tiles) does with a turn of 32 k is
//!
//! ```text
//! even = odd = 0
//! even = x[k] · w[k] + even;  odd = x[k + 1] · w[k + 1] + odd      for each pair of k, in order
//! sum = sum + (even + odd)
//! ```
//! in which numbers below the smallest normal one are zero, before and after. The processor does so where two
//! flags say it. The compiler may not know of them: while they are set, what adds and multiplies is assembled.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::avx512::Avx512;
use super::panel::Panel;
use super::simd::Simd;
use super::tile::{Args, Sums, lines, octet_ahead, tile};
use crate::pack::{Group, OCTET, STEP, UNIT};

/// Rows that are multiplied so, at most.
const FEW: usize = 2;

/// Whether this is faster than tiles.
pub(super) fn suits(args: &Args<'_>) -> bool {
    args.rows <= FEW && args.layout.group == Group::Block
}

/// The rows of `args` and its units of `W` panels, each of whose blocks is one group.
///
/// # Safety
/// As [`TileFn`](super::tile::TileFn).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c")]
pub(super) unsafe fn product<P, const W: usize>(args: &Args<'_>)
where
    P: Panel<Avx512, Value = __m512i>,
{
    for unit in 0..args.units {
        for row in 0..args.rows {
            // SAFETY: the unit and the row are there, in `x` and in `out`, and the features are enabled here.
            unsafe {
                let part = Args {
                    unit: args.unit.add(unit * args.unit_bytes),
                    units: 1,
                    x: args.x.add(row * args.x_stride),
                    out: args.out.add(row * args.out_stride + unit * UNIT),
                    columns: args.columns - unit * UNIT,
                    ..*args
                };
                tile::<Avx512, P, Turns, 1, W, W>(&part);
            }
        }
    }
}

struct Turns;

impl<P: Panel<Avx512, Value = __m512i>> Sums<Avx512, P> for Turns {
    const GO_ON: bool = true;

    #[inline(always)]
    unsafe fn group<const M: usize, const N: usize, const W: usize>(
        args: &Args<'_>,
        constants: &P::Constants,
        codes: *const u8,
        of: Range<usize>,
        (mut x, _): (*const f32, *const f32),
        zero: Option<&[P::Zero; N]>,
        sum: &mut [[__m512; N]; M],
    ) {
        const TURN: usize = STEP / OCTET;
        // SAFETY: the caller's.
        unsafe {
            let flags = Flushing::begin();
            for first in of.step_by(TURN) {
                let zeros = [[Avx512::splat(0.0); N]; M];
                let (mut even, mut odd) = (zeros, zeros);
                for octet in first..first + TURN {
                    let step = codes.add(octet / 4 * W * P::CODES.panel_bytes());
                    octet_ahead::<Avx512, P, N, W>(step, octet % 4);
                    let lines = lines::<Avx512, P, N, W>(step, octet % 4);
                    macro_rules! pair {
                        ($($j:literal)*) => {$(
                            let mut xs = [halves(_mm512_set1_epi32(x.add($j).cast::<i32>().read())); M];
                            for m in 1..M {
                                let word = x.add(m * args.x_stride + $j).cast::<i32>().read();
                                xs[m] = halves(_mm512_set1_epi32(word));
                            }
                            for q in 0..N {
                                let zero = zero.map(|zero| &zero[q]);
                                let w = halves(P::value::<W>(constants, &lines[q], $j, zero));
                                for m in 0..M {
                                    even[m][q] = flags.fma(xs[m][0], w[0], even[m][q]);
                                    odd[m][q] = flags.fma(xs[m][1], w[1], odd[m][q]);
                                }
                            }
                        )*};
                    }
                    pair!(0 1 2 3);
                    x = x.add(OCTET / P::K);
                }
                for m in 0..M {
                    for q in 0..N {
                        sum[m][q] = flags.add(sum[m][q], flags.add(even[m][q], odd[m][q]));
                    }
                }
            }
        }
    }
}

/// The first and the second number of pairs of bf16.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves(pairs: __m512i) -> [__m512; 2] {
    let second = _mm512_and_si512(pairs, _mm512_set1_epi32(!0xFFFF));
    [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(second)]
}

/// While it is there, numbers below the smallest normal one are zero in what it adds and multiplies.
struct Flushing {
    before: u32,
}

impl Flushing {
    /// # Safety
    /// The processor has AVX-512.
    #[inline(always)]
    unsafe fn begin() -> Flushing {
        /// Round to nearest, no traps, subnormal operands and results are zero.
        static FLAGS: u32 = 0x9FC0;
        let mut before = 0u32;
        // SAFETY: the caller's; `before` is written, `FLAGS` read, and `drop` ends it.
        unsafe {
            asm!("stmxcsr [{}]", "ldmxcsr [{}]", in(reg) &mut before, in(reg) &FLAGS,
                options(nostack, preserves_flags));
        }
        Flushing { before }
    }

    /// `a · b + c`, rounded once.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn fma(&self, a: __m512, b: __m512, mut c: __m512) -> __m512 {
        // SAFETY: the instruction is one of AVX-512's, and touches registers alone.
        unsafe {
            asm!("vfmadd231ps {}, {}, {}", inout(zmm_reg) c, in(zmm_reg) a, in(zmm_reg) b,
                options(nomem, nostack, preserves_flags));
        }
        c
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add(&self, a: __m512, b: __m512) -> __m512 {
        let sum;
        // SAFETY: as `fma`.
        unsafe {
            asm!("vaddps {}, {}, {}", lateout(zmm_reg) sum, in(zmm_reg) a, in(zmm_reg) b,
                options(nomem, nostack, preserves_flags));
        }
        sum
    }
}

impl Drop for Flushing {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: what was set before.
        unsafe {
            asm!("ldmxcsr [{}]", in(reg) &self.before, options(nostack, readonly, preserves_flags));
        }
    }
}
