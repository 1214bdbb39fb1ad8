//! The numbers in a block's header, scales and minima or zero points, as f32.
//!
//! A block's are read before its codes are multiplied, by one function of the set of features. In each tile it
//! would be eight ways to read numbers, over and over: more code than the products are.

use std::mem::MaybeUninit;

use super::simd::{Kind, Simd, ahead};
use crate::pack::{BLOCK, Layout, Number, Offset, PANEL};

/// Most groups of a block.
const GROUPS: usize = BLOCK / 16;

/// Reads numbers of a header, group after group, for [`Simd::numbers`].
///
/// # Safety
/// As [`Simd`]; the header has them, and there is room.
#[inline(always)]
pub(super) unsafe fn read<S: Simd>(kind: &Kind, to: *mut S::V) {
    let Kind { at, stride, groups, first, panels, outer, .. } = *kind;
    macro_rules! each {
        ($read:ident, $size:literal) => {
            for q in 0..panels {
                let row = first + q * PANEL;
                // SAFETY: the caller's.
                unsafe {
                    let by = outer.map(|outer| outer.add(row * 2));
                    for group in 0..groups {
                        let number = S::$read(at.add(group * stride + row * $size));
                        to.add(group * panels + q).write(match by {
                            Some(by) => S::mul(number, S::f16(by)),
                            None => number,
                        });
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

    /// Begins a block: asks for what lies ahead of its header, [reads](Self::read) it, and returns where the
    /// codes are.
    ///
    /// # Safety
    /// As [`read`](Self::read).
    #[inline(always)]
    pub(super) unsafe fn begin<const W: usize>(
        &mut self,
        at: *const u8,
        steps: usize,
        first: usize,
    ) -> *const u8 {
        let bytes = W * PANEL * self.layout.header_bytes(steps);
        // SAFETY: the caller's.
        unsafe {
            ahead::<S>(at, bytes);
            self.read::<W>(at, steps, first);
            at.add(bytes)
        }
    }

    /// Reads the numbers of a block of so many steps, of a unit of `W` panels: those of the panels from `first`
    /// on.
    ///
    /// # Safety
    /// As [`Simd`]; the block's header is at `at`.
    #[inline(always)]
    pub(super) unsafe fn read<const W: usize>(
        &mut self,
        at: *const u8,
        steps: usize,
        first: usize,
    ) {
        let (layout, rows) = (self.layout, W * PANEL);
        let (groups, stride) = (layout.groups(steps), rows * layout.group_bytes());
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

    /// The scales of a group, if the format has any: `N` vectors.
    #[inline(always)]
    pub(super) fn scales(&self, group: usize) -> Option<*const S::V> {
        match self.layout.scale {
            Some(_) => Some(of_group(&self.scales, group)),
            None => None,
        }
    }

    /// Likewise the minima.
    #[inline(always)]
    pub(super) fn minima(&self, group: usize) -> Option<*const S::V> {
        match self.layout.offset {
            Offset::Minimum(_) => Some(of_group(&self.offsets, group)),
            Offset::None | Offset::Zero(_) => None,
        }
    }

    /// Likewise the zero points.
    #[inline(always)]
    pub(super) fn zeros(&self, group: usize) -> Option<*const S::V> {
        match self.layout.offset {
            Offset::Zero(_) => Some(of_group(&self.offsets, group)),
            Offset::None | Offset::Minimum(_) => None,
        }
    }

    /// What sums of integers of a group end with, of the `q`-th panel: a scale and a minimum; what the format
    /// lacks does nothing.
    ///
    /// # Safety
    /// As [`Simd`]; the block with the group was read, and `q < N`.
    #[inline(always)]
    pub(super) unsafe fn ends(&self, group: usize, q: usize) -> (S::V, S::V) {
        // SAFETY: the caller's.
        unsafe {
            let scale = match self.scales(group) {
                Some(scale) => scale.add(q).read(),
                None => S::splat(1.0),
            };
            let minimum = match self.minima(group) {
                Some(minimum) => minimum.add(q).read(),
                None => S::splat(0.0),
            };
            (scale, minimum)
        }
    }
}

#[inline(always)]
fn of_group<V, const N: usize>(numbers: &[MaybeUninit<[V; N]>; GROUPS], group: usize) -> *const V {
    numbers.as_ptr().wrapping_add(group).cast()
}
