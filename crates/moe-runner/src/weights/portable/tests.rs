//! Every stored format, as a whole and as a window, comes back bit by bit.

use moe_kernels::numerics::ggml::BlockType;
use moe_kernels::numerics::quantise::{Fp6, GroupScale, Mxfp8Rule, Nvfp4Rule, Qdq};
use moe_kernels::numerics::{DecodeScale, EncodeScale};

use crate::random::Random;
use crate::spec::Granularity;
use crate::weights::{
    ActivationQuant, Blocks, Codes, Element, Expert, FloatType, Floats, Global, Matrix, Packing,
    ScaleType, Scales, Stored, ZeroPoints, Zeros,
};

const ROWS: usize = 24;
const COLS: usize = 256;

fn random_bytes(random: &mut Random, len: usize) -> Vec<u8> {
    (0..len).map(|_| random.bits() as u8).collect()
}

fn f32_bytes(random: &mut Random, len: usize) -> Vec<u8> {
    (0..len).flat_map(|_| (random.unit() as f32).to_le_bytes()).collect()
}

fn scaled(
    element: Element,
    (stored, granularity, block): (ScaleType, Granularity, [usize; 2]),
    zeros: impl Fn([usize; 2]) -> Zeros,
    global: Option<Global>,
) -> Codes {
    let random = &mut Random::new(5);
    let (down, across) = match granularity {
        Granularity::Tensor => (1, 1),
        Granularity::Channel => (ROWS, 1),
        Granularity::Group => (ROWS, COLS.div_ceil(block[1])),
        Granularity::Block => (ROWS.div_ceil(block[0]), COLS.div_ceil(block[1])),
    };
    let scales = match stored {
        ScaleType::F32 => f32_bytes(random, down * across),
        _ => random_bytes(random, down * across * stored.size()),
    };
    let scales = Scales::new(scales.into(), stored, granularity, block, [ROWS, COLS]).unwrap();
    let codes = random_bytes(random, ROWS * element.row_bytes(COLS).unwrap());
    let packing = (element, Packing::Rows);
    let zeros = zeros([down, across]);
    Codes::new(packing, codes.into(), [ROWS, COLS], scales, zeros, global).unwrap()
}

/// Every kind of array, by name.
fn arrays() -> Vec<(&'static str, Stored)> {
    use Granularity as G;
    use ScaleType as S;
    let none = |_| Zeros::None;
    let each = |[down, across]: [usize; 2]| {
        let zeros: Vec<i16> = (0..down * across).map(|z| z as i16 % 16).collect();
        Zeros::Each(ZeroPoints::from_i16(&zeros, [down, across]).unwrap())
    };
    let minima = |[down, across]: [usize; 2]| {
        let bytes: Vec<u8> = (0..down * across).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let minima = Scales::new(bytes.into(), S::F32, G::Group, [1, 32], [ROWS, COLS]);
        Zeros::Minima(minima.unwrap())
    };
    let random = &mut Random::new(1);
    let mut floats = |float: FloatType| random_bytes(random, ROWS * COLS * float.size());
    let rows = |bytes: Vec<u8>, float| Floats::row_major(bytes.into(), float, [ROWS, COLS]);
    let columns = |bytes: Vec<u8>, float| Floats::transposed(bytes.into(), float, [ROWS, COLS]);
    let groups = (0..COLS).map(|k| (k * 7 % 8) as u32).collect();
    let grouped = (S::F32, G::Group, [1, 32]);
    let int4 = scaled(Element::Uint4, grouped, each, None);
    let blocks = random_bytes(&mut Random::new(2), ROWS * BlockType::Q4K.row_bytes(COLS).unwrap());
    vec![
        ("f32", rows(floats(FloatType::F32), FloatType::F32).unwrap().into()),
        ("bf16", rows(floats(FloatType::Bf16), FloatType::Bf16).unwrap().into()),
        ("f16, transposed", columns(floats(FloatType::F16), FloatType::F16).unwrap().into()),
        ("fp8, tensor", scaled(Element::E4m3, (S::F32, G::Tensor, [0, 0]), none, None).into()),
        ("fp8, channel", scaled(Element::E4m3, (S::F32, G::Channel, [0, 0]), none, None).into()),
        ("fp8, block", scaled(Element::E5m2, (S::F32, G::Block, [8, 128]), none, None).into()),
        ("int8, same zero", scaled(Element::Int8, grouped, |_| Zeros::Same(-3), None).into()),
        ("int4, own zeros", int4.clone().into()),
        ("int3, minima", scaled(Element::Uint3, grouped, minima, None).into()),
        ("int4, act-order", int4.with_groups(groups).unwrap().into()),
        ("mxfp6", scaled(Element::E2m3, (S::E8m0, G::Group, [1, 32]), none, None).into()),
        (
            "nvfp4, divided",
            scaled(
                Element::E2m1,
                (S::E4m3, G::Group, [1, 16]),
                none,
                Some(Global::Divide(EncodeScale(3.7))),
            )
            .into(),
        ),
        (
            "nvfp4, multiplied",
            scaled(
                Element::E2m1,
                (S::E4m3, G::Group, [1, 16]),
                none,
                Some(Global::Multiply(DecodeScale(0.3))),
            )
            .into(),
        ),
        ("q4_k", Blocks::new(BlockType::Q4K, blocks.into(), [ROWS, COLS]).unwrap().into()),
    ]
}

fn bits(matrix: &Matrix) -> Vec<u32> {
    let mut row = vec![0.0; matrix.cols()];
    let mut all = Vec::new();
    for n in 0..matrix.rows() {
        matrix.decode_row(n, &mut row);
        all.extend(row.iter().map(|v: &f32| v.to_bits()));
    }
    all
}

fn expert(up: Matrix) -> Expert {
    Expert {
        gate: None,
        down: up.clone(),
        up,
        gate_bias: None,
        up_bias: Some(vec![1.5, f32::MIN_POSITIVE]),
        down_bias: None,
        norm: Some(vec![]),
    }
}

#[test]
fn every_array_and_every_window_comes_back() {
    for (name, array) in arrays() {
        let all = Matrix::new(array);
        let windows = [
            ("all", all.clone()),
            ("rows", all.rows_of(8, 1, 16).unwrap()),
            ("rows across blocks", all.rows_of(5, 1, 9).unwrap()),
            ("every second row", all.rows_of(1, 2, 12).unwrap()),
            ("columns", all.rows_of(3, 1, 4).unwrap().cols_of(128..192).unwrap()),
        ];
        for (window, matrix) in windows {
            let bytes = expert(matrix.clone()).to_bytes();
            let read = Expert::from_bytes(&bytes).unwrap().up;
            assert_eq!(bits(&read), bits(&matrix), "{name}, {window}");
            assert_eq!(read.format(), matrix.format(), "{name}, {window}");
            assert_eq!(read.codes().is_some(), matrix.codes().is_some(), "{name}, {window}");
            // no more than the rows' own bytes (twice: up and down), and sizes and small vectors;
            // where rows do not fill blocks of scales, each gets its own
            let own = read.view().stored().stored_bytes();
            assert!(bytes.len() <= 2 * own + 2 * COLS * 4 + 300, "{name}, {window}: {own}");
            let share = matrix.view().stored().stored_bytes() * read.rows() / ROWS;
            assert!(own <= share + ROWS * 8 + COLS * 4, "{name}, {window}: {own} of {share}");
        }
    }
}

#[test]
fn everything_else_of_an_expert_comes_back() {
    let matrix = |random: &mut Random| crate::weights::random_matrix(random, FloatType::Bf16, 3, 5);
    let random = &mut Random::new(9);
    let full = Expert {
        gate: Some(matrix(random)),
        up: matrix(random),
        down: matrix(random),
        gate_bias: Some(vec![0.1, -0.0]),
        up_bias: Some(vec![2.0]),
        down_bias: Some(vec![-3.0; 7]),
        norm: Some(vec![0.5]),
    };
    let read = Expert::from_bytes(&full.to_bytes()).unwrap();
    assert_eq!(bits(&read.gate.unwrap()), bits(&full.gate.clone().unwrap()));
    assert_eq!(bits(&read.up), bits(&full.up));
    assert_eq!(bits(&read.down), bits(&full.down));
    assert_eq!(read.gate_bias, full.gate_bias);
    assert!(read.gate_bias.unwrap()[1].is_sign_negative());
    assert_eq!(
        (read.up_bias, read.down_bias, read.norm),
        (full.up_bias, full.down_bias, full.norm)
    );
}

#[test]
fn every_quantisation_of_the_input_comes_back() {
    let all = [
        Qdq::Fp8Static { scale: 0.1 },
        Qdq::Fp8Tensor,
        Qdq::Fp8Token,
        Qdq::Fp8Group { size: 128, scale: GroupScale::PowerOfTwo },
        Qdq::Int8Static { scale: 1e-9 },
        Qdq::Int8Tensor,
        Qdq::Int8Token,
        Qdq::Int8Group { size: 64 },
        Qdq::Mxfp8(Mxfp8Rule::Ceil),
        Qdq::Mxfp6(Fp6::E2M3),
        Qdq::Mxfp4,
        Qdq::Nvfp4 { global: EncodeScale(1.7), rule: Nvfp4Rule::Reciprocal },
        Qdq::Nvfp4Token { rule: Nvfp4Rule::Division },
    ];
    let all = all.map(ActivationQuant::Quantised);
    for input in all.into_iter().chain([ActivationQuant::None]) {
        let matrix = crate::weights::random_matrix(&mut Random::new(1), FloatType::F32, 2, 2);
        let read = Expert::from_bytes(&expert(matrix.with_input(input)).to_bytes()).unwrap();
        assert_eq!(read.up.input, input);
    }
}

#[test]
fn broken_bytes_are_refused() {
    for (_, array) in arrays() {
        let bytes = expert(Matrix::new(array).rows_of(0, 1, 2).unwrap()).to_bytes();
        for len in (0..bytes.len()).step_by(13) {
            assert!(Expert::from_bytes(&bytes[..len]).is_err());
        }
        let message = Expert::from_bytes(&[&bytes[..], &[0]].concat()).unwrap_err().to_string();
        assert!(message.contains("1 bytes are left over"), "{message}");
        // whatever the damage, an answer or an error: no panic, no memory beyond the bytes
        for at in (0..bytes.len()).take(200) {
            for value in [0, 1, 0x7f, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] = value;
                let _ = Expert::from_bytes(&damaged);
            }
        }
    }
}
