//! The tile: some token rows × some panels of sixteen weight rows, over all of k.
//!
//! ```text
//! for each block, for each group of it
//!     sum = 0
//!     for each octet of the group, for each k of it
//!         w = sixteen weights of each panel, decoded in registers, less their zero points
//!         sum[token][panel] = x[token][k] · w + sum[token][panel]
//!     acc[token][panel] = scale · sum + acc + minimum · Σx      the scale times the token row's, if it has any
//! out = acc, times or divided by the scale of the whole matrix
//! ```
//!
//! Lanes are weight rows, so no sum crosses lanes: every element of `out` is the same chain of
//! fused multiply-adds over k, whatever tile it falls into and however wide the CPU's vectors are.

use std::ops::Range;

use super::header::Header;
use super::panel::Panel;
use super::simd::{Simd, ahead};
use crate::numerics::{DecodeScale, EncodeScale};
use crate::pack::{Finish, Layout, OCTET, PANEL, STEP};
use crate::stored::Global;

/// The operands of a tile.
pub(super) struct Args<'a> {
    pub(super) layout: Layout,
    pub(super) table: &'a [f32; 64],
    pub(super) finish: Finish,
    /// Steps of each block.
    pub(super) blocks: &'a [u8],
    /// Units of packed weights, of as many panels as the shape says, and bytes from one to the next.
    pub(super) unit: *const u8,
    pub(super) units: usize,
    pub(super) unit_bytes: usize,
    /// The tile's first panel in the unit.
    pub(super) first: usize,
    /// Token rows, as the shape says.
    pub(super) rows: usize,
    /// The tile's first token row: words of as many elements as the panels multiply at a time.
    pub(super) x: *const f32,
    /// From one token row to the next, in words.
    pub(super) x_stride: usize,
    /// From a token row to its sums of groups, in words.
    pub(super) sums: usize,
    /// From there to its scales of groups, if it has some.
    pub(super) scales: Option<usize>,
    /// For the first token row and the first panel.
    pub(super) out: *mut f32,
    /// In elements.
    pub(super) out_stride: usize,
    /// Columns of `out` from the first panel on, at least one for each panel of the tile.
    pub(super) columns: usize,
}

/// A tile. Unsafe to call: the CPU must have its features, and the pointers must be good for what
/// the arguments name, `out` for writing.
pub(super) type TileFn = unsafe fn(&Args<'_>);

/// A tile of a shape: some token rows, some panels of a unit of `of` panels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) panels: usize,
    pub(super) of: usize,
    /// Units at a time, at most.
    pub(super) units: usize,
    pub(super) run: TileFn,
}

impl Shape {
    /// For [`rows`](Self::rows): as many as there are.
    pub(super) const ANY: usize = 0;
}

/// `shapes!(function::<Panel>: (rows, panels of panels), …)`, the preferred first.
macro_rules! shapes {
    ($tile:ident::<$P:ident>: $(($rows:literal, $panels:literal of $of:literal)),*) => {
        [$(Shape {
            rows: $rows,
            panels: $panels,
            of: $of,
            units: 1,
            run: $tile::<$P, $rows, $panels, $of>,
        }),*]
    };
}
pub(super) use shapes;

/// Asks for what `N` panels read so far ahead of an octet of the step at `step`, and for nothing else: between
/// their items stand those of the other panels, which are read when their turn comes.
///
/// # Safety
/// As [`Panel`]; any address will do.
#[inline(always)]
pub(super) unsafe fn octet_ahead<S: Simd, P: Panel<S>, const N: usize, const W: usize>(
    step: *const u8,
    octet: usize,
) {
    let bytes = P::CODES.panel_bytes();
    // SAFETY: the caller's.
    unsafe {
        if N == W {
            ahead::<S>(step.wrapping_add(octet * W * bytes / 4), W * bytes / 4);
            return;
        }
        let items = bytes / P::ITEM;
        for item in octet * items / 4..(octet + 1) * items / 4 {
            ahead::<S>(step.wrapping_add(item * W * P::ITEM), N * P::ITEM);
        }
    }
}

/// `M` token rows, `N` panels of a unit of `W`.
///
/// # Safety
/// As [`TileFn`]; inlined into a function that enables the features of `S`.
#[inline(always)]
pub(super) unsafe fn tile<
    S: Simd,
    P: Panel<S>,
    A: Sums<S, P>,
    const M: usize,
    const N: usize,
    const W: usize,
>(
    args: &Args<'_>,
) {
    let layout = args.layout;
    // sums that nothing scales
    let go_on = A::GO_ON && layout.scale.is_none() && args.scales.is_none();
    // SAFETY: the unit holds all blocks with their headers and steps; the token rows hold STEP
    // elements for each step, and a sum for each group where there are offsets.
    unsafe {
        let constants = P::constants(args.table);
        let mut acc = [[S::splat(0.0); N]; M];
        let mut numbers = Header::<S, N>::new(layout);
        let (mut at, mut x, mut sums) = (args.unit, args.x, args.x.add(args.sums));
        for &steps in args.blocks {
            let steps = usize::from(steps);
            let groups = layout.groups(steps);
            let octets = steps * (STEP / OCTET) / groups;
            at = numbers.begin::<W>(at, steps, args.first);
            let codes = at.add(args.first * P::ITEM);
            at = at.add(steps * W * P::CODES.panel_bytes());
            let mut octet = 0;
            for group in 0..groups {
                let mut sum = if go_on { acc } else { [[S::splat(0.0); N]; M] };
                let (of, row) = (octet..octet + octets, (x, sums));
                match numbers.zeros(group) {
                    Some(zeros) if P::CODES.have_zeros() => {
                        let mut zero = [P::zero(zeros.read()); N];
                        for q in 1..N {
                            zero[q] = P::zero(zeros.add(q).read());
                        }
                        let zero = Some(&zero);
                        A::group::<M, N, W>(args, &constants, codes, of, row, zero, &mut sum);
                    }
                    _ => A::group::<M, N, W>(args, &constants, codes, of, row, None, &mut sum),
                }
                octet += octets;
                x = x.add(octets * OCTET / P::K);
                if go_on {
                    acc = sum;
                } else {
                    let scales = if P::CODED { args.scales } else { None };
                    let ends = (numbers.scales(group), numbers.minima(group));
                    finish_group::<S, M, N>(args, ends, (sums, scales), &sum, &mut acc);
                }
                sums = sums.add(1);
            }
        }
        write::<S, M, N>(args, &acc);
    }
}

/// How the products of a group are added up.
pub(super) trait Sums<S: Simd, P: Panel<S>> {
    /// Sums that nothing scales go on from one group to the next.
    const GO_ON: bool;

    /// Adds the octets `of` of a block whose codes are at `codes`, with the first token row's words and its
    /// number of the group.
    ///
    /// # Safety
    /// As [`tile`].
    unsafe fn group<const M: usize, const N: usize, const W: usize>(
        args: &Args<'_>,
        constants: &P::Constants,
        codes: *const u8,
        of: Range<usize>,
        row: (*const f32, *const f32),
        zero: Option<&[P::Zero; N]>,
        sum: &mut [[S::V; N]; M],
    );
}

/// One after the other, as the [module](self) says.
pub(super) struct Chain;

impl<S: Simd, P: Panel<S>> Sums<S, P> for Chain {
    const GO_ON: bool = false;

    #[inline(always)]
    unsafe fn group<const M: usize, const N: usize, const W: usize>(
        args: &Args<'_>,
        constants: &P::Constants,
        codes: *const u8,
        of: Range<usize>,
        (mut x, number): (*const f32, *const f32),
        zero: Option<&[P::Zero; N]>,
        sum: &mut [[S::V; N]; M],
    ) {
        // SAFETY: the caller's.
        unsafe {
            if P::INTEGERS {
                for m in 0..M {
                    let number = number.add(m * args.x_stride);
                    for q in 0..N {
                        sum[m][q] = P::begin(zero.map(|z| &z[q]), number);
                    }
                }
            }
            for octet in of {
                let step = codes.add(octet / 4 * W * P::CODES.panel_bytes());
                octet_ahead::<S, P, N, W>(step, octet % 4);
                products::<S, P, M, N, W>(constants, step, octet % 4, x, args.x_stride, zero, sum);
                x = x.add(OCTET / P::K);
            }
            if P::INTEGERS {
                for m in 0..M {
                    for q in 0..N {
                        sum[m][q] = P::end(sum[m][q]);
                    }
                }
            }
        }
    }
}

/// The lines of an octet of `N` panels.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
pub(super) unsafe fn lines<S: Simd, P: Panel<S>, const N: usize, const W: usize>(
    step: *const u8,
    octet: usize,
) -> [P::Octet; N] {
    // SAFETY: the caller's.
    unsafe {
        let mut lines = [P::octet::<W>(step, octet); N];
        for q in 1..N {
            lines[q] = P::octet::<W>(step.add(q * P::ITEM), octet);
        }
        lines
    }
}

/// Adds the products of eight k.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn products<S: Simd, P: Panel<S>, const M: usize, const N: usize, const W: usize>(
    constants: &P::Constants,
    step: *const u8,
    octet: usize,
    x: *const f32,
    x_stride: usize,
    zero: Option<&[P::Zero; N]>,
    sum: &mut [[S::V; N]; M],
) {
    // SAFETY: the caller's.
    unsafe {
        let lines = lines::<S, P, N, W>(step, octet);
        macro_rules! one {
            ($($j:literal)*) => {$(
                if $j < OCTET / P::K {
                    let mut w = [P::value::<W>(constants, &lines[0], $j, zero.map(|z| &z[0])); N];
                    for q in 1..N {
                        w[q] = P::value::<W>(constants, &lines[q], $j, zero.map(|z| &z[q]));
                    }
                    for m in 0..M {
                        let x = S::splat(*x.add(m * x_stride + $j));
                        for q in 0..N {
                            sum[m][q] = P::product(w[q], x, sum[m][q]);
                        }
                    }
                }
            )*};
        }
        one!(0 1 2 3 4 5 6 7);
    }
}

/// Scales the sums of a group and adds them: with the scales and the minima of the panels, if there are any.
/// `sums` is the first token row's number of the group, and `scales` how far its scale is from there, where
/// rows have scales.
///
/// Loops over rows and panels are small, one for each case: only so do they unroll, and only so
/// stay the sums in registers.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
pub(super) unsafe fn finish_group<S: Simd, const M: usize, const N: usize>(
    args: &Args<'_>,
    (scale, minimum): (Option<*const S::V>, Option<*const S::V>),
    (sums, scales): (*const f32, Option<usize>),
    sum: &[[S::V; N]; M],
    acc: &mut [[S::V; N]; M],
) {
    // SAFETY: the caller's.
    unsafe {
        match (scale, minimum, scales) {
            (None, _, None) => {
                for m in 0..M {
                    for q in 0..N {
                        acc[m][q] = S::add(sum[m][q], acc[m][q]);
                    }
                }
            }
            (None, _, Some(at)) => {
                for m in 0..M {
                    let scale = S::splat(*sums.add(m * args.x_stride + at));
                    for q in 0..N {
                        acc[m][q] = S::fma(scale, sum[m][q], acc[m][q]);
                    }
                }
            }
            (Some(scale), None, None) => {
                for m in 0..M {
                    for q in 0..N {
                        acc[m][q] = S::fma(scale.add(q).read(), sum[m][q], acc[m][q]);
                    }
                }
            }
            (Some(scale), None, Some(at)) => {
                for m in 0..M {
                    let of_row = S::splat(*sums.add(m * args.x_stride + at));
                    for q in 0..N {
                        acc[m][q] =
                            S::fma(S::mul(scale.add(q).read(), of_row), sum[m][q], acc[m][q]);
                    }
                }
            }
            // rows that have scales meet no minima
            (Some(scale), Some(minimum), _) => {
                for m in 0..M {
                    let sum_x = S::splat(*sums.add(m * args.x_stride));
                    for q in 0..N {
                        let scaled = S::fma(scale.add(q).read(), sum[m][q], acc[m][q]);
                        acc[m][q] = S::fma(minimum.add(q).read(), sum_x, scaled);
                    }
                }
            }
        }
    }
}

/// Writes the columns that there are.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
pub(super) unsafe fn write<S: Simd, const M: usize, const N: usize>(
    args: &Args<'_>,
    acc: &[[S::V; N]; M],
) {
    // SAFETY: `out` is writable for the tile's rows and columns.
    unsafe {
        for m in 0..M {
            for q in 0..N {
                let to = args.out.add(m * args.out_stride + q * PANEL);
                put::<S>(args.finish, acc[m][q], to, args.columns - q * PANEL);
            }
        }
    }
}

/// Writes a sum to the `columns` that there are from `to` on, at most a panel's.
///
/// # Safety
/// As [`Simd`]; they are writable.
#[inline(always)]
pub(super) unsafe fn put<S: Simd>(finish: Finish, acc: S::V, to: *mut f32, columns: usize) {
    // SAFETY: the caller's.
    unsafe {
        let value = finished::<S>(finish, acc);
        if columns >= PANEL {
            S::store(value, to);
        } else {
            let mut lanes = [0.0; PANEL];
            S::store(value, lanes.as_mut_ptr());
            to.copy_from_nonoverlapping(lanes.as_ptr(), columns);
        }
    }
}

/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn finished<S: Simd>(finish: Finish, acc: S::V) -> S::V {
    // SAFETY: the caller's.
    unsafe {
        let value = S::mul(acc, S::splat(finish.power));
        match finish.global {
            None => value,
            Some(Global::Multiply(DecodeScale(by))) => S::mul(value, S::splat(by)),
            Some(Global::Divide(EncodeScale(by))) => S::div(value, S::splat(by)),
        }
    }
}
