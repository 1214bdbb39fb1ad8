//! Writes safetensors files, so that a name never stands for half a file: everything goes to a
//! temporary file in the same folder, which takes the name only once it is complete and on disk. Where
//! the file system has files without a name, it is one: a process that is killed leaves nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::file::check_name;
use super::safetensors::METADATA;
use super::tensor::Dtype;
use crate::{Error, Result};

/// Longest file we begin, in bytes: no file system has room for it, and no sum of offsets overflows.
const MAX_FILE: u64 = 1 << 62;

/// A tensor that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTensor {
    /// Full name.
    pub name: String,
    /// Element type; not a GGUF block type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

/// A safetensors file in the making.
///
/// Sizes come first, contents follow in pieces of any size and in any order of tensors, so that a
/// file can be far larger than memory. Without [`Writer::finish`], nothing is left behind, and a
/// file that had the name before stays as it was.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: Temporary,
    places: BTreeMap<String, Place>,
}

/// Where a tensor goes.
#[derive(Debug)]
struct Place {
    /// The next byte to write.
    next: u64,
    end: u64,
}

impl Writer {
    /// Begins a file: `metadata` are the strings of the header's `__metadata__`.
    ///
    /// The tensors lie in the file by size of their elements, largest first, then by name, so that
    /// each is aligned to its elements.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a name that is taken twice or unusable, a block type, or a size beyond
    /// 64 bits; [`Error::File`] if the path names something that is no regular file; [`Error::Io`].
    pub fn create(path: &Path, metadata: &[(&str, &str)], tensors: &[NewTensor]) -> Result<Self> {
        // A rename would put a file in place of a device or a pipe.
        if std::fs::metadata(path).is_ok_and(|existing| !existing.is_file()) {
            return Err(Error::file(path, "is there already, and is no regular file"));
        }
        let mut sized = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            check_name(path, &tensor.name)?;
            let error = |reason: String| Error::tensor(path, &tensor.name, reason);
            if tensor.name == METADATA {
                return Err(error("is a name that the format needs for itself".to_owned()));
            }
            let Some(size) = tensor.dtype.size() else {
                return Err(error(format!("is {}, which safetensors cannot hold", tensor.dtype)));
            };
            let bytes = tensor.shape.iter().try_fold(size, |bytes, dim| bytes.checked_mul(*dim));
            let Some(bytes) = bytes else {
                return Err(error(format!("shape {:?} is larger than any file", tensor.shape)));
            };
            sized.push((size, tensor, bytes as u64));
        }
        sized
            .sort_by(|(a_size, a, _), (b_size, b, _)| b_size.cmp(a_size).then(a.name.cmp(&b.name)));

        let mut header = serde_json::Map::new();
        if !metadata.is_empty() {
            let metadata: BTreeMap<_, _> = metadata.iter().copied().collect();
            header.insert(METADATA.to_owned(), serde_json::json!(metadata));
        }
        let mut places = BTreeMap::new();
        let mut end = 0u64;
        for (_, tensor, bytes) in sized {
            let start = end;
            end = start.checked_add(bytes).filter(|end| *end <= MAX_FILE).ok_or_else(|| {
                Error::tensor(path, &tensor.name, "makes the file larger than any file can be")
            })?;
            let entry = serde_json::json!({
                "dtype": tensor.dtype.to_string(),
                "shape": tensor.shape,
                "data_offsets": [start, end],
            });
            if header.insert(tensor.name.clone(), entry).is_some() {
                return Err(Error::tensor(path, &tensor.name, "is given more than once"));
            }
            places.insert(tensor.name.clone(), Place { next: start, end });
        }
        let mut header = serde_json::Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let data_start = 8 + header.len() as u64;
        for place in places.values_mut() {
            place.next += data_start;
            place.end += data_start;
        }

        let io = |source| Error::Io { path: path.to_owned(), action: "write", source };
        let mut file = Temporary::beside(path).map_err(io)?;
        file.file().write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
        file.file().write_all(&header).map_err(io)?;
        Ok(Self { path: path.to_owned(), file, places })
    }

    /// Appends `bytes` (row-major, little-endian) to what has been written of a tensor.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is no such tensor, or it would have more bytes than its shape and
    /// dtype say; [`Error::Io`], for instance if the disk is full.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(place) = self.places.get_mut(name) else {
            return Err(Error::tensor(&self.path, name, "was not named when the file was begun"));
        };
        let room = place.end - place.next;
        if bytes.len() as u64 > room {
            let reason = format!("{} more bytes come, and there is room for {room}", bytes.len());
            return Err(Error::tensor(&self.path, name, reason));
        }
        let start = SeekFrom::Start(place.next);
        let io = |source| Error::Io { path: self.path.clone(), action: "write", source };
        let file = self.file.file();
        file.seek(start).and_then(|_| file.write_all(bytes)).map_err(io)?;
        place.next += bytes.len() as u64;
        Ok(())
    }

    /// Puts the complete file in place; one that had the name before is replaced in one step.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a tensor is not complete; [`Error::Io`]. Nothing has changed then.
    pub fn finish(mut self) -> Result<()> {
        if let Some((name, place)) = self.places.iter().find(|(_, place)| place.next < place.end) {
            let reason = format!("{} of its bytes were not written", place.end - place.next);
            return Err(Error::tensor(&self.path, name, reason));
        }
        let io = |source| Error::Io { path: self.path.clone(), action: "write", source };
        self.file.file().sync_all().map_err(io)?;
        self.file.persist(&self.path).map_err(io)?;
        // The new name itself is only on disk once the folder is. Not every file system can do
        // this to a folder; the file is complete either way.
        let _ = File::open(folder_of(&self.path)).and_then(|folder| folder.sync_all());
        Ok(())
    }
}

/// Writes a safetensors file of tensors that are in memory; see [`Writer`].
///
/// # Errors
/// As [`Writer::create`], [`Writer::write`] and [`Writer::finish`].
pub fn write_safetensors<'a>(
    path: &Path,
    metadata: &[(&str, &str)],
    tensors: impl IntoIterator<Item = (NewTensor, &'a [u8])>,
) -> Result<()> {
    let (tensors, contents): (Vec<_>, Vec<_>) = tensors.into_iter().unzip();
    let mut writer = Writer::create(path, metadata, &tensors)?;
    for (tensor, bytes) in tensors.iter().zip(contents) {
        writer.write(&tensor.name, bytes)?;
    }
    writer.finish()
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// A file in the making, with the permissions of any new file.
#[derive(Debug)]
pub(crate) enum Temporary {
    /// It has no name yet, and is gone with the process.
    #[cfg(target_os = "linux")]
    Nameless(File),
    Named(NamedTempFile),
}

impl Temporary {
    /// In the folder of `path`.
    pub(crate) fn beside(path: &Path) -> std::io::Result<Self> {
        #[cfg(target_os = "linux")]
        if let Some(file) = nameless(folder_of(path)) {
            return Ok(Self::Nameless(file));
        }
        builder().tempfile_in(folder_of(path)).map(Self::Named)
    }

    pub(crate) fn file(&mut self) -> &mut File {
        match self {
            #[cfg(target_os = "linux")]
            Self::Nameless(file) => file,
            Self::Named(file) => file.as_file_mut(),
        }
    }

    /// Gives it the name `path`, which may be another file's.
    pub(crate) fn persist(self, path: &Path) -> std::io::Result<()> {
        match self {
            // only a rename takes a name away from another file, and it needs one to begin with
            #[cfg(target_os = "linux")]
            Self::Nameless(file) => {
                let named = builder().make_in(folder_of(path), |name| link(&file, name))?;
                named.persist(path)?;
            }
            Self::Named(file) => drop(file.persist(path)?),
        }
        Ok(())
    }
}

fn builder() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".moe-runner-").suffix(".partial");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder
}

/// A file without a name; `None` where there are none, or none that could get a name.
#[cfg(target_os = "linux")]
fn nameless(folder: &Path) -> Option<File> {
    use rustix::fs::{Mode, OFlags, open};
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = File::from(open(folder, flags, Mode::from_raw_mode(0o666)).ok()?);
    by_number(&file).exists().then_some(file)
}

#[cfg(target_os = "linux")]
fn link(file: &File, name: &Path) -> std::io::Result<()> {
    use rustix::fs::{AtFlags, CWD, linkat};
    Ok(linkat(CWD, by_number(file), CWD, name, AtFlags::SYMLINK_FOLLOW)?)
}

/// What an open file is called while it has no name of its own.
#[cfg(target_os = "linux")]
fn by_number(file: &File) -> PathBuf {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;

    fn tensor(name: &str, dtype: Dtype, shape: &[usize]) -> NewTensor {
        NewTensor { name: name.to_owned(), dtype, shape: shape.to_vec() }
    }

    fn files(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|item| item.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// The format's own crate and our reader find in the file what was written.
    #[test]
    fn others_read_what_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.safetensors");
        let tensors = [
            tensor("b", Dtype::U8, &[3]),
            tensor("x \"é\"", Dtype::F32, &[2, 1]),
            tensor("none", Dtype::Bf16, &[0, 4]),
        ];
        let mut writer = Writer::create(&path, &[("format", "pt")], &tensors).unwrap();
        writer.write("b", &[1]).unwrap();
        writer.write("x \"é\"", &[0, 0, 128, 63]).unwrap();
        writer.write("b", &[2, 3]).unwrap();
        writer.write("x \"é\"", &[0, 0, 0, 64]).unwrap();
        assert!(!path.exists());
        writer.finish().unwrap();

        let bytes = std::fs::read(&path).unwrap();
        let theirs = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.names().len(), 3);
        assert_eq!(theirs.tensor("b").unwrap().data(), [1, 2, 3]);
        assert_eq!(theirs.tensor("none").unwrap().shape(), [0, 4]);
        let x = theirs.tensor("x \"é\"").unwrap();
        assert_eq!(
            (x.dtype(), x.data()),
            (::safetensors::Dtype::F32, &[0, 0, 128, 63, 0, 0, 0, 64][..])
        );
        assert_eq!(x.data().as_ptr().addr() % 4, bytes.as_ptr().addr() % 4, "aligned in the file");
        let (_, metadata) = ::safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");

        let ours = Checkpoint::open_safetensors(&path).unwrap();
        assert_eq!(ours.require("x \"é\"").unwrap().to_f32().unwrap(), [1.0, 2.0]);
        assert_eq!(files(folder.path()), ["out.safetensors"]);
    }

    /// An old file is replaced only by a complete new one; readers that map it keep the old.
    #[test]
    fn an_unfinished_file_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.safetensors");
        let one = || [tensor("a", Dtype::U8, &[2])];
        write_safetensors(&path, &[], [(one()[0].clone(), &[7u8, 8][..])]).unwrap();
        let old = Checkpoint::open_safetensors(&path).unwrap().require("a").unwrap();

        let mut writer = Writer::create(&path, &[], &one()).unwrap();
        writer.write("a", &[1]).unwrap();
        let error = writer.finish().unwrap_err().to_string();
        assert!(error.contains("'a': 1 of its bytes"), "{error}");
        drop(Writer::create(&path, &[], &one()).unwrap());
        assert_eq!(files(folder.path()), ["out.safetensors"]);
        // as if the process were killed: nobody is left to remove anything
        let mut writer = Writer::create(&path, &[], &one()).unwrap();
        writer.write("a", &[1]).unwrap();
        #[cfg(target_os = "linux")]
        if let Temporary::Nameless(_) = writer.file {
            std::mem::forget(writer);
            assert_eq!(files(folder.path()), ["out.safetensors"]);
        }
        assert_eq!(
            *Checkpoint::open_safetensors(&path).unwrap().require("a").unwrap().bytes,
            [7, 8]
        );

        write_safetensors(&path, &[], [(one()[0].clone(), &[1u8, 2][..])]).unwrap();
        assert_eq!(
            *Checkpoint::open_safetensors(&path).unwrap().require("a").unwrap().bytes,
            [1, 2]
        );
        assert_eq!(*old.bytes, [7, 8]);
    }

    #[test]
    fn refuses_what_the_format_cannot_hold() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.safetensors");
        let refused =
            |tensors: &[NewTensor]| Writer::create(&path, &[], tensors).unwrap_err().to_string();
        assert!(refused(&[tensor("q", Dtype::Ggml(12), &[256])]).contains("'q': is"));
        assert!(
            refused(&[tensor("h", Dtype::U8, &[usize::MAX, 2])]).contains("larger than any file")
        );
        let twice = [tensor("t", Dtype::U8, &[1]), tensor("t", Dtype::U8, &[1])];
        assert!(refused(&twice).contains("'t': is given more than once"));
        let huge = [tensor("s", Dtype::U8, &[1 << 62]), tensor("t", Dtype::U8, &[1])];
        assert!(refused(&huge).contains("'t': makes the file larger"));
        assert!(
            refused(&[tensor("s", Dtype::U8, &[usize::MAX])]).contains("makes the file larger")
        );
        assert!(refused(&[tensor("__metadata__", Dtype::U8, &[1])]).contains("needs for itself"));

        let mut writer = Writer::create(&path, &[], &[tensor("a", Dtype::U8, &[2])]).unwrap();
        assert!(writer.write("b", &[]).unwrap_err().to_string().contains("'b': was not named"));
        let long = writer.write("a", &[1, 2, 3]).unwrap_err().to_string();
        assert!(long.contains("room for 2"), "{long}");

        let error = Writer::create(folder.path(), &[], &[]).unwrap_err().to_string();
        assert!(error.contains("is no regular file"), "{error}");
        let nowhere = folder.path().join("no/such/out.safetensors");
        assert!(matches!(Writer::create(&nowhere, &[], &[]).unwrap_err(), Error::Io { .. }));
    }

    /// The temporary file's own permissions would keep everybody else from reading the result.
    #[cfg(unix)]
    #[test]
    fn has_the_permissions_of_any_new_file() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let plain = folder.path().join("plain");
        std::fs::write(&plain, "").unwrap();
        let path = folder.path().join("out.safetensors");
        write_safetensors(&path, &[], []).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&path), mode(&plain));
    }
}
