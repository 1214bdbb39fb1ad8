//! Which files of a folder are the model: by its index, or by their names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::file::{MAX_TENSORS, check_name, printable, read};
use super::safetensors::MAX_HEADER;
use crate::{Error, Result};

/// The file that says which shard holds which tensor.
pub(super) const INDEX: &str = "model.safetensors.index.json";

const SINGLE: &str = "model.safetensors";

/// Most shards of a model.
const MAX_SHARDS: usize = 10_000;

/// The files that make up a model.
pub(super) struct Folder {
    /// The folder they are in: the one that was asked for, or a snapshot below it.
    pub(super) path: PathBuf,
    pub(super) files: Vec<PathBuf>,
    /// What the index says, if there is one: tensor and number of the file, sorted by tensor.
    pub(super) index: Option<Vec<(Box<str>, u32)>>,
    /// Files that the index names and that are not there, by number.
    pub(super) absent: Vec<u32>,
}

impl Folder {
    /// Looks a folder through. With an index, the files are what it names; without, they are
    /// `model.safetensors`, or else all safetensors files that are shards or called `model*`.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let path = &snapshot(path)?;
        let names = file_names(path)?;
        let indices: Vec<&String> =
            names.iter().filter(|name| name.ends_with(".safetensors.index.json")).collect();
        match indices.as_slice() {
            [] => {}
            [one] => return Self::indexed(path, &path.join(one)),
            _ if path.join(INDEX).exists() => return Self::indexed(path, &path.join(INDEX)),
            [first, second, ..] => {
                let reason = format!("holds two indices, '{first}' and '{second}': whose is it?");
                return Err(Error::file(path, reason));
            }
        }
        let whole = |files| Self { path: path.clone(), files, index: None, absent: Vec::new() };
        if path.join(SINGLE).exists() {
            return Ok(whole(vec![path.join(SINGLE)]));
        }
        let shards = shards(&names);
        if shards.is_empty() {
            if let Some(unfinished) = names.iter().find(|name| is_unfinished(name)) {
                let reason = format!(
                    "holds no checkpoint yet: '{}' is a file that is still being fetched",
                    printable(unfinished)
                );
                return Err(Error::file(path, reason));
            }
            return Err(Error::file(path, no_model(path, &names)));
        }
        if let Some(missing) = missing_shard(&shards) {
            let reason = format!("holds '{}', but no '{missing}'", shards[0]);
            return Err(Error::file(path, reason));
        }
        Ok(whole(shards.into_iter().map(|name| path.join(name)).collect()))
    }

    fn indexed(path: &Path, index: &Path) -> Result<Self> {
        let json = read(index, MAX_HEADER)?;
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
        // one that no layer needs may be absent: its tensors are what cannot be had
        let numbered = (0..).zip(&files);
        let absent =
            numbered.filter(|(_, file)| !file.exists()).map(|(number, _)| number).collect();
        Ok(Self { path: path.to_owned(), files, index: Some(tensors), absent })
    }
}

/// A folder of the hub's cache holds a model's files below `snapshots`, by revision: that of its main
/// branch, or the only one with a `config.json`. The path itself where it is no such folder.
pub(super) fn snapshot(path: &Path) -> Result<PathBuf> {
    let below = path.join("snapshots");
    if !below.is_dir() || path.join("config.json").exists() {
        return Ok(path.to_owned());
    }
    let named = std::fs::read_to_string(path.join("refs").join("main")).unwrap_or_default();
    let main = below.join(named.trim());
    if !named.trim().is_empty() && !named.contains(['/', '\\']) && main.is_dir() {
        return Ok(main);
    }
    let revisions: Vec<PathBuf> = file_names(&below)?
        .iter()
        .map(|name| below.join(name))
        .filter(|folder| folder.join("config.json").exists())
        .collect();
    match revisions.as_slice() {
        [one] => Ok(one.clone()),
        [] => {
            Err(Error::file(path, "is a folder of the hub's cache without a whole snapshot in it"))
        }
        [one, ..] => {
            let reason = format!(
                "is a folder of the hub's cache with {} snapshots; name one of them, such as {}",
                revisions.len(),
                one.display()
            );
            Err(Error::file(path, reason))
        }
    }
}

/// Whether a name is one that downloaders give to files that are not whole yet.
fn is_unfinished(name: &str) -> bool {
    [".incomplete", ".part", ".aria2", ".crdownload", ".download"]
        .iter()
        .any(|ending| name.ends_with(ending))
}

/// The shards of a model without an index, sorted: safetensors files that are numbered, or named
/// for the layers and experts in them, or `model*`. Others belong to something else: adapters, the
/// format of the model's author, recorded outputs.
fn shards(names: &[String]) -> Vec<&String> {
    let files: Vec<&String> = names
        .iter()
        .filter(|name| name.ends_with(".safetensors") && !name.starts_with("adapter_"))
        .collect();
    let models = || files.iter().copied().filter(|name| name.starts_with("model"));
    let numbered = |name: &&String| {
        let stem = name.trim_end_matches(".safetensors");
        name.contains("-of-") || name.starts_with("layer") || stem.ends_with(char::is_numeric)
    };
    let shards: Vec<&String> =
        files.iter().copied().filter(|name| name.starts_with("model") || numbered(name)).collect();
    match shards.is_empty() {
        // one file of any name
        true if files.len() == 1 => files,
        // the author's own format beside the model's
        _ if models().next().is_some() && shards.iter().any(|n| n.starts_with("consolidated")) => {
            models().collect()
        }
        _ => shards,
    }
}

/// Whether a folder holds weights in any format, so that its `config.json` is not all there is.
pub(super) fn has_weights(path: &Path) -> Result<bool> {
    let endings = [".safetensors", ".gguf", ".bin", ".pt", ".pth"];
    let names = file_names(path)?;
    Ok(names.iter().any(|name| endings.iter().any(|ending| name.ends_with(ending))))
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

/// What to do where a folder has a GGUF file: nothing where it has none.
pub(super) fn gguf_in(path: &Path) -> Result<String> {
    Ok(name_gguf(&file_names(path)?).unwrap_or_default())
}

fn name_gguf(names: &[String]) -> Option<String> {
    let name = names.iter().find(|name| name.ends_with(".gguf"))?;
    Some(format!("; to open '{}', name that file", printable(name)))
}

fn no_model(path: &Path, names: &[String]) -> String {
    let pytorch = || {
        let name = printable(names.iter().find(|name| name.ends_with(".bin"))?);
        Some(format!("; '{name}' looks like PyTorch's format, which is not read: convert it"))
    };
    let named = |is: &dyn Fn(&Path) -> bool, what: &str| {
        let mut models =
            names.iter().filter(|name| is(&path.join(name))).map(|name| printable(name));
        let (first, more) = (models.next()?, models.count());
        let others = if more > 0 { format!(" and {more} more") } else { String::new() };
        Some(format!("; a folder in it, '{first}'{others}, {what}: name that"))
    };
    // a folder of models, and a hub's cache
    let models = || named(&|path| path.join("config.json").exists(), "has a config.json");
    let cached = || {
        let snapshots = |path: &Path| path.join("snapshots").is_dir();
        named(&snapshots, "is a model of a hub's cache")
    };
    let also =
        name_gguf(names).or_else(pytorch).or_else(models).or_else(cached).unwrap_or_default();
    format!("holds no checkpoint: no {INDEX}, {SINGLE} or numbered safetensors files{also}")
}

/// The first name that is absent from sets of shards named `…-00001-of-00003.safetensors`.
fn missing_shard(shards: &[&String]) -> Option<String> {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let set = |name: &str| {
        let (stem, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
        let (stem, number) = stem.rsplit_once('-')?;
        // A count that is no usable number is a name like any other.
        let total: usize = count.parse().ok().filter(|total| *total <= MAX_SHARDS)?;
        let counted = digits(number) && digits(count);
        counted.then(|| (stem.to_string(), number.len(), count.to_string(), total))
    };
    let sets: std::collections::BTreeSet<_> = shards.iter().filter_map(|name| set(name)).collect();
    let held: std::collections::BTreeSet<&str> = shards.iter().map(|name| name.as_str()).collect();
    sets.into_iter().take(MAX_SHARDS).find_map(|(stem, width, count, total)| {
        (1..=total)
            .map(|number| format!("{stem}-{number:0width$}-of-{count}.safetensors"))
            .find(|name| !held.contains(name.as_str()))
    })
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
