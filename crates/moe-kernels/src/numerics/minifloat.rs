//! What the floating-point formats of at most 8 bits have in common: sign, exponent, mantissa.
//!
//! The arithmetic on bits never overflows; it is written with wrapping operations because checks
//! would keep the compiler from vectorising it where they are on.

/// A format with a sign bit, `exponent` bits and `mantissa` bits, whose magnitudes count up with
/// their codes: subnormals first, no gap up to `max_code`.
#[derive(Clone, Copy)]
pub(super) struct Minifloat {
    pub(super) exponent: u32,
    pub(super) mantissa: u32,
    /// Code of the largest finite magnitude.
    pub(super) max_code: u8,
    /// Code that NaN is encoded as.
    pub(super) nan: u8,
}

impl Minifloat {
    #[inline(always)]
    const fn bias(self) -> u32 {
        (1 << (self.exponent - 1)) - 1
    }

    /// 2 to the power of `exponent`, which is that of a normal f32.
    #[inline(always)]
    const fn power_of_two(exponent: i32) -> f32 {
        f32::from_bits(((exponent + 127) as u32) << 23)
    }

    /// Distance of neighbouring subnormals: the smallest positive value.
    #[inline(always)]
    const fn step(self) -> f32 {
        Self::power_of_two(1 - self.bias() as i32 - self.mantissa as i32)
    }

    /// Value of a finite `code`.
    #[inline(always)]
    pub(super) const fn finite(self, code: u8) -> f32 {
        let (exponent, mantissa) = (self.exponent, self.mantissa);
        let sign = (code as u32 >> (exponent + mantissa)) << 31;
        let fraction = code as u32 & ((1 << mantissa) - 1);
        let biased = (code as u32 >> mantissa) & ((1 << exponent) - 1);
        let magnitude = if biased == 0 {
            fraction as f32 * self.step()
        } else {
            f32::from_bits((biased + 127 - self.bias()) << 23 | fraction << (23 - mantissa))
        };
        f32::from_bits(magnitude.to_bits() | sign)
    }

    /// Nearest code, ties to even, saturating.
    #[inline(always)]
    pub(super) fn encode(self, x: f32) -> u8 {
        let sign = ((x.to_bits() >> 31) << (self.exponent + self.mantissa)) as u8;
        let magnitude = x.abs();
        if magnitude.is_nan() {
            return self.nan | sign;
        }
        let smallest_normal = Self::power_of_two(1 - self.bias() as i32);
        let code = if magnitude < smallest_normal {
            // Adding 2^23 steps leaves no bits below one step: the sum's own rounding, to nearest
            // and ties to even, does the work, and its low bits count the steps.
            let anchor = self.step() * (1 << 23) as f32;
            (magnitude + anchor).to_bits().wrapping_sub(anchor.to_bits())
        } else {
            // Drop the mantissa bits that the format lacks; a carry runs into the exponent.
            let drop = 23 - self.mantissa;
            let bits = magnitude.to_bits();
            let carried = bits.wrapping_add((1 << (drop - 1)) - 1).wrapping_add(bits >> drop & 1);
            (carried >> drop).wrapping_sub((127 - self.bias()) << self.mantissa)
        };
        code.min(self.max_code as u32) as u8 | sign
    }

    /// Nearest value: what [`Self::encode`] and a decode give, without the detour. NaN stays NaN.
    #[inline(always)]
    pub(super) fn round(self, x: f32) -> f32 {
        let magnitude = x.abs();
        let anchor = self.step() * (1 << 23) as f32;
        let subnormal = (magnitude + anchor) - anchor;
        let drop = 23 - self.mantissa;
        let bits = magnitude.to_bits();
        let carried = bits.wrapping_add((1 << (drop - 1)) - 1).wrapping_add(bits >> drop & 1);
        let normal = f32::from_bits(carried & !((1 << drop) - 1));
        let smallest_normal = Self::power_of_two(1 - self.bias() as i32);
        let rounded = if magnitude < smallest_normal { subnormal } else { normal };
        let max = self.finite(self.max_code);
        let bounded = if magnitude >= max { max } else { rounded };
        if x.is_nan() { x } else { bounded.copysign(x) }
    }
}
