//! Every family of the library that defines it: a tiny checkpoint in its own layout, and what its MoE
//! block adds to the residual stream there. `scripts/families/blocks.py` records them.

use std::collections::BTreeMap;
use std::path::Path;

use moe_runner::checkpoint::Checkpoint;
use moe_runner::checkpoint::architecture::{self, LayerEntry};
use moe_runner::hidden::{ActivationDtype, Rows, RowsMut};
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, Options};
use moe_runner::weights::{self, LoadedLayer};
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Recorded {
    transformers: String,
    families: BTreeMap<String, Family>,
}

#[derive(Deserialize)]
struct Family {
    config: Value,
    tensors: Vec<Tensors>,
    moe: Vec<usize>,
    layers: BTreeMap<usize, Vec<f32>>,
    /// Keys that the family's class has the same values for.
    implied: Vec<String>,
    /// Other values of keys, and the first layer's output with them.
    changed: Option<(serde_json::Map<String, Value>, Vec<f32>)>,
}

/// Names with `#` for each number, the numbers at each, the shape, and the bound of integers.
#[derive(Deserialize)]
#[serde(untagged)]
enum Tensors {
    Floats(String, Vec<Vec<usize>>, Vec<usize>),
    Experts(String, Vec<Vec<usize>>, Vec<usize>, i64),
}

const TOKENS: usize = 4;

#[test]
fn every_family_computes_what_its_own_library_does() {
    let recorded: Recorded = serde_json::from_str(include_str!("recorded.json")).unwrap();
    assert!(recorded.families.len() >= 70, "of transformers {}", recorded.transformers);
    let problems: Vec<String> = recorded
        .families
        .iter()
        .flat_map(|(name, family)| {
            family.problems().map(move |problem| format!("{name}: {problem}"))
        })
        .collect();
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

impl Family {
    /// Where this differs from the recording: as it is, without the keys that the class implies, and with
    /// other values of some.
    fn problems(&self) -> impl Iterator<Item = String> {
        let folder = tempfile::tempdir().unwrap();
        self.write(folder.path());
        let as_it_is = run(folder.path(), &self.config, &self.moe, &self.layers).err();
        let mut less = self.config.clone();
        for key in &self.implied {
            less.as_object_mut().unwrap().remove(key);
        }
        let implied = run(folder.path(), &less, &self.moe, &self.layers);
        let implied = implied.err().map(|problem| format!("without implied keys: {problem}"));
        let changed = self.changed.as_ref().and_then(|(keys, output)| {
            let mut config = self.config.clone();
            config.as_object_mut().unwrap().extend(keys.clone());
            let layers = BTreeMap::from([(self.moe[0], output.clone())]);
            let problem = run(folder.path(), &config, &self.moe, &layers).err()?;
            Some(format!("with {keys:?}: {problem}"))
        });
        as_it_is.into_iter().chain(implied).chain(changed)
    }

    fn write(&self, folder: &Path) {
        let mut tensors = BTreeMap::new();
        for group in &self.tensors {
            let (pattern, numbers, shape, dtype) = match group {
                Tensors::Floats(pattern, numbers, shape) => (pattern, numbers, shape, Dtype::F32),
                Tensors::Experts(pattern, numbers, shape, _) => {
                    (pattern, numbers, shape, Dtype::I64)
                }
            };
            for name in names(pattern, numbers) {
                let bytes: Vec<u8> = match group {
                    Tensors::Floats(..) => {
                        let values = values(&name, shape.iter().product());
                        values.flat_map(f32::to_le_bytes).collect()
                    }
                    Tensors::Experts(.., bound) => {
                        experts_of_tokens(shape, *bound).flat_map(i64::to_le_bytes).collect()
                    }
                };
                tensors.insert(name, (dtype, shape.clone(), bytes));
            }
        }
        let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        let file = safetensors::serialize(views, None).unwrap();
        std::fs::write(folder.join("model.safetensors"), file).unwrap();
    }
}

/// Whether the checkpoint in `folder` has the layers `moe` with experts, each complete, and `outputs` of
/// some.
fn run(
    folder: &Path,
    config: &Value,
    moe: &[usize],
    outputs: &BTreeMap<usize, Vec<f32>>,
) -> Result<(), String> {
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let checkpoint = Checkpoint::open(folder).map_err(|error| error.to_string())?;
    let layers = architecture::layers(&checkpoint).map_err(|error| error.to_string())?;
    let found: Vec<usize> = layers.iter().map(|entry| entry.spec.index).collect();
    if found != moe {
        return Err(format!("layers {found:?}, recorded {moe:?}"));
    }
    for (layer, want) in outputs {
        let entry = layers.iter().find(|entry| entry.spec.index == *layer).unwrap();
        let accounting = weights::account(&checkpoint, entry);
        if !accounting.is_complete() || !accounting.unexpected.is_empty() {
            return Err(format!("layer {layer}: {accounting:?}"));
        }
        let error = error(&checkpoint, entry, want).map_err(|error| error.to_string())?;
        // some steps of the library's computation are in f32
        if error.is_nan() || error > 1e-11 {
            return Err(format!("layer {layer}: NMSE {error:e}"));
        }
    }
    Ok(())
}

/// NMSE of a layer's output.
fn error(checkpoint: &Checkpoint, entry: &LayerEntry, want: &[f32]) -> moe_runner::Result<f64> {
    let options = Options::new(ActivationDtype::F32, TOKENS)?;
    let mut runner = MoeRunner::new(LoadedLayer::load(checkpoint, entry)?.ready(&options)?);
    let x: Vec<f32> = values("hidden_states", want.len()).map(|v| v * 4.0).collect();
    let ids: Vec<u32> = (0..TOKENS as u32).collect();
    let mut y = vec![f32::NAN; want.len()];
    let input = ForwardInput { input_ids: Some(&ids), ..ForwardInput::new(Rows::F32(&x)) };
    let scale = runner.forward(&input, RowsMut::F32(&mut y))?.output_scale;
    let error: f64 = y.iter().zip(want).map(|(y, w)| f64::from(y * scale - w).powi(2)).sum();
    Ok(error / want.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>())
}

/// The names that a pattern with one list of numbers for each `#` stands for.
fn names(pattern: &str, numbers: &[Vec<usize>]) -> Vec<String> {
    let Some((numbers, rest)) = numbers.split_first() else { return vec![pattern.to_owned()] };
    let with = |number: &usize| names(&pattern.replacen('#', &number.to_string(), 1), rest);
    numbers.iter().flat_map(with).collect()
}

/// `values` of `blocks.py`: splitmix64 of the FNV-1a hash of the name plus the index, as f32.
fn values(name: &str, count: usize) -> impl Iterator<Item = f32> {
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |seed, byte| {
        (seed ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    let mean = f32::from(u8::from(name.ends_with("norm.weight")));
    (0..count as u64).map(move |i| {
        let z = seed.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let unit = ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32;
        (unit - 0.5) * 0.7 + mean
    })
}

/// `experts_of_tokens` of `blocks.py`.
fn experts_of_tokens(shape: &[usize], bound: i64) -> impl Iterator<Item = i64> {
    let columns = shape[1] as i64;
    (0..shape[0] as i64).flat_map(move |row| (0..columns).map(move |c| (row * 7 + c * 5) % bound))
}
