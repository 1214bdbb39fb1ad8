//! The formats of at most 8 bits against their definition: sign, exponent and mantissa, in f64.

use moe_kernels::numerics::{e2m1, e2m3, e3m2, e4m3, e5m2, e8m0};

/// A format as its standard describes it, and the functions under test.
struct Format {
    name: &'static str,
    exponent: u32,
    mantissa: u32,
    bias: i32,
    /// First magnitude code that is not a finite number, if there is one.
    special: Option<u32>,
    decode: fn(u8) -> f32,
    encode: fn(f32) -> u8,
    round: fn(f32) -> f32,
}

const FORMATS: [Format; 5] = [
    Format {
        name: "e4m3",
        exponent: 4,
        mantissa: 3,
        bias: 7,
        special: Some(0x7F),
        decode: e4m3::decode,
        encode: e4m3::encode,
        round: e4m3::round,
    },
    Format {
        name: "e5m2",
        exponent: 5,
        mantissa: 2,
        bias: 15,
        special: Some(0x7C),
        decode: e5m2::decode,
        encode: e5m2::encode,
        round: e5m2::round,
    },
    Format {
        name: "e3m2",
        exponent: 3,
        mantissa: 2,
        bias: 3,
        special: None,
        decode: e3m2::decode,
        encode: e3m2::encode,
        round: e3m2::round,
    },
    Format {
        name: "e2m3",
        exponent: 2,
        mantissa: 3,
        bias: 1,
        special: None,
        decode: e2m3::decode,
        encode: e2m3::encode,
        round: e2m3::round,
    },
    Format {
        name: "e2m1",
        exponent: 2,
        mantissa: 1,
        bias: 1,
        special: None,
        decode: e2m1::decode,
        encode: e2m1::encode,
        round: e2m1::round,
    },
];

impl Format {
    fn sign_bit(&self) -> u32 {
        1 << (self.exponent + self.mantissa)
    }

    /// Codes of the finite magnitudes, from zero up.
    fn magnitudes(&self) -> std::ops::Range<u32> {
        0..self.special.unwrap_or(self.sign_bit())
    }

    /// Value of a finite code.
    fn value(&self, code: u32) -> f64 {
        let sign = if code & self.sign_bit() == 0 { 1.0 } else { -1.0 };
        let fraction = f64::from(code % (1 << self.mantissa)) / f64::from(1 << self.mantissa);
        let exponent = (code & (self.sign_bit() - 1)) >> self.mantissa;
        let magnitude = match exponent {
            0 => fraction * 2f64.powi(1 - self.bias),
            _ => (1.0 + fraction) * 2f64.powi(exponent as i32 - self.bias),
        };
        sign * magnitude
    }

    /// Checks encode and round of `x` and `−x`.
    fn assert_nearest(&self, x: f32, code: u32) {
        for (x, code) in [(x, code), (-x, code | self.sign_bit())] {
            let name = self.name;
            assert_eq!(u32::from((self.encode)(x)), code, "{name}::encode({x:e})");
            let value = self.value(code) as f32;
            assert_eq!((self.round)(x).to_bits(), value.to_bits(), "{name}::round({x:e})");
        }
    }
}

#[test]
fn every_finite_code_decodes_to_its_definition() {
    for format in FORMATS {
        for magnitude in format.magnitudes() {
            for code in [magnitude, magnitude | format.sign_bit()] {
                let value = (format.decode)(code as u8);
                let expected = format.value(code) as f32;
                assert_eq!(value.to_bits(), expected.to_bits(), "{} {code:#x}", format.name);
            }
        }
    }
}

#[test]
fn special_codes() {
    for sign in [0, 0x80] {
        assert!(e4m3::decode(0x7F | sign).is_nan());
        for code in 0x7D..=0x7F {
            assert!(e5m2::decode(code | sign).is_nan());
        }
    }
    assert_eq!(e5m2::decode(0x7C), f32::INFINITY);
    assert_eq!(e5m2::decode(0xFC), f32::NEG_INFINITY);
    let bounds = [e4m3::MAX, e5m2::MAX, e3m2::MAX, e2m3::MAX, e2m1::MAX];
    for (format, max) in FORMATS.iter().zip(bounds) {
        assert_eq!(f64::from(max), format.value(format.magnitudes().end - 1), "{}", format.name);
    }
}

#[test]
fn finite_codes_survive_decode_and_encode() {
    for format in FORMATS {
        for code in format.magnitudes() {
            format.assert_nearest(format.value(code) as f32, code);
        }
    }
}

#[test]
fn values_between_two_codes_go_to_the_nearer_one_and_ties_to_the_even_one() {
    for format in FORMATS {
        let codes = format.magnitudes();
        for (below, above) in codes.clone().zip(codes.skip(1)) {
            let middle = (format.value(below) + format.value(above)) / 2.0;
            let middle = middle as f32; // one more bit of mantissa: exact
            let even = if below % 2 == 0 { below } else { above };
            format.assert_nearest(middle, even);
            format.assert_nearest(middle.next_down(), below);
            format.assert_nearest(middle.next_up(), above);
            format.assert_nearest((format.value(below) as f32).next_up(), below);
            format.assert_nearest((format.value(above) as f32).next_down(), above);
        }
    }
}

#[test]
fn what_is_too_large_saturates() {
    for format in FORMATS {
        let last = format.magnitudes().end - 1;
        let max = format.value(last) as f32;
        for x in [max.next_up(), max * 1.03, max * 1.25, max * 2.0, 1e30, f32::MAX, f32::INFINITY] {
            format.assert_nearest(x, last);
        }
    }
}

#[test]
fn what_is_too_small_becomes_zero_with_its_sign() {
    for format in FORMATS {
        for x in [0.0, f32::from_bits(1), f32::MIN_POSITIVE, 1e-20] {
            format.assert_nearest(x, 0);
        }
    }
}

#[test]
fn nan_stays_nan_where_the_format_has_one() {
    for nan in [f32::NAN, -f32::NAN, f32::from_bits(0x7F80_0001), f32::from_bits(0xFFFF_FFFF)] {
        assert!(e4m3::decode(e4m3::encode(nan)).is_nan());
        assert!(e5m2::decode(e5m2::encode(nan)).is_nan());
        assert_eq!(e8m0::encode(nan), e8m0::NAN);
        assert_eq!(e8m0::encode_up(nan), e8m0::NAN);
        for format in FORMATS {
            assert!((format.round)(nan).is_nan(), "{}", format.name);
        }
    }
    for sign in [1.0, -1.0] {
        assert_eq!(e3m2::decode(e3m2::encode(f32::NAN.copysign(sign))), 28.0 * sign);
        assert_eq!(e2m3::decode(e2m3::encode(f32::NAN.copysign(sign))), 7.5 * sign);
        assert_eq!(e2m1::decode(e2m1::encode(f32::NAN.copysign(sign))), 6.0 * sign);
    }
}

#[test]
fn e2m1_thresholds_as_the_specification_lists_them() {
    let upper = [(0.25, 0.0), (1.25, 1.0), (2.5, 2.0), (5.0, 4.0)]; // up to and with
    let below = [(0.75, 0.5), (1.75, 1.5), (3.5, 3.0)]; // up to and without
    for (x, value) in upper {
        assert_eq!(e2m1::round(x), value);
        assert_ne!(e2m1::round(f32::next_up(x)), value);
    }
    for (x, value) in below {
        assert_eq!(e2m1::round(f32::next_down(x)), value);
        assert_ne!(e2m1::round(x), value);
    }
}

#[test]
fn e8m0_powers_of_two() {
    for code in 0..255u8 {
        let value = 2f64.powi(i32::from(code) - 127);
        assert_eq!(f64::from(e8m0::decode(code)), value);
        let x = value as f32;
        assert_eq!((e8m0::encode(x), e8m0::encode_up(x)), (code, code));
        assert_eq!(e8m0::from_exponent(i32::from(code) - 127), code);
        if code < 254 {
            assert_eq!(e8m0::encode_up(x.next_up()), code + 1);
            let even = code + code % 2;
            let middle = 1.5 * x;
            assert_eq!(e8m0::encode(middle), even, "middle above {code}");
            assert_eq!(e8m0::encode(middle.next_down()), code);
            assert_eq!(e8m0::encode(middle.next_up()), code + 1);
        }
    }
    assert!(e8m0::decode(e8m0::NAN).is_nan());
    for encode in [e8m0::encode, e8m0::encode_up] {
        assert_eq!(encode(f32::INFINITY), 254);
        assert_eq!(encode(f32::MAX), 254);
        for small in [0.0, -1.0, f32::from_bits(1), f32::NEG_INFINITY] {
            assert_eq!(encode(small), 0);
        }
    }
    assert_eq!((e8m0::from_exponent(-500), e8m0::from_exponent(500)), (0, 254));
}

#[test]
fn slices_agree_with_scalars() {
    let codes: Vec<u8> = (0..=255).collect();
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let mut values = [0.0; 256];
    e4m3::decode_slice(&codes, &mut values);
    assert_eq!(bits(&values), codes.iter().map(|&c| e4m3::decode(c).to_bits()).collect::<Vec<_>>());
    let mut back = [0; 256];
    e4m3::encode_slice(&values, &mut back);
    assert_eq!(back.to_vec(), codes); // NaN codes too
    e5m2::decode_slice(&codes, &mut values);
    assert_eq!(bits(&values), codes.iter().map(|&c| e5m2::decode(c).to_bits()).collect::<Vec<_>>());
    e5m2::encode_slice(&values, &mut back);
    assert_eq!(back.to_vec(), values.map(e5m2::encode));
    e8m0::decode_slice(&codes, &mut values);
    assert_eq!(bits(&values), codes.iter().map(|&c| e8m0::decode(c).to_bits()).collect::<Vec<_>>());
}
