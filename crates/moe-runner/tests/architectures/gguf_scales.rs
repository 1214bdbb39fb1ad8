//! GGUF's scales of whole matrices: one for each expert, or one for all.

use moe_runner::checkpoint::{Checkpoint, architecture};
use moe_runner::hidden::{ActivationDtype, Rows, RowsMut};
use moe_runner::random::Random;
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, Options};
use moe_runner::weights::LoadedLayer;

use crate::gguf::{U32, write_data};

const EXPERTS: usize = 4;
const HIDDEN: usize = 64;
const INTERMEDIATE: usize = 4;

/// The layer of a file whose matrices are f32 that count from one in eighths, whose scales are 2, 3, 4
/// and 5, and whose `up` is as `up` says.
fn layer(scales: &[&'static str], up: Option<&[u8]>) -> LoadedLayer {
    let keys = [
        ("block_count", U32(1)),
        ("embedding_length", U32(HIDDEN as u32)),
        ("feed_forward_length", U32(INTERMEDIATE as u32)),
        ("expert_count", U32(EXPERTS as u32)),
        ("expert_used_count", U32(2)),
    ];
    let mut tensors = vec![
        "blk.0.ffn_gate_inp.weight 4 64",
        "blk.0.ffn_gate_exps.weight 4 4 64",
        "blk.0.ffn_up_exps.weight 4 4 64",
        "blk.0.ffn_down_exps.weight 4 64 4",
    ];
    tensors.extend(scales);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    write_data(&path, "qwen3moe", &keys, &tensors, |name, count| {
        let number = |i: usize| match name.ends_with(".scale") {
            true => 2.0 + i as f32,
            false => 1.0 + i as f32 / 8.0,
        };
        match up {
            Some(bytes) if name.contains("up_exps.weight") => (NVFP4, bytes.to_vec()),
            _ => (0, (0..count).flat_map(|i| number(i).to_le_bytes()).collect()),
        }
    });
    let checkpoint = Checkpoint::open(&path).unwrap();
    let entry = &architecture::layers(&checkpoint).unwrap()[0];
    LoadedLayer::load(&checkpoint, entry).unwrap()
}

/// Every weight is what is stored times its expert's scale, or the one for all.
#[test]
fn scales_multiply_weights() {
    let layer = layer(&["blk.0.ffn_up_exps.scale 4", "blk.0.ffn_down_exps.scale 1"], None);
    for (e, expert) in layer.experts.iter().enumerate() {
        let gate = expert.gate.as_ref().unwrap();
        for (matrix, scale) in [(gate, 1.0), (&expert.up, 2.0 + e as f32), (&expert.down, 2.0)] {
            let mut row = vec![0.0; matrix.cols()];
            for n in 0..matrix.rows() {
                matrix.decode_row(n, &mut row);
                for (k, value) in row.iter().enumerate() {
                    let index = (e * matrix.rows() + n) * matrix.cols() + k;
                    assert_eq!(*value, (1.0 + index as f32 / 8.0) * scale, "expert {e} [{n}, {k}]");
                }
            }
        }
    }
}

/// An expert whose down projection has a scale returns so many times the output.
#[test]
fn scales_multiply_outputs() {
    let outputs = |layer: LoadedLayer| -> Vec<f32> {
        let options = Options::new(ActivationDtype::F32, 1).unwrap();
        let mut runner = MoeRunner::new(layer.ready(&options).unwrap());
        // one token for each expert, which it alone gets
        let hidden: Vec<f32> = (0..EXPERTS * HIDDEN).map(|i| (i % HIDDEN) as f32 / 512.0).collect();
        let ids: Vec<i32> = (0..EXPERTS as i32).collect();
        let mut output = vec![f32::NAN; EXPERTS * HIDDEN];
        let input = ForwardInput::routed(Rows::F32(&hidden), &ids, &[1.0; EXPERTS]);
        runner.forward(&input, RowsMut::F32(&mut output)).unwrap();
        output
    };
    let plain = outputs(layer(&[], None));
    let scaled = outputs(layer(&["blk.0.ffn_down_exps.scale 4"], None));
    for (i, (scaled, plain)) in scaled.iter().zip(&plain).enumerate() {
        let expected = plain * (2.0 + (i / HIDDEN) as f32);
        assert!((scaled - expected).abs() <= 1e-5 * expected.abs(), "{i}: {scaled} {expected}");
    }
}

/// The type's number in GGUF.
const NVFP4: u32 = 40;

/// NVFP4: 64 values in a block of four scales (E4M3 without a sign) and 32 bytes, in which each 16 values
/// are 8 bytes, value `i` below value `i + 8`.
#[test]
fn scales_multiply_nvfp4() {
    const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let random = &mut Random::new(8);
    let rows = EXPERTS * INTERMEDIATE;
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    for _ in 0..rows {
        // 0.5 to 3.75
        let scales: Vec<u8> = (0..4).map(|_| 0x30 + (random.bits() % 24) as u8).collect();
        let codes: Vec<u8> = (0..64).map(|_| (random.bits() % 16) as u8).collect();
        for (code, i) in codes.iter().zip(0..) {
            let scale = scales[i / 16];
            let power = f32::from(1u16 << (scale >> 3)) / 128.0;
            let scale = power * (1.0 + f32::from(scale & 7) / 8.0);
            let magnitude = E2M1[usize::from(code & 7)] * scale;
            values.push(if code & 8 != 0 { -magnitude } else { magnitude });
        }
        bytes.extend(&scales);
        for sixteen in codes.chunks(16) {
            bytes.extend((0..8).map(|i| sixteen[i] | sixteen[i + 8] << 4));
        }
    }
    let layer = layer(&["blk.0.ffn_up_exps.scale 4"], Some(&bytes));
    for (e, expert) in layer.experts.iter().enumerate() {
        let mut row = vec![0.0; HIDDEN];
        for n in 0..INTERMEDIATE {
            expert.up.decode_row(n, &mut row);
            let first = (e * INTERMEDIATE + n) * HIDDEN;
            let expected: Vec<f32> =
                values[first..first + HIDDEN].iter().map(|v| v * (2.0 + e as f32)).collect();
            assert_eq!(row, expected, "expert {e}, row {n}");
        }
    }
}
