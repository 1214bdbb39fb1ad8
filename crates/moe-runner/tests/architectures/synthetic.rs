//! Small checkpoints written by tests.

use std::collections::BTreeMap;
use std::path::Path;

use moe_runner::checkpoint::Checkpoint;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

/// A checkpoint to be written: f32 tensors by name, with shapes.
#[derive(Clone, Default)]
pub(crate) struct Model {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Model {
    /// Adds a tensor of distinct values that depend on its name.
    pub(crate) fn add(&mut self, name: &str, shape: &[usize]) {
        let seed = name.bytes().fold(7u32, |seed, byte| seed.wrapping_mul(31) + u32::from(byte));
        let count: usize = shape.iter().product();
        let values = (0..count).map(|i| (seed % 1000) as f32 + i as f32 / 1024.0).collect();
        self.tensors.insert(name.to_string(), (shape.to_vec(), values));
    }

    /// Writes the checkpoint to `folder`, as one file, and opens it.
    pub(crate) fn open(&self, folder: &Path) -> Checkpoint {
        self.write(folder, "model.safetensors");
        Checkpoint::open(folder).unwrap()
    }

    /// Writes `config.json` and the tensors as `file`.
    pub(crate) fn write(&self, folder: &Path, file: &str) {
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        let bytes: Vec<(&String, &Vec<usize>, Vec<u8>)> = self
            .tensors
            .iter()
            .map(|(name, (shape, values))| {
                (name, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect())
            })
            .collect();
        let views = bytes.iter().map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap();
            (name.as_str(), view)
        });
        let file = folder.join(file);
        std::fs::write(file, safetensors::serialize(views, None).unwrap()).unwrap();
    }
}

/// `text` parsed, and its keys laid over those of `base`.
pub(crate) fn merged(base: &str, text: &str) -> Value {
    let mut merged: Value = serde_json::from_str(base).unwrap();
    let over: Value = serde_json::from_str(text).unwrap();
    for (key, value) in over.as_object().unwrap() {
        merged[key] = value.clone();
    }
    merged
}
