//! Plain Rust: eight lanes, which the compiler maps to whatever vectors the target has.

use std::array::from_fn;

use super::activation;
use super::lanes::Lanes;
use super::probe::{self, Probes};
use crate::activation::Activation;

pub(super) const PROBES: Probes = Probes { read, multiply_add };

pub(super) unsafe fn activate(kind: Activation, gate: &mut [f32], up: Option<&[f32]>) {
    // SAFETY: as above.
    unsafe { activation::activate::<Portable>(kind, gate, up) }
}

unsafe fn read(data: &[f32]) -> f32 {
    // SAFETY: as above.
    unsafe { probe::read::<Portable>(data) }
}

unsafe fn multiply_add(rounds: usize) -> u64 {
    // SAFETY: as above.
    unsafe { probe::multiply_add::<Portable, 6>(rounds) }
}

struct Portable;

const COUNT: usize = 8;

impl Lanes for Portable {
    type V = [f32; COUNT];
    const COUNT: usize = COUNT;

    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; COUNT] {
        [value; COUNT]
    }

    #[inline(always)]
    unsafe fn load_f32(from: *const u8) -> [f32; COUNT] {
        // SAFETY: readable for as many bytes, by the contract of `Lanes`.
        let bits: [u32; COUNT] = unsafe { from.cast::<[u32; COUNT]>().read_unaligned() };
        bits.map(|bits| f32::from_bits(u32::from_le(bits)))
    }

    #[inline(always)]
    unsafe fn store(v: [f32; COUNT], to: *mut f32) {
        // SAFETY: writable for as many elements, by the contract of `Lanes`.
        unsafe { to.cast::<[f32; COUNT]>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn add(a: [f32; COUNT], b: [f32; COUNT]) -> [f32; COUNT] {
        from_fn(|l| a[l] + b[l])
    }

    #[inline(always)]
    unsafe fn sub(a: [f32; COUNT], b: [f32; COUNT]) -> [f32; COUNT] {
        from_fn(|l| a[l] - b[l])
    }

    #[inline(always)]
    unsafe fn mul(a: [f32; COUNT], b: [f32; COUNT]) -> [f32; COUNT] {
        from_fn(|l| a[l] * b[l])
    }

    #[inline(always)]
    unsafe fn div(a: [f32; COUNT], b: [f32; COUNT]) -> [f32; COUNT] {
        from_fn(|l| a[l] / b[l])
    }

    #[inline(always)]
    unsafe fn at_least(v: [f32; COUNT], bound: [f32; COUNT]) -> [f32; COUNT] {
        from_fn(|l| if v[l] < bound[l] { bound[l] } else { v[l] })
    }

    #[inline(always)]
    unsafe fn at_most(v: [f32; COUNT], bound: [f32; COUNT]) -> [f32; COUNT] {
        from_fn(|l| if v[l] > bound[l] { bound[l] } else { v[l] })
    }

    #[inline(always)]
    unsafe fn select_less(
        a: [f32; COUNT],
        b: [f32; COUNT],
        yes: [f32; COUNT],
        no: [f32; COUNT],
    ) -> [f32; COUNT] {
        from_fn(|l| if a[l] < b[l] { yes[l] } else { no[l] })
    }

    #[inline(always)]
    unsafe fn pow2(n: [f32; COUNT]) -> [f32; COUNT] {
        n.map(|n| f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23))
    }

    #[inline(always)]
    unsafe fn mul_error(a: [f32; COUNT], b: [f32; COUNT], product: [f32; COUNT]) -> [f32; COUNT] {
        // Exact: a product of two f32 has at most 48 digits.
        from_fn(|l| (f64::from(a[l]) * f64::from(b[l]) - f64::from(product[l])) as f32)
    }

    /// Rounded once where every CPU of the target can, twice where one may lack the instruction.
    #[inline(always)]
    unsafe fn mul_add(a: [f32; COUNT], b: [f32; COUNT], c: [f32; COUNT]) -> [f32; COUNT] {
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            from_fn(|l| a[l].mul_add(b[l], c[l]))
        } else {
            from_fn(|l| a[l] * b[l] + c[l])
        }
    }

    #[inline(always)]
    unsafe fn sums(vectors: [[f32; COUNT]; 4]) -> [f32; 4] {
        vectors.map(|v| {
            let half = [v[0] + v[4], v[1] + v[5], v[2] + v[6], v[3] + v[7]];
            (half[0] + half[2]) + (half[1] + half[3])
        })
    }

    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}
}
