//! A small sound checkpoint, to be spoiled.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use moe_runner::checkpoint::{Checkpoint, Dtype, NewTensor, write_safetensors};
use moe_runner::random::Random;
use serde_json::{Value, json};

pub(crate) const HIDDEN: usize = 64;
pub(crate) const INTERMEDIATE: usize = 32;
pub(crate) const EXPERTS: usize = 8;

pub(crate) const GATE: &str = "gate_proj";
pub(crate) const UP: &str = "up_proj";
pub(crate) const DOWN: &str = "down_proj";
pub(crate) const ROUTER: &str = "model.layers.0.mlp.gate.weight";
pub(crate) const GATE_OF_SHARED: &str = "model.layers.0.mlp.shared_expert_gate.weight";
pub(crate) const CORRECTION: &str = "model.layers.0.mlp.gate.e_score_correction_bias";

/// The tensor of an expert's projection.
pub(crate) fn expert(index: usize, name: &str) -> String {
    format!("model.layers.0.mlp.experts.{index}.{name}.weight")
}

/// f32 tensors by name.
pub(crate) struct Model {
    config: Value,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Model {
    /// Random weights, nothing wrong with them.
    pub(crate) fn new() -> Self {
        Self::sized(EXPERTS, 2)
    }

    /// The same with so many experts, and so many of a token.
    pub(crate) fn sized(experts: usize, top_k: usize) -> Self {
        let config = json!({"model_type": "deepseek_v3", "hidden_size": HIDDEN,
            "hidden_act": "silu", "intermediate_size": 96, "moe_intermediate_size": INTERMEDIATE,
            "num_hidden_layers": 1, "n_routed_experts": experts, "n_shared_experts": 1,
            "num_experts_per_tok": top_k, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
            "routed_scaling_factor": 2.5, "norm_topk_prob": true, "scoring_func": "sigmoid"});
        let mut model = Self { config, tensors: BTreeMap::new() };
        let mut random = Random::new(11);
        let mut add = |name: &str, shape: &[usize]| {
            model.add(name, shape, |_| 0.05 * random.normal() as f32);
        };
        add(ROUTER, &[experts, HIDDEN]);
        add(CORRECTION, &[experts]);
        let shared = ["gate_proj", "up_proj", "down_proj"]
            .map(|name| format!("model.layers.0.mlp.shared_experts.{name}.weight"));
        let experts = (0..experts).map(|index| [GATE, UP, DOWN].map(|name| expert(index, name)));
        for [gate, up, down] in experts.chain([shared]) {
            add(&gate, &[INTERMEDIATE, HIDDEN]);
            add(&up, &[INTERMEDIATE, HIDDEN]);
            add(&down, &[HIDDEN, INTERMEDIATE]);
        }
        model
    }

    /// The same as a family whose shared expert has a gate.
    pub(crate) fn with_a_gate_of_the_shared_expert() -> Self {
        let Self { tensors, .. } = Self::new();
        let config = json!({"model_type": "qwen2_moe", "hidden_size": HIDDEN,
            "hidden_act": "silu", "intermediate_size": 96, "moe_intermediate_size": INTERMEDIATE,
            "shared_expert_intermediate_size": INTERMEDIATE, "num_hidden_layers": 1,
            "num_experts": EXPERTS, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
            "norm_topk_prob": false, "mlp_only_layers": []});
        let renamed = |name: String| name.replace("shared_experts", "shared_expert");
        let tensors = tensors.into_iter().map(|(name, tensor)| (renamed(name), tensor)).collect();
        let mut model = Self { config, tensors };
        model.tensors.remove(CORRECTION);
        model.add(GATE_OF_SHARED, &[1, HIDDEN], |i| 0.01 * (i as f32 - 20.5));
        model
    }

    pub(crate) fn add(&mut self, name: &str, shape: &[usize], value: impl FnMut(usize) -> f32) {
        let values = (0..shape.iter().product()).map(value).collect();
        self.tensors.insert(name.to_owned(), (shape.to_vec(), values));
    }

    pub(crate) fn values(&mut self, name: &str) -> &mut [f32] {
        &mut self.tensors.get_mut(name).unwrap().1
    }

    pub(crate) fn fill(&mut self, name: &str, value: f32) {
        self.values(name).fill(value);
    }

    pub(crate) fn map(&mut self, name: &str, change: impl Fn(f32) -> f32) {
        self.values(name).iter_mut().for_each(|value| *value = change(*value));
    }

    /// Changes some rows of `[n, HIDDEN]`.
    pub(crate) fn rows(&mut self, name: &str, rows: Range<usize>, change: impl Fn(f32) -> f32) {
        let values = &mut self.values(name)[rows.start * HIDDEN..rows.end * HIDDEN];
        values.iter_mut().for_each(|value| *value = change(*value));
    }

    pub(crate) fn copy(&mut self, from: &str, to: &str) {
        let values = self.values(from).to_vec();
        self.values(to).copy_from_slice(&values);
    }

    pub(crate) fn zero(&mut self) {
        self.tensors.values_mut().for_each(|(_, values)| values.fill(0.0));
    }

    pub(crate) fn open(&self, folder: &Path) -> Checkpoint {
        self.open_bytes(folder, &self.bytes())
    }

    /// The file, tensors in the order of their names.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.safetensors");
        let tensors: Vec<(NewTensor, Vec<u8>)> = self
            .tensors
            .iter()
            .map(|(name, (shape, values))| {
                let new = NewTensor { name: name.clone(), dtype: Dtype::F32, shape: shape.clone() };
                (new, values.iter().flat_map(|value| value.to_le_bytes()).collect())
            })
            .collect();
        let tensors = tensors.iter().map(|(new, bytes)| (new.clone(), bytes.as_slice()));
        write_safetensors(&file, &[], tensors).unwrap();
        std::fs::read(file).unwrap()
    }

    /// Opens `bytes` as the checkpoint's one file.
    pub(crate) fn open_bytes(&self, folder: &Path, bytes: &[u8]) -> Checkpoint {
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
        Checkpoint::open(folder).unwrap()
    }
}
