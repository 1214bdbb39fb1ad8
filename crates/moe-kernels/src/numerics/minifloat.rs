//! The floating-point formats of at most 8 bits: a table of them, and what they have in common:
//! sign, exponent, mantissa.
//!
//! The arithmetic on bits never overflows; it is written with wrapping operations because checks
//! would keep the compiler from vectorising it where they are on.

use super::vectorised::for_each_isa;
use super::{int4, packed6};
use crate::isa::Cpu;

/// A format with a sign bit, `exponent` bits and `mantissa` bits, whose magnitudes count up with
/// their codes: subnormals first, no gap up to `max_code`.
#[derive(Clone, Copy)]
struct Minifloat {
    exponent: u32,
    mantissa: u32,
    /// Code of the largest finite magnitude.
    max_code: u8,
    /// Code of infinity, if there is one. Other magnitudes beyond `max_code` are NaN.
    infinity: Option<u8>,
    /// Code that NaN is encoded as.
    nan: u8,
}

/// The module of a format: the functions of single numbers, and then those of rows, whose codes lie
/// one to a byte, in nibbles, or four in three bytes.
macro_rules! minifloat {
    (
        $(#[$doc:meta])*
        $name:ident: $exponent:literal, $mantissa:literal, $max_code:literal, $infinity:expr, $nan:literal;
        $codes:literal codes in $rows:ident
        $(#[$of_nan:meta])*
    ) => {
        $(#[$doc])*
        pub mod $name {
            use super::*;

            const FORMAT: Minifloat = Minifloat {
                exponent: $exponent,
                mantissa: $mantissa,
                max_code: $max_code,
                infinity: $infinity,
                nan: $nan,
            };

            /// Largest finite value.
            pub const MAX: f32 = FORMAT.value($max_code);

            /// Values of all codes.
            pub static VALUES: [f32; $codes] = {
                let mut values = [0.0; $codes];
                let mut code = 0;
                while code < $codes {
                    values[code] = FORMAT.value(code as u8);
                    code += 1;
                }
                values
            };

            /// Value of `code`, whose bits beyond the format's are ignored.
            #[inline]
            pub fn decode(code: u8) -> f32 {
                VALUES[usize::from(code) % $codes]
            }

            /// Nearest code, ties to even, saturating at ±[`MAX`], infinities too.
            $(#[$of_nan])*
            #[inline]
            pub fn encode(x: f32) -> u8 {
                FORMAT.encode(x)
            }

            /// `decode(encode(x))`, but NaN stays NaN.
            #[inline]
            pub fn round(x: f32) -> f32 {
                FORMAT.round(x)
            }

            minifloat!($rows);
        }
    };
    (bytes) => {
        /// Values of `codes`.
        ///
        /// # Panics
        /// If the lengths differ.
        pub fn decode_slice(codes: &[u8], out: &mut [f32]) {
            decode_on(Cpu::detect(), codes, out);
        }

        for_each_isa! {
            fn decode_on(cpu: Cpu, codes: &[u8], out: &mut [f32]) {
                assert_eq!(codes.len(), out.len());
                for (out, &code) in out.iter_mut().zip(codes) {
                    *out = FORMAT.value(code);
                }
            }
        }

        /// Codes of `values`, as [`encode`] gives them.
        ///
        /// # Panics
        /// If the lengths differ.
        pub fn encode_slice(values: &[f32], out: &mut [u8]) {
            encode_on(Cpu::detect(), values, out);
        }

        for_each_isa! {
            fn encode_on(cpu: Cpu, values: &[f32], out: &mut [u8]) {
                assert_eq!(values.len(), out.len());
                for (out, &x) in out.iter_mut().zip(values) {
                    *out = FORMAT.encode(x);
                }
            }
        }

        /// On every set of features what the single functions say.
        #[cfg(test)]
        #[test]
        fn slices() {
            let codes: Vec<u8> = (0..=255).collect();
            for cpu in Cpu::levels() {
                let mut values = vec![0.0; 256];
                decode_on(cpu, &codes, &mut values);
                let single = codes.iter().map(|code| decode(*code));
                assert!(values.iter().zip(single).all(|(a, b)| a.to_bits() == b.to_bits()), "{cpu:?}");
                let values: Vec<f32> = (0..4000).map(|i| (i as f32 - 2000.0) * 0.3).collect();
                let mut codes = vec![0; values.len()];
                encode_on(cpu, &values, &mut codes);
                assert!(codes.iter().zip(&values).all(|(code, x)| *code == encode(*x)), "{cpu:?}");
            }
        }
    };
    (nibbles) => {
        /// Values of both nibbles of a byte, low one first.
        static PAIRS: [[f32; 2]; 256] = {
            let mut pairs = [[0.0; 2]; 256];
            let mut byte = 0;
            while byte < 256 {
                pairs[byte] = [VALUES[byte & 15], VALUES[byte >> 4]];
                byte += 1;
            }
            pairs
        };

        /// Values `start..start + out.len()` of a packed row.
        ///
        /// # Panics
        /// If the row is shorter.
        pub fn decode_packed(row: &[u8], start: usize, out: &mut [f32]) {
            int4::decode_pairs(row, start, out, &PAIRS);
        }

        /// Packs `values`, as [`encode`] gives them, two to a byte; the last high nibble of an odd
        /// number of values is zero.
        ///
        /// # Panics
        /// If `out` is not `values.len().div_ceil(2)` bytes long.
        pub fn encode_packed(values: &[f32], out: &mut [u8]) {
            int4::pack_nibbles(values, out, |&x| encode(x));
        }
    };
    (sixes) => {
        /// Values `start..start + out.len()` of a packed row.
        ///
        /// # Panics
        /// If the row is shorter.
        pub fn decode_packed(row: &[u8], start: usize, out: &mut [f32]) {
            packed6::unpack(row, start, out, decode);
        }

        /// Packs `values`, as [`encode`] gives them, four to three bytes; missing codes of the last
        /// three bytes are zero.
        ///
        /// # Panics
        /// If `out` is not `values.len().div_ceil(4) * 3` bytes long.
        pub fn encode_packed(values: &[f32], out: &mut [u8]) {
            packed6::pack(values, out, encode);
        }
    };
}

minifloat! {
    /// FP4 E2M1, the elements of NVFP4 and MXFP4: magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6, bit 3 is the
    /// sign, neither infinities nor NaN. Two codes lie in a byte, the one with the even index in the
    /// low nibble.
    e2m1: 2, 1, 7, None, 7; 16 codes in nibbles
    /// The format has no NaN: NaN becomes ±[`MAX`], so callers that may meet one look for it first.
}

minifloat! {
    /// FP6 E2M3: 2 exponent bits, 3 mantissa bits, largest value 7.5, neither infinities nor NaN. Four
    /// codes lie in three bytes: code `i` takes bits `6i..6i+6` of the little-endian 24-bit number.
    e2m3: 2, 3, 0x1F, None, 0x1F; 64 codes in sixes
    /// The format has no NaN: NaN becomes ±[`MAX`], so callers that may meet one look for it first.
}

minifloat! {
    /// FP6 E3M2: 3 exponent bits, 2 mantissa bits, largest value 28, neither infinities nor NaN. Four
    /// codes lie in three bytes: code `i` takes bits `6i..6i+6` of the little-endian 24-bit number.
    e3m2: 3, 2, 0x1F, None, 0x1F; 64 codes in sixes
    /// The format has no NaN: NaN becomes ±[`MAX`], so callers that may meet one look for it first.
}

minifloat! {
    /// FP8 E4M3, the finite variant ("fn") of checkpoints: 4 exponent bits with bias 7, 3 mantissa
    /// bits, largest value 448, no infinities, NaN at 0x7F and 0xFF.
    e4m3: 4, 3, 0x7E, None, 0x7F; 256 codes in bytes
    /// NaN becomes 0x7F or 0xFF.
}

minifloat! {
    /// FP8 E5M2: 5 exponent bits with bias 15, 2 mantissa bits, largest finite value 57344, infinities
    /// at 0x7C and 0xFC, NaN above them. It is the upper half of an f16.
    e5m2: 5, 2, 0x7B, Some(0x7C), 0x7F; 256 codes in bytes
    /// NaN becomes 0x7F or 0xFF.
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

    /// Value of `code`: arithmetic without branches, so that loops of it become vectors.
    #[inline(always)]
    const fn value(self, code: u8) -> f32 {
        let bits = self.exponent + self.mantissa;
        let magnitude = code as u32 & ((1 << bits) - 1);
        let sign = (code as u32 >> bits & 1) << 31;
        // exponent and mantissa of a normal number in their places of an f32, the biases adjusted
        let normal = (magnitude << (23 - self.mantissa)) + ((127 - self.bias()) << 23);
        let subnormal = (magnitude as f32 * self.step()).to_bits();
        let finite = if magnitude < 1 << self.mantissa { subnormal } else { normal };
        let beyond = match self.infinity {
            Some(code) if magnitude == code as u32 => f32::INFINITY,
            _ => f32::NAN,
        };
        let bits = if magnitude > self.max_code as u32 { beyond.to_bits() } else { finite };
        f32::from_bits(bits | sign)
    }

    /// Nearest code, ties to even, saturating.
    #[inline(always)]
    fn encode(self, x: f32) -> u8 {
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
    fn round(self, x: f32) -> f32 {
        let magnitude = x.abs();
        let anchor = self.step() * (1 << 23) as f32;
        let subnormal = (magnitude + anchor) - anchor;
        let drop = 23 - self.mantissa;
        let bits = magnitude.to_bits();
        let carried = bits.wrapping_add((1 << (drop - 1)) - 1).wrapping_add(bits >> drop & 1);
        let normal = f32::from_bits(carried & !((1 << drop) - 1));
        let smallest_normal = Self::power_of_two(1 - self.bias() as i32);
        let rounded = if magnitude < smallest_normal { subnormal } else { normal };
        let max = self.value(self.max_code);
        let bounded = if magnitude >= max { max } else { rounded };
        if x.is_nan() { x } else { bounded.copysign(x) }
    }
}
