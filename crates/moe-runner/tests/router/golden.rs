//! Routing against recordings of the reference library: the same ids, weights within 1e-5.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use moe_runner::router::{Router, RouterTensors, Routing};
use moe_runner::spec::{
    Correction, GroupFill, GroupScore, Groups, IdleExperts, Renormalise, RouterSpec, Score,
    Selection, WeightFrom, WeightOn,
};
use safetensors::{Dtype, SafeTensors};

/// The routing of one case, given the number of router outputs and k, and its scaling factor.
fn options(case: &str, outputs: usize, top_k: usize) -> (RouterSpec, f32) {
    let plain = |renormalise| RouterSpec::softmax(outputs, top_k, renormalise);
    let sigmoid_v3 = |groups| RouterSpec {
        score: Score::Sigmoid,
        correction: Correction::OnScore,
        renormalise: Renormalise::Sum { eps: 1e-20 },
        groups,
        ..plain(true)
    };
    let groups = |score, fill| Some(Groups { count: 4, keep: 2, score, fill });
    match case {
        "mixtral" | "mixtral_bf16" | "qwen3_moe" | "qwen3_moe_bf16" => (plain(true), 1.0),
        _ if case.starts_with("quant_qwen3_moe_") => (plain(true), 1.0),
        _ if case.starts_with("gguf_qwen3moe_") => (plain(true), 1.0),
        "olmoe" | "olmoe_f16" | "qwen2_moe" | "qwen2_moe_f16" => (plain(false), 1.0),
        "deepseek_v2_lite" => (plain(false), 1.0),
        "deepseek_v2" => {
            (RouterSpec { groups: groups(GroupScore::Max, GroupFill::Zero), ..plain(false) }, 16.0)
        }
        "deepseek_v3" | "deepseek_v3_bf16" => {
            (sigmoid_v3(groups(GroupScore::TopTwoSum, GroupFill::NegativeInfinity)), 2.5)
        }
        "bailing_hybrid_defaults" => {
            let groups = Groups {
                count: 8,
                keep: 4,
                score: GroupScore::TopTwoSum,
                fill: GroupFill::NegativeInfinity,
            };
            (sigmoid_v3(Some(groups)), 2.5)
        }
        "minimax_m3_vl" => (sigmoid_v3(None), 2.0),
        "nemotron_h" => (sigmoid_v3(None), 2.5),
        "nemotron_h_latent" => (sigmoid_v3(None), 5.0),
        "gpt_oss" | "gpt_oss_mxfp4" | "granitemoe" => (
            RouterSpec {
                score: Score::Logits,
                weight_from: WeightFrom::SoftmaxChosen,
                ..plain(false)
            },
            1.0,
        ),
        "llama4" | "llama4_bf16" | "llama4_published" => (
            RouterSpec {
                score: Score::Logits,
                weight_from: WeightFrom::SigmoidChosen,
                weight_on: WeightOn::Input,
                ..plain(false)
            },
            1.0,
        ),
        "longcat_flash" => (
            RouterSpec {
                idle: Some(IdleExperts::Identity { count: 4 }),
                correction: Correction::OnScore,
                ..RouterSpec::softmax(outputs - 4, top_k, false)
            },
            6.0,
        ),
        "phimoe" => (
            RouterSpec {
                score: Score::Logits,
                selection: Selection::SparseMixer { eps: 0.01 },
                ..plain(false)
            },
            1.0,
        ),
        _ => panic!("no router options are listed for golden case '{case}'"),
    }
}

#[test]
fn recorded_routing() {
    let mut seen = BTreeSet::new();
    for folder in golden_folders() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let folder = entry.unwrap().path();
            let case = folder.file_name().unwrap().to_str().unwrap().to_owned();
            if folder.join("golden.safetensors").is_file() && seen.insert(case.clone()) {
                check_case(&case, &folder);
            }
        }
    }
    if seen.is_empty() {
        eprintln!("SKIPPED: no recordings in tests/golden or ../shared/golden");
    } else {
        eprintln!("{} recorded cases", seen.len());
    }
}

/// Where recordings may be; the repository's own first.
fn golden_folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = [root.join("tests/golden"), root.join("../../../shared/golden")];
    folders.into_iter().filter(|folder| folder.is_dir()).collect()
}

fn check_case(case: &str, folder: &Path) {
    let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let mut checked = 0;
    if !golden.names().iter().any(|name| name.ends_with("router_logits")) {
        eprintln!("{case}: its recording has no router logits");
        return;
    }
    for name in golden.names() {
        let Some(prefix) = name.strip_suffix("router_logits") else { continue };
        let logits = golden.tensor(name).unwrap();
        let recorded_ids = ints(&golden, &format!("{prefix}topk_ids"));
        let recorded_weights = floats(&golden, &format!("{prefix}topk_weights"));
        let [tokens, outputs] = *logits.shape() else { panic!("{case} {name}: not a matrix") };
        let top_k = recorded_ids.len() / tokens;

        let (spec, scale) = options(case, outputs, top_k);
        let layer = prefix.split('.').nth(1).unwrap();
        let correction =
            (spec.correction != Correction::None).then(|| correction_bias(folder, layer));
        let router =
            Router::new(spec, scale, RouterTensors { correction, ..RouterTensors::default() })
                .unwrap();
        let mut routing = Routing::new();
        router.route(&floats(&golden, name), None, tokens, &mut routing).unwrap();

        for token in 0..tokens {
            let mut row: Vec<(i64, f32)> = routing
                .ids_of(token)
                .iter()
                .zip(routing.weights_of(token))
                .map(|(id, &weight)| (i64::from(id.0), weight))
                .collect();
            row.sort_by_key(|&(id, _)| id);
            let slots = token * top_k..(token + 1) * top_k;
            let ids: Vec<i64> = row.iter().map(|&(id, _)| id).collect();
            assert_eq!(ids, recorded_ids[slots.clone()], "{case} {prefix} token {token}: ids");
            for (&(id, weight), &recorded) in row.iter().zip(&recorded_weights[slots]) {
                // The recordings are float32 themselves.
                assert!(
                    (weight - recorded).abs() <= 1e-5,
                    "{case} {prefix} token {token} expert {id}: {weight}, recorded {recorded}"
                );
            }
        }
        checked += 1;
    }
    assert!(checked >= 3, "{case}: only {checked} recordings of routing");
}

/// The layer's correction bias, whatever its architecture calls it.
fn correction_bias(folder: &Path, layer: &str) -> Vec<f32> {
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let model = SafeTensors::deserialize(&bytes).unwrap();
    let layer = format!(".layers.{layer}.");
    let mut names = model.names().into_iter().filter(|name| name.contains(&layer)).filter(|name| {
        ["e_score_correction_bias", "gate.expert_bias"].iter().any(|e| name.ends_with(e))
    });
    let name = names.next().unwrap().to_owned();
    assert!(names.next().is_none(), "two correction biases in {layer}");
    floats(&model, &name)
}

fn floats(file: &SafeTensors, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
    tensor.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

fn ints(file: &SafeTensors, name: &str) -> Vec<i64> {
    let tensor = file.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), Dtype::I64, "{name}");
    tensor.data().as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect()
}
