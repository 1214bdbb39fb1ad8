//! Packing and unpacking: nothing is lost, every window is the same as the whole.

use half::{bf16, f16};
use moe_kernels::numerics::{e2m1, e2m3, e3m2, float16, for_each_group, int4, int8};
use proptest::prelude::*;

/// A packed format: values to bytes, and a window of the bytes to values.
type Packed = (fn(&[f32], &mut [u8]), fn(&[u8], usize, &mut [f32]), fn(u8) -> f32, usize);

fn pack_int4(values: &[f32], out: &mut [u8]) {
    int4::pack(&values.iter().map(|&v| v as u8).collect::<Vec<_>>(), out);
}

/// With the bytes that `count` codes take.
fn formats(count: usize) -> [Packed; 4] {
    [
        (e2m1::encode_packed, e2m1::decode_packed, e2m1::decode, count.div_ceil(2)),
        (e2m3::encode_packed, e2m3::decode_packed, e2m3::decode, count.div_ceil(4) * 3),
        (e3m2::encode_packed, e3m2::decode_packed, e3m2::decode, count.div_ceil(4) * 3),
        (pack_int4, int4::decode_packed, |code| f32::from(code & 15), count.div_ceil(2)),
    ]
}

proptest! {
    #[test]
    fn packed_rows_lose_nothing(
        codes in prop::collection::vec(any::<u8>(), 0..70),
        start in 0usize..70,
        end in 0usize..70,
    ) {
        let (start, end) = (start.min(end).min(codes.len()), end.min(codes.len()));
        for (encode, decode, value, bytes) in formats(codes.len()) {
            let values: Vec<f32> = codes.iter().map(|&code| value(code)).collect();
            let mut packed = vec![0xFF; bytes];
            encode(&values, &mut packed);
            let mut window = vec![f32::NAN; end - start];
            decode(&packed, start, &mut window);
            for (got, expected) in window.iter().zip(&values[start..end]) {
                prop_assert_eq!(got.to_bits(), expected.to_bits());
            }
        }
    }

    #[test]
    fn gptq_and_awq_are_rows_in_another_order(
        (n, k, rows) in (1usize..5, 1usize..5).prop_flat_map(|(n, k)| {
            let bytes = prop::collection::vec(any::<u8>(), n * 8 * k * 8 / 2);
            (Just(n * 8), Just(k * 8), bytes)
        })
    ) {
        let mut gptq = vec![0; rows.len()];
        let mut awq = vec![0; rows.len()];
        int4::rows_to_gptq(&rows, n, k, &mut gptq);
        int4::rows_to_awq(&rows, n, k, &mut awq);
        for row in 0..n {
            for col in 0..k {
                let code = int4::nibble(&rows, row * k + col);
                prop_assert_eq!(int4::gptq_nibble(&gptq, n, row, col), code);
                prop_assert_eq!(int4::awq_nibble(&awq, n, row, col), code);
            }
        }
        let mut back = vec![0; rows.len()];
        int4::gptq_to_rows(&gptq, n, k, &mut back);
        prop_assert_eq!(&back, &rows);
        back.fill(0);
        int4::awq_to_rows(&awq, n, k, &mut back);
        prop_assert_eq!(&back, &rows);

        let (k, mut words) = (k / 2, vec![0; rows.len()]);
        int8::rows_to_gptq(&rows, n, k, &mut words);
        for row in 0..n {
            for col in 0..k {
                let word = (col / 4 * n + row) * 4;
                let word = u32::from_le_bytes(words[word..word + 4].try_into().unwrap());
                prop_assert_eq!((word >> (8 * (col % 4))) as u8, rows[row * k + col]);
            }
        }
        int8::gptq_to_rows(&words, n, k, &mut back);
        prop_assert_eq!(&back, &rows);
    }

    #[test]
    fn groups_cover_a_window_once(start in 0usize..50, len in 0usize..50, size in 1usize..20) {
        let mut window: Vec<f32> = (start..start + len).map(|i| i as f32).collect();
        let mut next = start;
        for_each_group(&mut window, start, size, |group, values| {
            assert!(!values.is_empty());
            for value in values {
                assert_eq!((*value, group), (next as f32, next / size));
                next += 1;
            }
        });
        prop_assert_eq!(next, start + len);
    }

    #[test]
    fn float16_is_bit_equal_to_half(bits in prop::collection::vec(any::<u32>(), 0..100)) {
        let values: Vec<f32> = bits.iter().map(|&bits| f32::from_bits(bits)).collect();
        let mut narrow = vec![bf16::ZERO; values.len()];
        float16::f32_to_bf16(&values, &mut narrow);
        let mut half = vec![f16::ZERO; values.len()];
        float16::f32_to_f16(&values, &mut half);
        let mut bytes = vec![0; 2 * values.len()];
        float16::f32_to_bf16_bytes(&values, &mut bytes);
        let typed: Vec<u8> = narrow.iter().flat_map(|v| v.to_le_bytes()).collect();
        prop_assert_eq!(&bytes, &typed);
        float16::f32_to_f16_bytes(&values, &mut bytes);
        let typed: Vec<u8> = half.iter().flat_map(|v| v.to_le_bytes()).collect();
        prop_assert_eq!(&bytes, &typed);
        for ((x, bf), h) in values.iter().zip(narrow).zip(half) {
            prop_assert_eq!(bf.to_bits(), bf16::from_f32(*x).to_bits(), "bf16 of {:e}", x);
            prop_assert_eq!(h.to_bits(), f16::from_f32_const(*x).to_bits(), "f16 of {:e}", x);
        }
    }
}

#[test]
fn ties_of_bf16_go_to_even() {
    let bits = (0..=u16::MAX).flat_map(|high| {
        [0x7FFF, 0x8000, 0x8001].map(|low| f32::from_bits(u32::from(high) << 16 | low))
    });
    let values: Vec<f32> = bits.collect();
    let mut narrow = vec![bf16::ZERO; values.len()];
    float16::f32_to_bf16(&values, &mut narrow);
    for (x, narrow) in values.iter().zip(narrow) {
        assert_eq!(narrow.to_bits(), bf16::from_f32(*x).to_bits(), "{x:e}");
    }
}

#[test]
fn words_of_a_published_layout() {
    // compressed-tensors: `(word >> 4 * (k % 8)) & 15`.
    let word = 0x8765_4321u32.to_le_bytes();
    let mut values = [0.0; 8];
    int4::decode_packed(&word, 0, &mut values);
    assert_eq!(values, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    // AWQ: column n in nibble [0, 4, 1, 5, 2, 6, 3, 7][n].
    let columns: Vec<u8> = (0..8).map(|n| int4::awq_nibble(&word, 8, n, 0)).collect();
    assert_eq!(columns, [1, 5, 2, 6, 3, 7, 4, 8]);
    for (i, nibble) in int4::AWQ_NIBBLE.into_iter().enumerate() {
        assert_eq!(int4::AWQ_COLUMN[nibble], i);
    }
    // FP6: four codes, least significant first, in three bytes.
    let bytes = (1u32 | 2 << 6 | 3 << 12 | 0x3F << 18).to_le_bytes();
    let mut values = [0.0; 4];
    e2m3::decode_packed(&bytes[..3], 0, &mut values);
    assert_eq!(values, [0.125, 0.25, 0.375, -7.5]);
}

#[test]
fn all_16_bit_floats_widen_exactly() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let bytes: Vec<u8> = all.iter().flat_map(|bits| bits.to_le_bytes()).collect();
    let bf16s: Vec<bf16> = all.iter().map(|&bits| bf16::from_bits(bits)).collect();
    let f16s: Vec<f16> = all.iter().map(|&bits| f16::from_bits(bits)).collect();
    let (mut typed, mut raw) = (vec![0.0; all.len()], vec![0.0; all.len()]);

    // `half` makes NaN quiet when it widens bf16; a shift keeps it as it is.
    float16::bf16_to_f32(&bf16s, &mut typed);
    float16::bf16_bytes_to_f32(&bytes, &mut raw);
    for ((x, typed), raw) in bf16s.iter().zip(&typed).zip(&raw) {
        assert_eq!(typed.to_bits(), raw.to_bits());
        assert!(typed.to_bits() == x.to_f32().to_bits() || x.is_nan() && typed.is_nan());
    }

    float16::f16_to_f32(&f16s, &mut typed);
    float16::f16_bytes_to_f32(&bytes, &mut raw);
    for ((x, typed), raw) in f16s.iter().zip(&typed).zip(&raw) {
        assert_eq!(typed.to_bits(), raw.to_bits());
        assert_eq!(typed.to_bits(), x.to_f32_const().to_bits());
    }
}

#[test]
fn int8_rounds_to_even_and_saturates() {
    let cases = [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (126.5, 126), (127.5, 127)];
    for (x, code) in cases {
        assert_eq!(int8::encode(x), code, "{x}");
    }
    assert_eq!((int8::encode(1e9), int8::encode(f32::NEG_INFINITY)), (127, -128));
    assert_eq!(int8::encode(f32::NAN), 0);
    let (mut signed, mut bytes, mut unsigned) = ([0.0; 256], [0.0; 256], [0.0; 256]);
    let codes: Vec<u8> = (0..=255).collect();
    int8::decode_slice(&codes.iter().map(|&c| c as i8).collect::<Vec<_>>(), &mut signed);
    int8::decode_bytes(&codes, &mut bytes);
    int8::decode_unsigned(&codes, &mut unsigned);
    for code in 0..256usize {
        let value = if code < 128 { code as f32 } else { code as f32 - 256.0 };
        assert_eq!((signed[code], bytes[code], unsigned[code]), (value, value, code as f32));
    }
}
