//! Every entry of the table against a scalar twin, bit by bit, and the twin against float64.

mod cases;
mod coded;
mod parts;
#[cfg(target_arch = "x86_64")]
mod tiles;

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::pack::{pack, twin};
use cases::{Numbers, View, cases};

/// `x · wᵀ` by `gemm`, in the units and rows of `cut`.
fn product(
    gemm: &'static Gemm,
    view: &View,
    x: &[f32],
    rows: usize,
    cut: (usize, usize),
) -> Vec<f32> {
    product_of(&pack(view, gemm).unwrap(), view, x, rows, cut)
}

/// The same with packed weights.
fn product_of(
    w: &Packed,
    view: &View,
    x: &[f32],
    rows: usize,
    (unit_cut, row_cut): (usize, usize),
) -> Vec<f32> {
    let gemm = w.gemm();
    let (cols, n) = (view.cols(), view.rows());
    let mut memory = vec![0u8; gemm.operand_bytes(w, rows) + 64];
    let start = memory.as_ptr().align_offset(64);
    let operand = gemm.operand(w, Rows::new(x, rows, cols, cols), &mut memory[start..]);
    let mut out = vec![f32::NAN; rows * n];
    let mut all = RowsMut::new(&mut out, rows, n, n);
    let cuts = |len: usize, cut: usize| [0..cut.min(len), cut.min(len)..len];
    for units in cuts(w.units(), unit_cut) {
        for rows in cuts(rows, row_cut) {
            let out = &mut all.window(rows.clone(), w.columns(units.clone()));
            gemm.run(w, operand, rows, units.clone(), out);
        }
    }
    out
}

/// Entries for `view` and rows of that kind that this CPU can run.
fn entries(view: &View, rows: OperandKind) -> Vec<&'static Gemm> {
    let all = ALL.iter().copied().flatten().filter(|gemm| gemm.rows() == rows);
    let reads = |gemm: &&Gemm| gemm.codes() == crate::pack::codes(view);
    let holds = crate::pack::holds(rows, view);
    all.filter(|gemm| holds && reads(gemm) && gemm.runs_here()).collect()
}

/// Entries for `view` and any rows of floats that this CPU can run.
fn all_entries(view: &View) -> Vec<&'static Gemm> {
    let kinds = [OperandKind::F32, OperandKind::Bf16, OperandKind::TileBf16];
    kinds.into_iter().flat_map(|rows| entries(view, rows)).collect()
}

/// As bits; all NaN alike.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| if v.is_nan() { u32::MAX } else { v.to_bits() }).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// All formats, any shape, any number of rows, any cut: the twin's bits; and the twin is right.
    #[test]
    fn every_entry_is_its_twin(
        seed: u64,
        n in prop_oneof![1..=20usize, 1..150usize],
        k in prop_oneof![1..=40usize, 1..300usize, Just(512)],
        m in prop_oneof![Just(1usize), 1..=9usize, 1..20usize],
        unit_cut in 0..3usize,
        row_cut in 0..9usize,
    ) {
        let mut numbers = Numbers(seed);
        for (name, view) in cases(&mut numbers, n, k) {
            let x = numbers.normal(m * view.cols());
            let rounded: Vec<f32> = x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
            for (kind, x_of_kind) in [(OperandKind::F32, &x), (OperandKind::Bf16, &rounded)] {
                let twin = twin::product(&view, &x, kind, None);
                check_against_float64(&name, &view, x_of_kind, &twin)?;
                let found = entries(&view, kind);
                prop_assert!(!found.is_empty() || kind != OperandKind::F32, "{}", name);
                for gemm in found {
                    let got = product(gemm, &view, &x, m, (unit_cut, row_cut));
                    prop_assert_eq!(bits(&got), bits(&twin), "{} by {:?}", name, gemm);
                }
            }
        }
    }
}

/// Windows may begin at any row and column, within a word of codes as well: what is read in whole words
/// is what is read code by code.
#[test]
fn windows_begin_anywhere() {
    let mut numbers = Numbers(11);
    for (name, view) in cases(&mut numbers, 88, 264) {
        for (row, column) in [(0, 4), (1, 1), (4, 12), (12, 33)] {
            let rows = view.rows_of(row, 1, 67);
            let Some(window) = rows.and_then(|rows| rows.cols_of(column..rows.cols())) else {
                continue;
            };
            let x = numbers.normal(window.cols());
            for kind in [OperandKind::F32, OperandKind::Bf16] {
                let twin = bits(&twin::product(&window, &x, kind, None));
                for gemm in entries(&window, kind) {
                    let got = product(gemm, &window, &x, 1, (0, 0));
                    assert_eq!(bits(&got), twin, "{name} from [{row}, {column}] on by {gemm:?}");
                }
            }
        }
    }
}

/// The twin is near the product of decoded weights in float64.
fn check_against_float64(
    name: &str,
    view: &View,
    x: &[f32],
    got: &[f32],
) -> Result<(), TestCaseError> {
    let mut w = vec![0.0; view.cols()];
    let (mut error, mut size, mut numbers) = (0.0, 0.0, 0);
    for n in 0..view.rows() {
        view.decode_row(n, &mut w);
        let largest = f64::from(w.iter().fold(0.0f32, |largest, w| largest.max(w.abs())));
        for (m, x) in x.chunks(view.cols().max(1)).enumerate() {
            let products = x.iter().zip(&w).map(|(x, w)| f64::from(*x) * f64::from(*w));
            let (sum, absolute) =
                products.fold((0.0, 0.0), |(sum, absolute), p| (sum + p, absolute + p.abs()));
            let got = f64::from(got[m * view.rows() + n]);
            if sum.is_nan() {
                prop_assert!(got.is_nan(), "{}: [{}][{}] {} is not NaN", name, m, n, got);
                continue;
            }
            // Minima cancel against the codes: hence the room.
            let sum_x: f64 = x.iter().map(|x| f64::from(x.abs())).sum();
            let bound = 1e-4 * absolute + 1e-5 * (1.0 + largest) * sum_x;
            prop_assert!(
                (got - sum).abs() <= bound,
                "{}: [{}][{}] {} is not {}",
                name,
                m,
                n,
                got,
                sum
            );
            (error, size) = (error + (got - sum).powi(2), size + sum * sum);
            numbers += 1;
        }
    }
    // Of sums that cancel little: a product of a few numbers may be nearly zero, and where NaN scales
    // leave but a few products, all of them.
    if view.cols() >= 32 && view.rows() >= 16 && numbers >= 16 {
        let nmse = error / size;
        prop_assert!(error <= 1e-11 * size, "{}: NMSE {:e} of {}", name, nmse, numbers);
    }
    Ok(())
}

#[test]
fn names_and_codes_are_the_tables() {
    let entries: Vec<&Gemm> = ALL.into_iter().flatten().collect();
    for (i, gemm) in entries.iter().enumerate() {
        assert!(entries[..i].iter().all(|other| other.name() != gemm.name()), "{gemm:?}");
        for of in [PANELS, 1] {
            let single = |shape: &Shape| shape.of == of && matches!(shape.rows, Shape::ANY | 1);
            assert!(gemm.shapes.iter().any(single), "{gemm:?}");
        }
        let whole = |shape: &Shape| shape.of.is_multiple_of(shape.panels);
        assert!(gemm.shapes.iter().all(whole), "{gemm:?}");
    }
    for codes in Codes::ALL {
        let portable = |gemm: &&&Gemm| gemm.codes() == codes && gemm.needs() == Features::NONE;
        assert_eq!(entries.iter().filter(portable).count(), 1, "{codes:?}");
    }
}

#[test]
fn the_best_entry_is_chosen_for_a_set() {
    let view = View::new(crate::stored::Floats::from_f32(&[1.0; 4], [2, 2]).unwrap());
    for (have, needs) in [
        (Features::NONE, Features::NONE),
        (Features::AVX2, Features::NONE),
        #[cfg(target_arch = "x86_64")]
        (Features::V3, Features::V3),
        #[cfg(target_arch = "x86_64")]
        (Features::V4.with(Features::AVX512_BF16), Features::V4),
    ] {
        assert_eq!(gemm(&view, OperandKind::F32, have).unwrap().needs(), needs, "{have}");
    }
}

#[test]
fn tiles_cover_everything_once() {
    for gemm in ALL.into_iter().flatten() {
        for (rows, panels) in [(1, 1), (1, 3), (5, 4), (15, 2), (16, 3), (7, 1), (0, 4)] {
            let mut seen = vec![0; rows * panels];
            gemm.cover(rows, panels, |shape, rows, panel| {
                for i in rows {
                    (panel..panel + shape.panels).for_each(|j| seen[i * panels + j] += 1);
                }
            });
            assert!(seen.iter().all(|times| *times == 1), "{gemm:?}: {rows} x {panels}");
        }
    }
}

/// Weights packed for one entry are refused by another; so are rows for other weights.
#[test]
fn what_does_not_belong_is_refused() {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    let refused = |f: &mut dyn FnMut()| catch_unwind(AssertUnwindSafe(f)).is_err();
    let floats = |k| View::new(crate::stored::Floats::from_f32(&vec![1.0; 2 * k], [2, k]).unwrap());
    let find = |codes| PORTABLE.iter().find(|gemm| gemm.codes() == codes).unwrap();
    let (gemm, other) = (find(Codes::F32), find(Codes::Bf16));
    assert!(pack(&floats(3), other).unwrap_err().to_string().contains("does not read F32"));
    let (w, wide) = (pack(&floats(3), gemm).unwrap(), pack(&floats(300), gemm).unwrap());
    let x = Rows::new(&[1.0, 2.0, 3.0], 1, 3, 3);
    let mut memory = vec![0u8; 4096];
    let start = memory.as_ptr().align_offset(64);
    let memory = &mut memory[start..];
    let mut out = [0.0; 2];
    let mut out = RowsMut::new(&mut out, 1, 2, 2);
    assert!(refused(&mut || _ = other.operand(&w, x, memory)));
    assert!(refused(&mut || _ = gemm.operand(&wide, x, memory)));
    let operand = gemm.operand(&w, x, memory);
    assert!(refused(&mut || other.run(&w, operand, 0..1, 0..1, &mut out)));
    assert!(refused(&mut || gemm.run(&wide, operand, 0..1, 0..1, &mut out)));
    assert!(refused(&mut || gemm.run(&w, operand, 0..2, 0..1, &mut out)));
    assert!(refused(&mut || gemm.run(&w, operand, 0..1, 0..2, &mut out)));
    assert!(refused(&mut || gemm.run(&w, operand, 0..1, 1..1, &mut out)));
    gemm.run(&w, operand, 0..1, 0..1, &mut out);
    assert_eq!(out.row(0), [6.0, 6.0]);
}

/// A code that is its zero point is exactly nothing, whatever it meets.
#[test]
fn zero_points_cancel_nothing() {
    use crate::stored::{
        Codes, Element, Granularity, Packing, ScaleType, Scales, ZeroPoints, Zeros,
    };
    let (n, k) = (64, 96);
    let x: Vec<f32> = (0..k).map(|i| if i % 7 == 3 { 147_456.0 } else { 1e-3 }).collect();
    for (element, code, zero) in [(Element::Uint4, 0xDD, 13), (Element::Int8, 0x9A, -102)] {
        let one = 1f32.to_le_bytes().repeat(n);
        let scales =
            Scales::new(one.into(), ScaleType::F32, Granularity::Channel, [1, k], [n, k]).unwrap();
        let zeros = ZeroPoints::from_i16(&vec![zero; n], scales.shape()).unwrap();
        let mut bytes = vec![code; n * element.row_bytes(k).unwrap()];
        bytes[0] ^= 1;
        let format = (element, Packing::Rows);
        let codes =
            Codes::new(format, bytes.into(), [n, k], scales, Zeros::Each(zeros), None).unwrap();
        let view = View::new(codes);
        for gemm in all_entries(&view) {
            let out = product(gemm, &view, &x, 1, (0, 0));
            let least =
                if gemm.rows() == OperandKind::F32 { 1e-3 } else { bf16::from_f32(1e-3).to_f32() };
            assert_eq!(out[0].abs(), least, "{gemm:?}");
            assert!(out[1..].iter().all(|v| *v == 0.0), "{gemm:?}");
        }
    }
}

/// Infinities and NaN of weights and rows come out where they belong, and only there.
#[test]
fn special_values() {
    let k = 37;
    for at in [0, 17, 36] {
        let mut values = vec![1.0; 3 * k];
        values[at] = f32::INFINITY;
        values[2 * k + at] = f32::NAN;
        let view = View::new(crate::stored::Floats::from_f32(&values, [3, k]).unwrap());
        for gemm in all_entries(&view) {
            let out = product(gemm, &view, &vec![1.0; k], 1, (0, 0));
            assert_eq!((out[0], out[1]), (f32::INFINITY, k as f32), "{gemm:?}");
            assert!(out[2].is_nan(), "{gemm:?}");
        }
    }
}

/// Dot products of bf16 take numbers below the normal ones for zero: weights, rows and sums.
#[test]
fn small_numbers() {
    let least = f32::MIN_POSITIVE;
    let values = [least, least / 2.0, -least / 4.0, 1.5 * least, 2.0, -3e-5, 1e-20, 0.0];
    let numbers = |shift: usize| (0..64).map(move |i| values[(i * i + shift) % 8]);
    let weights: Vec<f32> = (0..20).flat_map(numbers).collect();
    let weights: Vec<u8> = weights.iter().flat_map(|w| bf16::from_f32(*w).to_le_bytes()).collect();
    let float = crate::stored::FloatType::Bf16;
    let floats = crate::stored::Floats::row_major(weights.into(), float, [20, 64]).unwrap();
    let (view, x) = (View::new(floats), numbers(3).collect::<Vec<f32>>());
    for kind in [OperandKind::F32, OperandKind::Bf16] {
        let twin = twin::product(&view, &x, kind, None);
        for gemm in entries(&view, kind) {
            assert_eq!(bits(&product(gemm, &view, &x, 1, (0, 0))), bits(&twin), "{gemm:?}");
        }
    }
}

#[test]
fn empty_matrices() {
    for (m, n, k) in [(0, 4, 8), (4, 0, 8), (4, 4, 0), (0, 0, 0)] {
        let view = View::new(crate::stored::Floats::from_f32(&vec![1.0; n * k], [n, k]).unwrap());
        for gemm in all_entries(&view) {
            let out = product(gemm, &view, &vec![1.0; m * k], m, (0, 0));
            assert!(out.iter().all(|v| *v == 0.0), "no products: the sum is zero");
        }
    }
}
