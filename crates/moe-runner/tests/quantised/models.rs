//! Small checkpoints of two architectures in every format of [`FORMATS`].

use std::collections::BTreeMap;
use std::path::Path;

use crate::formats::{Format, Part, Store, Stored};
use moe_runner::checkpoint::{Checkpoint, Dtype, NewTensor, architecture, write_safetensors};
use moe_runner::random::Random;
use moe_runner::weights::{Expert, LoadedLayer, Matrix};
use serde_json::{Value, json};

pub(crate) const HIDDEN: usize = 128;
/// Not a multiple of the blocks of 64 columns.
pub(crate) const INTERMEDIATE: usize = 96;
const EXPERTS: usize = 4;

/// An architecture: its config and the names of its modules.
pub(crate) struct Model {
    pub(crate) name: &'static str,
    config: fn() -> Value,
    floats: fn() -> Vec<(String, Vec<usize>)>,
    experts: fn() -> Vec<[String; 3]>,
    shared: Option<[&'static str; 3]>,
}

pub(crate) const MODELS: &[Model] = &[
    Model {
        name: "mixtral",
        config: || {
            json!({"model_type": "mixtral", "hidden_size": HIDDEN, "hidden_act": "silu",
                "intermediate_size": INTERMEDIATE, "num_hidden_layers": 1,
                "num_local_experts": EXPERTS, "num_experts_per_tok": 2})
        },
        floats: || {
            let gate = "model.layers.0.block_sparse_moe.gate.weight";
            vec![(gate.into(), vec![EXPERTS, HIDDEN])]
        },
        experts: || {
            let name = |e, w| format!("model.layers.0.block_sparse_moe.experts.{e}.{w}");
            (0..EXPERTS).map(|e| ["w1", "w3", "w2"].map(|w| name(e, w))).collect()
        },
        shared: None,
    },
    Model {
        name: "deepseek_v3",
        config: || {
            json!({"model_type": "deepseek_v3", "hidden_size": HIDDEN, "hidden_act": "silu",
                "intermediate_size": 64, "moe_intermediate_size": INTERMEDIATE,
                "num_hidden_layers": 1, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
                "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                "first_k_dense_replace": 0, "routed_scaling_factor": 2.5, "norm_topk_prob": true,
                "scoring_func": "sigmoid"})
        },
        floats: || {
            let gate = "model.layers.0.mlp.gate.";
            vec![
                (format!("{gate}weight"), vec![EXPERTS, HIDDEN]),
                (format!("{gate}e_score_correction_bias"), vec![EXPERTS]),
            ]
        },
        experts: || {
            let name = |e, w| format!("model.layers.0.mlp.experts.{e}.{w}_proj");
            (0..EXPERTS).map(|e| ["gate", "up", "down"].map(|w| name(e, w))).collect()
        },
        shared: Some([
            "model.layers.0.mlp.shared_experts.gate_proj",
            "model.layers.0.mlp.shared_experts.up_proj",
            "model.layers.0.mlp.shared_experts.down_proj",
        ]),
    },
];

/// Tensors of a checkpoint by name, and what its modules' weights are.
pub(crate) struct Files {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
    pub(crate) values: BTreeMap<String, Vec<f64>>,
}

impl Files {
    pub(crate) fn new(model: &Model, format: &Format, seed: u64) -> Self {
        Self::mixed(model, (format.config)(), |_| format.store, seed)
    }

    /// Each module as the `Store` that `store` gives for its name.
    pub(crate) fn mixed(
        model: &Model,
        quantization: Value,
        store: impl Fn(&str) -> Store,
        seed: u64,
    ) -> Self {
        let random = &mut Random::new(seed);
        let mut config = (model.config)();
        config["quantization_config"] = quantization;
        let mut files = Self { config, tensors: BTreeMap::new(), values: BTreeMap::new() };
        for (name, shape) in (model.floats)() {
            let values = random.values(shape.iter().product(), 0.1);
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            files.tensors.insert(name, (Dtype::F32, shape, bytes));
        }
        let shared = model.shared.map(|names| names.map(String::from));
        for [gate, up, down] in (model.experts)().into_iter().chain(shared) {
            for (module, n, k) in [
                (gate, INTERMEDIATE, HIDDEN),
                (up, INTERMEDIATE, HIDDEN),
                (down, HIDDEN, INTERMEDIATE),
            ] {
                let Stored { parts, values } = store(&module)(random, n, k);
                for part in parts {
                    files.put(&module, part);
                }
                files.values.insert(module, values);
            }
        }
        files
    }

    pub(crate) fn put(&mut self, module: &str, (ending, dtype, shape, bytes): Part) {
        self.tensors.insert(format!("{module}{ending}"), (dtype, shape, bytes));
    }

    pub(crate) fn open(&self, folder: &Path) -> Checkpoint {
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        let tensors = self.tensors.iter().map(|(name, (dtype, shape, bytes))| {
            let new = NewTensor { name: name.clone(), dtype: *dtype, shape: shape.clone() };
            (new, bytes.as_slice())
        });
        write_safetensors(&folder.join("model.safetensors"), &[], tensors).unwrap();
        Checkpoint::open(folder).unwrap()
    }

    /// Writes, opens and loads the one layer.
    pub(crate) fn load(&self) -> moe_runner::Result<LoadedLayer> {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = self.open(folder.path());
        let entries = architecture::layers(&checkpoint).unwrap();
        assert_eq!(entries.len(), 1);
        LoadedLayer::load(&checkpoint, &entries[0])
    }
}

/// The matrices of a layer with the names of their modules.
pub(crate) fn matrices<'a>(model: &Model, layer: &'a LoadedLayer) -> Vec<(String, &'a Matrix)> {
    let shared = model.shared.map(|names| names.map(String::from));
    let names = (model.experts)().into_iter().chain(shared);
    let experts = layer.experts.iter().chain(layer.shared.iter().flat_map(|s| &s.experts));
    names
        .zip(experts)
        .flat_map(|([gate, up, down], expert)| {
            [(gate, expert.gate.as_ref().unwrap()), (up, &expert.up), (down, &expert.down)]
        })
        .collect()
}

/// The same layer with the weights as plain floats, multiplying rows that are quantised alike.
pub(crate) fn as_floats(layer: &LoadedLayer, files: &Files, model: &Model) -> LoadedLayer {
    let plain = |name: &String, matrix: &Matrix| {
        let values: Vec<f32> = files.values[name].iter().map(|v| *v as f32).collect();
        let plain = Matrix::from_f32(&values, [matrix.rows(), matrix.cols()]);
        plain.unwrap().with_input(matrix.input)
    };
    let replace = |experts: &mut [Expert], names: Vec<[String; 3]>| {
        for (expert, [gate, up, down]) in experts.iter_mut().zip(&names) {
            expert.gate = expert.gate.as_ref().map(|matrix| plain(gate, matrix));
            expert.up = plain(up, &expert.up);
            expert.down = plain(down, &expert.down);
        }
    };
    let mut layer = layer.clone();
    replace(&mut layer.experts, (model.experts)());
    if let (Some(shared), Some(names)) = (&mut layer.shared, model.shared) {
        replace(&mut shared.experts, vec![names.map(String::from)]);
    }
    layer
}
