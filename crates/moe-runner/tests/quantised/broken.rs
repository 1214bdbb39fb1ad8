//! Quantised checkpoints with something wrong: what loading says, and what diagnosis finds.

use crate::formats::{FORMATS, Format};
use crate::models::{Files, MODELS, matrices};
use moe_kernels::numerics::EncodeScale;
use moe_kernels::numerics::quantise::Qdq;
use moe_kernels::pool::Inline;
use moe_runner::checkpoint::{Dtype, architecture};
use moe_runner::doctor::{self, Finding, FindingKind, Severity};
use moe_runner::weights::{ActivationQuant, account};

const UP: &str = "model.layers.0.mlp.experts.2.up_proj";

fn format(name: &str) -> &'static Format {
    FORMATS.iter().find(|format| format.name == name).unwrap()
}

fn files(name: &str) -> Files {
    Files::new(&MODELS[1], format(name), 5)
}

fn findings(files: &Files) -> Vec<Finding> {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = files.open(folder.path());
    doctor::formats(&checkpoint, &architecture::layers(&checkpoint).unwrap()[0])
}

fn only_finding(files: &Files, kind: FindingKind, name: &str, detail: &str) {
    let mut found = findings(files);
    found.retain(|finding| finding.severity > Severity::Note);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((found[0].kind, found[0].names.as_slice()), (kind, [name.to_string()].as_slice()));
    let text = found[0].to_string();
    assert!(text.contains(detail), "{text}");
}

fn set(files: &mut Files, ending: &str, value: f32) {
    let tensor = files.tensors.get_mut(&format!("{UP}{ending}")).unwrap();
    assert_eq!(tensor.0, Dtype::F32);
    tensor.2 = value.to_le_bytes().to_vec();
}

/// The tensor whose absence is noticed is named, and no other tensor is called unexpected.
#[test]
fn every_tensor_of_every_format_is_needed() {
    // tensors that repeat what is known, or that one scheme has and another of the same name ignores
    let spare = [".weight_shape", ".weight_g_idx", ".g_idx", ".bias", ".input_scale"];
    for format in FORMATS {
        let all = Files::new(&MODELS[1], format, 5);
        let own: Vec<String> =
            all.tensors.keys().filter(|name| name.starts_with(UP)).cloned().collect();
        for name in own {
            if spare.iter().any(|ending| name.ends_with(ending)) && !name.ends_with("_scale") {
                continue;
            }
            let static_scale = matches!(format.name, "fp8 tensor, static" | "nvfp4 modelopt");
            if name.ends_with(".input_scale") && !static_scale {
                continue;
            }
            // nothing says that there must be one
            if name.ends_with(".global_scale") {
                continue;
            }
            // compressed-tensors' zero points of bytes may be left out: they are zero then
            if format.name == "int8 a16 zeros" && name.ends_with("zero_point") {
                continue;
            }
            let mut files = Files::new(&MODELS[1], format, 5);
            files.tensors.remove(&name);
            let folder = tempfile::tempdir().unwrap();
            let checkpoint = files.open(folder.path());
            let entry = &architecture::layers(&checkpoint).unwrap()[0];
            let account = account(&checkpoint, entry);
            assert_eq!(
                account.missing,
                std::slice::from_ref(&name),
                "{}: {account:?}",
                format.name
            );
            assert!(account.unexpected_experts.is_empty(), "{}: {account:?}", format.name);
            let error = files.load().unwrap_err().to_string();
            assert!(error.contains(&name) && error.contains("missing"), "{error}");
        }
    }
}

/// A tensor of the wrong shape or dtype is an error that names it, for every tensor of every format.
#[test]
fn every_wrong_shape_and_dtype_is_an_error_that_names_the_tensor() {
    for format in FORMATS {
        let names: Vec<String> =
            Files::new(&MODELS[0], format, 5).tensors.keys().cloned().collect();
        let module = "model.layers.0.block_sparse_moe.experts.1.w2.";
        for name in names.iter().filter(|name| name.starts_with(module)) {
            if [".bias", ".input_scale"].iter().any(|ending| name.ends_with(ending)) {
                continue;
            }
            let mut longer = Files::new(&MODELS[0], format, 5);
            let (_, shape, bytes) = longer.tensors.get_mut(name).unwrap();
            let size = bytes.len() / shape.iter().product::<usize>();
            if shape.is_empty() {
                *shape = vec![1];
            }
            let last = shape.len() - 1;
            shape[last] += 1;
            bytes.resize(shape.iter().product::<usize>() * size, 1);
            let mut other = Files::new(&MODELS[0], format, 5);
            let (dtype, shape, bytes) = other.tensors.get_mut(name).unwrap();
            *dtype = Dtype::Bool;
            bytes.resize(shape.iter().product(), 0);
            for (files, what) in [(longer, "shape"), (other, "dtype")] {
                let error = match files.load() {
                    Err(error) => error.to_string(),
                    Ok(_) => panic!("{}: a wrong {what} of '{name}' is not noticed", format.name),
                };
                assert!(error.contains(name.as_str()), "{}, {what}: {error}", format.name);
            }
        }
    }
}

#[test]
fn a_scale_that_cannot_be_divided_by_is_an_error_and_a_finding() {
    for (name, ending) in [("fp8 tensor, static", ".input_scale"), ("nvfp4", ".input_global_scale")]
    {
        for (value, detail) in
            [(f32::NAN, "NaN"), (0.0, "is 0"), (f32::INFINITY, "inf"), (-1.0, "is -1")]
        {
            let mut files = files(name);
            set(&mut files, ending, value);
            let tensor = format!("{UP}{ending}");
            let error = files.load().unwrap_err().to_string();
            assert!(error.contains(&tensor) && error.contains("calibrated"), "{error}");
            only_finding(&files, FindingKind::Uncalibrated, &tensor, detail);
        }
        // what quantisers write before calibration can be loaded, and is told
        let mut files = files(name);
        set(&mut files, ending, 1.0);
        files.load().unwrap();
        only_finding(&files, FindingKind::Uncalibrated, &format!("{UP}{ending}"), "exactly 1");
    }
}

#[test]
fn weight_scales_that_are_no_numbers_or_absurd_are_found() {
    let mut files_ = files("fp8 block");
    set_all(&mut files_, ".weight_scale_inv", f32::NAN);
    let name = format!("{UP}.weight_scale_inv");
    only_finding(&files_, FindingKind::BadScale, &name, "NaN at 0");
    set_all(&mut files_, ".weight_scale_inv", 1e30);
    only_finding(&files_, FindingKind::AbsurdScale, &name, "at 0");
    // a block of zeros has such a scale
    set_all(&mut files_, ".weight_scale_inv", 0.0);
    assert_eq!(findings(&files_), []);
    let mut powers = files("mxfp4");
    powers.tensors.get_mut(&format!("{UP}.weight_scale")).unwrap().2[7] = 255;
    only_finding(&powers, FindingKind::BadScale, &format!("{UP}.weight_scale"), "NaN at 7");
}

fn set_all(files: &mut Files, ending: &str, value: f32) {
    let tensor = files.tensors.get_mut(&format!("{UP}{ending}")).unwrap();
    tensor.2.chunks_exact_mut(4).for_each(|bytes| bytes.copy_from_slice(&value.to_le_bytes()));
}

/// One expert's scales are wrong by a factor: its weights are far off the others', in every format.
#[test]
fn a_wrong_scale_is_far_off_the_other_experts() {
    let mut tried = 0;
    for format in FORMATS {
        let mut files = Files::new(&MODELS[1], format, 5);
        let scales = files.tensors.iter_mut().filter(|(name, (dtype, _, _))| {
            let of_weights = name.contains("scale") && !name.contains("input");
            name.starts_with(UP) && of_weights && *dtype == Dtype::F32
        });
        let Some((_, (_, _, bytes))) = scales.last() else { continue };
        for bytes in bytes.as_chunks_mut::<4>().0 {
            *bytes = (f32::from_le_bytes(*bytes) * 1000.0).to_le_bytes();
        }
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = files.open(folder.path());
        let entry = &architecture::layers(&checkpoint).unwrap()[0];
        let layer = moe_runner::weights::LoadedLayer::load(&checkpoint, entry).unwrap();
        let found = doctor::examine(&checkpoint, entry, &layer, &Inline);
        let off = found.iter().find(|finding| finding.kind == FindingKind::OffScale);
        let off = off.unwrap_or_else(|| panic!("{}: {found:?}", format.name));
        assert_eq!(off.experts, [2], "{}: {off}", format.name);
        assert!(off.names[0].starts_with(UP), "{}: {off}", format.name);
        tried += 1;
    }
    assert!(tried > 8, "{tried} formats have scales in f32");
}

/// An expert whose largest activation in calibration was next to nothing.
#[test]
fn experts_that_calibration_hardly_reached() {
    for (name, ending, factor) in
        [("fp8 tensor, static", ".input_scale", 1e-4), ("nvfp4", ".input_global_scale", 1e4)]
    {
        let mut files = files(name);
        let tensor = &files.tensors[&format!("{UP}{ending}")];
        let usual = f32::from_le_bytes(tensor.2[..4].try_into().unwrap());
        set(&mut files, ending, usual * factor);
        only_finding(&files, FindingKind::Uncalibrated, UP, "times smaller");
    }
}

/// Experts that a quantiser skipped are loaded as what they are, and told about.
#[test]
fn skipped_experts_are_found() {
    let mut files = files("int4 g32");
    files.tensors.retain(|name, _| !name.starts_with(UP));
    let weight = vec![0x3Cu8; 2 * 96 * 128];
    files.put(UP, (".weight", Dtype::Bf16, vec![96, 128], weight));
    let layer = files.load().unwrap();
    let formats: Vec<String> =
        matrices(&MODELS[1], &layer).iter().map(|(_, m)| m.format().to_string()).collect();
    assert_eq!(formats.iter().filter(|format| *format == "bf16").count(), 1);
    let found = findings(&files);
    let kinds: Vec<FindingKind> = found.iter().map(|finding| finding.kind).collect();
    assert_eq!(kinds, [FindingKind::Skipped, FindingKind::Inconsistent]);
    assert!(found.iter().all(|finding| finding.names == [UP] && finding.severity > Severity::Note));
    assert!(found[0].to_string().contains("BF16, the configuration says int4"), "{}", found[0]);
}

/// Each of gate and up keeps its own weights' scale; the rows they share have one, the widest.
#[test]
fn gate_and_up_with_different_scales_lose_nothing() {
    let mut files = files("nvfp4");
    set(&mut files, ".input_global_scale", 350.0);
    let layer = files.load().unwrap();
    for expert in &layer.experts {
        for matrix in [expert.gate.as_ref().unwrap(), &expert.up] {
            let ActivationQuant::Quantised(Qdq::Nvfp4 { global, .. }) = matrix.input else {
                panic!("{:?}", matrix.input);
            };
            assert_eq!(global, EncodeScale(350.0));
        }
        let ActivationQuant::Quantised(Qdq::Nvfp4 { global, .. }) = expert.down.input else {
            panic!("{:?}", expert.down.input);
        };
        assert_eq!(global, EncodeScale(700.0));
    }
    let found = findings(&files);
    // the test's tensors all have weight scales of their own
    let kinds: Vec<FindingKind> = found.iter().map(|finding| finding.kind).collect();
    assert_eq!(kinds, [FindingKind::GateUpScales, FindingKind::InputScales]);
    assert!(found.iter().all(|finding| finding.severity == Severity::Note));
}

/// Two experts whose static scales differ by a factor: rows are quantised once, for the larger range,
/// so that no expert's values are cut off.
#[test]
fn the_widest_static_scale_counts() {
    let mut files = files("fp8 tensor, static");
    let before = files.load().unwrap();
    let scale = |input: ActivationQuant| match input {
        ActivationQuant::Quantised(Qdq::Fp8Static { scale }) => scale,
        other => panic!("{other:?}"),
    };
    let of_first = |layer: &moe_runner::weights::LoadedLayer| {
        let first = layer.experts.iter().flat_map(|e| e.gate.iter().chain([&e.up]));
        first.map(|matrix| scale(matrix.input)).collect::<Vec<_>>()
    };
    let usual = of_first(&before)[0];
    assert!(of_first(&before).iter().all(|scale| *scale == usual));
    for (factor, want) in [(8.0, 8.0 * usual), (0.125, usual)] {
        set(&mut files, ".input_scale", factor * usual);
        let layer = files.load().unwrap();
        assert!(of_first(&layer).iter().all(|scale| *scale == want), "{:?}", of_first(&layer));
        // the second product has rows of its own for each expert
        let down = |layer: &moe_runner::weights::LoadedLayer| {
            layer.experts.iter().map(|e| scale(e.down.input)).collect::<Vec<_>>()
        };
        assert_eq!(down(&layer), down(&before));
    }
}

/// The same of INT8, where the configuration alone says that scales are stored.
#[test]
fn the_widest_static_scale_counts_in_int8() {
    let mut files = files("int8 channel");
    let input = serde_json::json!({"type": "int", "num_bits": 8, "strategy": "tensor",
        "symmetric": true, "dynamic": false});
    files.config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = input;
    let modules: Vec<String> = files.values.keys().cloned().collect();
    for module in &modules {
        let scale = if module == UP { 0.5f32 } else { 0.0625 };
        let bytes = scale.to_le_bytes().to_vec();
        files.put(module, (".input_scale", Dtype::F32, vec![1], bytes));
    }
    for expert in &files.load().unwrap().experts {
        for (matrix, scale) in
            [(expert.gate.as_ref().unwrap(), 0.5), (&expert.up, 0.5), (&expert.down, 0.0625)]
        {
            assert_eq!(matrix.input, ActivationQuant::Quantised(Qdq::Int8Static { scale }));
        }
    }
}

/// Quantised tensors that the configuration leaves alone, or without any configuration.
#[test]
fn quantised_weights_without_a_scheme_are_an_error() {
    let mut files = files("fp8 channel");
    files.config["quantization_config"]["ignore"] = serde_json::json!(["re:.*experts.2.up_proj"]);
    let error = files.load().unwrap_err().to_string();
    assert!(error.contains("different schemes"), "{error}");
    files.config.as_object_mut().unwrap().remove("quantization_config");
    let error = files.load().unwrap_err().to_string();
    assert!(error.contains("F8_E4M3") && error.contains("quantization_config"), "{error}");
}

/// ModelOpt's own file beside `config.json`.
#[test]
fn hf_quant_config_is_read() {
    let mut files = files("nvfp4 modelopt");
    files.config.as_object_mut().unwrap().remove("quantization_config");
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}"#;
    std::fs::write(folder.path().join("hf_quant_config.json"), config).unwrap();
    let checkpoint = files.open(folder.path());
    let entry = &architecture::layers(&checkpoint).unwrap()[0];
    let layer = moe_runner::weights::LoadedLayer::load(&checkpoint, entry).unwrap();
    assert_eq!(layer.experts[0].up.format().to_string(), "nvfp4");
}
