//! Plain Rust, which the compiler turns into whatever vectors the target has.

use std::array::from_fn;

use half::{bf16, f16};

use super::header;
use super::panel::Panel;
use super::simd::{Kind, Simd};
use super::tile::{Args, Chain, Shape, shapes};
use crate::numerics::{e4m3, e5m2, e8m0};

pub(super) const fn of<P: Panel<Portable>>() -> &'static [Shape] {
    const { &shapes!(tile::<P>: (4, 1 of 4), (1, 1 of 4), (1, 1 of 1)) }
}

unsafe fn tile<P: Panel<Portable>, const M: usize, const N: usize, const W: usize>(
    args: &Args<'_>,
) {
    // SAFETY: the caller's; no features are needed.
    unsafe { super::tile::tile::<Portable, P, Chain, M, N, W>(args) }
}

/// For [`Simd::numbers`].
#[inline(never)]
unsafe fn numbers(kind: &Kind, to: *mut <Portable as Simd>::V) {
    // SAFETY: the caller's; no features are needed.
    unsafe { header::read::<Portable>(kind, to) }
}

pub(super) struct Portable;

type V = [f32; 16];
type I = [u32; 16];

/// `a · b + c`, for the few that need it: apart, or it would stand at every product.
#[cold]
#[inline(never)]
fn rounded_once(a: &V, b: &V, c: &V) -> V {
    from_fn(|l| a[l].mul_add(b[l], c[l]))
}

/// # Safety
/// Readable for sixteen elements.
#[inline(always)]
unsafe fn read<T>(at: *const u8) -> [T; 16] {
    // SAFETY: the caller's.
    unsafe { at.cast::<[T; 16]>().read_unaligned() }
}

// SAFETY of all blocks below: the pointers are good for sixteen elements, by the contract of `Simd`.
impl Simd for Portable {
    type V = V;
    type I = I;
    type Table = V;

    #[inline(always)]
    unsafe fn splat(value: f32) -> V {
        [value; 16]
    }

    #[inline(always)]
    unsafe fn load(at: *const u8) -> V {
        // SAFETY: see above.
        unsafe { read(at) }
    }

    #[inline(always)]
    unsafe fn store(v: V, at: *mut f32) {
        // SAFETY: see above.
        unsafe { at.cast::<V>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        from_fn(|l| a[l] + b[l])
    }

    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        from_fn(|l| a[l] * b[l])
    }

    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        from_fn(|l| a[l] / b[l])
    }

    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            return from_fn(|l| a[l].mul_add(b[l], c[l]));
        }
        // The product of two f32 is exact in f64, so that only the sum's two roundings may differ
        // from one: where f64 rounds to the middle of two f32, or f32 has fewer digits.
        let sum: [f64; 16] = from_fn(|l| f64::from(a[l]) * f64::from(b[l]) + f64::from(c[l]));
        let twice = sum.iter().fold(false, |twice, sum| {
            let middle = sum.to_bits() & 0x1FFF_FFFF == 0x1000_0000;
            let tiny = sum.abs() < f64::from(2.0 * f32::MIN_POSITIVE) && *sum != 0.0;
            twice | middle | tiny
        });
        match twice {
            false => sum.map(|sum| sum as f32),
            true => rounded_once(&a, &b, &c),
        }
    }

    #[inline(always)]
    unsafe fn f16(at: *const u8) -> V {
        // SAFETY: see above.
        unsafe { read::<u16>(at) }.map(|bits| f16::from_bits(bits).to_f32_const())
    }

    #[inline(always)]
    unsafe fn bf16(at: *const u8) -> V {
        // SAFETY: see above.
        unsafe { read::<u16>(at) }.map(|bits| bf16::from_bits(bits).to_f32_const())
    }

    #[inline(always)]
    unsafe fn int8(at: *const u8) -> V {
        // SAFETY: see above.
        unsafe { read::<i8>(at) }.map(f32::from)
    }

    #[inline(always)]
    unsafe fn low4(at: *const u8) -> V {
        // SAFETY: see above.
        unsafe { read::<u8>(at) }.map(|byte| f32::from(byte & 15))
    }

    #[inline(always)]
    unsafe fn high4(at: *const u8) -> V {
        // SAFETY: see above.
        unsafe { read::<u8>(at) }.map(|byte| f32::from(byte >> 4))
    }

    #[inline(always)]
    unsafe fn e4m3(at: *const u8) -> V {
        // SAFETY: see above.
        unsafe { read::<u8>(at) }.map(|code| e4m3::decode(code) / 256.0)
    }

    #[inline(always)]
    unsafe fn e5m2(at: *const u8) -> V {
        // SAFETY: see above.
        unsafe { read::<u8>(at) }.map(e5m2::decode)
    }

    #[inline(always)]
    unsafe fn e8m0(at: *const u8) -> V {
        // SAFETY: see above.
        unsafe { read::<u8>(at) }.map(e8m0::decode)
    }

    #[inline(always)]
    unsafe fn words(at: *const u8) -> I {
        // SAFETY: see above.
        unsafe { read(at) }
    }

    #[inline(always)]
    unsafe fn low_bf16(words: I) -> V {
        words.map(|word| f32::from_bits(word << 16))
    }

    #[inline(always)]
    unsafe fn high_bf16(words: I) -> V {
        words.map(|word| f32::from_bits(word & !0xFFFF))
    }

    #[inline(always)]
    unsafe fn shr(words: I, bits: u32) -> I {
        words.map(|word| word >> bits)
    }

    #[inline(always)]
    unsafe fn shl(words: I, bits: u32) -> I {
        words.map(|word| word << bits)
    }

    #[inline(always)]
    unsafe fn blend(mask: u32, a: I, b: I) -> I {
        from_fn(|l| a[l] & mask | b[l] & !mask)
    }

    #[inline(always)]
    unsafe fn integers(words: I, mask: u32, bias: V) -> V {
        from_fn(|l| (words[l] & mask) as f32 - (bias[l] - super::simd::MAGIC))
    }

    #[inline(always)]
    unsafe fn table(numbers: &[f32; 64]) -> V {
        from_fn(|i| numbers[i])
    }

    #[inline(always)]
    unsafe fn lookup16(table: V, words: I) -> V {
        words.map(|word| table[word as usize & 15])
    }

    #[inline(always)]
    unsafe fn lookup64(numbers: &[f32; 64], words: I) -> V {
        words.map(|word| numbers[word as usize & 63])
    }

    #[inline(always)]
    unsafe fn numbers(kind: &Kind, to: *mut Self::V) {
        // SAFETY: see above.
        unsafe { numbers(kind, to) }
    }

    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}
}
