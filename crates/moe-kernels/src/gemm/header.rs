//! The numbers in a block's header, scales and minima or zero points, as f32.
//!
//! A block's are read before its codes are multiplied, by one function of the set of features. In each tile it
//! would be eight ways to read numbers, over and over: more code than the products are.

use std::mem::MaybeUninit;

use super::simd::Simd;
use crate::pack::{BLOCK, Layout, Number, Offset, PANEL};

/// Most groups of a block.
const GROUPS: usize = BLOCK / 16;

/// Numbers of one kind, of some panels' rows.
pub(super) struct Kind {
    number: Number,
    /// Those of the first group, and bytes from one group's to the next.
    at: *const u8,
    stride: usize,
    groups: usize,
    /// Of the header's rows the first ones that are read, and how many panels of them.
    first: usize,
    panels: usize,
    /// An f16 of each row that they are multiplied by.
    outer: Option<*const u8>,
}

/// Reads them, group after group, for [`Simd::numbers`].
///
/// # Safety
/// As [`Simd`]; the header has them, and there is room.
#[inline(always)]
pub(super) unsafe fn read<S: Simd>(kind: &Kind, to: *mut S::V) {
    let Kind { at, stride, groups, first, panels, outer, .. } = *kind;
    macro_rules! each {
        ($read:ident, $size:literal) => {
            for group in 0..groups {
                for q in 0..panels {
                    // SAFETY: the caller's.
                    unsafe {
                        let at = at.add(group * stride + (first + q * PANEL) * $size);
                        to.add(group * panels + q).write(S::$read(at));
                    }
                }
            }
        };
    }
    match kind.number {
        Number::F32 => each!(load, 4),
        Number::F16 => each!(f16, 2),
        Number::Bf16 => each!(bf16, 2),
        Number::E8m0 => each!(e8m0, 1),
        Number::E4m3 => each!(e4m3, 1),
        Number::Int8 => each!(int8, 1),
        Number::Low4 => each!(low4, 1),
        Number::High4 => each!(high4, 1),
    }
    let Some(outer) = outer else { return };
    for q in 0..panels {
        // SAFETY: the caller's.
        unsafe {
            let by = S::f16(outer.add((first + q * PANEL) * 2));
            for group in 0..groups {
                let to = to.add(group * panels + q);
                to.write(S::mul(to.read(), by));
            }
        }
    }
}

/// The numbers of a block, of the rows of `N` panels.
pub(super) struct Header<S: Simd, const N: usize> {
    layout: Layout,
    scales: [MaybeUninit<[S::V; N]>; GROUPS],
    offsets: [MaybeUninit<[S::V; N]>; GROUPS],
}

impl<S: Simd, const N: usize> Header<S, N> {
    #[inline(always)]
    pub(super) fn new(layout: Layout) -> Self {
        let none = const { [const { MaybeUninit::uninit() }; GROUPS] };
        Header { layout, scales: none, offsets: none }
    }

    /// Reads the numbers of a block of a unit of `W` panels, which has so many groups: of the panels from
    /// `first` on.
    ///
    /// # Safety
    /// As [`Simd`]; the block's header is at `at`.
    #[inline(always)]
    pub(super) unsafe fn read<const W: usize>(
        &mut self,
        at: *const u8,
        groups: usize,
        first: usize,
    ) {
        let (layout, rows) = (self.layout, W * PANEL);
        let stride = rows * layout.group_bytes();
        // SAFETY: the header has a number of each kind for each row of the unit and each group.
        unsafe {
            let scales = at.add(rows * layout.outer_bytes());
            let kind = |number, at, outer: Option<*const u8>| Kind {
                number,
                at,
                stride,
                groups,
                first: first * PANEL,
                panels: N,
                outer,
            };
            if let Some(number) = layout.scale {
                let outer = layout.outer_scale.then_some(at);
                S::numbers(&kind(number, scales, outer), self.scales.as_mut_ptr().cast());
            }
            if let Offset::Zero(number) | Offset::Minimum(number) = layout.offset {
                let offsets = match number {
                    // the other halves of the scales' bytes
                    Number::High4 => scales,
                    _ => scales.add(rows * layout.scale_bytes()),
                };
                let outer = layout.outer_minimum.then_some(at.add(rows * 2));
                S::numbers(&kind(number, offsets, outer), self.offsets.as_mut_ptr().cast());
            }
        }
    }

    /// The scales of a group, if the format has any, of `K` of the panels from `first` on.
    ///
    /// # Safety
    /// As [`Simd`]; the block with the group was read, and has the panels.
    #[inline(always)]
    pub(super) unsafe fn scales<const K: usize>(
        &self,
        group: usize,
        first: usize,
    ) -> Option<[S::V; K]> {
        match self.layout.scale {
            // SAFETY: the caller's.
            Some(_) => Some(unsafe { of_group(&self.scales, group, first) }),
            None => None,
        }
    }

    /// Likewise the minima.
    ///
    /// # Safety
    /// As [`scales`](Self::scales).
    #[inline(always)]
    pub(super) unsafe fn minima<const K: usize>(
        &self,
        group: usize,
        first: usize,
    ) -> Option<[S::V; K]> {
        match self.layout.offset {
            // SAFETY: the caller's.
            Offset::Minimum(_) => Some(unsafe { of_group(&self.offsets, group, first) }),
            Offset::None | Offset::Zero(_) => None,
        }
    }

    /// Likewise the zero points.
    ///
    /// # Safety
    /// As [`scales`](Self::scales).
    #[inline(always)]
    pub(super) unsafe fn zeros<const K: usize>(
        &self,
        group: usize,
        first: usize,
    ) -> Option<[S::V; K]> {
        match self.layout.offset {
            // SAFETY: the caller's.
            Offset::Zero(_) => Some(unsafe { of_group(&self.offsets, group, first) }),
            Offset::None | Offset::Minimum(_) => None,
        }
    }

    /// Likewise what sums of the group end with.
    ///
    /// # Safety
    /// As [`scales`](Self::scales).
    #[inline(always)]
    pub(super) unsafe fn ends<const K: usize>(&self, group: usize, first: usize) -> Ends<S, K> {
        // SAFETY: the caller's.
        unsafe {
            Ends {
                scale: match self.scales(group, first) {
                    Some(scale) => scale,
                    None => [S::splat(1.0); K],
                },
                minimum: match self.minima(group, first) {
                    Some(minimum) => minimum,
                    None => [S::splat(0.0); K],
                },
            }
        }
    }
}

/// The numbers of a group that sums of integers end with: what the format lacks does nothing.
#[derive(Clone, Copy)]
pub(super) struct Ends<S: Simd, const K: usize> {
    pub(super) scale: [S::V; K],
    pub(super) minimum: [S::V; K],
}

/// # Safety
/// The numbers of the group were read, and are of the panels.
#[inline(always)]
unsafe fn of_group<V: Copy, const N: usize, const K: usize>(
    numbers: &[MaybeUninit<[V; N]>; GROUPS],
    group: usize,
    first: usize,
) -> [V; K] {
    // SAFETY: the caller's.
    unsafe { numbers.as_ptr().cast::<V>().add(group * N + first).cast::<[V; K]>().read() }
}
