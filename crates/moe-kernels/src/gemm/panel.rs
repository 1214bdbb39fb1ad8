//! How the lines of a panel become numbers: for each kind of [`Codes`], a few lines.
//!
//! Here they become f32, for multiply-adds of one k at a time; [`pairs`](super::pairs) has others.

use super::simd::{MAGIC, Simd};
use crate::pack::{Codes, position};

/// A kind of codes. A panel's first item of a step is at `at`, the next ones `W` items apart, for a
/// unit of `W` panels; an octet is eight of the step's 32 k.
///
/// # Safety
/// As [`Simd`]; `at` is readable for the panel's items of the step, `octet < 4`, `j < 8`.
pub(super) trait Panel<S: Simd> {
    const CODES: Codes;
    /// Bytes of an item.
    const ITEM: usize;
    /// k that are multiplied at a time: those of a word of a token row.
    const K: usize;
    /// Whether token rows may be codes with scales.
    const CODED: bool = false;
    /// Whether sums are integers, which begin and end as the panel says.
    const INTEGERS: bool = false;
    /// What stays in registers.
    type Constants: Copy;
    /// What is loaded once for an octet.
    type Octet: Copy;
    /// Zero points of sixteen rows.
    type Zero: Copy;
    /// Weights of sixteen rows.
    type Value: Copy;

    unsafe fn constants(table: &[f32; 64]) -> Self::Constants;

    unsafe fn octet<const W: usize>(at: *const u8, octet: usize) -> Self::Octet;

    /// What is added to codes, as the header has it.
    unsafe fn zero(numbers: S::V) -> Self::Zero;

    /// The `j`-th `K` k of the octet, of all sixteen rows. `j` is a literal once everything is
    /// inlined.
    unsafe fn value<const W: usize>(
        constants: &Self::Constants,
        octet: &Self::Octet,
        j: usize,
        zero: Option<&Self::Zero>,
    ) -> Self::Value;

    /// `value · x + sum`, for a word of a token row in all lanes.
    unsafe fn product(value: Self::Value, x: S::V, sum: S::V) -> S::V;

    /// What a group's sum begins with; `x` is the token row's number of the group, if it has any.
    #[inline(always)]
    unsafe fn begin(_zero: Option<&Self::Zero>, _x: *const f32) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::splat(0.0) }
    }

    /// A group's sum as a number.
    #[inline(always)]
    unsafe fn end(sum: S::V) -> S::V {
        sum
    }
}

/// What all panels of f32 have in common.
macro_rules! of_f32 {
    ($name:ident) => {
        const CODES: Codes = Codes::$name;
        const ITEM: usize = Codes::$name.item_bytes();
        const K: usize = 1;
        type Zero = S::V;
        type Value = S::V;

        #[inline(always)]
        unsafe fn zero(numbers: S::V) -> S::V {
            numbers
        }

        #[inline(always)]
        unsafe fn product(value: S::V, x: S::V, sum: S::V) -> S::V {
            // SAFETY: the caller's.
            unsafe { S::fma(value, x, sum) }
        }
    };
}

/// `value + zero`, where there is a zero.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn shifted<S: Simd>(value: S::V, zero: Option<&S::V>) -> S::V {
    match zero {
        // SAFETY: the caller's.
        Some(zero) => unsafe { S::add(value, *zero) },
        None => value,
    }
}

/// Codes of whole bytes: `$per` k to an item of `$bytes` bytes, `|item, j| number`.
macro_rules! bytes {
    ($name:ident, $per:literal in $bytes:literal, |$item:ident, $j:ident| $value:expr) => {
        pub(super) struct $name;

        impl<S: Simd> Panel<S> for $name {
            of_f32!($name);
            type Constants = ();
            type Octet = *const u8;

            #[inline(always)]
            unsafe fn constants(_: &[f32; 64]) {}

            #[inline(always)]
            unsafe fn octet<const W: usize>(at: *const u8, octet: usize) -> *const u8 {
                // SAFETY: the caller's.
                unsafe { at.add(octet * (8 / $per) * W * $bytes) }
            }

            #[inline(always)]
            unsafe fn value<const W: usize>(
                _: &(),
                octet: &*const u8,
                $j: usize,
                zero: Option<&S::V>,
            ) -> S::V {
                // SAFETY: the caller's.
                unsafe {
                    let $item = octet.add($j / $per * W * $bytes);
                    shifted::<S>($value, zero)
                }
            }
        }
    };
}

bytes!(F32, 1 in 64, |item, j| S::load(item));
bytes!(F16, 1 in 32, |item, j| S::f16(item));
bytes!(Bf16, 2 in 64, |item, j| {
    let pair = S::words(item);
    if j % 2 == 1 { S::high_bf16(pair) } else { S::low_bf16(pair) }
});
bytes!(Int8, 1 in 16, |item, j| S::int8(item));
bytes!(E4m3, 1 in 16, |item, j| S::e4m3(item));
bytes!(E5m2, 1 in 16, |item, j| S::e5m2(item));

/// Codes in planes of bits. `low` are the lines of the wider plane, `high` those of the other.
macro_rules! planes {
    (
        $name:ident, $Constants:ty, |$table:ident| $constants:expr,
        |$at:ident, $octet:ident| $load:expr => $Octet:ty,
        |$c:ident, $o:ident, $j:ident| $value:expr
    ) => {
        pub(super) struct $name;

        impl<S: Simd> Panel<S> for $name {
            of_f32!($name);
            type Constants = $Constants;
            type Octet = $Octet;

            #[inline(always)]
            unsafe fn constants($table: &[f32; 64]) -> Self::Constants {
                // SAFETY: the caller's.
                unsafe { $constants }
            }

            #[inline(always)]
            unsafe fn octet<const W: usize>($at: *const u8, $octet: usize) -> Self::Octet {
                // SAFETY: the caller's.
                unsafe { $load }
            }

            #[inline(always)]
            unsafe fn value<const W: usize>(
                $c: &Self::Constants,
                $o: &Self::Octet,
                $j: usize,
                zero: Option<&S::V>,
            ) -> S::V {
                // SAFETY: the caller's.
                unsafe { shifted::<S>($value, zero) }
            }
        }
    };
}

planes!(
    Table4, S::Table, |table| S::table(table),
    |at, octet| four::<S, W>(at, octet) => S::I,
    |table, codes, j| S::lookup16(*table, S::shr(*codes, 4 * position(j) as u32))
);
planes!(
    Table2, S::Table, |table| S::table(table),
    |at, octet| two::<S, W>(at, octet) => S::I,
    |table, codes, j| S::lookup16(*table, S::shr(*codes, 2 * position(j) as u32))
);
planes!(
    Table3, S::Table, |table| S::table(table),
    |at, octet| (two::<S, W>(at, octet), one::<S, W>(at.add(2 * W * 64), octet)) => (S::I, S::I),
    |table, codes, j| S::lookup16(*table, joined::<S, 2, 1>(codes, j))
);
planes!(
    Int5, S::V, |table| S::splat(MAGIC + table[0]),
    |at, octet| (four::<S, W>(at, octet), one::<S, W>(at.add(4 * W * 64), octet)) => (S::I, S::I),
    |bias, codes, j| S::integers(joined::<S, 4, 1>(codes, j), 31, *bias)
);
planes!(
    Int6, S::V, |table| S::splat(MAGIC + table[0]),
    |at, octet| (four::<S, W>(at, octet), two::<S, W>(at.add(4 * W * 64), octet)) => (S::I, S::I),
    |bias, codes, j| S::integers(joined::<S, 4, 2>(codes, j), 63, *bias)
);
planes!(
    Table6, [f32; 64], |table| copied(table),
    |at, octet| (four::<S, W>(at, octet), two::<S, W>(at.add(4 * W * 64), octet)) => (S::I, S::I),
    |table, codes, j| S::lookup64(table, joined::<S, 4, 2>(codes, j))
);

/// The numbers themselves, for a look-up in memory.
///
/// # Safety
/// None needed.
#[inline(always)]
unsafe fn copied(numbers: &[f32; 64]) -> [f32; 64] {
    *numbers
}

/// The line of an octet of 4-bit codes.
///
/// # Safety
/// As [`Panel`].
#[inline(always)]
pub(super) unsafe fn four<S: Simd, const W: usize>(at: *const u8, octet: usize) -> S::I {
    // SAFETY: the caller's.
    unsafe { S::words(at.add(octet * W * 64)) }
}

/// The words of an octet of 2-bit codes, in the low halves.
///
/// # Safety
/// As [`Panel`].
#[inline(always)]
pub(super) unsafe fn two<S: Simd, const W: usize>(at: *const u8, octet: usize) -> S::I {
    // SAFETY: the caller's.
    unsafe { S::shr(S::words(at.add(octet / 2 * W * 64)), octet as u32 % 2 * 16) }
}

/// The words of an octet of single bits, in the low bytes.
///
/// # Safety
/// As [`Panel`].
#[inline(always)]
pub(super) unsafe fn one<S: Simd, const W: usize>(at: *const u8, octet: usize) -> S::I {
    // SAFETY: the caller's.
    unsafe { S::shr(S::words(at), octet as u32 * 8) }
}

/// The codes of both planes, `LOW` bits and above them `HIGH` bits; anything above those.
///
/// # Safety
/// As [`Panel`].
#[inline(always)]
unsafe fn joined<S: Simd, const LOW: usize, const HIGH: usize>(
    planes: &(S::I, S::I),
    j: usize,
) -> S::I {
    let from = HIGH * position(j);
    // SAFETY: the caller's.
    unsafe {
        let low = S::shr(planes.0, (LOW * position(j)) as u32);
        let high = match from >= LOW {
            true => S::shr(planes.1, (from - LOW) as u32),
            false => S::shl(planes.1, (LOW - from) as u32),
        };
        S::blend((1 << LOW) - 1, low, high)
    }
}
