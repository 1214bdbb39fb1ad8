//! The tile: some token rows × some panels of sixteen weight rows, over all of k.
//!
//! ```text
//! for each block, for each group of it
//!     sum = 0
//!     for each octet of the group, for each k of it
//!         w = sixteen weights of each panel, decoded in registers
//!         sum[token][panel] = x[token][k] · w + sum[token][panel]
//!     acc[token][panel] = scale · (zero · Σx + sum) + acc + minimum · Σx
//! out = acc, times or divided by the scale of the whole matrix
//! ```
//!
//! Lanes are weight rows, so no sum crosses lanes: every element of `out` is the same chain of
//! fused multiply-adds over k, whatever tile it falls into and however wide the CPU's vectors are.

use super::panel::Panel;
use super::simd::Simd;
use crate::numerics::{DecodeScale, EncodeScale};
use crate::pack::{Finish, Layout, Number, OCTET, Offset, PANEL, STEP};
use crate::stored::Global;

/// The operands of a tile.
pub(super) struct Args<'a> {
    pub(super) layout: Layout,
    pub(super) table: &'a [f32; 64],
    pub(super) finish: Finish,
    /// Steps of each block.
    pub(super) blocks: &'a [u8],
    /// A unit of packed weights.
    pub(super) unit: *const u8,
    /// Panels of the unit.
    pub(super) panels: usize,
    /// The tile's first panel.
    pub(super) first: usize,
    /// The tile's first token row.
    pub(super) x: *const f32,
    /// From one token row to the next, in elements.
    pub(super) x_stride: usize,
    /// From a token row to its sums of groups, in elements.
    pub(super) sums: usize,
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

/// A tile of a shape.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) panels: usize,
    pub(super) run: TileFn,
}

/// `shapes!(function::<Panel>: (rows, panels), …)`, the preferred first.
macro_rules! shapes {
    ($tile:ident::<$P:ident>: $(($rows:literal, $panels:literal)),*) => {
        [$(Shape { rows: $rows, panels: $panels, run: $tile::<$P, $rows, $panels> }),*]
    };
}
pub(super) use shapes;

/// Bytes ahead of the codes that are asked for.
const AHEAD: usize = 2048;

/// # Safety
/// As [`TileFn`]; inlined into a function that enables the features of `S`.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, P: Panel<S>, const M: usize, const N: usize>(args: &Args<'_>) {
    let layout = args.layout;
    let panel_bytes = P::CODES.panel_bytes();
    let rows = args.panels * PANEL;
    // SAFETY: the unit holds all blocks with their headers and steps; the token rows hold STEP
    // elements for each step, and a sum for each group where there are offsets.
    unsafe {
        let constants = P::constants(args.table);
        let mut acc = [[S::splat(0.0); N]; M];
        let (mut at, mut x, mut sum_at) = (args.unit, args.x, args.x.add(args.sums));
        for &steps in args.blocks {
            let steps = usize::from(steps);
            let header = at;
            let groups = layout.groups(steps);
            let octets = steps * (STEP / OCTET) / groups;
            at = at.add(rows * layout.header_bytes(steps));
            let codes = at.add(args.first * panel_bytes);
            let mut octet = 0;
            for group in 0..groups {
                let mut sum = [[S::splat(0.0); N]; M];
                for _ in 0..octets {
                    let step = codes.add(octet / 4 * args.panels * panel_bytes);
                    for q in 0..N {
                        let bytes = panel_bytes / 4;
                        for line in 0..bytes.div_ceil(64) {
                            let near = step.add(q * panel_bytes + octet % 4 * bytes + 64 * line);
                            S::prefetch(near.wrapping_add(AHEAD));
                        }
                    }
                    products::<S, P, M, N>(&constants, step, octet % 4, x, args.x_stride, &mut sum);
                    octet += 1;
                    x = x.add(OCTET);
                }
                let numbers = header.add(rows * layout.outer_bytes());
                let numbers = numbers.add(group * rows * layout.group_bytes());
                finish_group::<S, M, N>(args, header, numbers, sum_at, &sum, &mut acc);
                sum_at = sum_at.add(1);
            }
            at = at.add(steps * args.panels * panel_bytes);
        }
        write::<S, M, N>(args, &mut acc);
    }
}

/// Adds the products of eight k.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn products<S: Simd, P: Panel<S>, const M: usize, const N: usize>(
    constants: &P::Constants,
    step: *const u8,
    octet: usize,
    x: *const f32,
    x_stride: usize,
    sum: &mut [[S::V; N]; M],
) {
    // SAFETY: the caller's.
    unsafe {
        let mut lines = [P::octet(step, octet); N];
        for q in 1..N {
            lines[q] = P::octet(step.add(q * P::CODES.panel_bytes()), octet);
        }
        macro_rules! one {
            ($($j:literal)*) => {$(
                let mut w = [P::value(constants, &lines[0], $j); N];
                for q in 1..N {
                    w[q] = P::value(constants, &lines[q], $j);
                }
                for m in 0..M {
                    let x = S::splat(*x.add(m * x_stride + $j));
                    for q in 0..N {
                        sum[m][q] = S::fma(w[q], x, sum[m][q]);
                    }
                }
            )*};
        }
        one!(0 1 2 3 4 5 6 7);
    }
}

/// Scales the sum of a group and adds it.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn finish_group<S: Simd, const M: usize, const N: usize>(
    args: &Args<'_>,
    header: *const u8,
    numbers: *const u8,
    sums: *const f32,
    sum: &[[S::V; N]; M],
    acc: &mut [[S::V; N]; M],
) {
    let layout = args.layout;
    let rows = args.panels * PANEL;
    // SAFETY: the header holds a number of each kind for each row of the unit.
    unsafe {
        for q in 0..N {
            let row = (args.first + q) * PANEL;
            let Some(number) = layout.scale else {
                for m in 0..M {
                    acc[m][q] = S::add(sum[m][q], acc[m][q]);
                }
                continue;
            };
            let mut scale = read::<S>(number, numbers.add(row * number.size()));
            if layout.outer_scale {
                scale = S::mul(scale, S::f16(header.add(row * 2)));
            }
            let offsets = numbers.add(rows * layout.scale_bytes());
            match layout.offset {
                Offset::None => {
                    for m in 0..M {
                        acc[m][q] = S::fma(scale, sum[m][q], acc[m][q]);
                    }
                }
                Offset::Zero(number) => {
                    let zero = read::<S>(number, offsets.add(row * number.size()));
                    for m in 0..M {
                        let sum_x = S::splat(*sums.add(m * args.x_stride));
                        acc[m][q] = S::fma(scale, S::fma(zero, sum_x, sum[m][q]), acc[m][q]);
                    }
                }
                Offset::Minimum(number) => {
                    let at = match number {
                        Number::High4 => numbers.add(row),
                        _ => offsets.add(row * number.size()),
                    };
                    let mut minimum = read::<S>(number, at);
                    if layout.outer_minimum {
                        minimum = S::mul(minimum, S::f16(header.add((rows + row) * 2)));
                    }
                    for m in 0..M {
                        let sum_x = S::splat(*sums.add(m * args.x_stride));
                        let scaled = S::fma(scale, sum[m][q], acc[m][q]);
                        acc[m][q] = S::fma(minimum, sum_x, scaled);
                    }
                }
            }
        }
    }
}

/// Sixteen numbers of a header.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn read<S: Simd>(number: Number, at: *const u8) -> S::V {
    // SAFETY: the caller's.
    unsafe {
        match number {
            Number::F32 => S::load(at),
            Number::F16 => S::f16(at),
            Number::Bf16 => S::bf16(at),
            Number::E8m0 => S::e8m0(at),
            Number::E4m3 => S::e4m3(at),
            Number::Int8 => S::int8(at),
            Number::Low4 => S::low4(at),
            Number::High4 => S::high4(at),
        }
    }
}

/// Writes the columns that there are.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn write<S: Simd, const M: usize, const N: usize>(
    args: &Args<'_>,
    acc: &mut [[S::V; N]; M],
) {
    // SAFETY: `out` is writable for the tile's rows and columns.
    unsafe {
        for m in 0..M {
            for q in 0..N {
                let value = S::mul(acc[m][q], S::splat(args.finish.power));
                let value = match args.finish.global {
                    None => value,
                    Some(Global::Multiply(DecodeScale(by))) => S::mul(value, S::splat(by)),
                    Some(Global::Divide(EncodeScale(by))) => S::div(value, S::splat(by)),
                };
                let to = args.out.add(m * args.out_stride + q * PANEL);
                let columns = args.columns - q * PANEL;
                if columns >= PANEL {
                    S::store(value, to);
                } else {
                    let mut lanes = [0.0; PANEL];
                    S::store(value, lanes.as_mut_ptr());
                    to.copy_from_nonoverlapping(lanes.as_ptr(), columns);
                }
            }
        }
    }
}
