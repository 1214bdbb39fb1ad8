//! Which files of a folder are the model: by its index, or by their names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::file::{MAX_TENSORS, check_name, map, printable};
use super::safetensors::MAX_HEADER;
use crate::{Error, Result};

/// The file that says which shard holds which tensor.
pub(super) const INDEX: &str = "model.safetensors.index.json";

const SINGLE: &str = "model.safetensors";

/// Most shards of a model.
const MAX_SHARDS: usize = 10_000;

/// The files that make up a model.
pub(super) struct Folder {
    pub(super) files: Vec<PathBuf>,
    /// What the index says, if there is one: tensor and number of the file, sorted by tensor.
    pub(super) index: Option<Vec<(Box<str>, u32)>>,
}

impl Folder {
    /// Looks a folder through. With an index, the files are what it names; without, they are
    /// `model.safetensors`, or else all `model*.safetensors`. Other files are not the model's.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let index = path.join(INDEX);
        if index.exists() {
            return Self::indexed(path, &index);
        }
        if path.join(SINGLE).exists() {
            return Ok(Self { files: vec![path.join(SINGLE)], index: None });
        }
        let names = file_names(path)?;
        let mut shards: Vec<&String> = names
            .iter()
            .filter(|name| name.starts_with("model") && name.ends_with(".safetensors"))
            .collect();
        if shards.is_empty() {
            return Err(Error::file(path, no_model(&names)));
        }
        shards.sort();
        if let Some(missing) = missing_shard(&shards) {
            let reason = format!("holds '{}', but no '{missing}'", shards[0]);
            return Err(Error::file(path, reason));
        }
        Ok(Self { files: shards.into_iter().map(|name| path.join(name)).collect(), index: None })
    }

    fn indexed(path: &Path, index: &Path) -> Result<Self> {
        let json = map(index)?;
        if json.len() as u64 > MAX_HEADER {
            let reason = format!("has {} bytes; the limit is {MAX_HEADER}", json.len());
            return Err(Error::file(index, reason));
        }
        let Index { weight_map: WeightMap { shards, mut tensors } } = serde_json::from_slice(&json)
            .map_err(|error| {
                let reason = format!("is no usable index: {}", printable(&error.to_string()));
                Error::file(index, reason)
            })?;
        tensors.sort_unstable();
        for pair in tensors.windows(2) {
            if pair[0].0 == pair[1].0 {
                return Err(Error::tensor(
                    index,
                    printable(&pair[0].0),
                    "stands more than once in it",
                ));
            }
        }
        for (tensor, _) in &tensors {
            check_name(index, tensor)?;
        }
        let mut files = Vec::with_capacity(shards.len());
        for shard in &shards {
            let plain = shard.ends_with(".safetensors")
                && !shard.contains(['/', '\\'])
                && !shard.chars().any(char::is_control);
            if !plain {
                let reason = format!(
                    "names the shard '{}'; only safetensors files in the same folder are opened",
                    printable(shard)
                );
                return Err(Error::file(index, reason));
            }
            files.push(path.join(shard));
        }
        let missing: Vec<&String> = shards
            .iter()
            .zip(&files)
            .filter(|(_, file)| !file.exists())
            .map(|(name, _)| name)
            .collect();
        if let Some(first) = missing.first() {
            let reason = format!(
                "names {} shards, of which {} are not there, such as '{first}'; get the whole checkpoint",
                shards.len(),
                missing.len()
            );
            return Err(Error::file(index, reason));
        }
        Ok(Self { files, index: Some(tensors) })
    }
}

/// Names of the files in a folder, sorted; those that are no UTF-8 are none of ours.
fn file_names(path: &Path) -> Result<Vec<String>> {
    let io = |source| Error::Io { path: path.to_owned(), action: "list", source };
    let mut names = Vec::new();
    for item in std::fs::read_dir(path).map_err(io)? {
        names.extend(item.map_err(io)?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

fn no_model(names: &[String]) -> String {
    let ending = |suffix: &str| names.iter().find(|name| name.ends_with(suffix));
    let also = if let Some(name) = ending(".gguf") {
        format!("; to open '{}', name that file", printable(name))
    } else if let Some(name) = ending(".bin") {
        format!(
            "; '{}' looks like PyTorch's format, which is not read: convert it",
            printable(name)
        )
    } else {
        String::new()
    };
    format!("holds no checkpoint: no {INDEX}, {SINGLE} or model*.safetensors{also}")
}

/// The first name that is absent from a set of shards named `…-00001-of-00003.safetensors`.
fn missing_shard(shards: &[&String]) -> Option<String> {
    let (stem, count) = shards[0].strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, number) = stem.rsplit_once('-')?;
    let width = number.len();
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(number) || !digits(count) {
        return None;
    }
    // A count that is no usable number is a name like any other.
    let total: usize = count.parse().ok().filter(|total| *total <= MAX_SHARDS)?;
    (1..=total)
        .map(|number| format!("{stem}-{number:0width$}-of-{count}.safetensors"))
        .find(|name| !shards.contains(&name))
}

#[derive(Deserialize)]
struct Index {
    weight_map: WeightMap,
}

/// The index's map, with every shard's name kept once.
#[derive(Default)]
struct WeightMap {
    shards: Vec<String>,
    tensors: Vec<(Box<str>, u32)>,
}

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = WeightMap;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object with a file name for each tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut numbers = BTreeMap::<String, u32>::new();
                let mut read = WeightMap::default();
                while let Some((tensor, shard)) = map.next_entry::<Box<str>, String>()? {
                    if read.tensors.len() == MAX_TENSORS {
                        return Err(A::Error::custom(format_args!(
                            "more than {MAX_TENSORS} tensors"
                        )));
                    }
                    let number = match numbers.get(&shard) {
                        Some(number) => *number,
                        None if read.shards.len() == MAX_SHARDS => {
                            return Err(A::Error::custom(format_args!(
                                "more than {MAX_SHARDS} shards"
                            )));
                        }
                        None => {
                            let number = read.shards.len() as u32;
                            read.shards.push(shard.clone());
                            numbers.insert(shard, number);
                            number
                        }
                    };
                    read.tensors.push((tensor, number));
                }
                Ok(read)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
