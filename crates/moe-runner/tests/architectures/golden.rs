//! Every recorded case that is not quantised: the spec against one written by hand, and the
//! recorded outputs against a float64 computation from the loaded weights.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use moe_runner::checkpoint::Checkpoint;
use moe_runner::checkpoint::architecture::{self, LayerEntry};
use moe_runner::spec::{
    Activation, Correction, GroupFill, GroupScore, Groups, IdleExperts, Renormalise, RouterSpec,
    Score, Selection, WeightFrom, WeightOn,
};
use moe_runner::weights::{self, LoadedLayer};

use crate::block;

/// What a case's layers must be.
struct Expected {
    name: &'static str,
    moe: &'static [usize],
    /// Block of the first MoE layer.
    block: &'static str,
    /// H, width of the routed rows, I.
    dims: [usize; 3],
    router: RouterSpec,
    scale: f32,
    activation: Activation,
    /// Gated, with biases.
    expert: [bool; 2],
    /// Width, and whether it has a scalar gate.
    shared: Option<(usize, bool)>,
}

fn expected() -> Vec<Expected> {
    const SUM: Renormalise = Renormalise::Sum { eps: 0.0 };
    let softmax = RouterSpec::softmax;
    let base = |name, moe, block, dims, router| Expected {
        name,
        moe,
        block,
        dims,
        router,
        scale: 1.0,
        activation: Activation::Silu,
        expert: [true, false],
        shared: None,
    };
    let groups = |score, fill| Some(Groups { count: 4, keep: 2, score, fill });
    let v3 = |experts, top_k| RouterSpec {
        score: Score::Sigmoid,
        correction: Correction::OnScore,
        renormalise: Renormalise::Sum { eps: 1e-20 },
        ..softmax(experts, top_k, false)
    };
    let chosen = |experts, top_k| RouterSpec {
        score: Score::Logits,
        weight_from: WeightFrom::SoftmaxChosen,
        ..softmax(experts, top_k, false)
    };
    vec![
        Expected {
            scale: 16.0,
            shared: Some((72, false)),
            ..base(
                "deepseek_v2",
                &[1, 2],
                "model.layers.1.mlp",
                [64, 64, 36],
                RouterSpec {
                    groups: groups(GroupScore::Max, GroupFill::Zero),
                    ..softmax(12, 3, false)
                },
            )
        },
        Expected {
            shared: Some((72, false)),
            ..base(
                "deepseek_v2_lite",
                &[1],
                "model.layers.1.mlp",
                [64, 64, 36],
                softmax(10, 3, false),
            )
        },
        Expected {
            scale: 2.5,
            shared: Some((36, false)),
            ..base(
                "deepseek_v3",
                &[1, 2],
                "model.layers.1.mlp",
                [64, 64, 36],
                RouterSpec {
                    groups: groups(GroupScore::TopTwoSum, GroupFill::NegativeInfinity),
                    ..v3(16, 4)
                },
            )
        },
        Expected {
            activation: Activation::ClampedSwiglu { alpha: 1.702, beta: 1.0, limit: 7.0 },
            expert: [true, true],
            ..base("gpt_oss", &[0, 1], "model.layers.0.mlp", [64, 64, 56], chosen(8, 4))
        },
        base("granitemoe", &[0, 1], "model.layers.0.block_sparse_moe", [64, 64, 40], chosen(10, 3)),
        Expected {
            shared: Some((40, false)),
            ..base(
                "llama4",
                &[1, 3],
                "model.layers.1.feed_forward",
                [64, 64, 40],
                RouterSpec {
                    weight_from: WeightFrom::SigmoidChosen,
                    weight_on: WeightOn::Input,
                    ..chosen(8, 1)
                },
            )
        },
        Expected {
            scale: 6.0,
            ..base(
                "longcat_flash",
                &[0, 1],
                "model.layers.0.mlp",
                [64, 64, 36],
                RouterSpec {
                    correction: Correction::OnScore,
                    idle: Some(IdleExperts::Identity { count: 4 }),
                    ..softmax(8, 4, false)
                },
            )
        },
        base(
            "mixtral",
            &[0, 1],
            "model.layers.0.block_sparse_moe",
            [64, 64, 80],
            softmax(8, 2, true),
        ),
        Expected {
            scale: 2.5,
            activation: Activation::Relu2,
            expert: [false, false],
            shared: Some((88, false)),
            ..base("nemotron_h", &[1, 3], "backbone.layers.1.mixer", [64, 64, 44], v3(12, 4))
        },
        Expected {
            scale: 5.0,
            activation: Activation::Relu2,
            expert: [false, false],
            shared: Some((88, false)),
            ..base("nemotron_h_latent", &[0, 2], "backbone.layers.0.mixer", [64, 28, 44], v3(12, 4))
        },
        base("olmoe", &[0, 1], "model.layers.0.mlp", [64, 64, 44], softmax(8, 3, false)),
        base(
            "phimoe",
            &[0, 1],
            "model.layers.0.block_sparse_moe",
            [64, 64, 56],
            RouterSpec {
                score: Score::Logits,
                selection: Selection::SparseMixer { eps: 0.01 },
                ..softmax(8, 2, false)
            },
        ),
        Expected {
            shared: Some((72, true)),
            ..base("qwen2_moe", &[0, 2], "model.layers.0.mlp", [64, 64, 40], softmax(12, 4, false))
        },
        base(
            "qwen3_moe",
            &[1, 3],
            "model.layers.1.mlp",
            [64, 64, 36],
            RouterSpec { renormalise: SUM, ..softmax(16, 4, false) },
        ),
        base("gguf_qwen3moe", &[0], "blk.0", [64, 64, 96], softmax(6, 2, true)),
    ]
}

/// Cases that are stored as plain floats, with the case whose expectation they share.
fn plain_cases() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut seen = BTreeSet::new();
    let mut cases = Vec::new();
    for folder in [root.join("tests/golden"), root.join("../../../shared/golden")] {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        let mut entries: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        entries.sort();
        for path in entries.into_iter().filter(|path| path.is_dir()) {
            let case = path.file_name().unwrap().to_str().unwrap().to_owned();
            let base = ["_bf16", "_f16", "_f32", "_published"]
                .iter()
                .fold(case.as_str(), |case, ending| case.strip_suffix(ending).unwrap_or(case));
            if expected().iter().any(|e| e.name == base) && seen.insert(case.clone()) {
                cases.push((path, base.to_owned()));
            }
        }
    }
    cases
}

fn open(folder: &Path) -> Checkpoint {
    let gguf = folder.join("model.gguf");
    let path = if gguf.is_file() { &gguf } else { folder };
    Checkpoint::open(path).unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
}

#[test]
fn specs_and_outputs_of_recorded_cases() {
    let cases = plain_cases();
    if cases.is_empty() {
        eprintln!("SKIPPED: no recordings in tests/golden or ../shared/golden");
    }
    eprintln!("{} recorded cases", cases.len());
    for (folder, base) in cases {
        let expected = expected().into_iter().find(|e| e.name == base).unwrap();
        let checkpoint = open(&folder);
        let layers = architecture::layers(&checkpoint)
            .unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        check_spec(&folder, &expected, &layers);
        for entry in &layers {
            let accounting = weights::account(&checkpoint, entry);
            assert!(accounting.is_complete(), "{}: {accounting:?}", folder.display());
            assert_eq!(accounting.unexpected, Vec::<String>::new(), "{}", folder.display());
            let layer = LoadedLayer::load(&checkpoint, entry).unwrap();
            check_outputs(&folder, &entry.spec, &layer);
        }
    }
}

fn check_spec(folder: &Path, expected: &Expected, layers: &[LayerEntry]) {
    let case = folder.display();
    let indices: Vec<usize> = layers.iter().map(|entry| entry.spec.index).collect();
    assert_eq!(indices, expected.moe, "{case}");
    let spec = &layers[0].spec;
    let block = spec.name.strip_prefix("language_model.").unwrap_or(&spec.name);
    assert_eq!(block, expected.block, "{case}");
    for spec in layers.iter().map(|entry| &entry.spec) {
        let dims = [spec.dims.hidden, spec.dims.routed_hidden, spec.dims.intermediate];
        assert_eq!(dims, expected.dims, "{case}");
        assert_eq!(spec.router, expected.router, "{case}");
        assert_eq!(spec.routed_scale.factor, expected.scale, "{case}");
        assert_eq!(spec.expert.activation, expected.activation, "{case}");
        assert_eq!([spec.expert.gated, spec.expert.bias], expected.expert, "{case}");
        assert_eq!(spec.gate.bias, expected.expert[1], "{case}");
        let shared = spec.shared.as_ref().map(|s| (s.intermediate, s.sigmoid_gate));
        assert_eq!(shared, expected.shared, "{case}");
        assert_eq!(spec.output, Default::default(), "{case}");
    }
}

/// Logits, shared and whole output of the seven recorded rows.
fn check_outputs(folder: &Path, spec: &moe_runner::spec::LayerSpec, layer: &LoadedLayer) {
    let golden = Checkpoint::open_safetensors(folder.join("golden.safetensors")).unwrap();
    let read = |name: &str| {
        let name = format!("layers.{}.t7.{name}", spec.index);
        golden.tensor(&name).unwrap()
    };
    let floats = |name: &str| -> Option<Vec<Vec<f64>>> {
        let tensor = read(name)?;
        let values = tensor.to_f32().unwrap();
        let rows = values.chunks(tensor.shape[1]);
        Some(rows.map(|row| row.iter().map(|v| f64::from(*v)).collect()).collect())
    };
    let ids = read("topk_ids").unwrap().to_i64().unwrap();
    let (x, weights) = (floats("x").unwrap(), floats("topk_weights").unwrap());
    let (logits, outputs) = (floats("router_logits").unwrap(), floats("out").unwrap());
    let shared = floats("shared_out");
    for (token, x) in x.iter().enumerate() {
        let what = format!("{}, layer {}, token {token}", folder.display(), spec.index);
        let routes: Vec<(usize, f64)> = weights[token]
            .iter()
            .zip(&ids[token * weights[token].len()..])
            .map(|(weight, id)| (usize::try_from(*id).unwrap(), *weight))
            .collect();
        close(&block::logits(layer, x), &logits[token], &format!("{what}: logits"));
        close(&block::output(spec, layer, x, &routes), &outputs[token], &format!("{what}: output"));
        assert_eq!(shared.is_some(), spec.shared.is_some(), "{what}");
        if let (Some(shared), Some(spec)) = (&shared, &spec.shared) {
            close(&block::shared(spec, layer, x), &shared[token], &format!("{what}: shared"));
        }
    }
}

fn close(got: &[f64], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let error: f64 = got.iter().zip(want).map(|(g, w)| (g - w).powi(2)).sum();
    let norm: f64 = want.iter().map(|w| w * w).sum();
    assert!(error <= 1e-11 * norm, "{what}: relative square error {:e}", error / norm);
}
