//! GGUF files, versions 2 and 3, little-endian.
//!
//! ```text
//! "GGUF" | u32 version | u64 tensors | u64 key/values | key/values | tensor infos | padding | data
//! ```
//!
//! A tensor info is name, dimensions (innermost first), type and offset into the data. Offsets are
//! multiples of `general.alignment` (32 where the file says nothing).

mod metadata;
mod reader;
pub(super) mod types;

pub use metadata::{Array, Metadata, Value};
pub use types::GgmlType;

use std::path::{Path, PathBuf};

use super::file::{
    Entry, MAX_DIMS, MAX_TENSORS, StoredDtype, TensorFile, check_name, map, sort_entries,
};
use crate::{Error, Result};
use reader::Reader;

/// The first bytes of a GGUF file.
pub(super) const MAGIC: &[u8] = b"GGUF";

const ALIGNMENT: &str = "general.alignment";
const DEFAULT_ALIGNMENT: usize = 32;

/// Opens a GGUF file; if it is the first of a split model, all its parts.
pub(super) fn open(path: &Path) -> Result<(Metadata, Vec<TensorFile>)> {
    let (metadata, first) = read(path)?;
    let parts = metadata.usize("split.count")?.unwrap_or(1);
    let mut files = vec![first];
    if parts > 1 {
        let number = metadata.usize("split.no")?.ok_or_else(|| metadata.missing("split.no"))?;
        let part = |no: usize| part_path(path, number, no, parts);
        if number != 0 {
            let first = part(0)?;
            let reason = format!("is part {} of {parts}; open {}", number + 1, first.display());
            return Err(Error::file(path, reason));
        }
        let mut tensors = files[0].entries.len();
        for no in 1..parts {
            let path = part(no)?;
            let (metadata, file) = read(&path)?;
            if metadata.usize("split.no")? != Some(no)
                || metadata.usize("split.count")? != Some(parts)
            {
                let reason =
                    format!("does not say of itself that it is part {} of {parts}", no + 1);
                return Err(Error::file(&path, reason));
            }
            tensors += file.entries.len();
            if tensors > MAX_TENSORS {
                return Err(Error::file(
                    &path,
                    format!("has tensor {tensors} of the model; at most {MAX_TENSORS} are taken"),
                ));
            }
            files.push(file);
        }
        if let Some(promised) = metadata.usize("split.tensors.count")?
            && promised != tensors
        {
            let reason = format!("is {promised}, but the {parts} parts hold {tensors} tensors");
            return Err(metadata.error("split.tensors.count", reason));
        }
    }
    Ok((metadata, files))
}

/// The file of part `no` (from 0) of a split model, after the name of part `number`:
/// `NAME-00001-of-00003.gguf`.
fn part_path(path: &Path, number: usize, no: usize, parts: usize) -> Result<PathBuf> {
    let suffix = |no: usize| format!("-{:05}-of-{parts:05}.gguf", no + 1);
    let name = path.file_name().and_then(|name| name.to_str());
    match name.and_then(|name| name.strip_suffix(&suffix(number))) {
        Some(stem) => Ok(path.with_file_name(format!("{stem}{}", suffix(no)))),
        None => {
            let reason = format!(
                "is part {} of {parts}, so its name must end in '{}'",
                number + 1,
                suffix(number)
            );
            Err(Error::file(path, reason))
        }
    }
}

/// Reads one file.
fn read(path: &Path) -> Result<(Metadata, TensorFile)> {
    let bytes = map(path)?;
    let mut reader = Reader { path, bytes: &bytes, at: 0 };
    if !bytes.starts_with(MAGIC) {
        return Err(Error::file(path, "is no GGUF file: it does not begin with 'GGUF'"));
    }
    reader.take(MAGIC.len() as u64)?;
    match reader.u32()? {
        2 | 3 => {}
        1 => {
            return Err(Error::file(
                path,
                "is GGUF version 1, which was in use for a few days of 2023; convert it again",
            ));
        }
        version if version.swap_bytes() < 1 << 16 => {
            return Err(Error::file(
                path,
                "is a big-endian GGUF file; only little-endian ones can be read",
            ));
        }
        version => {
            return Err(Error::file(
                path,
                format!("is GGUF version {version}; versions 2 and 3 can be read"),
            ));
        }
    }
    // The smallest tensor info: an empty name, no dimensions, type and offset. The smallest
    // key/value: an empty key, a type and one byte.
    let tensors = reader.count("tensors", 8 + 4 + 4 + 8)?;
    let keys = reader.count("key/values", 8 + 4 + 1)?;
    if tensors > MAX_TENSORS as u64 {
        return Err(Error::file(
            path,
            format!("has {tensors} tensors; at most {MAX_TENSORS} are taken"),
        ));
    }
    let metadata = Metadata::read(&mut reader, &bytes, keys)?;
    let alignment = alignment(&metadata)?;
    let infos = (0..tensors).map(|_| Info::read(&mut reader)).collect::<Result<Vec<_>>>()?;
    // Without tensors, there need not be padding either.
    let data_start = reader.at.next_multiple_of(alignment).min(bytes.len());
    let mut entries = Vec::with_capacity(infos.len());
    for info in infos {
        entries.push(info.place(path, data_start, bytes.len(), alignment)?);
    }
    check_overlaps(path, &entries)?;
    sort_entries(path, &mut entries)?;
    Ok((metadata, TensorFile { path: path.to_owned(), bytes, entries }))
}

fn alignment(metadata: &Metadata) -> Result<usize> {
    let Some(alignment) = metadata.usize(ALIGNMENT)? else { return Ok(DEFAULT_ALIGNMENT) };
    if !alignment.is_power_of_two() || alignment > 1 << 20 {
        let reason = format!("is {alignment}; it must be a power of two, at most 2^20");
        return Err(metadata.error(ALIGNMENT, reason));
    }
    Ok(alignment)
}

/// A tensor as its info stands in the file.
struct Info {
    name: Box<str>,
    /// Outermost first, unlike in the file.
    shape: Box<[usize]>,
    kind: u32,
    offset: u64,
}

impl Info {
    fn read(reader: &mut Reader<'_>) -> Result<Self> {
        let name = reader.string("tensor name")?;
        check_name(reader.path, name)?;
        let error = |reason: String| Error::tensor(reader.path, name, reason);
        let dims = reader.u32()? as usize;
        if dims > MAX_DIMS {
            return Err(error(format!("has {dims} dimensions; at most {MAX_DIMS} are taken")));
        }
        let mut shape = Vec::with_capacity(dims);
        for _ in 0..dims {
            let dim = reader.u64()?;
            shape.push(
                usize::try_from(dim).map_err(|_| error(format!("has a dimension of {dim}")))?,
            );
        }
        shape.reverse();
        Ok(Self {
            name: name.into(),
            shape: shape.into(),
            kind: reader.u32()?,
            offset: reader.u64()?,
        })
    }

    /// Checks where the tensor lies: aligned, and in the file with all of its blocks.
    fn place(
        self,
        path: &Path,
        data_start: usize,
        file_len: usize,
        alignment: usize,
    ) -> Result<Entry> {
        let Self { name, shape, kind, offset } = self;
        let error = |reason: String| Error::tensor(path, &*name, reason);
        if offset % alignment as u64 != 0 {
            return Err(error(format!(
                "its offset {offset} is no multiple of the alignment, {alignment}"
            )));
        }
        let (dtype, bytes) = match GgmlType::of(kind) {
            Some(stored) => {
                (StoredDtype::Known(stored.into()), block_bytes(stored, &shape).map_err(&error)?)
            }
            // Nobody knows how long it is; as it cannot be read, that does not matter.
            None => (StoredDtype::Unknown(format!("ggml type {kind}").into()), 0),
        };
        let start = usize::try_from(offset).ok().and_then(|offset| data_start.checked_add(offset));
        let end = start.and_then(|start| start.checked_add(bytes)).filter(|end| *end <= file_len);
        let (Some(start), Some(end)) = (start, end) else {
            return Err(error(format!(
                "its {bytes} bytes at offset {offset} reach beyond the {} bytes of data in the file; \
                 the file is truncated, or its header is wrong",
                file_len - data_start
            )));
        };
        Ok(Entry { name, dtype, shape, range: start..end })
    }
}

/// The bytes of a tensor: every row a whole number of blocks.
fn block_bytes(stored: GgmlType, shape: &[usize]) -> Result<usize, String> {
    let GgmlType { name, block, bytes, .. } = stored;
    let row = shape.last().copied().unwrap_or(1);
    if row % block != 0 {
        return Err(format!("has rows of {row} elements; {name} comes in blocks of {block}"));
    }
    let blocks =
        shape.iter().rev().skip(1).try_fold(row / block, |product, dim| product.checked_mul(*dim));
    blocks
        .and_then(|blocks| blocks.checked_mul(bytes))
        .ok_or_else(|| format!("{name} of shape {shape:?} is larger than any file"))
}

fn check_overlaps(path: &Path, entries: &[Entry]) -> Result<()> {
    let mut by_place: Vec<&Entry> = entries.iter().collect();
    by_place.sort_unstable_by_key(|entry| (entry.range.start, entry.range.end));
    match by_place.windows(2).find(|pair| pair[1].range.start < pair[0].range.end) {
        Some(pair) => {
            let reason = format!("overlaps with '{}'", pair[0].name);
            Err(Error::tensor(path, &*pair[1].name, reason))
        }
        None => Ok(()),
    }
}
