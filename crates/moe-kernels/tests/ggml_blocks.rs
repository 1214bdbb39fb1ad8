//! GGUF block types against vectors that another implementation decoded and encoded.
//!
//! `data/ggml/TYPE.blocks` are random bytes with finite scales, and for some types rows of a file;
//! `TYPE.values` are their values, `TYPE.encoded` the blocks that `encode.values` become (by the
//! `gguf` Python package 0.19, which follows ggml's reference code).

use moe_kernels::numerics::ggml::BlockType;
use proptest::prelude::*;

fn data(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/data/ggml/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn floats(name: &str) -> Vec<f32> {
    data(name).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn vectors(block: BlockType) -> (Vec<u8>, Vec<f32>) {
    let name = block.name().to_lowercase();
    (data(&format!("{name}.blocks")), floats(&format!("{name}.values")))
}

#[test]
fn every_type_decodes_as_the_reference() {
    for block in BlockType::ALL {
        let (bytes, expected) = vectors(block);
        assert_eq!(block.row_bytes(expected.len()), Some(bytes.len()), "{}", block.name());
        let mut values = vec![f32::NAN; expected.len()];
        block.decode_row(&bytes, 0, &mut values);
        // Equal as numbers: the reference has no negative zero in MXFP4.
        for (i, (value, expected)) in values.iter().zip(&expected).enumerate() {
            assert_eq!(value, expected, "{} value {i}", block.name());
        }
        assert!(values.iter().filter(|v| **v != 0.0).count() > values.len() / 2);
    }
}

#[test]
fn encoding_equals_the_reference() {
    let values = floats("encode.values");
    let mut encoded_types = 0;
    for block in BlockType::ALL {
        let mut bytes = vec![0; block.block_bytes()];
        if !block.encode(&vec![0.0; block.block_len()], &mut bytes) {
            continue;
        }
        encoded_types += 1;
        let expected = data(&format!("{}.encoded", block.name().to_lowercase()));
        let expected = expected.chunks_exact(block.block_bytes());
        for (i, (values, expected)) in values.chunks_exact(32).zip(expected).enumerate() {
            assert!(block.encode(values, &mut bytes));
            if block == BlockType::Mxfp4 {
                assert_same_error(block, values, &bytes, expected);
            } else {
                assert_eq!(bytes, expected, "{} block {i}", block.name());
            }
        }
    }
    assert_eq!(encoded_types, 6);
}

/// Ties and zeros of MXFP4 may have other codes than the reference's: as near they must be.
fn assert_same_error(block: BlockType, values: &[f32], bytes: &[u8], expected: &[u8]) {
    assert_eq!(bytes[0], expected[0]);
    let (mut got, mut reference) = ([0.0; 32], [0.0; 32]);
    block.decode(bytes, &mut got);
    block.decode(expected, &mut reference);
    for ((x, got), reference) in values.iter().zip(got).zip(reference) {
        assert_eq!((x - got).abs(), (x - reference).abs(), "{x}: {got} and {reference}");
    }
}

#[test]
fn numbers_and_names_are_those_of_the_file_format() {
    for block in BlockType::ALL {
        assert_eq!(BlockType::from_ggml(block.ggml()), Some(block));
    }
    let number = |name: &str| BlockType::ALL.iter().find(|b| b.name() == name).unwrap().ggml();
    assert_eq!((number("Q4_K"), number("Q6_K"), number("IQ4_NL")), (12, 14, 20));
    assert_eq!((number("Q8_0"), number("IQ4_XS"), number("MXFP4")), (8, 23, 39));
    for plain in [0, 1, 30, 9, 999] {
        assert_eq!(BlockType::from_ggml(plain), None);
    }
    assert_eq!(BlockType::Q4K.row_bytes(512), Some(288));
    assert_eq!(BlockType::Q4K.row_bytes(500), None);
    assert_eq!(BlockType::Q8_0.row_bytes(usize::MAX / 32 * 32), None);
}

proptest! {
    #[test]
    fn a_window_is_part_of_the_row(kind in 0..BlockType::ALL.len(), a in 0usize..513, b in 0usize..513) {
        let block = BlockType::ALL[kind];
        let (bytes, row) = vectors(block);
        let (start, end) = (a.min(b).min(row.len()), a.max(b).min(row.len()));
        let mut window = vec![f32::NAN; end - start];
        block.decode_row(&bytes, start, &mut window);
        prop_assert_eq!(&window[..], &row[start..end]);
    }

    /// Half a step, and what rounding scale and minimum to f16 adds.
    #[test]
    fn encoding_errs_by_half_a_step(values in prop::collection::vec(-4.0f32..4.0, 32)) {
        let max = values.iter().fold(0.0f32, |max, v| max.max(v.abs()));
        let range = values.iter().fold(f32::MIN, |m, &v| m.max(v))
            - values.iter().fold(f32::MAX, |m, &v| m.min(v));
        // The `_0` types of 4 and 5 bits have one code less on the side of smaller magnitudes.
        let steps = [
            (BlockType::Q4_0, max / 8.0, 1.0),
            (BlockType::Q5_0, max / 16.0, 1.0),
            (BlockType::Q4_1, range / 15.0, 0.5),
            (BlockType::Q5_1, range / 31.0, 0.5),
            (BlockType::Q8_0, max / 127.0, 0.5),
        ];
        for (block, step, share) in steps {
            let mut bytes = vec![0; block.block_bytes()];
            prop_assert!(block.encode(&values, &mut bytes));
            let mut back = vec![0.0; 32];
            block.decode(&bytes, &mut back);
            for (x, y) in values.iter().zip(&back) {
                let bound = share * step * 1.0001 + max / 512.0;
                prop_assert!((x - y).abs() <= bound, "{} {x} {y}", block.name());
            }
        }
    }
}
