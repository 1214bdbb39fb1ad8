//! How files end: tensors of zeros, as they are where a file was made in its full size and never
//! filled.

use std::path::Path;

use super::container::Checkpoint;
use super::file::{Entry, StoredDtype, TensorFile};

/// The end of a file, as far as its tensors are zeros.
pub(crate) struct Tail<'a> {
    pub(crate) path: &'a Path,
    /// Bytes of tensors that are zeros, from the end on.
    pub(crate) zeros: usize,
    /// From the last tensor back to the first that is not all zeros.
    pub(crate) tensors: Vec<TailTensor<'a>>,
}

/// One of the last tensors of a file.
pub(crate) struct TailTensor<'a> {
    pub(crate) name: &'a str,
    pub(crate) dtype: &'a StoredDtype,
    pub(crate) shape: &'a [usize],
    pub(crate) bytes: usize,
    /// Zeros at its end.
    pub(crate) zeros: usize,
}

impl TailTensor<'_> {
    /// There is nothing else in it.
    pub(crate) fn is_zero(&self) -> bool {
        self.zeros == self.bytes
    }
}

impl Checkpoint {
    /// The ends of all files; none of an outline, which is not to be read.
    pub(crate) fn tails(&self) -> impl Iterator<Item = Tail<'_>> {
        self.files_to_read().iter().map(tail)
    }
}

fn tail(file: &TensorFile) -> Tail<'_> {
    let mut entries: Vec<&Entry> = file.entries.iter().collect();
    entries.sort_unstable_by_key(|entry| std::cmp::Reverse((entry.range.end, entry.range.start)));
    let mut tail = Tail { path: &file.path, zeros: 0, tensors: Vec::new() };
    for entry in entries {
        let bytes = file.bytes.get(entry.range.clone()).unwrap_or_default();
        let zeros = bytes.iter().rev().take_while(|byte| **byte == 0).count();
        let tensor = TailTensor {
            name: &entry.name,
            dtype: &entry.dtype,
            shape: &entry.shape,
            bytes: bytes.len(),
            zeros,
        };
        tail.zeros += zeros;
        let ends = !tensor.is_zero();
        tail.tensors.push(tensor);
        if ends {
            break;
        }
    }
    tail
}
