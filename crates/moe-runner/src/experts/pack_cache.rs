//! Packed weights on disk, mapped at the next start.
//!
//! ```text
//! file   = magic (8) · bytes of the header (8) · digest of the header (16) · header · sections
//! header = JSON: the key, what the sections are, where they lie
//! ```
//!
//! All projections that a kernel packs together (the routed experts of a layer on a rank, or its shared
//! ones) are one file. Its name is its **key**: a digest of this program's version and that of the
//! packed layout, the kernel with its features, every matrix's format, shape and window, and what the
//! matrices hold. So other weights, another kernel or another version have another file, and nothing is
//! ever taken for something else. Digests are not cryptographic: they tell what has changed, not what
//! somebody has forged.
//!
//! A file is written under a temporary name and renamed when it is on disk; one that is cut off, of
//! another version or otherwise not what its key says is written anew. Pages of a mapped file are those
//! of all processes that map it.

use std::collections::HashMap;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use moe_kernels::operand::OperandKind;
use moe_kernels::pack::{Packed, Parts, VERSION};
use moe_kernels::pool::ThreadPool;
use moe_kernels::region::for_each;
use moe_kernels::stored::View;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Bytes, Checkpoint, Temporary, map};
use crate::experts::KernelDesc;
use crate::{Error, Result};

const MAGIC: &[u8; 8] = b"MOEPACK\n";

/// Bytes before the header.
const PREFIX: usize = 8 + 8 + 16;

/// Sections begin at a multiple of this: a cache line.
const LINE: usize = 64;

/// The first section begins at a multiple of this: a page.
const PAGE: usize = 4096;

/// A folder of packed weights. Cloning shares it, and what it tells of its [use](Self::used).
///
/// ```no_run
/// use moe_runner::experts::PackCache;
/// use moe_runner::prelude::*;
/// # fn main() -> moe_runner::Result<()> {
/// let checkpoint = Checkpoint::open("Qwen3-30B-A3B")?;
/// let cache = PackCache::of_checkpoint("/var/cache/moe-runner", &checkpoint)?;
/// let options = Options { pack_cache: Some(cache), ..Options::new(ActivationDtype::Bf16, 16)? };
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct PackCache(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    /// Of the checkpoint's files, where there is one: then samples of the weights say the rest.
    stamp: Option<[u64; 2]>,
    used: Mutex<PackCacheUse>,
}

/// What a [`PackCache`] was good for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackCacheUse {
    /// Files that were mapped: sets of experts that nobody had to pack.
    pub mapped: usize,
    /// Bytes of packed weights in them.
    pub mapped_bytes: usize,
    /// Files that were written.
    pub written: usize,
    /// Bytes of packed weights in them.
    pub written_bytes: usize,
    /// What did not go as it should: files that had to be written anew, and those that could not be
    /// written. The weights were packed all the same.
    pub warnings: Vec<String>,
}

/// A matrix that is to be packed, and the rows that it is to multiply.
pub(super) type Wanted<'a> = (&'a View, OperandKind);

impl PackCache {
    /// Packed weights in `folder`, which is made when it is needed; for weights from anywhere. They
    /// are recognised by **all** their bytes, which must be read for it.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self::with(folder.into(), None)
    }

    /// The same for the weights of `checkpoint` alone, which are recognised by the sizes and the times
    /// of change of all its files, together with samples of every array's bytes (the ends, and at
    /// least one in every MiB): a start reads next to nothing of the checkpoint. A file that is
    /// changed and given its old time and size again, in none of the sampled places, passes for what
    /// it was.
    ///
    /// # Errors
    /// [`Error::Io`] if a file's size and time cannot be asked for.
    pub fn of_checkpoint(folder: impl Into<PathBuf>, checkpoint: &Checkpoint) -> Result<Self> {
        let mut digest = Digest::new();
        for path in checkpoint.files() {
            let io = |source| Error::Io { path: path.to_owned(), action: "look at", source };
            let file = std::fs::metadata(path).map_err(io)?;
            let time = file.modified().map_err(io)?.duration_since(UNIX_EPOCH);
            // before 1970: as good as any other time
            let time = time.unwrap_or_default().as_nanos();
            digest.update(path.file_name().unwrap_or_default().as_encoded_bytes());
            digest.update(&file.len().to_le_bytes());
            digest.update(&time.to_le_bytes());
        }
        Ok(Self::with(folder.into(), Some(digest.finish())))
    }

    fn with(folder: PathBuf, stamp: Option<[u64; 2]>) -> Self {
        Self(Arc::new(Inner { folder, stamp, used: Mutex::default() }))
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.0.folder
    }

    /// What it was good for until now.
    pub fn used(&self) -> PackCacheUse {
        self.0.used.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, note: impl FnOnce(&mut PackCacheUse)) {
        note(&mut self.0.used.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The place of what `desc` packs of `wanted`.
    pub(super) fn place(
        &self,
        desc: &KernelDesc,
        wanted: &[Wanted<'_>],
        pool: &dyn ThreadPool,
    ) -> Place<'_> {
        // experts may be windows of one array
        let (mut arrays, mut numbers) = (Vec::new(), HashMap::new());
        for array in wanted.iter().flat_map(|(view, _)| view.stored().arrays()) {
            numbers.entry(identity(array)).or_insert_with(|| {
                arrays.push((array, [0; 2]));
                arrays.len() - 1
            });
        }
        let sampled = self.0.stamp.is_some();
        for_each(pool, arrays.iter_mut(), |(array, digest)| {
            *digest = if sampled { samples(array) } else { whole(array) };
        });
        let mut digest = Digest::new();
        digest.update(env!("CARGO_PKG_VERSION").as_bytes());
        digest.update(&VERSION.to_le_bytes());
        digest.update(desc.name.as_bytes());
        digest.update(desc.target.features().to_string().as_bytes());
        self.0.stamp.iter().flatten().for_each(|part| digest.update(&part.to_le_bytes()));
        for (view, rows) in wanted {
            // derived, so that nothing that a view or its arrays are is ever forgotten here
            digest.update(format!("{view:?} {rows:?}").as_bytes());
            for array in view.stored().arrays() {
                let (_, of_array) = arrays[numbers[&identity(array)]];
                of_array.iter().for_each(|part| digest.update(&part.to_le_bytes()));
            }
        }
        let [high, low] = digest.finish();
        let key = format!("{high:016x}{low:016x}");
        Place { path: self.0.folder.join(format!("{key}.packed")), key, cache: self }
    }
}

/// Where packed weights are, or will be.
pub(super) struct Place<'a> {
    cache: &'a PackCache,
    key: String,
    path: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Header {
    key: String,
    /// What matrices are, once each.
    parts: Vec<Parts>,
    /// One for each matrix.
    sections: Vec<Section>,
}

#[derive(Serialize, Deserialize)]
struct Section {
    /// Number in `parts`.
    parts: usize,
    /// From the first section's start.
    start: usize,
    bytes: usize,
    /// Of samples.
    digest: [u64; 2],
}

impl Place<'_> {
    /// The packed weights, mapped; `None` if they are not there as they should be.
    pub(super) fn map(&self, wanted: &[Wanted<'_>]) -> Option<Vec<Packed>> {
        if !self.path.exists() {
            return None;
        }
        match self.read(wanted) {
            Ok((packed, bytes)) => {
                self.cache.note(|used| {
                    used.mapped += 1;
                    used.mapped_bytes += bytes;
                });
                Some(packed)
            }
            Err(reason) => {
                let warning = format!("{}: {reason}; packed anew", self.path.display());
                self.cache.note(|used| used.warnings.push(warning));
                None
            }
        }
    }

    fn read(&self, wanted: &[Wanted<'_>]) -> Result<(Vec<Packed>, usize), String> {
        let file = map(&self.path).map_err(|error| error.to_string())?;
        let (header, sections) = split(&file)?;
        if header.key != self.key {
            return Err("holds other weights than its name says".into());
        }
        if header.sections.len() != wanted.len() {
            return Err(format!("has {} matrices of {}", header.sections.len(), wanted.len()));
        }
        let mut all = 0;
        let packed = header.sections.iter().zip(wanted).map(|(section, (view, _))| {
            let end = section.start.checked_add(section.bytes);
            let bytes = end.and_then(|end| sections.slice(section.start..end));
            let bytes = bytes.ok_or("is cut off")?;
            if samples(&bytes) != section.digest {
                return Err("is damaged".into());
            }
            all += section.bytes;
            let parts = header.parts.get(section.parts).ok_or("its header is wrong")?;
            let packed = Packed::from_parts(parts, bytes).map_err(|misfit| misfit.to_string())?;
            match (packed.rows(), packed.cols()) == (view.rows(), view.cols()) {
                true => Ok(packed),
                false => Err(format!("has {packed:?} for {view:?}")),
            }
        });
        Ok((packed.collect::<Result<_, String>>()?, all))
    }

    /// Keeps what was packed. What goes wrong is a warning: the weights are there.
    pub(super) fn keep(&self, packed: &[&Packed]) {
        let written = self.write(packed);
        self.cache.note(|used| match written {
            Ok(bytes) => {
                used.written += 1;
                used.written_bytes += bytes;
            }
            Err(error) => {
                used.warnings.push(format!("{}: not written: {error}", self.path.display()));
            }
        });
    }

    fn write(&self, packed: &[&Packed]) -> io::Result<usize> {
        std::fs::create_dir_all(self.cache.folder())?;
        let (mut parts, mut sections, mut end) = (Vec::<Parts>::new(), Vec::new(), 0usize);
        for packed in packed {
            let (bytes, these) = (packed.as_bytes(), packed.parts());
            // the last ones are the likeliest
            let number = parts.iter().rposition(|other| *other == these).unwrap_or_else(|| {
                parts.push(these);
                parts.len() - 1
            });
            let start = end.next_multiple_of(LINE);
            end = start + bytes.len();
            let digest = samples(bytes);
            sections.push(Section { parts: number, start, bytes: bytes.len(), digest });
        }
        let header = Header { key: self.key.clone(), parts, sections };
        let text = serde_json::to_vec(&header)?;
        let mut temporary = Temporary::beside(&self.path)?;
        let mut file = BufWriter::with_capacity(1 << 20, temporary.file());
        file.write_all(MAGIC)?;
        file.write_all(&text.len().to_le_bytes())?;
        for part in whole(&text) {
            file.write_all(&part.to_le_bytes())?;
        }
        file.write_all(&text)?;
        let padding = |from: usize, to: usize| vec![0; to - from];
        file.write_all(&padding(PREFIX + text.len(), first_section(text.len())))?;
        let mut at = 0;
        for (section, packed) in header.sections.iter().zip(packed) {
            file.write_all(&padding(at, section.start))?;
            file.write_all(packed.as_bytes())?;
            at = section.start + section.bytes;
        }
        file.flush()?;
        drop(file);
        temporary.file().sync_all()?;
        temporary.persist(&self.path)?;
        Ok(header.sections.iter().map(|section| section.bytes).sum())
    }
}

/// Where the sections begin behind a header of so many bytes.
fn first_section(header: usize) -> usize {
    (PREFIX + header).next_multiple_of(PAGE)
}

/// The header and the sections of a file.
fn split(file: &Bytes) -> Result<(Header, Bytes), String> {
    let Some((prefix, rest)) = file.split_at_checked(PREFIX) else {
        return Err("is cut off".into());
    };
    if !prefix.starts_with(MAGIC) {
        return Err("is no file of packed weights".into());
    }
    let number =
        |at: usize| u64::from_le_bytes(prefix[at..at + 8].try_into().expect("eight bytes"));
    let len = usize::try_from(number(8)).ok().filter(|len| *len <= rest.len());
    let text = len.map(|len| &rest[..len]).ok_or("is cut off")?;
    if whole(text) != [number(16), number(24)] {
        return Err("its header is damaged".into());
    }
    let header = serde_json::from_slice(text).map_err(|error| format!("its header: {error}"))?;
    let sections = file.slice(first_section(text.len())..file.len());
    Ok((header, sections.ok_or("is cut off")?))
}

/// Which array it is.
fn identity(array: &[u8]) -> (*const u8, usize) {
    (array.as_ptr(), array.len())
}

/// A digest of all bytes.
fn whole(bytes: &[u8]) -> [u64; 2] {
    let mut digest = Digest::new();
    digest.update(bytes);
    digest.finish()
}

/// A digest of some: all of a few, else the ends and what lies evenly between, at least a cache line
/// in every MiB.
fn samples(bytes: &[u8]) -> [u64; 2] {
    let Some(last) = bytes.len().checked_sub(PAGE) else { return whole(bytes) };
    let mut digest = Digest::new();
    digest.update(&bytes.len().to_le_bytes());
    let steps = 3 + (bytes.len() >> 20);
    for step in 0..=steps {
        let at = (last as u128 * step as u128 / steps as u128) as usize
            + if step == steps { PAGE - LINE } else { 0 };
        digest.update(&bytes[at..at + LINE]);
    }
    digest.finish()
}

/// A digest of 128 bits: eight chains of multiplications, so that it runs as fast as memory is read.
struct Digest {
    lanes: [u64; 8],
}

impl Digest {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

    fn new() -> Self {
        Self { lanes: [1, 2, 3, 4, 5, 6, 7, 8] }
    }

    /// Takes `bytes` in; two calls are not one with both.
    fn update(&mut self, bytes: &[u8]) {
        let (chunks, rest) = bytes.as_chunks();
        chunks.iter().for_each(|chunk| self.take(chunk));
        let mut last = [0; 64];
        last[..rest.len()].copy_from_slice(rest);
        self.take(&last);
        last = [0; 64];
        last[..8].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        self.take(&last);
    }

    /// For one word a bijection of the lane, and for a lane one of the word: no single change is lost.
    fn take(&mut self, chunk: &[u8; 64]) {
        for (lane, word) in self.lanes.iter_mut().zip(chunk.as_chunks().0) {
            let mixed = (*lane ^ u64::from_le_bytes(*word)).wrapping_mul(Self::FACTOR);
            *lane = mixed.rotate_left(29);
        }
    }

    fn finish(self) -> [u64; 2] {
        let mut out = [0; 2];
        for (i, half) in out.iter_mut().enumerate() {
            for lane in self.lanes {
                let mixed =
                    (*half ^ lane).wrapping_mul(Self::FACTOR).rotate_left(17 + 14 * i as u32);
                *half = mixed ^ mixed >> 32;
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use moe_kernels::pool::Inline;
    use moe_kernels::stored::{
        Codes, Element, Granularity, Packing, ScaleType, Scales, ZeroPoints, Zeros,
    };

    use super::*;
    use crate::experts::KERNELS;

    /// Two rows of codes that are all 5, with a scale and a zero point for each 32.
    fn codes(scales: &[f32], zeros: [i16; 4]) -> View {
        let scales: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        let group = (ScaleType::F32, Granularity::Group, [1, 32]);
        let scales = Scales::new(scales.into(), group.0, group.1, group.2, [2, 64]).unwrap();
        let zeros = Zeros::Each(ZeroPoints::from_i16(&zeros, [2, 2]).unwrap());
        let packing = (Element::Uint4, Packing::Rows);
        let codes = Codes::new(packing, vec![0x55; 64].into(), [2, 64], scales, zeros, None);
        View::new(codes.unwrap())
    }

    /// Each part of what is packed, and of what it is packed for, is in the name of the file; the same has the same.
    #[test]
    fn everything_that_matters_has_a_name_of_its_own() {
        let name = |view: &View, rows, stamp, desc| {
            let cache = PackCache::with("folder".into(), stamp);
            cache.place(desc, &[(view, rows)], &Inline).path
        };
        let (one, other) = ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.5]);
        let plain = codes(&one, [1, 2, 3, 4]);
        let f32 = OperandKind::F32;
        for stamp in [None, Some([1, 2])] {
            let same = name(&plain, f32, stamp, KERNELS[0]);
            assert_eq!(name(&codes(&one, [1, 2, 3, 4]), f32, stamp, KERNELS[0]), same);
            let scales = codes(&other, [1, 2, 3, 4]);
            assert_ne!(name(&scales, f32, stamp, KERNELS[0]), same, "a scale");
            let zeros = codes(&one, [1, 2, 3, 5]);
            assert_ne!(name(&zeros, f32, stamp, KERNELS[0]), same, "a zero point");
            let row = plain.rows_of(0, 1, 1).unwrap();
            assert_ne!(name(&row, f32, stamp, KERNELS[0]), same, "a row");
            assert_ne!(name(&plain, OperandKind::Bf16, stamp, KERNELS[0]), same, "rows of bf16");
            assert_ne!(name(&plain, f32, stamp, KERNELS[1]), same, "a kernel");
            assert_ne!(name(&plain, f32, Some([1, 3]), KERNELS[0]), same, "a checkpoint");
        }
    }

    /// Sampled or whole, at any length: what changes at an end, or in length, changes the digest; all of
    /// a small array, and a change of every byte of a large one, do.
    #[test]
    fn digests_tell_changes() {
        for len in [0, 1, 7, 63, 64, 65, PAGE - 1, PAGE, PAGE + 1, 3 << 20] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 7 % 251) as u8).collect();
            for digest in [whole, samples] {
                let known = digest(&bytes);
                assert_eq!(digest(&bytes), known);
                let longer = [&bytes[..], &[0]].concat();
                assert_ne!(digest(&longer), known, "{len}");
                let ends = [0, len.saturating_sub(1)].into_iter();
                for at in ends.chain(0..if len < PAGE { len } else { 0 }).filter(|at| *at < len) {
                    let mut other = bytes.clone();
                    other[at] ^= 1;
                    assert_ne!(digest(&other), known, "{at} of {len}");
                }
            }
            if len > 0 {
                let other: Vec<u8> = bytes.iter().map(|byte| byte ^ 0x80).collect();
                assert_ne!(samples(&other), samples(&bytes));
            }
        }
        // a change as long as a MiB, wherever it lies, meets a sample
        let long: Vec<u8> = (0..5 << 20).map(|i| (i * 7 % 251) as u8).collect();
        for start in (0..4 << 20).step_by(300_000) {
            let mut other = long.clone();
            other[start..start + (1 << 20) + LINE].iter_mut().for_each(|byte| *byte ^= 1);
            assert_ne!(samples(&other), samples(&long), "from {start} on");
        }
        let (mut a, mut b) = (Digest::new(), Digest::new());
        a.update(b"ab");
        b.update(b"a");
        b.update(b"b");
        assert_ne!(a.finish(), b.finish());
    }
}
