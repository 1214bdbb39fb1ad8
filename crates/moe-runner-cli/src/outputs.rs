//! What a command writes is none of what it reads: told apart by the files themselves, whatever
//! they are called. Whether it can be written is known before anything is computed.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use moe_runner::Error;
use moe_runner::checkpoint::Checkpoint;
use moe_runner::quantize::is_companion;

use crate::failure::unusable;

const CONFIG: &str = "config.json";

/// Refuses `-` as an output: standard output has the report.
pub(crate) fn ensure_named(flag: &str, path: &Path) -> Result<()> {
    match path.as_os_str() == "-" {
        true => Err(unusable(format!(
            "{flag} -: standard output has the report; name another (./- is a file of that name)"
        ))),
        false => Ok(()),
    }
}

/// Refuses outputs, each given as its flag and path, that are one of `inputs` (the same), part of the
/// checkpoint or of any other, or each other; and those that cannot be written where they are to be.
pub(crate) fn ensure_apart(
    outputs: &[(&str, &Path)],
    inputs: &[(&str, &Path)],
    checkpoint: Option<&Checkpoint>,
) -> Result<()> {
    let own = checkpoint.map(own_files).unwrap_or_default();
    let of_checkpoint = |path: &Path| checkpoint.is_some_and(|c| same(path, c.path()));
    for (i, (flag, path)) in outputs.iter().enumerate() {
        ensure_named(flag, path)?;
        let refuse = |what: String| {
            Err(unusable(format!("{flag} {}: {what}; name another file", path.display())))
        };
        if let Some((input, _)) = inputs.iter().find(|(_, input)| same(path, input)) {
            return refuse(format!("is the file of {input}"));
        }
        if let Some((other, _)) = outputs[..i].iter().find(|(_, other)| same(path, other)) {
            return refuse(format!("is the file of {other} too"));
        }
        if of_checkpoint(path) {
            return refuse("is the checkpoint itself".into());
        }
        if let Some(file) = own.iter().find(|file| same(path, file)) {
            return refuse(format!("is a file of the checkpoint, {}", file.display()));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let folder = folder_of(path);
        if is_models(&name) && (of_checkpoint(folder) || folder.join(CONFIG).is_file()) {
            return refuse(match path.exists() {
                true => "is a part of the checkpoint in its folder".into(),
                false => "would be taken for a part of the checkpoint in this folder".into(),
            });
        }
        if name == CONFIG || name.ends_with(".gguf") {
            return refuse("would be taken for a checkpoint".into());
        }
        ensure_writable(path)?;
    }
    Ok(())
}

/// Whether a file can be there, tried with one that has no name.
fn ensure_writable(path: &Path) -> Result<()> {
    if std::fs::metadata(path).is_ok_and(|there| !there.is_file()) {
        return Err(Error::file(path, "is there already, and is no regular file").into());
    }
    tempfile::tempfile_in(folder_of(path))
        .map(drop)
        .with_context(|| format!("{}: cannot write", path.display()))
}

/// Writes a file: all of it or, with what was there before left as it is, nothing.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<()> {
    let place = || format!("{}: cannot write", path.display());
    let mut builder = tempfile::Builder::new();
    // those of any new file
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder_of(path)).with_context(place)?;
    file.write_all(content).with_context(place)?;
    file.persist(path).with_context(place)?;
    Ok(())
}

/// The folder that a file is, or will be, in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."))
}

/// The files of a checkpoint: tensors, and in a folder what describes them.
fn own_files(checkpoint: &Checkpoint) -> BTreeSet<PathBuf> {
    let infos = checkpoint.names().filter_map(|name| checkpoint.info(name));
    let mut files: BTreeSet<PathBuf> = infos.map(|info| info.file.to_owned()).collect();
    if let Ok(items) = std::fs::read_dir(checkpoint.path()) {
        let items = items.flatten().filter(|item| {
            let name = item.file_name();
            let name = name.to_string_lossy();
            is_models(&name) && !name.ends_with(".safetensors")
        });
        files.extend(items.map(|item| item.path()));
    }
    files
}

/// Whether a file of that name, in a checkpoint's folder, is one of the checkpoint's.
fn is_models(name: &str) -> bool {
    let weights = name.starts_with("model") && name.ends_with(".safetensors");
    weights || name == CONFIG || name == "model.safetensors.index.json" || is_companion(name)
}

/// Whether both are one file or folder, or will be. Nothing else is opened: who opens a pipe waits for
/// its other end.
fn same(a: &Path, b: &Path) -> bool {
    let ordinary = |path| std::fs::metadata(path).is_ok_and(|at| at.is_file() || at.is_dir());
    if ordinary(a)
        && ordinary(b)
        && let Ok(same) = same_file::is_same_file(a, b)
    {
        return same;
    }
    place(a).zip(place(b)).is_some_and(|(a, b)| a == b)
}

/// Where a file that need not be there will be.
fn place(path: &Path) -> Option<PathBuf> {
    let folder = std::fs::canonicalize(folder_of(path)).ok()?;
    Some(folder.join(path.file_name()?))
}
