//! The new folder: made beside its place under another name, and put there when it is complete.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use super::Options;
use super::plan::{Plan, size};
use crate::checkpoint::{Checkpoint, NewTensor, Writer};
use crate::{Error, Result};

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";

/// Endings of files that hold weights.
const WEIGHTS: [&str; 8] =
    ["safetensors", "bin", "pt", "pth", "gguf", "h5", "msgpack", "index.json"];

/// A folder in the making. Dropped, it is removed.
pub(super) struct Folder {
    output: PathBuf,
    making: TempDir,
    /// Which file holds which tensor.
    index: BTreeMap<String, String>,
}

impl Folder {
    /// Begins the folder `output`.
    pub(super) fn begin(checkpoint: &Checkpoint, output: &Path, overwrite: bool) -> Result<Self> {
        check_place(checkpoint, output, overwrite)?;
        let parent = match output.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(io(parent, "make"))?;
        let name = output.file_name().unwrap_or_default().to_string_lossy();
        let prefix = format!(".{name}.partial-");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix);
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let making = builder.tempdir_in(parent).map_err(io(parent, "make a folder in"))?;
        Ok(Self { output: output.to_owned(), making, index: BTreeMap::new() })
    }

    /// Begins file `number` of `count`.
    pub(super) fn shard(
        &mut self,
        number: usize,
        count: usize,
        tensors: &[NewTensor],
    ) -> Result<Writer> {
        let name = match count {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let writer = Writer::create(&self.making.path().join(&name), &[("format", "pt")], tensors)?;
        self.index.extend(tensors.iter().map(|tensor| (tensor.name.clone(), name.clone())));
        Ok(writer)
    }

    /// Writes what else belongs to a checkpoint, config.json last, and puts the folder in place.
    /// Returns what was not copied.
    pub(super) fn finish(
        self,
        checkpoint: &Checkpoint,
        plan: &Plan,
        options: &Options,
    ) -> Result<Vec<PathBuf>> {
        let from = checkpoint.path();
        let to = self.making.path();
        let tensors: BTreeSet<&Path> =
            checkpoint.names().filter_map(|name| checkpoint.info(name)).map(|i| i.file).collect();
        let mut left_out = Vec::new();
        let list = || io(from, "list");
        for item in fs::read_dir(from).map_err(list())? {
            let path = item.map_err(list())?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name == CONFIG || name == INDEX || tensors.contains(&*path) {
                continue;
            }
            if !path.is_file() || WEIGHTS.iter().any(|ending| name.ends_with(&format!(".{ending}")))
            {
                left_out.push(path);
                continue;
            }
            let copy = to.join(&name);
            fs::copy(&path, &copy).map_err(io(&path, "copy"))?;
            sync(&copy)?;
        }
        left_out.sort();
        if plan.shards.len() > 1 {
            let total: u64 =
                plan.shards.iter().flatten().flat_map(|unit| &unit.tensors).map(size).sum();
            let index = json!({"metadata": {"total_size": total}, "weight_map": self.index});
            write(&to.join(INDEX), format!("{index:#}\n").as_bytes())?;
        }
        let config = fs::read(from.join(CONFIG)).map_err(io(&from.join(CONFIG), "read"))?;
        let quantization = format!("{:#}", options.format.config(&plan.ignore));
        write(&to.join(CONFIG), &with_quantization(&from.join(CONFIG), &config, &quantization)?)?;
        self.put_in_place()?;
        Ok(left_out)
    }

    fn put_in_place(self) -> Result<()> {
        let Self { output, making, .. } = self;
        let rename = || io(&output, "put the new checkpoint at");
        // An old folder makes way in one step, and comes back if the new one cannot follow.
        let mut old = None;
        if output.exists() {
            let parent = making.path().parent().unwrap_or(Path::new("."));
            let aside = tempfile::Builder::new()
                .prefix(".replaced-")
                .tempdir_in(parent)
                .map_err(rename())?;
            fs::rename(&output, aside.path().join("old")).map_err(rename())?;
            old = Some(aside);
        }
        if let Err(error) = fs::rename(making.path(), &output) {
            if let Some(aside) = &old {
                let _ = fs::rename(aside.path().join("old"), &output);
            }
            return Err(rename()(error));
        }
        // it has another name now: nothing is left to remove
        let _ = making.keep();
        // not every file system can do this to a folder
        let parent = output.parent().filter(|parent| *parent != Path::new(""));
        let _ = fs::File::open(parent.unwrap_or(Path::new("."))).and_then(|f| f.sync_all());
        Ok(())
    }
}

/// Nothing is in the way, or what is may be replaced.
fn check_place(checkpoint: &Checkpoint, output: &Path, overwrite: bool) -> Result<()> {
    if output.file_name().is_none() {
        return Err(Error::file(output, "is no name for a new folder"));
    }
    if !output.exists() {
        return Ok(());
    }
    let refuse = |reason: &str| Err(Error::file(output, reason));
    if !output.is_dir() {
        return refuse("is there already, and is no folder");
    }
    let resolved = |path: &Path| fs::canonicalize(path).map_err(io(path, "open"));
    if resolved(checkpoint.path())?.starts_with(resolved(output)?) {
        return refuse("holds the checkpoint that is to be quantised; name another folder");
    }
    let mut items = fs::read_dir(output).map_err(io(output, "list"))?;
    let empty = items.next().is_none();
    match overwrite {
        _ if empty => Ok(()),
        false => refuse("is there already, and is not empty; name another folder, or overwrite it"),
        true if output.join(CONFIG).is_file() => Ok(()),
        true => refuse("holds something that is no checkpoint; it is not overwritten"),
    }
}

/// The document with one more key at its end; everything else stays as it was written, numbers
/// that JSON does not know included.
fn with_quantization(path: &Path, config: &[u8], quantization: &str) -> Result<Vec<u8>> {
    let text = std::str::from_utf8(config).map_err(|_| Error::file(path, "is no UTF-8"))?;
    let before = text.trim_end().strip_suffix('}').map(str::trim_end);
    let before = before.ok_or_else(|| Error::file(path, "is no JSON object"))?;
    let comma = if before.ends_with('{') { "" } else { "," };
    let indented = quantization.replace('\n', "\n  ");
    Ok(format!("{before}{comma}\n  \"quantization_config\": {indented}\n}}\n").into_bytes())
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = fs::File::create(path).map_err(io(path, "write"))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io(path, "write"))
}

fn sync(path: &Path) -> Result<()> {
    fs::File::open(path).and_then(|file| file.sync_all()).map_err(io(path, "write"))
}

fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Io { path, action, source }
}
