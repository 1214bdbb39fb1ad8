//! The header of a safetensors file.
//!
//! ```text
//! u64 n, little-endian | n bytes of JSON | the tensors, without gaps, to the end of the file
//! ```
//!
//! The JSON is one object, `{"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}`;
//! offsets count from its end. The order of the names says nothing about the order of the offsets.
//! We read it ourselves because the format's own crate lets the later of two equal names win,
//! refuses a whole file for one dtype that it does not know, and does not say which tensor is
//! wrong.

use std::path::Path;

use serde::Deserialize;
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use super::file::{Entry, MAX_DIMS, MAX_TENSORS, StoredDtype, check_name, printable, sort_entries};
use super::tensor::Dtype;
use crate::{Error, Result};

/// Longest header, in bytes; other readers of the format have the same limit.
pub(super) const MAX_HEADER: u64 = 100_000_000;

/// The header's key for strings about the file.
pub(super) const METADATA: &str = "__metadata__";

/// A dtype by the name that the format has for it. Known to the format, but not here: F4, F6_E2M3,
/// F6_E3M2, C64 and the FNUZ variants of FP8.
fn dtype(name: &str) -> Option<Dtype> {
    Some(match name {
        "BOOL" => Dtype::Bool,
        "U8" => Dtype::U8,
        "I8" => Dtype::I8,
        "U16" => Dtype::U16,
        "I16" => Dtype::I16,
        "U32" => Dtype::U32,
        "I32" => Dtype::I32,
        "U64" => Dtype::U64,
        "I64" => Dtype::I64,
        "F16" => Dtype::F16,
        "BF16" => Dtype::Bf16,
        "F32" => Dtype::F32,
        "F64" => Dtype::F64,
        "F8_E4M3" => Dtype::F8E4M3,
        "F8_E5M2" => Dtype::F8E5M2,
        "F8_E8M0" => Dtype::F8E8M0,
        _ => return None,
    })
}

/// The tensors of a safetensors file, sorted by name, every one checked against the file.
pub(super) fn read(path: &Path, bytes: &[u8]) -> Result<Vec<Entry>> {
    let data_start = data_start(path, bytes)?;
    let data_len = bytes.len() - data_start;
    let mut entries = parse(path, &bytes[8..data_start])?;
    for entry in &mut entries {
        check_size(path, entry, data_len)?;
    }
    check_tiling(path, &entries, data_len)?;
    for entry in &mut entries {
        entry.range = data_start + entry.range.start..data_start + entry.range.end;
    }
    sort_entries(path, &mut entries)?;
    Ok(entries)
}

/// Where the tensors begin: not behind the end of the file.
fn data_start(path: &Path, bytes: &[u8]) -> Result<usize> {
    let Some((length, rest)) = bytes.split_first_chunk() else {
        let reason = format!(
            "is no safetensors file: it has {} bytes, and the format begins with 8 of header length",
            bytes.len()
        );
        return Err(Error::file(path, reason));
    };
    let length = u64::from_le_bytes(*length);
    // Garbage in front mostly reads as an enormous length; so say what is expected there.
    if length > MAX_HEADER {
        let reason = format!(
            "is no safetensors file: it would have a header of {length} bytes; the limit is {MAX_HEADER}"
        );
        return Err(Error::file(path, reason));
    }
    match usize::try_from(length) {
        Ok(length) if length <= rest.len() => Ok(8 + length),
        _ => {
            let reason = format!(
                "ends within its header: that has {length} bytes, of which {} are there; \
                 the file is truncated, or no safetensors file",
                rest.len()
            );
            Err(Error::file(path, reason))
        }
    }
}

fn parse(path: &Path, json: &[u8]) -> Result<Vec<Entry>> {
    if json.first() != Some(&b'{') {
        return Err(Error::file(path, "is no safetensors file: its header is no JSON object"));
    }
    let mut header = Header { path, entries: Vec::new(), current: None, refusal: None };
    let mut json = serde_json::Deserializer::from_slice(json);
    let parsed = header.deserialize(&mut json).and_then(|()| json.end());
    match (parsed, header.refusal, header.current) {
        (Ok(()), ..) => Ok(header.entries),
        (Err(_), Some(refusal), _) => Err(refusal),
        (Err(error), None, Some(name)) => Err(Error::tensor(
            path,
            printable(&name),
            format!("its entry in the header is bad: {}", printable(&error.to_string())),
        )),
        (Err(error), None, None) => {
            Err(Error::file(path, format!("bad header: {}", printable(&error.to_string()))))
        }
    }
}

/// Collects the entries while the JSON is read, so that no document is built in between.
struct Header<'p> {
    path: &'p Path,
    /// Ranges count from the end of the header.
    entries: Vec<Entry>,
    /// The tensor whose entry is being read, for messages.
    current: Option<String>,
    /// An error of ours, which serde can only carry as text.
    refusal: Option<Error>,
}

impl<'de> DeserializeSeed<'de> for &mut Header<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Header<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object with one entry per tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if let Err(error) = check_name(self.path, &name) {
                self.refusal = Some(error);
                return Err(A::Error::custom("bad name"));
            }
            if self.entries.len() == MAX_TENSORS {
                return Err(A::Error::custom(format_args!("more than {MAX_TENSORS} tensors")));
            }
            self.current = Some(name);
            let stored: Stored = map.next_value()?;
            self.entries.push(Entry {
                name: self.current.take().unwrap_or_default().into(),
                dtype: match dtype(&stored.dtype) {
                    Some(dtype) => StoredDtype::Known(dtype),
                    None => StoredDtype::Unknown(printable(&stored.dtype).into()),
                },
                shape: stored.shape.0.into(),
                range: stored.data_offsets.0..stored.data_offsets.1,
            });
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct Stored {
    dtype: String,
    shape: Shape,
    data_offsets: (usize, usize),
}

struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dims;
        impl<'de> Visitor<'de> for Dims {
            type Value = Shape;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut dims = Vec::new();
                while let Some(dim) = seq.next_element()? {
                    if dims.len() == MAX_DIMS {
                        return Err(A::Error::custom(format_args!(
                            "more than {MAX_DIMS} dimensions"
                        )));
                    }
                    dims.push(dim);
                }
                Ok(Shape(dims))
            }
        }
        deserializer.deserialize_seq(Dims)
    }
}

/// Checks that a tensor lies in the file, and has as many bytes as its shape and dtype say.
fn check_size(path: &Path, entry: &Entry, data_len: usize) -> Result<()> {
    let error = |reason| Err(Error::tensor(path, &*entry.name, reason));
    let std::ops::Range { start, end } = entry.range;
    if start > end {
        return error(format!("its data_offsets [{start}, {end}] run backwards"));
    }
    if end > data_len {
        return error(format!(
            "its data_offsets [{start}, {end}] reach beyond the {data_len} bytes of tensors in the \
             file; the file is truncated, or its header is wrong"
        ));
    }
    let StoredDtype::Known(dtype) = entry.dtype else { return Ok(()) };
    let needed = dtype
        .size()
        .and_then(|size| entry.shape.iter().try_fold(size, |bytes, dim| bytes.checked_mul(*dim)));
    if needed != Some(end - start) {
        let needed = needed.map_or("more than any file can hold".to_owned(), |n| n.to_string());
        return error(format!(
            "has {} bytes; {dtype} of shape {:?} needs {needed}",
            end - start,
            entry.shape
        ));
    }
    Ok(())
}

/// Checks that the tensors fill the file: no byte in two of them, none in no tensor. Hidden bytes
/// and shared ones are how a file is made to look different to two readers.
fn check_tiling(path: &Path, entries: &[Entry], data_len: usize) -> Result<()> {
    let mut by_place: Vec<&Entry> = entries.iter().collect();
    by_place.sort_unstable_by_key(|entry| (entry.range.start, entry.range.end));
    let mut filled = 0;
    for (i, entry) in by_place.iter().enumerate() {
        let start = entry.range.start;
        if start < filled {
            let reason = format!("overlaps with '{}'", by_place[i - 1].name);
            return Err(Error::tensor(path, &*entry.name, reason));
        }
        if start > filled {
            let reason = format!("{} bytes before it belong to no tensor", start - filled);
            return Err(Error::tensor(path, &*entry.name, reason));
        }
        filled = entry.range.end;
    }
    if filled < data_len {
        let reason = format!("{} bytes at its end belong to no tensor", data_len - filled);
        return Err(Error::file(path, reason));
    }
    Ok(())
}
