//! Checkpoints as files: every weight of every form is exact, as this workspace's own reader sees it,
//! and the layer that it makes of them is right.

use moe_acid::write::{self, Form};
use moe_acid::{Block, Decoder, FAMILIES, Readings};
use moe_runner::checkpoint::{Checkpoint, architecture};
use moe_runner::hidden::{ActivationDtype, Rows, RowsMut};
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, Options};
use moe_runner::weights::{LoadedLayer, Matrix};

fn decoded(matrix: &Matrix) -> Vec<f64> {
    let mut row = vec![0.0; matrix.cols()];
    let mut all = Vec::new();
    for n in 0..matrix.rows() {
        matrix.decode_row(n, &mut row);
        all.extend(row.iter().map(|v| f64::from(*v)));
    }
    all
}

#[test]
fn every_form_holds_every_weight_and_the_layer_is_right() {
    let folder = tempfile::tempdir().unwrap();
    let mut written = 0;
    for family in FAMILIES {
        let block = Block::new(family);
        let decoder = Decoder::new(&block);
        for form in Form::ALL {
            let name = format!("{} in {}", family.name, form.name());
            let path = folder.path().join(&name);
            match write::checkpoint(&block, form, &path) {
                Ok(()) => written += 1,
                Err(error) => {
                    assert_eq!(Some(error.to_string()), form.refuses(family), "{name}");
                    assert!(!path.exists());
                    continue;
                }
            }
            let size = std::fs::metadata(path.join("model.safetensors")).unwrap().len();
            // float32 is twice what is published
            assert!(size < if form == Form::F32 { 4 << 20 } else { 2 << 20 }, "{name}: {size}");

            let checkpoint = Checkpoint::open(&path).unwrap();
            let entry = architecture::layers(&checkpoint).unwrap().remove(0);
            let layer = LoadedLayer::load(&checkpoint, &entry).unwrap_or_else(|e| panic!("{e}"));
            for (e, (expert, weights)) in layer.experts.iter().zip(&block.experts).enumerate() {
                let gate = expert.gate.as_ref().unwrap();
                assert_eq!(decoded(gate), weights.gate.dense(), "{name}: gate of {e}");
                assert_eq!(decoded(&expert.up), weights.up.dense(), "{name}: up of {e}");
                assert_eq!(decoded(&expert.down), weights.down.dense(), "{name}: down of {e}");
            }

            let rows: Vec<f32> = block.embeddings().concat().iter().map(|v| *v as f32).collect();
            let mut output = vec![0.0; rows.len()];
            let options = Options::new(ActivationDtype::F32, 1).unwrap();
            let mut runner = MoeRunner::new(layer.ready(&options).unwrap());
            let input = ForwardInput::new(Rows::F32(&rows));
            runner.forward(&input, RowsMut::F32(&mut output)).unwrap();
            let readings = Readings::from_output(&block, &output).unwrap();
            let verdict = decoder.verdict(&readings);
            assert!(verdict.is_right(), "{name}: {verdict}");
            assert!(verdict.residual < 1e-5, "{name}: {}", verdict.residual);
        }
    }
    // gpt_oss is not published in three of the forms
    assert_eq!(written, FAMILIES.len() * Form::ALL.len() - 3);
}
