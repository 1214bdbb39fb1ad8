//! The recorded cases: where they are, and what was recorded.
#![allow(dead_code, unreachable_pub)] // each test file uses its own part

use std::path::{Path, PathBuf};

use moe_runner::checkpoint::Checkpoint;
use moe_runner::checkpoint::architecture::{self, LayerEntry};
use moe_runner::hidden::ActivationDtype;
use moe_runner::router::Routing;
use moe_runner::spec::{LayerSpec, ScaleOn};
use moe_runner::weights::LoadedLayer;

/// Token counts that were recorded.
pub const TOKENS: [usize; 3] = [1, 7, 33];

/// One checkpoint with its recordings.
pub struct Case {
    pub name: String,
    pub checkpoint: Checkpoint,
    recordings: Checkpoint,
}

/// One layer's recorded forward pass.
pub struct Recorded {
    pub x: Vec<f32>,
    /// `out_fakequant` where activations are quantised, else `out`.
    pub out: Vec<f64>,
    pub fake_quantised: bool,
    pub shared_out: Option<Vec<f64>>,
    top_k: usize,
    ids: Vec<i64>,
    weights: Vec<f32>,
}

/// All cases: the full set where it stands beside the repository, else those in the repository.
pub fn all_cases() -> Vec<Case> {
    // at run time: built here, these tests also run on a machine with a GPU, from its own copy
    let here = std::env::var_os("CARGO_MANIFEST_DIR");
    let here = here.map_or(PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    let folders = [here.join("../../../shared/golden"), here.join("tests/golden")];
    let folder = folders.iter().find(|folder| folder.is_dir()).expect("recorded cases");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .expect("the folder of cases can be listed")
        .map(|entry| entry.expect("an entry of the folder").path())
        .filter(|path| path.join("golden.safetensors").is_file())
        .collect();
    paths.sort();
    paths.iter().map(|path| Case::open(path)).collect()
}

impl Recorded {
    /// The NMSE that a layer in f32 may have. The recordings are float32: their own rounding is part of
    /// it. Where activations are quantised between the products, a rounding may flip.
    pub fn bound(&self) -> f64 {
        if self.fake_quantised { 1e-4 } else { 1e-10 }
    }
}

impl Case {
    /// The NMSE that a layer may have in the checkpoint's own dtype, where that has 16 bits.
    pub fn sixteen_bit_bound(&self) -> Option<f64> {
        match self.dtype() {
            ActivationDtype::F32 => None,
            ActivationDtype::Bf16 => Some(1e-5),
            ActivationDtype::F16 => Some(1e-6),
        }
    }

    fn open(folder: &Path) -> Self {
        let gguf = folder.join("model.gguf");
        let path = if gguf.is_file() { gguf } else { folder.to_owned() };
        Self {
            name: folder.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            checkpoint: Checkpoint::open(&path).unwrap_or_else(|error| panic!("{error}")),
            recordings: Checkpoint::open_safetensors(folder.join("golden.safetensors"))
                .unwrap_or_else(|error| panic!("{error}")),
        }
    }

    /// Every MoE layer, loaded.
    pub fn layers(&self) -> Vec<(LayerEntry, LoadedLayer)> {
        let entries = architecture::layers(&self.checkpoint)
            .unwrap_or_else(|error| panic!("{}: {error}", self.name));
        assert!(!entries.is_empty(), "{}: no MoE layer", self.name);
        let load = |entry: LayerEntry| {
            let layer = LoadedLayer::load(&self.checkpoint, &entry)
                .unwrap_or_else(|error| panic!("{}: {error}", self.name));
            (entry, layer)
        };
        entries.into_iter().map(load).collect()
    }

    /// Dtype of the stored float weights.
    pub fn dtype(&self) -> ActivationDtype {
        let name = self
            .checkpoint
            .config()
            .and_then(|config| config.str("torch_dtype").ok().flatten().map(str::to_owned));
        match name.as_deref() {
            Some("bfloat16") => ActivationDtype::Bf16,
            Some("float16") => ActivationDtype::F16,
            _ => ActivationDtype::F32,
        }
    }

    /// What was recorded for a layer and a number of tokens.
    pub fn recorded(&self, layer: usize, tokens: usize) -> Recorded {
        let tensor = |what: &str| {
            self.recordings
                .tensor(&format!("layers.{layer}.t{tokens}.{what}"))
                .unwrap_or_else(|error| panic!("{}: {error}", self.name))
        };
        let floats = |what: &str| tensor(what).map(|t| t.to_f32().expect("a float tensor"));
        let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect();
        let quantised = floats("out_fakequant");
        let ids = tensor("topk_ids").expect("recorded ids");
        Recorded {
            x: floats("x").expect("recorded input"),
            fake_quantised: quantised.is_some(),
            out: wide(quantised.or_else(|| floats("out")).expect("recorded output")),
            shared_out: floats("shared_out").map(wide),
            top_k: ids.shape[1],
            ids: ids.to_i64().expect("integer ids"),
            weights: floats("topk_weights").expect("recorded weights"),
        }
    }
}

impl Recorded {
    /// Ids exact, weights within 1e-5; the order within a row carries no meaning. Recorded weights
    /// hold the scaling factor, also where the layer applies it to the sum.
    pub fn expect_routing(&self, place: &str, spec: &LayerSpec, routing: &Routing) {
        let factor = match spec.routed_scale.on {
            ScaleOn::Weights => 1.0,
            ScaleOn::Output => spec.routed_scale.factor,
        };
        assert_eq!(routing.top_k, self.top_k, "{place}");
        for t in 0..routing.tokens {
            let mut got: Vec<(i64, f32)> = routing
                .ids_of(t)
                .iter()
                .map(|id| i64::from(id.0))
                .zip(routing.weights_of(t).iter().map(|weight| weight * factor))
                .collect();
            got.sort_by_key(|(id, _)| *id);
            for (j, (id, weight)) in got.into_iter().enumerate() {
                let slot = t * self.top_k + j;
                assert_eq!(id, self.ids[slot], "{place}, token {t}");
                let want = self.weights[slot];
                assert!(
                    (weight - want).abs() <= 1e-5 * want.abs().max(1.0),
                    "{place}, token {t}, expert {id}: weight {weight}, recorded {want}"
                );
            }
        }
    }
}
