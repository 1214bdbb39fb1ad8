//! Stored matrices: one matrix, written in every packing, reads the same, whole and by windows.

use moe_kernels::numerics::{DecodeScale, EncodeScale, int4, int8};
use moe_kernels::stored::{
    Bytes, Codes, Element, FloatType, Floats, Global, Granularity, Packing, ScaleType, Scales,
    Stored, View, WeightFormat, ZeroPacking, ZeroPoints, Zeros,
};

const ROWS: usize = 24;
const COLS: usize = 64;
const GROUP: usize = 16;

/// Codes of `bits` bits, one to a byte, row after row.
fn codes(bits: usize) -> Vec<u8> {
    (0..ROWS * COLS).map(|i| ((i * 37 + i / COLS * 11) % (1 << bits)) as u8).collect()
}

fn pack_rows(codes: &[u8], bits: usize) -> Vec<u8> {
    let mut bytes = vec![0; codes.len() * bits / 8];
    for (i, code) in codes.iter().enumerate() {
        for bit in 0..bits {
            bytes[(i * bits + bit) / 8] |= (code >> bit & 1) << ((i * bits + bit) % 8);
        }
    }
    bytes
}

fn transposed(codes: &[u8]) -> Vec<u8> {
    (0..COLS).flat_map(|k| (0..ROWS).map(move |n| codes[n * COLS + k])).collect()
}

fn scale(n: usize, group: usize) -> f32 {
    0.25 + n as f32 + group as f32 / 32.0
}

fn scales() -> Scales {
    let bytes: Vec<u8> = (0..ROWS)
        .flat_map(|n| (0..COLS / GROUP).flat_map(move |g| scale(n, g).to_le_bytes()))
        .collect();
    let block = [1, GROUP];
    Scales::new(bytes.into(), ScaleType::F32, Granularity::Group, block, [ROWS, COLS]).unwrap()
}

fn zero(n: usize, group: usize) -> u8 {
    ((n * 5 + group * 3) % 16) as u8
}

fn decoded(view: &View) -> Vec<f32> {
    let mut out = vec![0.0; view.rows() * view.cols()];
    for (row, out) in out.chunks_exact_mut(view.cols()).enumerate() {
        view.decode_row(row, out);
    }
    out
}

#[test]
fn every_packing_of_the_same_codes_reads_the_same() {
    for (element, bits) in [(Element::Uint4, 4), (Element::Uint8, 8)] {
        let codes = codes(bits);
        let rows = pack_rows(&codes, bits);
        let mut gptq = vec![0; rows.len()];
        let mut awq = vec![0; rows.len()];
        match bits {
            4 => {
                int4::rows_to_gptq(&rows, ROWS, COLS, &mut gptq);
                int4::rows_to_awq(&rows, ROWS, COLS, &mut awq);
            }
            _ => int8::rows_to_gptq(&rows, ROWS, COLS, &mut gptq),
        }
        let mut packings = vec![
            (Packing::Rows, rows.clone()),
            (Packing::Transposed, pack_rows(&transposed(&codes), bits)),
            (Packing::Gptq, gptq),
        ];
        if bits == 4 {
            packings.push((Packing::Awq, awq));
        }
        let expected: Vec<f32> = codes
            .iter()
            .enumerate()
            .map(|(i, code)| (f32::from(*code) - 3.0) * scale(i / COLS, i % COLS / GROUP))
            .collect();
        for (packing, bytes) in packings {
            let stored = Codes::new(
                (element, packing),
                bytes.into(),
                [ROWS, COLS],
                scales(),
                Zeros::Same(3),
                None,
            );
            let view = View::new(
                stored.unwrap_or_else(|misfit| panic!("{element:?} {packing:?}: {misfit}")),
            );
            assert_eq!(decoded(&view), expected, "{element:?} {packing:?}");
            let window = view.rows_of(1, 2, 7).and_then(|rows| rows.cols_of(5..50)).unwrap();
            let part: Vec<f32> =
                (0..7).flat_map(|row| &expected[(1 + row * 2) * COLS..][5..50]).copied().collect();
            assert_eq!(decoded(&window), part, "{element:?} {packing:?}");
            // a slice of one of two projections in turn: its rows and columns are counted from the window's
            let inner = window.rows_of(1, 2, 3).and_then(|rows| rows.cols_of(2..30)).unwrap();
            let part: Vec<f32> =
                (0..3).flat_map(|row| &expected[(3 + row * 4) * COLS..][7..35]).copied().collect();
            assert_eq!(decoded(&inner), part, "{element:?} {packing:?}");
            let mut raw = [0; 45];
            window.codes().unwrap().codes(window.stored_row(3), window.stored_cols(), &mut raw);
            assert_eq!(raw, codes[7 * COLS..][5..50], "{element:?} {packing:?}");
        }
    }
}

#[test]
fn six_bit_and_signed_codes_are_read_by_rows() {
    let six = codes(6);
    let scale = |stored: ScaleType, one: Vec<u8>| {
        let bytes: Vec<u8> = one.repeat(ROWS * COLS / 32);
        Scales::new(bytes.into(), stored, Granularity::Group, [1, 32], [ROWS, COLS]).unwrap()
    };
    let ones = scale(ScaleType::E8m0, vec![127]);
    for element in [Element::E2m3, Element::E3m2] {
        let packed = pack_rows(&six, 6).into();
        let shape = [ROWS, COLS];
        let packing = (element, Packing::Rows);
        let stored = Codes::new(packing, packed, shape, ones.clone(), Zeros::None, None).unwrap();
        let expected: Vec<f32> = six.iter().map(|code| element.value(*code)).collect();
        assert_eq!(decoded(&View::new(stored.clone())), expected);
        let mut raw = vec![0; COLS];
        stored.codes(3, 0..COLS, &mut raw);
        assert_eq!(raw, six[3 * COLS..4 * COLS]);
    }
    let four = codes(4);
    let ones = scale(ScaleType::F32, 1.0f32.to_le_bytes().to_vec());
    for (packing, bytes) in [
        (Packing::Rows, pack_rows(&four, 4)),
        (Packing::Transposed, pack_rows(&transposed(&four), 4)),
    ] {
        let packing = (Element::Int4, packing);
        let stored =
            Codes::new(packing, bytes.into(), [ROWS, COLS], ones.clone(), Zeros::None, None);
        let expected: Vec<f32> = four
            .iter()
            .map(|code| if *code < 8 { f32::from(*code) } else { f32::from(*code) - 16.0 })
            .collect();
        assert_eq!(decoded(&View::new(stored.unwrap())), expected, "{packing:?}");
    }
}

/// Integers of every number of bits with a least value for each group: `code · scale + minimum`, rounded
/// once whatever the scales' type.
#[test]
fn integers_with_minima_are_read_by_rows() {
    let elements = [
        (Element::Uint1, 1),
        (Element::Uint2, 2),
        (Element::Uint3, 3),
        (Element::Uint4, 4),
        (Element::Uint5, 5),
        (Element::Uint6, 6),
        (Element::Uint8, 8),
    ];
    let groups = COLS / GROUP;
    // numbers that fill f32, and numbers of eight bits
    let number = |n: usize, g: usize, short: bool| {
        let number = (1.0 + (n * groups + g) as f32 / 1000.0) / 3.0;
        if short { f32::from_bits(number.to_bits() & 0xFFFF_0000) } else { number }
    };
    for (element, bits) in elements {
        for short in [false, true] {
            let numbers = |of: &dyn Fn(usize, usize) -> f32| {
                let all = (0..ROWS).flat_map(|n| (0..groups).map(move |g| (n, g)));
                let bytes: Vec<u8> = all
                    .flat_map(|(n, g)| match short {
                        true => of(n, g).to_le_bytes()[2..].to_vec(),
                        false => of(n, g).to_le_bytes().to_vec(),
                    })
                    .collect();
                let stored = if short { ScaleType::Bf16 } else { ScaleType::F32 };
                let (granularity, block) = (Granularity::Group, [1, GROUP]);
                Scales::new(bytes.into(), stored, granularity, block, [ROWS, COLS]).unwrap()
            };
            let scales = numbers(&|n, g| number(n, g, short));
            let minima = numbers(&|n, g| -number(g, n, short));
            let codes = codes(bits);
            let packing = (element, Packing::Rows);
            let bytes: Bytes = pack_rows(&codes, bits).into();
            let make = |zeros, global| {
                let scales = scales.clone();
                Codes::new(packing, bytes.clone(), [ROWS, COLS], scales, zeros, global)
            };
            let view = View::new(make(Zeros::Minima(minima.clone()), None).unwrap());
            assert_eq!(view.format(), WeightFormat::IntMinima(bits as u8));
            assert_eq!(view.describe(), format!("int{bits} (group of {GROUP}, minima)"));
            let expected: Vec<f32> = codes
                .iter()
                .enumerate()
                .map(|(i, code)| {
                    let (n, g) = (i / COLS, i % COLS / GROUP);
                    f32::from(*code).mul_add(number(n, g, short), -number(g, n, short))
                })
                .collect();
            assert_eq!(decoded(&view), expected, "{element:?}");
            let window = view.rows_of(1, 2, 7).and_then(|rows| rows.cols_of(5..50)).unwrap();
            let part: Vec<f32> =
                (0..7).flat_map(|row| &expected[(1 + row * 2) * COLS..][5..50]).copied().collect();
            assert_eq!(decoded(&window), part, "{element:?}");
            // no format has both, and none has minima of other groups
            let global = Some(Global::Multiply(DecodeScale(1.0)));
            assert!(make(Zeros::Minima(minima), global).is_err());
            let wider = Bytes::from(vec![0; ROWS * groups / 2 * 4]);
            let (granularity, block) = (Granularity::Group, [1, 2 * GROUP]);
            let wider = Scales::new(wider, ScaleType::F32, granularity, block, [ROWS, COLS]);
            assert!(make(Zeros::Minima(wider.unwrap()), None).is_err());
        }
    }
}

#[test]
fn zero_points_lie_in_seven_ways() {
    let groups = COLS / GROUP;
    let at = |index: usize| zero(index / groups, index % groups);
    let by_row: Vec<u8> = (0..ROWS * groups).map(at).collect();
    let by_group: Vec<u8> = (0..groups).flat_map(|g| (0..ROWS).map(move |n| zero(n, g))).collect();
    // [groups, N/8] words with AWQ's order is what an AWQ array of `groups` columns is
    let mut awq = vec![0; by_row.len() / 2];
    let rows = pack_rows(&by_row, 4);
    let padded: Vec<u8> = (0..ROWS)
        .flat_map(|n| {
            let mut row = rows[n * groups / 2..(n + 1) * groups / 2].to_vec();
            row.resize(4, 0);
            row
        })
        .collect();
    let mut wide = vec![0; ROWS * 4];
    int4::rows_to_awq(&padded, ROWS, 8, &mut wide);
    awq.copy_from_slice(&wide[..by_row.len() / 2]);
    let words = |per: usize, bits: usize| -> Vec<u8> {
        // [N/per, groups] words: the codes of `per` rows in each
        let order: Vec<u8> = (0..ROWS / per)
            .flat_map(|w| {
                (0..groups).flat_map(move |g| (0..per).map(move |i| zero(w * per + i, g)))
            })
            .collect();
        pack_rows(&order, bits)
    };
    let wide: Vec<u8> = by_row.iter().flat_map(|z| i16::from(*z).to_le_bytes()).collect();
    for (packing, bytes) in [
        (ZeroPacking::I16, wide),
        (ZeroPacking::I8, by_row.clone()),
        (ZeroPacking::Nibbles, pack_rows(&by_group, 4)),
        (ZeroPacking::Bytes, by_group.clone()),
        (ZeroPacking::Awq, awq),
        (ZeroPacking::NibblesByGroup, words(8, 4)),
        (ZeroPacking::BytesByGroup, words(4, 8)),
    ] {
        let zeros = ZeroPoints::new(bytes.clone().into(), packing, [ROWS, groups], 1).unwrap();
        for n in 0..ROWS {
            for g in 0..groups {
                assert_eq!(zeros.get(n, g), i16::from(zero(n, g)) + 1, "{packing:?} [{n}, {g}]");
            }
        }
        assert!(ZeroPoints::new(bytes[1..].to_vec().into(), packing, [ROWS, groups], 1).is_err());
    }
}

/// The last word of a line is padded: the next group's zero points begin with a word of their own.
#[test]
fn zero_points_of_rows_that_fill_no_words() {
    let (rows, groups) = (13usize, 3usize);
    for (packing, bits, by_group) in [
        (ZeroPacking::Nibbles, 4, false),
        (ZeroPacking::Bytes, 8, false),
        (ZeroPacking::NibblesByGroup, 4, true),
        (ZeroPacking::BytesByGroup, 8, true),
    ] {
        let per = 32 / bits;
        let words = 0..rows.div_ceil(per);
        let of_word = move |word: usize, group: usize| {
            let of_row = move |row: usize| if row < rows { zero(row, group) } else { 0 };
            (word * per..(word + 1) * per).map(of_row)
        };
        let codes: Vec<u8> = match by_group {
            true => words.flat_map(|w| (0..groups).flat_map(move |g| of_word(w, g))).collect(),
            false => {
                (0..groups).flat_map(|g| words.clone().flat_map(move |w| of_word(w, g))).collect()
            }
        };
        let bytes = pack_rows(&codes, bits).into();
        let zeros = ZeroPoints::new(bytes, packing, [rows, groups], 0).unwrap();
        for (n, g) in (0..rows).flat_map(|n| (0..groups).map(move |g| (n, g))) {
            assert_eq!(zeros.get(n, g), i16::from(zero(n, g)), "{packing:?} [{n}, {g}]");
        }
    }
}

#[test]
fn transposed_scales_floats_and_tensor_scales() {
    let by_group: Vec<u8> = (0..COLS / GROUP)
        .flat_map(|g| (0..ROWS).flat_map(move |n| scale(n, g).to_le_bytes()))
        .collect();
    let block = [1, GROUP];
    let shape = [ROWS, COLS];
    let turned =
        Scales::new(by_group.into(), ScaleType::F32, Granularity::Group, block, shape).unwrap();
    let turned = turned.transposed();
    let codes = codes(8);
    let make = |scales: Scales, global| {
        let packing = (Element::Int8, Packing::Rows);
        let bytes = Bytes::from(codes.clone());
        View::new(Codes::new(packing, bytes, shape, scales, Zeros::None, global).unwrap())
    };
    assert_eq!(decoded(&make(turned, None)), decoded(&make(scales(), None)));
    let divided = make(scales(), Some(Global::Divide(EncodeScale(4.0))));
    let multiplied = make(scales(), Some(Global::Multiply(DecodeScale(0.25))));
    assert_eq!(decoded(&divided), decoded(&multiplied));
    let expected = f32::from(codes[COLS + 20] as i8) * scale(1, 1) / 4.0;
    assert_eq!(decoded(&divided)[COLS + 20], expected);

    let values: Vec<f32> = (0..ROWS * COLS).map(|i| i as f32 / 8.0).collect();
    let turned: Vec<u8> = (0..COLS)
        .flat_map(|k| (0..ROWS).map(move |n| n * COLS + k))
        .flat_map(|i| values[i].to_le_bytes())
        .collect();
    let floats = Floats::transposed(turned.into(), FloatType::F32, shape).unwrap();
    assert!(floats.float_rows().is_none());
    let view = View::new(floats);
    assert_eq!(view.format(), WeightFormat::F32);
    assert_eq!(decoded(&view), values);
    assert_eq!(decoded(&View::new(Floats::from_f32(&values, shape).unwrap())), values);
    assert_eq!(view.rows_of(0, 1, 1).unwrap().stored_bytes(), COLS * 4);
    assert!(matches!(view.stored(), Stored::Floats(_)));
}

/// Blocks as many down as across: nothing but the numbers tells which way the grid lies.
#[test]
fn a_square_grid_of_scales_is_read_row_by_row() {
    let grid = [1.0f32, 2.0, 4.0, 8.0];
    let bytes: Vec<u8> = grid.iter().flat_map(|scale| scale.to_le_bytes()).collect();
    let (block, shape) = ([ROWS / 2, COLS / 2], [ROWS, COLS]);
    let scales = Scales::new(bytes.into(), ScaleType::F32, Granularity::Block, block, shape);
    let packing = (Element::Int8, Packing::Rows);
    let ones = Bytes::from(vec![1u8; ROWS * COLS]);
    let codes = Codes::new(packing, ones, shape, scales.unwrap(), Zeros::None, None).unwrap();
    let corners = |values: &[f32]| {
        [(0, 0), (0, COLS - 1), (ROWS - 1, 0), (ROWS - 1, COLS - 1)]
            .map(|(row, col)| values[row * COLS + col])
    };
    assert_eq!(corners(&decoded(&View::new(codes))), grid);
}

#[test]
fn what_does_not_fit_is_refused() {
    let new = |packing, bytes: usize, shape| {
        let [rows, _]: [usize; 2] = shape;
        let scales = vec![0; rows * 4];
        let scales =
            Scales::new(scales.into(), ScaleType::F32, Granularity::Channel, [1, 1], shape);
        let codes = Bytes::from(vec![0; bytes]);
        Codes::new((Element::Uint4, packing), codes, shape, scales?, Zeros::None, None)
    };
    assert!(new(Packing::Rows, 8 * 4, [8, 8]).is_ok());
    // rows may be padded, but not cut
    assert!(new(Packing::Rows, 8 * 5, [8, 8]).is_ok());
    assert!(new(Packing::Rows, 8 * 3, [8, 8]).is_err());
    assert!(new(Packing::Rows, 8 * 4 + 1, [8, 8]).is_err());
    assert!(new(Packing::Transposed, 8 * 4, [8, 8]).is_ok());
    assert!(new(Packing::Transposed, 8 * 4, [7, 8]).is_err());
    assert!(new(Packing::Gptq, 8 * 4, [8, 8]).is_ok());
    assert!(new(Packing::Gptq, 8 * 6, [8, 12]).is_err());
    assert!(new(Packing::Awq, 8 * 4, [8, 8]).is_ok());
    assert!(new(Packing::Awq, 12 * 4, [12, 8]).is_err());
}
