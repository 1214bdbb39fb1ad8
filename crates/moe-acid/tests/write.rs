//! Checkpoints as files: every weight of every form is exact, as this workspace's own reader sees it,
//! and the layer that it makes of them is right.

use moe_acid::write::{self, Form};
use moe_acid::{Block, Decoder, FAMILIES, Family, Readings};
use moe_runner::checkpoint::{Checkpoint, architecture};
use moe_runner::hidden::{ActivationDtype, Rows, RowsMut};
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, Options};
use moe_runner::weights::{Codes, Expert, Global, LoadedLayer, Matrix, ZeroPoints, Zeros};

fn decoded(matrix: &Matrix) -> Vec<f64> {
    let mut row = vec![0.0; matrix.cols()];
    let mut all = Vec::new();
    for n in 0..matrix.rows() {
        matrix.decode_row(n, &mut row);
        all.extend(row.iter().map(|v| f64::from(*v)));
    }
    all
}

/// What this workspace's own layer makes of the probes.
fn readings(block: &Block, layer: &LoadedLayer) -> Readings {
    let rows: Vec<f32> = block.embeddings().concat().iter().map(|v| *v as f32).collect();
    let mut output = vec![0.0; rows.len()];
    let options = Options::new(ActivationDtype::F32, 1).unwrap();
    let mut runner = MoeRunner::new(layer.ready(&options).unwrap());
    let input = ForwardInput::new(Rows::F32(&rows));
    runner.forward(&input, RowsMut::F32(&mut output)).unwrap();
    Readings::from_output(block, &output).unwrap()
}

/// A fault in the file is seen through this workspace's own layer, too.
#[test]
fn swapped_matrices_of_a_file_are_named() {
    let folder = tempfile::tempdir().unwrap();
    for form in Form::ALL {
        let mut block = Block::new(Family::named("mixtral").unwrap());
        block.experts.iter_mut().for_each(|e| std::mem::swap(&mut e.gate, &mut e.up));
        let path = folder.path().join(form.name());
        write::checkpoint(&block, form, &path).unwrap();
        let checkpoint = Checkpoint::open(form.opened(&path)).unwrap();
        let entry = architecture::layers(&checkpoint).unwrap().remove(0);
        let layer = LoadedLayer::load(&checkpoint, &entry).unwrap();
        let right = Block::new(block.family);
        let verdict = Decoder::new(&right).verdict(&readings(&right, &layer));
        assert_eq!(verdict.to_string(), "gate and up swapped", "{}", form.name());
    }
}

/// A quantised layer whose experts' codes were read with other zero points, or other tensor scales.
fn misread(
    layer: &LoadedLayer,
    zero: impl Fn(&Codes, usize, usize) -> f32,
    global: impl Fn(&Expert, &Codes) -> Option<Global>,
) -> LoadedLayer {
    let mut layer = layer.clone();
    for expert in &mut layer.experts {
        let old = expert.clone();
        for matrix in expert.gate.iter_mut().chain([&mut expert.up, &mut expert.down]) {
            let codes = matrix.codes().unwrap();
            let (shape, scales) = ([codes.rows(), codes.cols()], codes.scales().clone());
            let [down, across] = scales.shape();
            let zeros: Vec<i16> = (0..down)
                .flat_map(|row| (0..across).map(move |group| (row, group)))
                .map(|(row, group)| zero(codes, row, group) as i16)
                .collect();
            let zeros = match codes.zeros() {
                Zeros::Each(_) => {
                    Zeros::Each(ZeroPoints::from_i16(&zeros, [down, across]).unwrap())
                }
                other => other.clone(),
            };
            let (packing, bytes) = ((codes.element(), codes.packing()), codes.bytes().to_vec());
            let global = global(&old, codes);
            let read = Codes::new(packing, bytes.into(), shape, scales, zeros, global);
            *matrix = Matrix::new(read.unwrap());
        }
    }
    layer
}

/// What a form has in more than one value shows where an engine takes one for all: zero points of groups and of
/// rows, tensor scales of gate and up.
#[test]
fn what_is_read_for_all_alike_shows() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["mixtral", "deepseek_v3"] {
        let block = Block::new(Family::named(name).unwrap());
        let decoder = Decoder::new(&block);
        let load = |form: Form| {
            let path = folder.path().join(format!("{name} {}", form.name()));
            write::checkpoint(&block, form, &path).unwrap();
            let checkpoint = Checkpoint::open(&path).unwrap();
            let entry = architecture::layers(&checkpoint).unwrap().remove(0);
            LoadedLayer::load(&checkpoint, &entry).unwrap()
        };
        let verdict = |layer: &LoadedLayer| decoder.verdict(&readings(&block, layer)).to_string();
        let own = |_: &Expert, codes: &Codes| codes.global();
        let int4 = load(Form::Int4);
        let right = misread(&int4, |codes, row, group| codes.zero(row, group), own);
        assert_eq!(verdict(&right), "right", "{name}");
        for (what, layer) in [
            ("of the first group", misread(&int4, |codes, row, _| codes.zero(row, 0), own)),
            ("of the first row", misread(&int4, |codes, _, group| codes.zero(0, group), own)),
            ("one less", misread(&int4, |codes, row, group| codes.zero(row, group) - 1.0, own)),
            ("the middle", misread(&int4, |_, _, _| 8.0, own)),
        ] {
            assert_ne!(verdict(&layer), "right", "{name}: zero points {what}");
        }
        let of_gate = |expert: &Expert, codes: &Codes| match codes.rows() < codes.cols() {
            true => expert.gate.as_ref().unwrap().codes().unwrap().global(),
            false => codes.global(),
        };
        let merged = misread(&load(Form::Nvfp4), |_, _, _| 0.0, of_gate);
        let words = "gate's tensor scale is used for up (x4.000)";
        assert!(verdict(&merged).contains(words), "{name}: {}", verdict(&merged));
    }
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
            let path = form.opened(&path);
            let weights = if path.is_dir() { path.join("model.safetensors") } else { path.clone() };
            let size = std::fs::metadata(weights).unwrap().len();
            // float32 is twice what is published
            let wide = matches!(form, Form::F32 | Form::GgufF32);
            assert!(size < if wide { 4 << 20 } else { 2 << 20 }, "{name}: {size}");

            let checkpoint = Checkpoint::open(&path).unwrap();
            let entry = architecture::layers(&checkpoint).unwrap().remove(0);
            let layer = LoadedLayer::load(&checkpoint, &entry).unwrap_or_else(|e| panic!("{e}"));
            for (e, (expert, weights)) in layer.experts.iter().zip(&block.experts).enumerate() {
                let gate = expert.gate.as_ref().unwrap();
                assert_eq!(decoded(gate), weights.gate.dense(), "{name}: gate of {e}");
                assert_eq!(decoded(&expert.up), weights.up.dense(), "{name}: up of {e}");
                assert_eq!(decoded(&expert.down), weights.down.dense(), "{name}: down of {e}");
            }

            let verdict = decoder.verdict(&readings(&block, &layer));
            assert!(verdict.is_right(), "{name}: {verdict}");
            assert!(verdict.residual < 1e-5, "{name}: {}", verdict.residual);
        }
    }
    // gpt_oss is not published in three of the forms
    assert_eq!(written, FAMILIES.len() * Form::ALL.len() - 3);
}
