//! Products on tile registers: some token rows × the panels of some units, over all of k.
//!
//! ```text
//! for each block, for each unit, for each group (formats without scales: c begins as acc, and is acc)
//!     for each two panels (all four, where there are no more rows than a tile has)
//!         b = the group's weights as pairs of bf16: where they lie, or decoded into a buffer
//!         for each 16 token rows
//!             c = a · b, on tile registers
//!             acc = scale · c + acc + minimum · Σx
//! out = acc, times or divided by the scale of the whole matrix
//! ```
//!
//! Weights of bf16 have no headers, so that two of their blocks are one: sums stay in registers
//! longer. The weights of two panels of a block stay in the first level of the caches while all rows
//! pass, and the rows' part of a block in the second while the units pass. What comes next from
//! further away is asked for into that level.
//!
//! A tile of sixteen token rows is read where the rows lie; one of sixteen pairs of k of a panel is
//! what the panel's items are. What the registers add up in what order is theirs, the same for any
//! rows beside.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::avx512::Avx512;
use super::header::Header;
use super::panel::Panel;
use super::registers::{Coming, Config, ROWS, Strip, Tiles, Weights};
use super::simd::{AHEAD, Simd};
use super::tile::{Args, finish_group, write};
use crate::pack::{BLOCK, Codes, Group, OCTET, PANEL, STEP, UNIT};

/// Token rows whose sums are kept.
const MOST: usize = 256;

/// Units whose sums are kept.
pub(super) const UNITS: usize = 4;

/// Steps that are multiplied without a look at the sums, at most, where weights lie as tiles read them:
/// those of two blocks.
const TOGETHER: usize = 2 * BLOCK / STEP;

#[repr(align(64))]
struct Aligned<const N: usize>([f32; N]);

/// All rows of `args`, its units of `W` panels, `N` of them at a time.
///
/// # Safety
/// As [`TileFn`](super::tile::TileFn), and as [`Tiles`].
pub(super) unsafe fn product<T, P, const W: usize, const N: usize>(args: &Args<'_>, tiles: &mut T)
where
    T: Tiles,
    P: Panel<Avx512, Value = __m512i>,
{
    if args.rows <= ROWS && args.units == 1 {
        // SAFETY: the caller's; there is room for the sums.
        return with_sums::<{ ROWS * UNIT }>(|acc| unsafe {
            blocks::<T, P, W, W>(args, tiles, acc)
        });
    }
    with_sums::<{ MOST * UNITS * UNIT }>(|acc| {
        for done in (0..args.rows).step_by(MOST) {
            // SAFETY: the rows are there, in `x` and in `out`, and room for their sums.
            unsafe {
                let part = Args {
                    rows: (args.rows - done).min(MOST),
                    x: args.x.add(done * args.x_stride),
                    out: args.out.add(done * args.out_stride),
                    ..*args
                };
                blocks::<T, P, W, N>(&part, tiles, acc);
            }
        }
    });
}

/// Lends room for so many sums; small where it need not be large, for the stack is touched throughout.
#[inline(never)]
fn with_sums<const LEN: usize>(work: impl FnOnce(*mut f32)) {
    let mut room = MaybeUninit::<Aligned<LEN>>::uninit();
    work(room.as_mut_ptr().cast());
}

/// `acc` has room for the sums of the rows and units.
///
/// # Safety
/// As [`product`]; with one tile of rows at most where `N` is 4.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c")]
unsafe fn blocks<T, P, const W: usize, const N: usize>(
    args: &Args<'_>,
    tiles: &mut T,
    acc: *mut f32,
) where
    T: Tiles,
    P: Panel<Avx512, Value = __m512i>,
{
    let layout = args.layout;
    // Half a tile's k, where a scale is for no more.
    let k = if layout.group == Group::Sixteen { STEP / 2 } else { STEP };
    // Without scales tiles go on with the sums of the block before.
    let adds = layout.scale.is_none() && args.scales.is_none();
    let strips = args.rows.div_ceil(ROWS);
    let mut sum = MaybeUninit::<Aligned<{ ROWS * UNIT }>>::uninit();
    let mut decoded = MaybeUninit::<Aligned<{ BLOCK / 2 * UNIT }>>::uninit();
    let mut configured = 0;
    // Weights that lie where tiles read them have no headers between their blocks.
    let whole = P::CODES == Codes::Bf16;
    // SAFETY: each unit holds all blocks with their headers and steps; the token rows hold the words
    // of each step, and a sum for each group where there are minima. The buffers hold the sums of a
    // strip, and the pairs of a block of all panels. Of `acc` the sums that there are are set first.
    unsafe {
        if !adds || args.blocks.is_empty() {
            acc.write_bytes(0, args.units * args.rows * UNIT);
        }
        let constants = P::constants(args.table);
        let mut numbers = Header::<Avx512, W>::new(layout);
        let (sum, decoded) = (sum.as_mut_ptr().cast::<f32>(), decoded.as_mut_ptr().cast::<u8>());
        let (mut at, mut x, mut sums) = (args.unit, args.x, args.x.add(args.sums));
        let (mut blocks, mut begun) =
            (args.blocks.iter().map(|&steps| usize::from(steps)).peekable(), false);
        while let Some(mut steps) = blocks.next() {
            while let Some(more) = blocks.next_if(|more| whole && adds && steps + more <= TOGETHER)
            {
                steps += more;
            }
            let more = blocks.peek().is_some();
            let (groups, header_bytes) =
                (layout.groups(steps), W * PANEL * layout.header_bytes(steps));
            let bytes = header_bytes + steps * W * P::CODES.panel_bytes();
            let octets = steps * (STEP / OCTET) / groups;
            let turns = octets * OCTET / k;
            for unit in 0..args.units {
                let (header, acc) =
                    (at.add(unit * args.unit_bytes), acc.add(unit * args.rows * UNIT));
                numbers.read::<W>(header, steps, 0);
                let codes = header.add(header_bytes);
                // The same block of the next unit, or the next block of the first.
                let next = match unit + 1 < args.units {
                    true => Some(codes.wrapping_add(args.unit_bytes)),
                    false => more.then(|| at.wrapping_add(bytes + header_bytes)),
                };
                for group in 0..groups {
                    let x = x.add(group * octets * OCTET / P::K);
                    for first in (0..W).step_by(N) {
                        let weights = if whole {
                            let at = codes.add(first * P::ITEM);
                            Weights { at, item: W * 64, panel: 64, step: k / 2 * W * 64 }
                        } else {
                            let of = group * octets..(group + 1) * octets;
                            let zeros = numbers.zeros(group).map(|zeros| zeros.add(first));
                            decode::<P, N, W>(first, &constants, zeros, codes, of, decoded);
                            let panel = octets * OCTET / 2 * 64;
                            Weights { at: decoded, item: 64, panel, step: k / 2 * 64 }
                        };
                        for strip in 0..strips {
                            let row = strip * ROWS;
                            let rows = (args.rows - row).min(ROWS);
                            if rows != configured {
                                tiles.configure(&Config::new(rows, k));
                                configured = rows;
                            }
                            // Lines of weights a turn, and rows of the strip a pass, so that all
                            // passes over a block ask for the next one.
                            let slots = W / N * strips * turns;
                            let asks = whole && next.is_some();
                            let each = if asks { (steps * W * 16).div_ceil(slots) } else { 0 };
                            let done = (first / N * strips + strip) * turns * each * 64;
                            let (pass, passes) = (unit * (W / N) + first / N, args.units * (W / N));
                            let asked = if more { ROWS } else { 0 };
                            let strip = Strip {
                                x: x.add(row * args.x_stride).cast(),
                                stride: args.x_stride * 4,
                                step: 2 * k,
                                turns,
                                weights,
                                coming: Coming {
                                    lines: next.unwrap_or(codes).wrapping_add(done),
                                    each,
                                    rows: (pass * asked / passes, (pass + 1) * asked / passes),
                                    bytes: steps * STEP * 2,
                                },
                                sum: if adds { acc.add(row * UNIT + first * PANEL) } else { sum },
                                adds: adds && begun,
                            };
                            strip.multiply::<T, N>(tiles);
                            if adds {
                                continue;
                            }
                            let ends = (
                                numbers.scales(group).map(|scales| scales.add(first)),
                                numbers.minima(group).map(|minima| minima.add(first)),
                            );
                            let mut i = 0;
                            while i < rows {
                                let total = acc.add((row + i) * UNIT + first * PANEL);
                                let sums = sums.add(group + (row + i) * args.x_stride);
                                let part = sum.add(i * UNIT);
                                i += if rows - i >= 4 {
                                    finish::<4, N>(args, ends, sums, part, total)
                                } else {
                                    finish::<1, N>(args, ends, sums, part, total)
                                };
                            }
                        }
                    }
                }
            }
            begun = true;
            at = at.add(bytes);
            x = x.add(steps * STEP / P::K);
            sums = sums.add(groups);
        }
        for unit in 0..args.units {
            let columns = args.columns - unit * UNIT;
            for row in 0..args.rows {
                let total = [panels::<W>(acc.add((unit * args.rows + row) * UNIT))];
                let out = args.out.add(row * args.out_stride + unit * UNIT);
                write::<Avx512, 1, W>(&Args { out, columns, ..*args }, &total);
            }
        }
    }
}

/// Scales the sums of a group of `M` rows and adds them; returns `M`.
///
/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn finish<const M: usize, const N: usize>(
    args: &Args<'_>,
    ends: (Option<*const __m512>, Option<*const __m512>),
    sums: *const f32,
    part: *const f32,
    total: *mut f32,
) -> usize {
    // SAFETY: the caller's.
    unsafe {
        let (mut new, mut parts) = ([panels::<N>(total); M], [panels::<N>(part); M]);
        for m in 1..M {
            (new[m], parts[m]) = (panels(total.add(m * UNIT)), panels(part.add(m * UNIT)));
        }
        let sums = (sums, args.scales);
        finish_group::<Avx512, M, N>(args, ends, sums, &parts, &mut new);
        for m in 0..M {
            for q in 0..N {
                Avx512::store(new[m][q], total.add(m * UNIT + q * PANEL));
            }
        }
    }
    M
}

/// Sixteen f32 for each panel.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn panels<const N: usize>(at: *const f32) -> [__m512; N] {
    // SAFETY: the caller's.
    unsafe {
        let mut all = [Avx512::load(at.cast()); N];
        for q in 1..N {
            all[q] = Avx512::load(at.add(q * PANEL).cast());
        }
        all
    }
}

/// Writes the pairs of the octets `of` of a block whose codes are at `codes`, panel after panel: `N` of
/// them, from `first` on, with their zero points.
///
/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn decode<P: Panel<Avx512, Value = __m512i>, const N: usize, const W: usize>(
    first: usize,
    constants: &P::Constants,
    zeros: Option<*const __m512>,
    codes: *const u8,
    of: Range<usize>,
    to: *mut u8,
) {
    let pairs = of.len() * OCTET / 2;
    // SAFETY: the caller's; a prefetch takes any address.
    unsafe {
        for panel in 0..N {
            let q = first + panel;
            let zero = match zeros {
                Some(zeros) if P::CODES.have_zeros() => Some(P::zero(zeros.add(panel).read())),
                _ => None,
            };
            let mut to = to.add(panel * pairs * 64);
            for octet in of.clone() {
                let step = codes.add(octet / 4 * W * P::CODES.panel_bytes());
                Avx512::prefetch(step.wrapping_add(AHEAD + (octet % 4 * W + q) * 64));
                let lines = P::octet::<W>(step.add(q * P::ITEM), octet % 4);
                macro_rules! pair {
                    ($($j:literal)*) => {$(
                        let pair = P::value::<W>(constants, &lines, $j, zero.as_ref());
                        _mm512_store_si512(to.add($j * 64).cast(), pair);
                    )*};
                }
                pair!(0 1 2 3);
                to = to.add(4 * 64);
            }
        }
    }
}
