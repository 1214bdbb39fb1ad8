//! One file of a checkpoint: mapped, with the table its header gives.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::tensor::{Bytes, Dtype, Tensor};
use crate::{Error, Result};

/// Most tensors of one checkpoint, over all its files. (The largest published ones have some
/// 200 000.) With [`MAX_NAME`] and [`MAX_DIMS`] it bounds what a table of tensors can take.
pub(super) const MAX_TENSORS: usize = 1 << 20;

/// Longest name of a tensor or key, in bytes.
pub(super) const MAX_NAME: usize = 1024;

/// Most dimensions of a tensor.
pub(super) const MAX_DIMS: usize = 8;

/// A dtype as a header gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredDtype {
    /// One this library can read.
    Known(Dtype),
    /// Another; by the name that stands in the header. Such a tensor can be listed, not read.
    Unknown(Box<str>),
}

impl std::fmt::Display for StoredDtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Known(dtype) => dtype.fmt(f),
            Self::Unknown(name) => f.write_str(name),
        }
    }
}

/// A tensor as its file's header describes it. Whoever makes one has checked that the range lies
/// in the file and, for a known dtype, is as long as shape and dtype say.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: Box<str>,
    pub(super) dtype: StoredDtype,
    /// Outermost first.
    pub(super) shape: Box<[usize]>,
    /// Place in the file.
    pub(super) range: Range<usize>,
}

/// A mapped file and its tensors, sorted by name.
#[derive(Debug)]
pub(super) struct TensorFile {
    pub(super) path: PathBuf,
    pub(super) bytes: Bytes,
    pub(super) entries: Vec<Entry>,
}

impl TensorFile {
    /// A view of one of the entries.
    ///
    /// # Errors
    /// [`Error::Tensor`] if its dtype is unknown.
    pub(super) fn tensor(&self, entry: &Entry) -> Result<Tensor> {
        let dtype = match &entry.dtype {
            StoredDtype::Known(dtype) => *dtype,
            StoredDtype::Unknown(name) => {
                let reason = format!("has the dtype '{name}', which cannot be read");
                return Err(Error::tensor(&self.path, &*entry.name, reason));
            }
        };
        let bytes = self
            .bytes
            .slice(entry.range.clone())
            .ok_or_else(|| Error::tensor(&self.path, &*entry.name, "lies outside of its file"))?;
        Ok(Tensor {
            name: entry.name.to_string(),
            file: self.path.clone(),
            dtype,
            shape: entry.shape.to_vec(),
            bytes,
            blank: false,
        })
    }
}

/// Maps a file, or reads it where this is built without `mmap`; it must be a regular file with something in it.
///
/// The mapping shows the file as it is on disk: while it is in use, nobody may write to the file
/// or shorten it. (To replace it with a new one of the same name is fine.)
pub(crate) fn map(path: &Path) -> Result<Bytes> {
    map_as(path, path)
}

/// The same of a file that messages call `name`.
pub(super) fn map_as(path: &Path, name: &Path) -> Result<Bytes> {
    let bytes = contents(open(path, name)?).map_err(|source| Error::Io {
        path: name.to_owned(),
        action: "read",
        source,
    })?;
    if let Some(reason) = stands_for_another(&bytes) {
        return Err(Error::file(name, reason));
    }
    Ok(bytes)
}

/// Reads a file of at most `limit` bytes: what others may write to meanwhile.
pub(super) fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = open(path, path)?.take(limit.saturating_add(1)).read_to_end(&mut bytes);
    read.map_err(|source| Error::Io { path: path.to_owned(), action: "read", source })?;
    if bytes.len() as u64 > limit {
        return Err(Error::file(path, format!("has more than {limit} bytes, which is the limit")));
    }
    if let Some(reason) = stands_for_another(&bytes) {
        return Err(Error::file(path, reason));
    }
    Ok(bytes)
}

/// Opens a regular file with something in it. What it is, is asked of the open file: another may have
/// its name by then. Nobody waits for the other end of a pipe.
fn open(path: &Path, name: &Path) -> Result<File> {
    let io = |source| Error::Io { path: name.to_owned(), action: "open", source };
    let mut options = File::options();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32);
    }
    let file = options.open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    if !metadata.is_file() {
        let kind =
            if metadata.is_dir() { "is a folder; a file is needed" } else { "is no regular file" };
        return Err(Error::file(name, kind));
    }
    if metadata.len() == 0 {
        return Err(Error::file(name, "is empty"));
    }
    Ok(file)
}

#[cfg(feature = "mmap")]
fn contents(file: File) -> std::io::Result<Bytes> {
    // SAFETY: the mapping is read-only, and `Bytes` bounds every access by its length. That nobody
    // changes or shortens the file meanwhile cannot be checked; the documentation of `map` asks for it.
    let mapped = unsafe { memmap2::Mmap::map(&file) }?;
    Ok(Bytes::new(std::sync::Arc::new(mapped)))
}

#[cfg(not(feature = "mmap"))]
fn contents(mut file: File) -> std::io::Result<Bytes> {
    let mut bytes = Vec::new();
    let len = usize::try_from(file.metadata()?.len()).map_err(std::io::Error::other)?;
    bytes.try_reserve_exact(len)?;
    std::io::Read::read_to_end(&mut file, &mut bytes)?;
    Ok(bytes.into())
}

/// What a file is that a download left in the place of another one.
pub(super) fn stands_for_another(bytes: &[u8]) -> Option<&'static str> {
    let start = &bytes[..bytes.len().min(64)];
    let text = start.trim_ascii_start().to_ascii_lowercase();
    if start.starts_with(b"version https://git-lfs") {
        return Some("is a Git-LFS pointer, not the file itself: get that with 'git lfs pull'");
    }
    if text.starts_with(b"<!doctype") || text.starts_with(b"<html") || text.starts_with(b"<?xml") {
        return Some("is a web page, such as the error of a failed download: get the file again");
    }
    None
}

/// Checks a tensor's name, which messages and tables are to show: not empty, not absurdly long,
/// no control characters.
pub(super) fn check_name(path: &Path, name: &str) -> Result<()> {
    let reason = if name.len() > MAX_NAME {
        format!("has a name of {} bytes; at most {MAX_NAME} are taken", name.len())
    } else if name.chars().any(char::is_control) {
        "has control characters in its name".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::tensor(path, printable(name), reason))
}

/// Checks that dimensions can be multiplied in any order: zeros make an array empty, however large
/// the others are, but a product of those alone must be a number as well.
fn check_dims(path: &Path, entry: &Entry) -> Result<()> {
    let product = entry.shape.iter().try_fold(1usize, |all, dim| all.checked_mul((*dim).max(1)));
    match product {
        Some(_) => Ok(()),
        None => {
            let reason = format!("has shape {:?}, which no array can have", entry.shape);
            Err(Error::tensor(path, &*entry.name, reason))
        }
    }
}

/// Sorts entries by name, and checks their shapes.
///
/// # Errors
/// [`Error::Tensor`] if two have the same name, or a shape is absurd.
pub(super) fn sort_entries(path: &Path, entries: &mut Vec<Entry>) -> Result<()> {
    entries.iter().try_for_each(|entry| check_dims(path, entry))?;
    entries.shrink_to_fit();
    entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    match entries.windows(2).find(|pair| pair[0].name == pair[1].name) {
        Some(pair) => {
            Err(Error::tensor(path, &*pair[0].name, "stands more than once in the header"))
        }
        None => Ok(()),
    }
}

/// Text from a file, fit for one line of a message: control characters escaped, cut off after 80
/// characters.
pub(super) fn printable(text: &str) -> String {
    let mut line = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == 80 {
            line.push('…');
            break;
        }
        if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line
}
