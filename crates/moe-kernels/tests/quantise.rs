//! Quantisers against a model that searches all codes for the nearest value.

use moe_kernels::isa::Cpu;
use moe_kernels::numerics::quantise::weight::{self, ScaleType};
use moe_kernels::numerics::quantise::{Fp6, GroupScale, Mxfp8Rule, Nvfp4Rule, Qdq};
use moe_kernels::numerics::quantise::{fp8_row, int8_row};
use moe_kernels::numerics::{
    DecodeScale, EncodeScale, e2m1, e2m3, e3m2, e4m3, e8m0, for_each_group, int4,
};
use proptest::prelude::*;

/// [`Qdq::apply`] on every set of features that it is compiled for: the same bits.
fn apply(qdq: &Qdq, rows: &mut [f32], cols: usize) {
    let before = rows.to_vec();
    qdq.apply(Cpu::PORTABLE, rows, cols);
    for cpu in Cpu::levels() {
        let mut again = before.clone();
        qdq.apply(cpu, &mut again, cols);
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        assert!(again.iter().zip(&*rows).all(same), "{qdq:?} with {cpu:?}");
    }
}

/// The codes of a format by their values, from zero up.
fn magnitudes(decode: fn(u8) -> f32, count: u8) -> Vec<f32> {
    (0..count).map(decode).collect()
}

fn integers() -> Vec<f32> {
    (0..=128u8).map(f32::from).collect()
}

/// The element of `±magnitudes` nearest to `x`; between two, the one with the even index.
fn nearest(magnitudes: &[f32], x: f32) -> f32 {
    let distance = |i: usize| (f64::from(magnitudes[i]) - f64::from(x.abs())).abs();
    let mut best = 0;
    for i in 0..magnitudes.len() {
        let (d, least) = (distance(i), distance(best));
        if d < least || d == least && i % 2 == 0 {
            best = i;
        }
    }
    magnitudes[best].copysign(x)
}

fn e4m3_nearest(x: f32) -> f32 {
    nearest(&magnitudes(e4m3::decode, 127), x)
}

fn e2m1_nearest(x: f32) -> f32 {
    nearest(&magnitudes(e2m1::decode, 8), x)
}

fn int8_nearest(x: f32) -> f32 {
    nearest(&integers(), x).clamp(-128.0, 127.0)
}

fn max_of(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max, x| max.max(x.abs()))
}

/// 2^exponent of an MX block by the "even" rule.
fn even_scale(max: f32, mantissa: i32, largest: i32) -> f32 {
    let exponent = f64::from(max).log2().floor();
    let mantissa_of_max = f64::from(max) / exponent.exp2();
    let up = mantissa_of_max >= 2.0 - 2f64.powi(-mantissa - 1);
    let exponent = exponent as i32 + i32::from(up) - largest;
    2f64.powi(exponent.max(-127)) as f32
}

/// One group of values that share a scale, as the docs of `Qdq` say.
fn model(qdq: Qdq, group: &mut [f32]) {
    let max = max_of(group);
    let scaled = |s: f32, round: &dyn Fn(f32) -> f32, group: &mut [f32]| {
        group.iter_mut().for_each(|x| *x = round(*x / s) * s);
    };
    match qdq {
        Qdq::Fp8Static { scale } => scaled(scale, &e4m3_nearest, group),
        Qdq::Fp8Tensor => scaled(max / 448.0, &e4m3_nearest, group),
        Qdq::Fp8Token => scaled((max / 448.0).max(1.0 / (448.0 * 512.0)), &e4m3_nearest, group),
        Qdq::Fp8Group { scale, .. } => {
            let s = max.max(1e-10) / 448.0;
            let s = match scale {
                GroupScale::F32 => s,
                GroupScale::PowerOfTwo => f64::from(s).log2().ceil().exp2() as f32,
            };
            scaled(s, &e4m3_nearest, group);
        }
        Qdq::Int8Static { scale } => scaled(scale, &int8_nearest, group),
        Qdq::Int8Tensor | Qdq::Int8Token | Qdq::Int8Group { .. } => {
            scaled(max.max(1e-10) / 127.0, &int8_nearest, group);
        }
        Qdq::Mxfp8(rule) => {
            let exponent = match rule {
                Mxfp8Rule::Floor => f64::from(max).log2().floor(),
                Mxfp8Rule::Ceil => (f64::from(max) / 448.0).log2().ceil(),
            };
            scaled(exponent.exp2() as f32, &e4m3_nearest, group);
        }
        Qdq::Mxfp6(Fp6::E3M2) => {
            let values = magnitudes(e3m2::decode, 32);
            scaled(even_scale(max, 2, 4), &|x| nearest(&values, x), group);
        }
        Qdq::Mxfp6(Fp6::E2M3) => {
            let values = magnitudes(e2m3::decode, 32);
            scaled(even_scale(max, 3, 2), &|x| nearest(&values, x), group);
        }
        Qdq::Mxfp4 => scaled(even_scale(max, 1, 2), &e2m1_nearest, group),
        Qdq::Nvfp4 { global: EncodeScale(g), rule: Nvfp4Rule::Division } => {
            let s = e4m3_nearest(g * max / 6.0);
            group.iter_mut().for_each(|x| *x = e2m1_nearest(*x * g / s) * s / g);
        }
        Qdq::Nvfp4 { global: EncodeScale(g), rule: Nvfp4Rule::Reciprocal } => {
            let s = e4m3_nearest(g * (max * (1.0 / 6.0)));
            group.iter_mut().for_each(|x| *x = e2m1_nearest(*x * (g / s)) * (s / g));
        }
        Qdq::Nvfp4Token { .. } => unreachable!("tested against Nvfp4"),
    }
}

/// How many values share a scale: all, those of a row, or a group along the row.
#[derive(Clone, Copy)]
enum Share {
    All,
    Row,
    Group(usize),
}

const STATIC: f32 = 0.0123;
const GLOBAL: EncodeScale = EncodeScale(731.5);

const KINDS: [(Qdq, Share); 15] = [
    (Qdq::Fp8Static { scale: STATIC }, Share::All),
    (Qdq::Fp8Tensor, Share::All),
    (Qdq::Fp8Token, Share::Row),
    (Qdq::Fp8Group { size: 24, scale: GroupScale::F32 }, Share::Group(24)),
    (Qdq::Fp8Group { size: 24, scale: GroupScale::PowerOfTwo }, Share::Group(24)),
    (Qdq::Int8Static { scale: STATIC }, Share::All),
    (Qdq::Int8Tensor, Share::All),
    (Qdq::Int8Token, Share::Row),
    (Qdq::Int8Group { size: 24 }, Share::Group(24)),
    (Qdq::Mxfp8(Mxfp8Rule::Floor), Share::Group(32)),
    (Qdq::Mxfp8(Mxfp8Rule::Ceil), Share::Group(32)),
    (Qdq::Mxfp6(Fp6::E3M2), Share::Group(32)),
    (Qdq::Mxfp6(Fp6::E2M3), Share::Group(32)),
    (Qdq::Mxfp4, Share::Group(32)),
    (Qdq::Nvfp4 { global: GLOBAL, rule: Nvfp4Rule::Division }, Share::Group(16)),
];

const RECIPROCAL: Qdq = Qdq::Nvfp4 { global: GLOBAL, rule: Nvfp4Rule::Reciprocal };

/// Rows of values over several magnitudes, some exactly on ties of the formats.
fn rows(cols: usize) -> impl Strategy<Value = Vec<f32>> {
    let value = prop_oneof![
        4 => -3.0f32..3.0,
        1 => -0.01f32..0.01,
        1 => (-24i8..24).prop_map(|i| f32::from(i) * 0.125),
    ];
    prop::collection::vec(value, 2 * cols)
}

proptest! {
    /// 40 columns: whole groups, and a tail in every format.
    #[test]
    fn activations_equal_the_model(values in rows(40)) {
        let reciprocal = (RECIPROCAL, Share::Group(16));
        for (qdq, share) in KINDS.into_iter().chain([reciprocal]) {
            let (mut got, mut expected) = (values.clone(), values.clone());
            apply(&qdq, &mut got, 40);
            match share {
                Share::All => model(qdq, &mut expected),
                Share::Row => expected.chunks_mut(40).for_each(|row| model(qdq, row)),
                Share::Group(size) => expected
                    .chunks_mut(40)
                    .flat_map(|row| row.chunks_mut(size))
                    .for_each(|group| model(qdq, group)),
            }
            for ((x, got), expected) in values.iter().zip(&got).zip(&expected) {
                prop_assert_eq!(got, expected, "{:?} of {}", qdq, x);
            }
        }
    }

    #[test]
    fn quantising_again_changes_nothing(values in rows(64)) {
        for (qdq, _) in KINDS {
            // Its largest element may round up to the next power of two, and coarsen the scale.
            if qdq == Qdq::Mxfp8(Mxfp8Rule::Floor) {
                continue;
            }
            let mut once = values.clone();
            apply(&qdq, &mut once, 64);
            let mut twice = once.clone();
            apply(&qdq, &mut twice, 64);
            for (once, twice) in once.iter().zip(&twice) {
                // A scale computed from rounded values may differ in its last bits.
                prop_assert!((once - twice).abs() <= once.abs() * 1e-6, "{qdq:?} {once} {twice}");
            }
        }
    }

    #[test]
    fn errors_are_at_most_half_a_step(values in rows(64)) {
        let max = max_of(&values);
        for (qdq, _) in KINDS {
            // Mantissa bits, and half of the smallest step as a share of the largest value.
            let (mantissa, smallest) = match qdq {
                Qdq::Int8Token | Qdq::Int8Tensor | Qdq::Int8Group { .. } => (30, 0.5 / 127.0),
                Qdq::Fp8Token | Qdq::Fp8Tensor | Qdq::Fp8Group { .. } => (3, 2f32.powi(-17)),
                Qdq::Mxfp8(Mxfp8Rule::Ceil) => (3, 2f32.powi(-17)),
                Qdq::Mxfp8(Mxfp8Rule::Floor) => (3, 2f32.powi(-10)),
                Qdq::Mxfp6(Fp6::E3M2) => (2, 2f32.powi(-8)),
                Qdq::Mxfp6(Fp6::E2M3) => (3, 2f32.powi(-5)),
                Qdq::Mxfp4 => (1, 2f32.powi(-3)),
                _ => continue,
            };
            let mut got = values.clone();
            apply(&qdq, &mut got, 64);
            for (x, got) in values.iter().zip(&got) {
                // A quotient of up to 127 steps, and its product, are rounded to f32: 4 · 127 · 2⁻²⁴ steps.
                let bound = (x.abs() * 2f32.powi(-mantissa - 1)).max(smallest * max) * 1.0001;
                prop_assert!((x - got).abs() <= bound, "{qdq:?} {x} {got}");
            }
        }
    }

    #[test]
    fn codes_of_a_row_are_those_of_its_qdq(values in rows(40)) {
        let mut expected = values.clone();
        apply(&Qdq::Int8Token, &mut expected, 80);
        let mut codes = [0i8; 80];
        let scale = int8_row(Cpu::detect(), &values, &mut codes);
        prop_assert_eq!(codes.map(|code| f32::from(code) * scale).to_vec(), expected);

        let mut expected = values.clone();
        apply(&Qdq::Fp8Token, &mut expected, 80);
        let mut codes = [0u8; 80];
        let scale = fp8_row(Cpu::detect(), &values, &mut codes);
        prop_assert_eq!(codes.map(|code| e4m3::decode(code) * scale).to_vec(), expected);
    }

    /// 40 columns: a tail in every format.
    #[test]
    fn rows_that_travel_are_quantised_as_in_place(values in rows(40)) {
        for (qdq, _) in KINDS {
            let Some(len) = qdq.row_bytes(80) else { continue };
            let (mut expected, mut got) = (values.clone(), values.clone());
            apply(&qdq, &mut expected, 80);
            let mut bytes = vec![0xAA; len];
            qdq.encode_row(Cpu::detect(), &values, &mut bytes);
            qdq.decode_row(&bytes, &mut got);
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&got), bits(&expected), "{:?}", qdq);
        }
    }

    #[test]
    fn nvfp4_by_token_is_nvfp4_with_the_scale_of_the_row(values in rows(48)) {
        for rule in [Nvfp4Rule::Division, Nvfp4Rule::Reciprocal] {
            let (mut got, mut expected) = (values.clone(), values.clone());
            apply(&Qdq::Nvfp4Token { rule }, &mut got, 48);
            for row in expected.chunks_mut(48) {
                let global = EncodeScale(448.0 * 6.0 / max_of(row));
                apply(&Qdq::Nvfp4 { global, rule }, row, 48);
            }
            prop_assert_eq!(got, expected);
        }
    }

    /// Decoded weights are the nearest that the stored scales allow, whatever made the scales.
    #[test]
    fn weight_codes_are_the_nearest(values in rows(40)) {
        let e4m3s = magnitudes(e4m3::decode, 127);
        let e2m1s = magnitudes(e2m1::decode, 8);
        let check = |name: &str, got: &[f32], scales: &[f32], candidates: &dyn Fn(f32) -> f32| {
            for ((x, got), scale) in values.iter().zip(got).zip(scales) {
                let best = f64::from(candidates(x / scale)) * f64::from(*scale);
                let (err, least) = (f64::from(x - got).abs(), (f64::from(*x) - best).abs());
                let slack = 1e-6 * f64::from(*scale) + 2e-7 * f64::from(x.abs());
                assert!(err <= least + slack, "{name}: {x} {got} {best}");
            }
        };

        let q = weight::fp8_channel(&values, 40).unwrap();
        let scales: Vec<f32> = (0..80).map(|i| q.scales[i / 40]).collect();
        let got: Vec<f32> = (0..80).map(|i| e4m3::decode(q.codes[i]) * scales[i]).collect();
        check("fp8 channel", &got, &scales, &|x| nearest(&e4m3s, x));
        for (row, scale) in values.chunks(40).zip(&q.scales) {
            let max = max_of(row);
            prop_assert_eq!(*scale, if max == 0.0 { 1.0 } else { max / 448.0 });
        }

        // Blocks of 2 × 16 over 2 × 40: a tail of 8 columns.
        let q = weight::fp8_block(&values, 40, [2, 16]).unwrap();
        prop_assert_eq!(q.scales.len(), 3);
        let scales: Vec<f32> = (0..80).map(|i| q.scales[i % 40 / 16]).collect();
        let got: Vec<f32> = (0..80).map(|i| e4m3::decode(q.codes[i]) * scales[i]).collect();
        for (block, scale) in q.scales.iter().enumerate() {
            let inside = (0..80).filter(|i| i % 40 / 16 == block).map(|i| values[i]);
            let max = max_of(&inside.collect::<Vec<_>>());
            prop_assert_eq!(*scale, if max == 0.0 { 1.0 } else { max / 448.0 });
        }
        check("fp8 block", &got, &scales, &|x| nearest(&e4m3s, x));

        let q = weight::int8_channel(&values, 40).unwrap();
        let scales: Vec<f32> = (0..80).map(|i| q.scales[i / 40]).collect();
        let got: Vec<f32> = (0..80).map(|i| f32::from(q.codes[i]) * scales[i]).collect();
        for (row, scale) in values.chunks(40).zip(&q.scales) {
            let max = max_of(row);
            prop_assert_eq!(*scale, if max == 0.0 { 1.0 } else { max / 127.5 });
        }
        check("int8 channel", &got, &scales, &|x| int8_nearest(x));

        for scale_type in [ScaleType::F32, ScaleType::F16, ScaleType::Bf16] {
            let q = weight::int4_group(&values, 40, 16, scale_type).unwrap();
            prop_assert_eq!((q.codes.len(), q.scales.len()), (2 * 20, 2 * 3));
            let scales: Vec<f32> = (0..80).map(|i| q.scales[i / 40 * 3 + i % 40 / 16]).collect();
            let mut got = vec![0.0; 80];
            for (row, got) in got.chunks_mut(40).enumerate() {
                int4::decode_packed(&q.codes[row * 20..][..20], 0, got);
                for_each_group(got, 0, 16, |group, values| {
                    let scale = q.scales[row * 3 + group];
                    values.iter_mut().for_each(|v| *v = (*v - 8.0) * scale);
                });
            }
            let integers = integers();
            check("int4", &got, &scales, &|x| nearest(&integers, x).clamp(-8.0, 7.0));
        }

        let global = weight::nvfp4_global_scale(max_of(&values));
        let q = weight::nvfp4(&values, 40, global).unwrap();
        let scale = |i: usize| e4m3::decode(q.scales[i / 40 * 3 + i % 40 / 16]) / global.0;
        let scales: Vec<f32> = (0..80).map(scale).collect();
        let mut got = vec![0.0; 80];
        e2m1::decode_packed(&q.codes, 0, &mut got);
        got.iter_mut().zip(&scales).for_each(|(v, s)| *v *= s);
        check("nvfp4", &got, &scales, &|x| nearest(&e2m1s, x));

        let q = weight::mxfp4(&values, 40).unwrap();
        let scale = |i: usize| e8m0::decode(q.scales[i / 40 * 2 + i % 40 / 32]);
        let scales: Vec<f32> = (0..80).map(scale).collect();
        e2m1::decode_packed(&q.codes, 0, &mut got);
        got.iter_mut().zip(&scales).for_each(|(v, s)| *v *= s);
        check("mxfp4", &got, &scales, &|x| nearest(&e2m1s, x));
        let mut activations = values.clone();
        apply(&Qdq::Mxfp4, &mut activations, 40);
        prop_assert_eq!(got, activations);
    }
}

/// `values`, padded with zeros to a block of 32, after `qdq`.
fn block<const N: usize>(qdq: Qdq, values: [f32; N]) -> [f32; N] {
    let mut block = [0.0; 32];
    block[..N].copy_from_slice(&values);
    apply(&qdq, &mut block, 32);
    std::array::from_fn(|i| block[i])
}

#[test]
fn cases_by_hand() {
    // 1.75 counts as 2: scale 2^(1−2), 3.5 ties to 4. Just below: scale 2^(0−2), 7 saturates at 6.
    assert_eq!(block(Qdq::Mxfp4, [1.75, 0.3]), [2.0, 0.25]);
    assert_eq!(block(Qdq::Mxfp4, [1.75f32.next_down(), 0.3]), [1.5, 0.25]);
    // E2M3 has one mantissa bit more than E3M2: what counts as 2 begins at 1.9375 and 1.875.
    assert_eq!(block(Qdq::Mxfp6(Fp6::E2M3), [1.9375]), [2.0]);
    assert_eq!(block(Qdq::Mxfp6(Fp6::E2M3), [1.9375f32.next_down()]), [1.875]);
    assert_eq!(block(Qdq::Mxfp6(Fp6::E3M2), [1.875]), [2.0]);
    assert_eq!(block(Qdq::Mxfp6(Fp6::E3M2), [1.875f32.next_down()]), [1.75]);
    // Scale 1 up to 448, then 2; with the old rule 2^8, and 2^−9 · 2^8 = 0.5 is the smallest value.
    let small = 2f32.powi(-9);
    assert_eq!(block(Qdq::Mxfp8(Mxfp8Rule::Ceil), [448.0, small]), [448.0, small]);
    assert_eq!(block(Qdq::Mxfp8(Mxfp8Rule::Ceil), [449.0, small]), [448.0, 0.0]);
    assert_eq!(block(Qdq::Mxfp8(Mxfp8Rule::Floor), [448.0, 0.3, 0.2]), [448.0, 0.5, 0.0]);
    // Scales of subnormals are those of the smallest normal number, 2^−126.
    let (half, tiny) = (f32::MIN_POSITIVE / 2.0, 2f32.powi(-126) * 2f32.powi(-10));
    assert_eq!(block(Qdq::Mxfp8(Mxfp8Rule::Floor), [half, tiny]), [half, 0.0]);
    // Floors: s = 1 / 229376, and 0.001 / s = 229.4 rounds to 224; s = 1e-10 / 127.
    assert_eq!(block(Qdq::Fp8Token, [0.001]), [224.0 / 229376.0]);
    assert_eq!(block(Qdq::Int8Token, [1e-11]), [13.0 * (1e-10 / 127.0)]);
    // s = e4m3(6 / 6) = 1.
    let nvfp4 = Qdq::Nvfp4 { global: EncodeScale(1.0), rule: Nvfp4Rule::Division };
    assert_eq!(block(nvfp4, [6.0, -2.5, 0.25, 5.5]), [6.0, -2.0, 0.0, 6.0]);
    // s = 1, saturating; s = 1 / 127.
    assert_eq!(block(Qdq::Fp8Static { scale: 1.0 }, [500.0, 17.0, 19.0]), [448.0, 16.0, 20.0]);
    assert_eq!(block(Qdq::Int8Static { scale: 0.5 }, [100.0, -100.0, 0.25]), [63.5, -64.0, 0.0]);
    // amax 300 / 448 rounds up to 1.
    let up = Qdq::Fp8Group { size: 32, scale: GroupScale::PowerOfTwo };
    assert_eq!(block(up, [300.0, 17.0]), [288.0, 16.0]);
}

/// Beside the ties of block scales and of elements, where the order of operations shows.
#[test]
fn the_rules_of_nvfp4_are_told_apart() {
    let rules = [KINDS[14].0, RECIPROCAL];
    let (g, mut differ) = (GLOBAL.0, [0, 0]);
    let mut compare = |block: [f32; 4], what: usize| {
        let results = rules.map(|qdq| {
            let (mut got, mut expected) = (block, block);
            apply(&qdq, &mut got, 4);
            model(qdq, &mut expected);
            assert_eq!(got, expected, "{qdq:?} of {block:?}");
            // Scale times element: a multiple of 1/2, once the last bits of `s / G` are rounded off.
            got.map(|x| (x * g * 4.0).round())
        });
        differ[what] += usize::from(results[0] != results[1]);
    };
    let beside =
        |x: f32| (-20i32..=20).map(move |i| f32::from_bits((x.to_bits() as i32 + i) as u32));
    for code in 0x50..0x78 {
        let middle = (e4m3::decode(code) + e4m3::decode(code + 1)) / 2.0;
        for max in beside(middle * 6.0 / g) {
            compare([max, max * 0.3, 0.0, -max], 0);
        }
        let scale = e4m3::decode(code);
        for tie in [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] {
            for x in beside(tie * scale / g) {
                compare([6.0 * scale / g, x, -x, 0.0], 1);
            }
        }
    }
    assert!(differ[0] > 0 && differ[1] > 0, "{differ:?}");
}

#[test]
fn zeros_stay_zeros_with_their_signs() {
    for (qdq, _) in KINDS {
        let mut rows = [0.0, -0.0].repeat(40);
        apply(&qdq, &mut rows, 40);
        assert!(rows.iter().all(|&x| x == 0.0), "{qdq:?}");
        let float = !format!("{qdq:?}").starts_with("Int8");
        assert!(!float || rows.iter().skip(1).step_by(2).all(|x| x.is_sign_negative()), "{qdq:?}");
    }
    let mut empty = [];
    apply(&Qdq::Fp8Tensor, &mut empty, 40);
    apply(&Qdq::Mxfp4, &mut empty, 0);
}

#[test]
fn values_that_are_not_finite_are_seen() {
    for (qdq, share) in KINDS {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut rows = vec![0.5; 80];
            rows[1] = bad;
            apply(&qdq, &mut rows, 40);
            let shared = match (qdq, share) {
                (Qdq::Fp8Static { .. } | Qdq::Int8Static { .. }, _) => 0,
                (_, Share::All) => 80,
                (_, Share::Row) => 40,
                (_, Share::Group(size)) => size,
            };
            let saturates = shared == 0 || matches!(qdq, Qdq::Nvfp4 { .. });
            if saturates && bad.is_infinite() {
                assert!(rows.iter().all(|x| x.is_finite()), "{qdq:?} {bad}");
                assert!(rows[1].abs() > 0.5 && rows[1].signum() == bad.signum());
            } else {
                assert!(rows[1].is_nan() && rows[..shared].iter().all(|x| x.is_nan()), "{qdq:?}");
                assert!(rows[shared.max(2)..].iter().all(|x| x.is_finite()), "{qdq:?}");
            }
        }
    }
    let row = [1.0, f32::NAN];
    assert!(
        int8_row(Cpu::detect(), &row, &mut [0; 2]).is_nan()
            && fp8_row(Cpu::detect(), &row, &mut [0; 2]).is_nan()
    );
}

#[test]
fn rows_that_travel_keep_what_is_not_finite() {
    let formats = [Qdq::Fp8Token, Qdq::Int8Token, Qdq::Fp8Static { scale: 0.5 }];
    let group = Qdq::Fp8Group { size: 2, scale: GroupScale::PowerOfTwo };
    for (qdq, len) in formats.into_iter().chain([group]).zip([8, 8, 4, 12]) {
        assert_eq!(qdq.row_bytes(4), Some(len), "{qdq:?}");
        for row in [[1.0, f32::NAN, -0.0, 3.0], [0.0, -0.0, f32::INFINITY, 1e30], [0.0; 4]] {
            let (mut expected, mut got, mut bytes) = (row, row, vec![0; len]);
            apply(&qdq, &mut expected, 4);
            qdq.encode_row(Cpu::detect(), &row, &mut bytes);
            qdq.decode_row(&bytes, &mut got);
            for (got, expected) in got.iter().zip(expected) {
                let same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
                assert!(same, "{qdq:?} of {row:?}: {got}, not {expected}");
            }
        }
    }
    assert_eq!(Qdq::Mxfp4.row_bytes(32), None);
}

#[test]
fn the_smallest_and_largest_values_give_finite_results() {
    for (qdq, _) in KINDS {
        for x in [f32::from_bits(1), f32::MIN_POSITIVE / 3.0, f32::MIN_POSITIVE, 1e-30, 1e37] {
            let mut row = [x, -x, 0.0, x / 2.0];
            apply(&qdq, &mut row, 4);
            assert!(row.iter().all(|y| y.is_finite()), "{qdq:?} {x:e} {row:?}");
            assert!(row[0] >= 0.0 && row[1] <= 0.0 && row[2] == 0.0, "{qdq:?} {x:e} {row:?}");
        }
    }
    for rule in [Nvfp4Rule::Division, Nvfp4Rule::Reciprocal] {
        let mut row = [f32::from_bits(1), f32::MIN_POSITIVE, 0.0, 0.0];
        apply(&Qdq::Nvfp4Token { rule }, &mut row, 4);
        assert!(row.iter().all(|y| y.is_finite()), "{row:?}");
    }
}

#[test]
fn weights_of_zeros_and_weights_that_are_not_finite() {
    let zeros = [0.0; 64];
    assert_eq!(weight::fp8_channel(&zeros, 32).unwrap().scales, [1.0; 2]);
    assert_eq!(weight::int8_channel(&zeros, 32).unwrap().scales, [1.0; 2]);
    let int4 = weight::int4_group(&zeros, 32, 32, ScaleType::Bf16).unwrap();
    assert_eq!((int4.codes, int4.scales), (vec![0x88; 32], vec![1.0; 2]));
    assert_eq!(weight::nvfp4(&zeros, 32, EncodeScale(1.0)).unwrap().codes, [0; 32]);
    assert_eq!(weight::mxfp4(&zeros, 32).unwrap().codes, [0; 32]);

    let mut bad = zeros;
    bad[40] = f32::NEG_INFINITY;
    let error = weight::fp8_block(&bad, 32, [128, 128]).unwrap_err();
    assert_eq!((error.row, error.col, error.value), (1, 8, f32::NEG_INFINITY));
    assert!(error.to_string().contains("row 1, column 8 is -inf"));
    assert!(weight::int8_channel(&bad, 32).is_err());
    assert!(weight::int4_group(&bad, 32, 32, ScaleType::F32).is_err());
    assert!(weight::nvfp4(&bad, 32, EncodeScale(1.0)).is_err());
    assert!(weight::mxfp4(&bad, 32).is_err());
}

#[test]
fn int4_rows_are_whole_words() {
    let q = weight::int4_group(&[7.5, -7.5, 1.0, 6.5, 0.0], 5, 4, ScaleType::F32).unwrap();
    // Scales 7.5 / 7.5 and, for the zero of the tail, 1. Codes 8 + 7 (8 is too much), 8 − 8, 8 + 1,
    // 8 + 6 (even), and 8.
    assert_eq!(q.scales, [1.0, 1.0]);
    assert_eq!(q.codes, [0x0F, 0xE9, 0x08, 0x00]);
}

#[test]
fn global_scales_turn_into_each_other() {
    assert_eq!(EncodeScale(8.0).to_decode(), DecodeScale(0.125));
    assert_eq!(DecodeScale(0.125).to_encode(), EncodeScale(8.0));
    assert_eq!(weight::nvfp4_global_scale(2.0), EncodeScale(1344.0));
    assert_eq!(weight::nvfp4_global_scale(0.0), EncodeScale(1.0));
}
