//! Rows that were quantised, multiplied as codes.

use super::*;
use crate::numerics::ggml::BlockType;
use crate::numerics::quantise::{GroupScale, Qdq};
use crate::pack::{integer_rows, quantised_rows};
use crate::stored::{Element, Stored, Zeros};

/// Ways to quantise rows whose codes are bytes.
const WAYS: [Qdq; 9] = [
    Qdq::Fp8Token,
    Qdq::Fp8Static { scale: 0.037 },
    Qdq::Fp8Group { size: 128, scale: GroupScale::F32 },
    Qdq::Fp8Group { size: 32, scale: GroupScale::PowerOfTwo },
    Qdq::Int8Token,
    Qdq::Int8Static { scale: 0.021 },
    Qdq::Int8Group { size: 128 },
    Qdq::Int8Group { size: 32 },
    Qdq::Int8Group { size: 16 },
];

const KINDS: [OperandKind; 2] = [OperandKind::Bf16, OperandKind::Int8];

/// `rows` rows of `view`'s columns, quantised so.
fn quantised(numbers: &mut Numbers, view: &View, rows: usize, way: Qdq) -> Vec<f32> {
    let mut x = numbers.normal(rows * view.cols());
    // rows of very different sizes: a scale is not another row's
    for (i, row) in x.chunks_mut(view.cols()).enumerate() {
        row.iter_mut().for_each(|x| *x *= [1.0, 1e-3, 40.0][i % 3]);
    }
    way.apply(Cpu::detect(), &mut x, view.cols());
    x
}

/// Weights of `view` for rows that are quantised so, for every entry that multiplies codes of that kind.
fn packed(view: &View, kind: OperandKind, way: Qdq) -> Vec<Packed> {
    let takes = quantised_rows(kind, view, &way);
    let found = entries(view, kind).into_iter().filter(|_| takes);
    found.map(|gemm| pack(view, gemm).unwrap().coded(way)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    /// All formats, any shape, any number of rows, any cut: the twin's bits; and the twin is right.
    #[test]
    fn codes_are_multiplied_as_the_twin_does(
        seed: u64,
        n in prop_oneof![1..=20usize, 1..150usize],
        k in prop_oneof![1..=40usize, 1..300usize, Just(512)],
        m in prop_oneof![Just(1usize), 1..=9usize, 1..20usize],
        unit_cut in 0..3usize,
        row_cut in 0..9usize,
    ) {
        let mut numbers = Numbers(seed);
        let cases = cases(&mut numbers, n, k);
        for (i, (name, view)) in cases.into_iter().enumerate() {
            let way = WAYS[(i + seed as usize % 9) % WAYS.len()];
            let x = quantised(&mut numbers, &view, m, way);
            for kind in KINDS {
                let packed = packed(&view, kind, way);
                if packed.is_empty() {
                    continue;
                }
                let twin = twin::product(&view, &x, kind, Some(&way));
                check_against_float64(&name, &view, &x, &twin)?;
                for w in packed {
                    let got = product_of(&w, &view, &x, m, (unit_cut, row_cut));
                    prop_assert_eq!(bits(&got), bits(&twin), "{} by {:?}: {:?}", name, w, way);
                }
            }
        }
    }
}

/// What is a whole number before it is scaled, or a few times is: all types of GGUF, and all codes of integers
/// and of FP4 and FP6 but E3M2. Their rows are quantised as suits the weights, and multiplied in integers.
#[test]
fn weights_of_few_bits_are_multiplied_as_integers() {
    let mut numbers = Numbers(11);
    let mut types = Vec::new();
    for (name, view) in cases(&mut numbers, 70, 512) {
        // columns of windows begin anywhere
        if view.stored_cols().start > 0 {
            continue;
        }
        let way = integer_rows(&view);
        match view.stored() {
            Stored::Floats(_) => assert!(way.is_none(), "{name}"),
            Stored::Blocks(_) => assert!(way.is_some(), "{name}"),
            Stored::Codes(codes) => match codes.element() {
                Element::E4m3 | Element::E5m2 | Element::E3m2 => assert!(way.is_none(), "{name}"),
                // zero points of signed nibbles are beyond them, and bytes have no least values
                Element::Int4 => {}
                _ if matches!(codes.zeros(), Zeros::Minima(_)) && codes.element().bits() == 8 => {}
                // columns in an order of their own
                _ if codes.group_of().is_some() || codes.scales().block()[1] == 24 => {}
                _ => assert!(way.is_some(), "{name}"),
            },
        }
        let Some(way) = way else { continue };
        if let Stored::Blocks(blocks) = view.stored() {
            types.push(blocks.block());
        }
        let x = quantised(&mut numbers, &view, 5, way);
        let twin = twin::product(&view, &x, OperandKind::Int8, Some(&way));
        check_against_float64(&name, &view, &x, &twin).unwrap();
        for w in packed(&view, OperandKind::Int8, way) {
            let got = product_of(&w, &view, &x, 5, (1, 3));
            assert_eq!(bits(&got), bits(&twin), "{name} by {way:?}: {w:?}");
        }
    }
    assert!(BlockType::ALL.iter().all(|block| types.contains(block)));
}

/// Rows of the greatest codes alone, of either sign: sums of 16 bits have room for what they make.
#[test]
fn greatest_codes_have_room() {
    let mut numbers = Numbers(13);
    let way = Qdq::Int8Static { scale: 1.0 };
    for (name, view) in cases(&mut numbers, 70, 512) {
        let packed = packed(&view, OperandKind::Int8, way);
        if packed.is_empty() {
            continue;
        }
        let codes = [127.0, -128.0, 127.0, -128.0, 127.0, -128.0];
        let x: Vec<f32> = codes.iter().flat_map(|code| vec![*code; view.cols()]).collect();
        let twin = twin::product(&view, &x, OperandKind::Int8, Some(&way));
        check_against_float64(&name, &view, &x, &twin).unwrap();
        for w in packed {
            let got = product_of(&w, &view, &x, codes.len(), (0, 0));
            assert_eq!(bits(&got), bits(&twin), "{name} by {w:?}");
        }
    }
}

/// A scale of the row for as many columns as share one of the weights: at least 32, at most 256.
#[test]
fn rows_are_quantised_as_suits_the_weights() {
    let mut numbers = Numbers(12);
    let size = |view: &View| match integer_rows(view) {
        Some(Qdq::Int8Group { size }) => size,
        other => panic!("{other:?}"),
    };
    for (group, want) in [(32, 32), (64, 64), (128, 128), (256, 256), (512, 256), (1024, 256)] {
        let view = integers(&mut numbers, [16, 1024], group, false);
        assert_eq!(size(&view), want, "{group}");
    }
    for (name, view) in cases(&mut numbers, 16, 512) {
        if let Stored::Blocks(blocks) = view.stored()
            && view.stored_cols().start == 0
        {
            let want = match blocks.block() {
                BlockType::Tq1_0 | BlockType::Tq2_0 => 256,
                _ => 32,
            };
            assert_eq!(size(&view), want, "{name}");
        }
    }
}

/// Integers: `[n, k]` with a scale for each row and group of columns, with zero points where asked for.
fn integers(numbers: &mut Numbers, [n, k]: [usize; 2], group: usize, zeros: bool) -> View {
    use crate::stored::{Codes, Granularity, Packing, ScaleType, Scales, ZeroPoints};
    let across = k.div_ceil(group);
    let scales: Vec<u8> =
        numbers.normal(n * across).iter().flat_map(|scale| scale.to_le_bytes()).collect();
    let shape = ([1, group], [n, k]);
    let scales =
        Scales::new(scales.into(), ScaleType::F32, Granularity::Group, shape.0, shape.1).unwrap();
    // the extremes, whose products with extremes are the largest sums
    let codes: Vec<u8> =
        numbers.normal(n * k).iter().map(|v| if *v > 0.0 { 127 } else { 128 }).collect();
    let points = ZeroPoints::from_i16(&vec![-127; n * across], scales.shape()).unwrap();
    let zeros = if zeros { Zeros::Each(points) } else { Zeros::None };
    let format = (Element::Int8, Packing::Rows);
    View::new(Codes::new(format, codes.into(), [n, k], scales, zeros, None).unwrap())
}

/// Sums of products of integers are exact: every kind of dot product has the same bits.
#[test]
fn integers_have_the_same_bits_in_every_dot_product() {
    let mut numbers = Numbers(8);
    for (k, group, way) in [
        (512, 512, Qdq::Int8Token),
        (300, 300, Qdq::Int8Static { scale: 0.01 }),
        (384, 128, Qdq::Int8Group { size: 128 }),
    ] {
        for zeros in [false, true] {
            let view = integers(&mut numbers, [70, k], group, zeros);
            let mut x = vec![1.27; 5 * k];
            x.iter_mut().skip(k).zip(numbers.normal(4 * k)).for_each(|(x, v)| *x = v);
            way.apply(Cpu::detect(), &mut x, k);
            let twin = bits(&twin::product(&view, &x, OperandKind::Int8, Some(&way)));
            for kind in KINDS {
                assert_eq!(bits(&twin::product(&view, &x, kind, Some(&way))), twin, "{kind:?}");
                for w in packed(&view, kind, way) {
                    assert_eq!(bits(&product_of(&w, &view, &x, 5, (0, 0))), twin, "{w:?} {way:?}");
                }
            }
            for w in on_tiles(&view, way) {
                assert_eq!(bits(&product_of(&w, &view, &x, 5, (0, 0))), twin, "{w:?} {way:?}");
            }
        }
    }
}

/// The same for tile registers, and their model.
fn on_tiles(view: &View, way: Qdq) -> Vec<Packed> {
    #[cfg(target_arch = "x86_64")]
    let found = super::tiles::entries(view);
    #[cfg(not(target_arch = "x86_64"))]
    let found = Vec::<&'static Gemm>::new();
    let takes = quantised_rows(OperandKind::TileBf16, view, &way);
    let found = found.into_iter().filter(|_| takes);
    found.map(|gemm| pack(view, gemm).unwrap().coded(way)).collect()
}

#[test]
fn codes_on_tiles_are_near_float64() {
    let mut numbers = Numbers(9);
    for (i, (name, view)) in cases(&mut numbers, 80, 300).into_iter().enumerate() {
        let way = WAYS[i % WAYS.len()];
        let x = quantised(&mut numbers, &view, 20, way);
        for w in on_tiles(&view, way) {
            let got = product_of(&w, &view, &x, 20, (0, 0));
            check_against_float64(&name, &view, &x, &got).unwrap();
        }
    }
}

/// A slice of a row is told the whole row's scale: its own largest code may be any.
#[test]
fn slices_have_the_scale_of_the_whole_row() {
    let mut numbers = Numbers(3);
    let whole = integers(&mut numbers, [20, 96], 96, false);
    for way in [Qdq::Int8Token, Qdq::Fp8Token] {
        let mut x = numbers.normal(96);
        x[90] = 9.0;
        let max = x.iter().fold(0.0f32, |max, v| max.max(v.abs()));
        way.apply(Cpu::detect(), &mut x, 96);
        for kind in KINDS {
            for w in packed(&whole, kind, way) {
                let gemm = w.gemm();
                let of = |view: &View, x: &[f32]| {
                    let w = pack(view, gemm).unwrap().coded(way);
                    let mut memory = vec![0; gemm.operand_bytes(&w, 1)];
                    let rows = Rows::new(x, 1, x.len(), x.len());
                    let x = gemm.operand_of(&w, rows, Some(max), &mut memory);
                    let mut out = vec![0.0; 20];
                    gemm.run(&w, x, 0..1, 0..1, &mut RowsMut::new(&mut out, 1, 20, 20));
                    out
                };
                let parts =
                    [0..64, 64..96].map(|cols| of(&whole.cols_of(cols.clone()).unwrap(), &x[cols]));
                let want = product_of(&w, &whole, &x, 1, (0, 0));
                for ((a, b), want) in parts[0].iter().zip(&parts[1]).zip(want) {
                    assert!((a + b - want).abs() <= 1e-6 * (a.abs() + b.abs()), "{way:?} {w:?}");
                }
            }
        }
    }
}

/// NaN of a row come out of all its products and of no other row's; a row of zeros is zeros.
#[test]
fn special_rows() {
    let mut numbers = Numbers(4);
    let view = integers(&mut numbers, [20, 256], 128, false);
    for way in WAYS {
        let mut x = numbers.normal(4 * 256);
        x[256 + 200] = f32::NAN;
        x[512..768].fill(0.0);
        way.apply(Cpu::detect(), &mut x, 256);
        for kind in KINDS {
            for w in packed(&view, kind, way) {
                let out = product_of(&w, &view, &x, 4, (0, 0));
                let rows: Vec<&[f32]> = out.chunks(20).collect();
                assert!(rows[1].iter().all(|v| v.is_nan()), "{w:?} {way:?}");
                assert!(rows[2].iter().all(|v| *v == 0.0), "{w:?} {way:?}");
                assert!(rows[0].iter().chain(rows[3]).all(|v| v.is_finite()), "{w:?} {way:?}");
            }
        }
    }
}

/// What would lose something is not multiplied as codes.
#[test]
fn rows_that_do_not_fit_are_not_codes() {
    let mut numbers = Numbers(6);
    let one = integers(&mut numbers, [16, 256], 256, false);
    let groups = integers(&mut numbers, [16, 256], 64, false);
    // act-order within 128 columns: each group's columns are those of one group of the rows
    let order: Vec<u32> = (0..256).map(|k| k / 128 * 2 + k % 2).collect();
    let ordered = groups.codes().unwrap().clone().with_groups(order.into()).unwrap();
    let ordered = View::new(ordered);
    let (bf16, int8) = (OperandKind::Bf16, OperandKind::Int8);
    for (kind, view, way, fits) in [
        (int8, &one, Qdq::Int8Token, true),
        (int8, &one, Qdq::Fp8Token, false),
        (bf16, &one, Qdq::Fp8Token, true),
        // a packed group of 256 columns, rows with a scale for 128
        (bf16, &one, Qdq::Int8Group { size: 128 }, false),
        (int8, &groups, Qdq::Int8Group { size: 128 }, true),
        (int8, &groups, Qdq::Int8Group { size: 96 }, false),
        // codes are told from their places: columns in another order share one scale, or none
        (int8, &ordered, Qdq::Int8Token, true),
        (int8, &ordered, Qdq::Int8Group { size: 128 }, false),
        (bf16, &ordered, Qdq::Fp8Group { size: 128, scale: GroupScale::F32 }, false),
        (int8, &one, Qdq::Int8Static { scale: 1e-35 }, false),
        // exact as numbers
        (bf16, &one, Qdq::Mxfp4, true),
        (int8, &one, Qdq::Mxfp4, false),
    ] {
        assert_eq!(quantised_rows(kind, view, &way), fits, "{kind:?} {way:?}");
        assert!(quantised_rows(OperandKind::F32, view, &way));
    }
}
