//! The new checkpoint: made under another name, and put in its place when it is complete.
//!
//! Where nothing is, a folder appears in one step. Into a folder that is there, files are put one by
//! one, `config.json` last; those of the checkpoint that they replace are out of the way by then, and
//! come back if anything fails.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::json;

use super::Options;
use super::companions::is_companion;
use super::leftovers::{Found, Leftover, Making, clean};
use super::place::{Moves, free_space, rename_new};
use super::plan::{Plan, size};
use crate::checkpoint::{Checkpoint, NewTensor, Writer};
use crate::{Error, Result};

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";

/// Where the old files of an overwritten checkpoint are until the new ones are in place.
const REPLACED: &str = ".moe-runner-replaced-";

/// Where the checkpoint goes.
enum Place {
    /// Nothing is there.
    New,
    /// A folder, with the files that may be replaced.
    Folder(Vec<Old>),
}

/// A file of the checkpoint that is to be replaced, as it was when the run began.
struct Old {
    name: String,
    bytes: u64,
    modified: Option<SystemTime>,
}

/// A checkpoint in the making. Dropped, it is removed.
pub(super) struct Folder {
    output: PathBuf,
    place: Place,
    making: Making,
    /// What earlier runs left here.
    pub(super) leftovers: Vec<Leftover>,
    /// Files that are copied beside the weights.
    companions: Vec<PathBuf>,
    /// Files and folders that are not.
    left_out: Vec<PathBuf>,
    /// Which file holds which tensor.
    index: BTreeMap<String, String>,
}

impl Folder {
    /// Begins the checkpoint at `output`.
    pub(super) fn begin(
        checkpoint: &Checkpoint,
        output: &Path,
        plan: &Plan,
        overwrite: bool,
    ) -> Result<Self> {
        let there = fs::symlink_metadata(output).is_ok();
        if there && !output.exists() {
            return Err(Error::file(output, "is a link to something that is not there"));
        }
        // by its own name: what is renamed must not be a link
        let named = if there { fs::canonicalize(output) } else { std::path::absolute(output) };
        let output = named.map_err(io(output, "open"))?;
        let (Some(name), Some(parent)) = (output.file_name(), output.parent()) else {
            return Err(Error::file(&output, "is no name for a new folder"));
        };
        if !parent.is_dir() {
            return Err(Error::file(parent, "is no folder; make it first"));
        }
        if there && !output.is_dir() {
            return Err(Error::file(&output, "is there already, and is no folder"));
        }
        let beside_it = format!(".{}.partial-", name.to_string_lossy());
        let within = ".moe-runner-partial-".to_string();
        // the folder may have come after a run that began without it
        let mut found = match clean(parent, &beside_it) {
            Err(_) if there => Found::default(),
            found => found.map_err(io(parent, "list"))?,
        };
        let (parent, prefix) = match there {
            true => (output.clone(), within),
            false => (parent.to_owned(), beside_it),
        };
        if there {
            found.extend(clean(&parent, &prefix).map_err(io(&parent, "list"))?);
        }
        if let Some(other) = found.in_use {
            let reason = format!("is being written by another run, in {}", other.display());
            return Err(Error::file(&output, reason));
        }
        let (companions, left_out) = beside(checkpoint)?;
        let place = match there {
            true => Place::Folder(old_files(checkpoint, &output, &companions, overwrite)?),
            false => Place::New,
        };
        let copies = companions.iter().filter_map(|path| fs::metadata(path).ok());
        let needed = plan.bytes() + copies.map(|copy| copy.len()).sum::<u64>();
        ensure_space(&output, needed, free_space(&parent))?;
        let making = Making::begin(&parent, &prefix).map_err(io(&parent, "make a folder here"))?;
        let leftovers = found.leftovers;
        Ok(Self { output, place, making, leftovers, companions, left_out, index: BTreeMap::new() })
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

    /// Writes what else belongs to a checkpoint, config.json last, and puts it in place. Returns
    /// what was not copied.
    pub(super) fn finish(
        self,
        checkpoint: &Checkpoint,
        plan: &Plan,
        options: &Options,
    ) -> Result<Finished> {
        let from = checkpoint.path();
        let to = self.making.path();
        for path in &self.companions {
            let copy = to.join(path.file_name().unwrap_or_default());
            fs::copy(path, &copy).map_err(io(path, "copy"))?;
            sync(&copy)?;
        }
        if plan.shards.len() > 1 {
            let total: u64 =
                plan.shards.iter().flatten().flat_map(|unit| &unit.tensors).map(size).sum();
            let index = json!({"metadata": {"total_size": total}, "weight_map": self.index});
            write(&to.join(INDEX), format!("{index:#}\n").as_bytes())?;
        }
        let config = fs::read(from.join(CONFIG)).map_err(io(&from.join(CONFIG), "read"))?;
        let quantization = format!("{:#}", options.format.config(&plan.ignore));
        write(&to.join(CONFIG), &with_quantization(&from.join(CONFIG), &config, &quantization)?)?;
        let Self { output, place, making, mut leftovers, left_out, .. } = self;
        match place {
            Place::New => put_folder(&output, making)?,
            Place::Folder(old) => leftovers.extend(put_files(&output, &making, &old)?),
        }
        Ok(Finished { left_out, leftovers })
    }
}

/// What there is to say of a checkpoint that is in place.
pub(super) struct Finished {
    pub(super) left_out: Vec<PathBuf>,
    pub(super) leftovers: Vec<Leftover>,
}

/// The whole folder takes its name, if nothing has taken it meanwhile. Complete as it is, the new
/// one is kept otherwise.
fn put_folder(output: &Path, making: Making) -> Result<()> {
    making.unmark().map_err(io(making.path(), "complete"))?;
    let made = making.keep();
    let parent = made.parent().unwrap_or(Path::new("."));
    match rename_new(&made, output) {
        Ok(()) => {
            sync_folder(parent);
            Ok(())
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Err(Error::file(
            output,
            format!(
                "appeared while the new checkpoint was being made, and is left as it is; the new \
                 one is complete: {}",
                made.display()
            ),
        )),
        Err(error) => Err(Error::Io {
            path: made,
            action: "be given its name (the new checkpoint is complete there)",
            source: error,
        }),
    }
}

/// The old checkpoint's files make way, then the new ones take their names, config.json last. If
/// anything fails, everything comes back; where that fails too, the old files stay where they are,
/// and the error names the place.
fn put_files(output: &Path, making: &Making, old: &[Old]) -> Result<Option<Leftover>> {
    let mut names: Vec<_> = fs::read_dir(making.path())
        .and_then(|items| items.map(|item| Ok(item?.file_name())).collect::<Result<_, _>>())
        .map_err(io(making.path(), "list"))?;
    // the marker stays: it says whose folder this is until the end
    names.retain(|name| !name.to_string_lossy().starts_with('.'));
    names.sort_by_key(|name| (name == CONFIG, name.clone()));
    let aside = tempfile::Builder::new().prefix(REPLACED).tempdir_in(output);
    // it is removed when all is well, and only then
    let aside = aside.map_err(io(output, "make a folder here"))?.keep();
    let mut moves = Moves::default();
    let moved = || -> std::io::Result<()> {
        for old in old.iter().rev() {
            let path = output.join(&old.name);
            if !old.is_as_it_was(&path) {
                let reason = format!("'{}' was changed while the new one was made", old.name);
                return Err(std::io::Error::other(reason));
            }
            moves.rename(path, aside.join(&old.name))?;
        }
        for name in &names {
            let put = moves.rename(making.path().join(name), output.join(name));
            put.map_err(|error| match error.kind() {
                std::io::ErrorKind::AlreadyExists => {
                    let name = name.to_string_lossy();
                    std::io::Error::other(format!(
                        "'{name}' is there, and is no file of the checkpoint that was there when the \
                         run began"
                    ))
                }
                _ => error,
            })?;
        }
        Ok(())
    };
    if let Err(source) = { moved }() {
        if moves.undo() {
            let _ = fs::remove_dir(&aside);
            let action = "take the new checkpoint's files; the old ones are back";
            return Err(Error::Io { path: output.to_owned(), action, source });
        }
        let reason = format!(
            "the new checkpoint's files could not be put in place ({source}), and not all of the old \
             ones could be put back: they are in {}",
            aside.display()
        );
        return Err(Error::file(output, reason));
    }
    sync_folder(output);
    // of the old ones, which nobody asked to keep
    let removed = fs::remove_dir_all(&aside).is_ok();
    Ok((!removed).then_some(Leftover { path: aside, removed }))
}

impl Old {
    fn of(folder: &Path, name: String) -> Result<Self> {
        let path = folder.join(&name);
        let about = fs::metadata(&path).map_err(io(&path, "open"))?;
        if !about.is_file() {
            return Err(Error::file(&path, "stands where a file of the new checkpoint goes"));
        }
        Ok(Self { name, bytes: about.len(), modified: about.modified().ok() })
    }

    fn is_as_it_was(&self, path: &Path) -> bool {
        fs::metadata(path)
            .is_ok_and(|about| (about.len(), about.modified().ok()) == (self.bytes, self.modified))
    }
}

/// The files of `output` that the new checkpoint replaces, config.json last: an old one's weights,
/// index and configuration, and what both have. None in an empty folder.
fn old_files(
    checkpoint: &Checkpoint,
    output: &Path,
    companions: &[PathBuf],
    overwrite: bool,
) -> Result<Vec<Old>> {
    let refuse = |reason: &str| Err(Error::file(output, reason));
    let from = fs::canonicalize(checkpoint.path()).map_err(io(checkpoint.path(), "open"))?;
    if from.starts_with(output) {
        return refuse("holds the checkpoint that is to be quantised; name another folder");
    }
    let items = fs::read_dir(output).map_err(io(output, "list"))?;
    let mut names = Vec::new();
    for item in items {
        names.push(item.map_err(io(output, "list"))?.file_name().to_string_lossy().into_owned());
    }
    if let Some(replaced) = names.iter().find(|name| name.starts_with(REPLACED)) {
        return refuse(&format!(
            "an interrupted run was replacing this checkpoint, and the old one's files are in \
             {replaced}: move them back, or remove that folder"
        ));
    }
    if names.is_empty() {
        return Ok(Vec::new());
    }
    if !overwrite {
        return refuse("is there already, and is not empty; name another folder, or overwrite it");
    }
    if !output.join(CONFIG).is_file() {
        return refuse("holds something that is no checkpoint; it is not overwritten");
    }
    let weights = |name: &str| name.starts_with("model") && name.ends_with(".safetensors");
    let copied: BTreeSet<&OsStr> = companions.iter().filter_map(|path| path.file_name()).collect();
    names.retain(|name| {
        name == CONFIG || name == INDEX || weights(name) || copied.contains(OsStr::new(name))
    });
    // the checkpoint may be a folder of links to these
    let sources = sources(checkpoint, companions);
    if let Some(name) = names.iter().find(|name| sources.contains(&output.join(name))) {
        return refuse(&format!(
            "holds '{name}' of the checkpoint that is to be quantised; name another folder"
        ));
    }
    names.sort_by_key(|name| (name == CONFIG, name.clone()));
    names.into_iter().map(|name| Old::of(output, name)).collect()
}

/// The files that a checkpoint is read from, and those that are copied, wherever links lead to.
fn sources(checkpoint: &Checkpoint, companions: &[PathBuf]) -> BTreeSet<PathBuf> {
    let infos = checkpoint.names().filter_map(|name| checkpoint.info(name));
    let own = [CONFIG, INDEX].map(|name| checkpoint.path().join(name));
    let mut files: BTreeSet<PathBuf> = infos.map(|info| info.file.to_owned()).collect();
    files.extend(own.into_iter().chain(companions.iter().cloned()));
    files.into_iter().filter_map(|file| fs::canonicalize(file).ok()).collect()
}

/// What lies beside a checkpoint's own files: what a model needs, and what it does not.
fn beside(checkpoint: &Checkpoint) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let from = checkpoint.path();
    let tensors: BTreeSet<&Path> =
        checkpoint.names().filter_map(|name| checkpoint.info(name)).map(|i| i.file).collect();
    let mut paths = Vec::new();
    for item in fs::read_dir(from).map_err(io(from, "list"))? {
        paths.push(item.map_err(io(from, "list"))?.path());
    }
    paths.sort();
    paths.retain(|path| {
        let own = path.file_name().is_some_and(|name| name == CONFIG || name == INDEX);
        !own && !tensors.contains(&**path)
    });
    Ok(paths.into_iter().partition(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        path.is_file() && is_companion(&name)
    }))
}

/// Refuses before the first byte what the disk has no room for.
fn ensure_space(output: &Path, needed: u64, free: Option<u64>) -> Result<()> {
    match free {
        Some(free) if free < needed => {
            // one rounded up, one down: they do not look alike
            let (needed, free) = match needed {
                0..10_000_000_000 => (
                    format!("{} MB", needed.div_ceil(1_000_000)),
                    format!("{} MB", free / 1_000_000),
                ),
                _ => {
                    let gigabytes = |tenths: u64| format!("{}.{} GB", tenths / 10, tenths % 10);
                    (gigabytes(needed.div_ceil(100_000_000)), gigabytes(free / 100_000_000))
                }
            };
            let reason = format!("needs {needed}, and {free} are free on its disk");
            Err(Error::file(output, reason))
        }
        _ => Ok(()),
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

/// The names in a folder, on disk. Not every file system can do this; the files are complete either
/// way.
fn sync_folder(path: &Path) {
    let _ = fs::File::open(path).and_then(|folder| folder.sync_all());
}

fn sync(path: &Path) -> Result<()> {
    fs::File::open(path).and_then(|file| file.sync_all()).map_err(io(path, "write"))
}

fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Io { path, action, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_room_is_told_of() {
        let place = Path::new("out");
        let error = ensure_space(place, 30_000_000_001, Some(30_000_000_000)).unwrap_err();
        let says = "out: needs 30.1 GB, and 30.0 GB are free on its disk";
        assert_eq!(error.to_string(), says);
        let error = ensure_space(place, 10_000_001, Some(10_000_000)).unwrap_err();
        let says = "out: needs 11 MB, and 10 MB are free on its disk";
        assert_eq!(error.to_string(), says);
        ensure_space(place, 5, Some(5)).unwrap();
        // some file systems do not tell
        ensure_space(place, 5, None).unwrap();
    }
}
