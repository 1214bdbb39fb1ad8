//! What a command writes is none of what it reads: told apart by the files themselves, whatever
//! they are called.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::Result;
use moe_runner::checkpoint::Checkpoint;
use moe_runner::quantize::is_companion;

use crate::failure::unusable;

/// Refuses outputs, each given as its flag and path, that are one of `inputs` (the same), part of the
/// checkpoint, or each other.
pub(crate) fn ensure_apart(
    outputs: &[(&str, &Path)],
    inputs: &[(&str, &Path)],
    checkpoint: &Checkpoint,
) -> Result<()> {
    let own = own_files(checkpoint);
    for (i, (flag, path)) in outputs.iter().enumerate() {
        let refuse = |what: String| {
            Err(unusable(format!("{flag} {}: {what}; name another file", path.display())))
        };
        if let Some((input, _)) = inputs.iter().find(|(_, input)| same(path, input)) {
            return refuse(format!("is the file of {input}"));
        }
        if let Some((other, _)) = outputs[..i].iter().find(|(_, other)| same(path, other)) {
            return refuse(format!("is the file of {other} too"));
        }
        if same(path, checkpoint.path()) {
            return refuse("is the checkpoint itself".into());
        }
        if let Some(file) = own.iter().find(|file| same(path, file)) {
            return refuse(format!("is a file of the checkpoint, {}", file.display()));
        }
        let folder = path.parent().filter(|folder| *folder != Path::new(""));
        if same(folder.unwrap_or(Path::new(".")), checkpoint.path())
            && path.file_name().is_some_and(|name| is_models(&name.to_string_lossy()))
        {
            return refuse("would be taken for a part of the checkpoint in this folder".into());
        }
    }
    Ok(())
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
    weights || name == "config.json" || name == "model.safetensors.index.json" || is_companion(name)
}

/// Whether both are one file or folder, or will be.
fn same(a: &Path, b: &Path) -> bool {
    same_file::is_same_file(a, b).unwrap_or_else(|_| match (place(a), place(b)) {
        (Some(a), Some(b)) => a == b,
        _ => false,
    })
}

/// Where a file that need not be there will be.
fn place(path: &Path) -> Option<PathBuf> {
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    let folder = std::fs::canonicalize(folder.unwrap_or(Path::new("."))).ok()?;
    Some(folder.join(path.file_name()?))
}
