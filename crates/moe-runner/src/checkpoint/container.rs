//! A checkpoint on disk: its files, mapped, and one table of all their tensors.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::config::Config;
use super::file::{Entry, MAX_TENSORS, StoredDtype, TensorFile, map_as};
use super::folder::{Folder, INDEX, gguf_in};
use super::places::Places;
use super::quantization::Quantization;
use super::tensor::{Bytes, Tensor};
use super::{gguf, safetensors};
use crate::error::nearest;
use crate::{Error, Result};

/// The file format of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// Safetensors files, in a folder with `config.json`.
    Safetensors,
    /// A GGUF file, or the parts of one.
    Gguf,
}

/// What a container's header says about one tensor.
#[derive(Clone, Copy, Debug)]
pub struct TensorInfo<'a> {
    /// Full name.
    pub name: &'a str,
    /// The file that holds it.
    pub file: &'a Path,
    /// The dtype; it may be one that cannot be read.
    pub dtype: &'a StoredDtype,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// Its size in the file; 0 for a GGUF type of unknown size.
    pub bytes: usize,
}

/// A checkpoint that is open: every file mapped, every header checked, no weight read. Cheap to
/// clone; its tensors share the mappings, and keep them alive.
#[derive(Clone)]
pub struct Checkpoint {
    inner: Arc<Inner>,
    /// What its tensors hold is not read.
    blank: bool,
}

/// How much of a checkpoint there was to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Its files, or those of them that hold something needed.
    Files,
    /// `config.json` and an index: names are known, number formats are as configured.
    Index,
    /// `config.json` alone: names are those of the architecture.
    Config,
}

struct Inner {
    path: PathBuf,
    seen: Seen,
    container: Container,
    config: Option<Config>,
    metadata: Option<gguf::Metadata>,
    files: Vec<TensorFile>,
    /// Number of the file, and of the entry in it; sorted by name, no name twice.
    table: Vec<(u32, u32)>,
    /// The same by name.
    places: Places,
    /// Whether any tensor's name ends so, of the endings that were asked for.
    endings: Mutex<HashMap<Box<str>, bool>>,
    /// Tensors that must not be handed out, whether they are in the table or not.
    faults: BTreeMap<Box<str>, Fault>,
    quantization: OnceLock<Option<Arc<Quantization>>>,
}

/// Why a tensor is not handed out. It need not be one that anybody asks for, so it is no reason
/// to refuse the checkpoint.
enum Fault {
    /// These files (by number) all hold one of that name.
    Duplicate(Vec<u32>),
    /// A shard holds it, but the index does not list it.
    Unlisted,
    /// The index says it is in this file (by number), and it is not.
    Misplaced(u32),
    /// It is in a file (of this name) that the index names and that is not there.
    Absent(Box<str>),
}

impl Checkpoint {
    /// The files that hold tensors.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        self.inner.files.iter().map(|file| file.path.as_path())
    }

    /// Opens a folder with `config.json` and safetensors files, or a GGUF file.
    ///
    /// A folder's files are those that `*.safetensors.index.json` names, of which some may be absent
    /// (asking for their tensors is an error); without an index, `model.safetensors`; without that,
    /// all shards, whatever their stem. A folder of the hub's cache stands for its snapshot. Of a
    /// split GGUF model, name the first part.
    ///
    /// The files are mapped: nothing is copied, and while the checkpoint or one of its tensors is
    /// in use, nobody may write to them or shorten them. Whatever they hold, opening them allocates
    /// at most 512 MiB beyond their own size: a header or index has at most 100 MB, a checkpoint
    /// 2^20 tensors of at most 8 dimensions, `config.json` 16 MiB and 2^18 values.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::File`], [`Error::Config`] or [`Error::Tensor`], with the file and,
    /// where one is at fault, the tensor: a file is missing, cut off or garbage; a tensor lies
    /// outside of its file, overlaps with another, has a wrong number of bytes, or the same name
    /// as another in its file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let kind = std::fs::metadata(path).map_err(|source| Error::Io {
            path: path.to_owned(),
            action: "open",
            source,
        })?;
        if kind.is_dir() {
            return Self::open_folder(path);
        }
        let extension = path.extension().unwrap_or_default();
        if extension == "safetensors" || extension == "json" {
            let reason =
                "is one file of a checkpoint; name the folder that holds it and config.json";
            return Err(Error::file(path, reason));
        }
        let (metadata, files) = gguf::open(path)?;
        Self::new(path, Container::Gguf, None, Some(metadata), files, None)
    }

    /// Opens a single safetensors file for its tensors alone: inputs, recorded outputs.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_safetensors(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::open_safetensors_as(path, path)
    }

    /// The same of a file that messages call `name`: one that holds what came from elsewhere.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_safetensors_as(path: &Path, name: &Path) -> Result<Self> {
        let file = safetensors_file(path, name)?;
        Self::new(name, Container::Safetensors, None, None, vec![file], None)
    }

    fn open_folder(path: &Path) -> Result<Self> {
        let Folder { path, files, mut index, absent } = Folder::open(path)?;
        let path = &*path;
        let config = path.join("config.json");
        if !config.exists() {
            let gguf = gguf_in(path)?;
            let reason = format!("holds no config.json, which says what the tensors mean{gguf}");
            return Err(Error::file(path, reason));
        }
        let config = Config::open(&config)?;
        let mut opened = Vec::with_capacity(files.len());
        let mut tensors = 0;
        let mut absences = Vec::new();
        let mut numbers = Vec::with_capacity(files.len());
        for (number, file) in (0u32..).zip(files) {
            numbers.push(opened.len() as u32);
            if absent.contains(&number) {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                let lost = index.iter_mut().flatten().filter(|(_, shard)| *shard == number);
                absences.extend(lost.map(|(tensor, _)| (tensor.clone(), Box::from(&*name))));
                continue;
            }
            let file = safetensors_file(&file, &file)?;
            tensors += file.entries.len();
            if tensors > MAX_TENSORS {
                return Err(Error::file(path, format!("holds more than {MAX_TENSORS} tensors")));
            }
            opened.push(file);
        }
        if let Some(index) = &mut index {
            index.retain(|(_, shard)| !absent.contains(shard));
            index.iter_mut().for_each(|(_, shard)| *shard = numbers[*shard as usize]);
        }
        let files = opened;
        let mut new = Self::new(path, Container::Safetensors, Some(config), None, files, index)?;
        if let Some(inner) = Arc::get_mut(&mut new.inner) {
            inner
                .faults
                .extend(absences.into_iter().map(|(name, file)| (name, Fault::Absent(file))));
        }
        Ok(new)
    }

    /// Makes the table of all tensors.
    fn new(
        path: &Path,
        container: Container,
        config: Option<Config>,
        metadata: Option<gguf::Metadata>,
        files: Vec<TensorFile>,
        index: Option<Vec<(Box<str>, u32)>>,
    ) -> Result<Self> {
        let name =
            |&(file, entry): &(u32, u32)| &*files[file as usize].entries[entry as usize].name;
        let mut table: Vec<(u32, u32)> = (0u32..)
            .zip(&files)
            .flat_map(|(number, file)| {
                (0..file.entries.len() as u32).map(move |entry| (number, entry))
            })
            .collect();
        table.sort_unstable_by(|a, b| name(a).cmp(name(b)).then(a.cmp(b)));

        let mut faults = BTreeMap::new();
        for same in table.chunk_by(|a, b| name(a) == name(b)).filter(|same| same.len() > 1) {
            let holders = same.iter().map(|(file, _)| *file).collect();
            faults.insert(name(&same[0]).into(), Fault::Duplicate(holders));
        }
        table.dedup_by(|b, a| name(a) == name(b));
        if let Some(index) = index {
            let listed =
                |name: &str| index.binary_search_by(|(listed, _)| (**listed).cmp(name)).is_ok();
            for unlisted in table.iter().map(name).filter(|name| !listed(name)) {
                faults.entry(unlisted.into()).or_insert(Fault::Unlisted);
            }
            for (tensor, shard) in &index {
                let entries = &files[*shard as usize].entries;
                if entries.binary_search_by(|entry| entry.name.cmp(tensor)).is_err() {
                    faults.entry(tensor.clone()).or_insert(Fault::Misplaced(*shard));
                }
            }
        }
        let inner = Inner {
            path: path.to_owned(),
            seen: Seen::Files,
            container,
            config,
            metadata,
            places: Places::new(table.iter().map(name)),
            files,
            table,
            endings: Mutex::default(),
            faults,
            quantization: OnceLock::new(),
        };
        Ok(Self { inner: Arc::new(inner), blank: false })
    }

    /// The same checkpoint by its headers alone: names, types and shapes are what they are, every
    /// number is one, and no page of a tensor is touched.
    pub fn outline(&self) -> Self {
        Self { blank: true, ..self.clone() }
    }

    /// Whether its files hold any tensor.
    pub(super) fn holds_tensors(&self) -> bool {
        self.inner.files.iter().any(|file| !file.entries.is_empty())
    }

    /// Names of tensors that an index promises and no file holds, among those that are not handed out.
    pub(super) fn withheld(&self) -> impl Iterator<Item = &str> {
        self.inner.faults.keys().map(|name| &**name)
    }

    /// A `config.json` in `folder`, and nothing else.
    pub(super) fn of_config(folder: &Path, config: Config) -> Result<Self> {
        Self::new(folder, Container::Safetensors, Some(config), None, Vec::new(), None)
    }

    /// The same configuration over a table of tensors without content.
    pub(super) fn with_entries(
        &self,
        mut entries: Vec<Entry>,
        seen: Seen,
        bytes: Bytes,
    ) -> Result<Self> {
        let path = self.inner.path.clone();
        super::file::sort_entries(&path, &mut entries)?;
        let file = TensorFile { path: path.join("config.json"), bytes, entries };
        let config = self.inner.config.clone();
        let mut new = Self::new(&path, self.container(), config, None, vec![file], None)?;
        if let Some(inner) = Arc::get_mut(&mut new.inner) {
            inner.seen = seen;
        }
        Ok(new.outline())
    }

    /// How much of it there was to look at.
    pub fn seen(&self) -> Seen {
        self.inner.seen
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The file format.
    pub fn container(&self) -> Container {
        self.inner.container
    }

    /// The parsed `config.json`; `None` for a GGUF file and for a lone safetensors file.
    pub fn config(&self) -> Option<&Config> {
        self.inner.config.as_ref()
    }

    /// The key/values of a GGUF file (of its first part, if it is split); other checkpoints have
    /// none.
    pub fn metadata(&self) -> Option<&gguf::Metadata> {
        self.inner.metadata.as_ref()
    }

    /// Names of all tensors that the files hold, sorted, each once.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.inner.table.iter().map(|place| &*self.entry(*place).1.name)
    }

    /// Those of the names that begin with `prefix`.
    pub fn names_below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        let table = &self.inner.table;
        let name = |place: &(u32, u32)| &*self.entry(*place).1.name;
        let first = table.partition_point(|place| name(place) < prefix);
        table[first..].iter().map(name).take_while(move |name| name.starts_with(prefix))
    }

    /// Whether any tensor's name ends so. All names are looked through once for each ending.
    pub(crate) fn any_name_ends(&self, ending: &str) -> bool {
        let mut known = self.inner.endings.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answer) = known.get(ending) {
            return *answer;
        }
        let answer = self.names().any(|name| name.ends_with(ending));
        known.insert(ending.into(), answer);
        answer
    }

    /// Whether this is an [outline](Self::outline).
    pub(crate) fn is_outline(&self) -> bool {
        self.blank
    }

    /// What the configuration says about number formats, read once.
    ///
    /// # Errors
    /// As [`Quantization::of`].
    pub fn quantization(&self) -> Result<Option<Arc<Quantization>>> {
        if let Some(read) = self.inner.quantization.get() {
            return Ok(read.clone());
        }
        let read = Quantization::of(self)?.map(Arc::new);
        Ok(self.inner.quantization.get_or_init(|| read).clone())
    }

    /// Whether a file holds a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// What the header says about a tensor, also where it cannot be read.
    pub fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        let (file, entry) = self.find(name)?;
        Some(TensorInfo {
            name: &entry.name,
            file: &file.path,
            dtype: &entry.dtype,
            shape: &entry.shape,
            bytes: entry.range.len(),
        })
    }

    /// A tensor, sharing the mapped file; `None` where neither a file nor the index knows of one.
    ///
    /// # Errors
    /// [`Error::Tensor`] if its dtype cannot be read, several files hold a tensor of that name, or
    /// the index and the files disagree about it.
    pub fn tensor(&self, name: &str) -> Result<Option<Tensor>> {
        if let Some(fault) = self.inner.faults.get(name) {
            return Err(Error::tensor(&self.inner.path, name, self.describe(fault)));
        }
        let tensor = self.find(name).map(|(file, entry)| file.tensor(entry)).transpose()?;
        Ok(tensor.map(|tensor| Tensor { blank: self.blank, ..tensor }))
    }

    /// A tensor that must be there.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`]; [`Error::Tensor`] with the names nearest to it if it is missing.
    pub fn require(&self, name: &str) -> Result<Tensor> {
        self.tensor(name)?.ok_or_else(|| {
            let near = nearest(name, self.names());
            let reason = match near.is_empty() {
                true => "is missing".to_owned(),
                false => format!("is missing; near names: {}", near.join(", ")),
            };
            Error::tensor(&self.inner.path, name, reason)
        })
    }

    /// Tensors that more than one file holds, with those files, sorted. Asking for one is an error.
    pub fn duplicates(&self) -> impl Iterator<Item = (&str, Vec<&Path>)> {
        self.inner.faults.iter().filter_map(|(name, fault)| match fault {
            Fault::Duplicate(files) => Some((&**name, self.paths(files))),
            _ => None,
        })
    }

    /// The files, as far as what they hold may be looked at.
    pub(super) fn files_to_read(&self) -> &[TensorFile] {
        if self.blank { &[] } else { &self.inner.files }
    }

    fn find(&self, name: &str) -> Option<(&TensorFile, &Entry)> {
        let Inner { table, places, .. } = &*self.inner;
        let number = places.find(name, |number| &*self.entry(table[number]).1.name == name)?;
        Some(self.entry(table[number]))
    }

    fn entry(&self, (file, entry): (u32, u32)) -> (&TensorFile, &Entry) {
        let file = &self.inner.files[file as usize];
        (file, &file.entries[entry as usize])
    }

    fn paths(&self, files: &[u32]) -> Vec<&Path> {
        files.iter().map(|file| &*self.inner.files[*file as usize].path).collect()
    }

    fn describe(&self, fault: &Fault) -> String {
        let names = |files: &[u32]| {
            let names = self.paths(files).into_iter().filter_map(Path::file_name);
            let first: Vec<_> = names.take(3).map(|name| name.to_string_lossy()).collect();
            format!("{}{}", first.join(", "), if files.len() > 3 { ", …" } else { "" })
        };
        match fault {
            Fault::Duplicate(files) => format!("stands in more than one file: {}", names(files)),
            Fault::Absent(file) => {
                format!("is in '{file}', which {INDEX} names and which is not there: get that file")
            }
            Fault::Unlisted => format!("is not listed in {INDEX}, though a shard holds it"),
            Fault::Misplaced(file) => {
                format!("is in {} according to {INDEX}, but that does not hold it", names(&[*file]))
            }
        }
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Checkpoint({}, {} tensors)", self.inner.path.display(), self.inner.table.len())
    }
}

fn safetensors_file(path: &Path, name: &Path) -> Result<TensorFile> {
    let bytes = map_as(path, name)?;
    let entries = safetensors::read(name, &bytes)?;
    Ok(TensorFile { path: name.to_owned(), bytes, entries })
}

#[cfg(test)]
mod tests {
    use super::super::tensor::Dtype;
    use super::*;

    /// The recorded checkpoints of the repository.
    fn golden() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
    }

    /// Every recorded checkpoint opens, with all of its tensors, and without the recordings that lie
    /// beside it.
    #[test]
    fn opens_the_golden_checkpoints() {
        let cases = std::fs::read_dir(golden()).unwrap();
        let mut opened = 0;
        for case in cases.map(|case| case.unwrap().path()).filter(|path| path.is_dir()) {
            let gguf = case.join("model.gguf");
            let path = if gguf.exists() { &gguf } else { &case };
            let checkpoint = Checkpoint::open(path).unwrap();
            assert_eq!(checkpoint.config().is_some(), !gguf.exists(), "{}", path.display());
            assert_eq!(checkpoint.metadata().is_some(), gguf.exists(), "{}", path.display());
            assert_eq!(checkpoint.duplicates().count(), 0);
            let names: Vec<&str> = checkpoint.names().collect();
            assert!(names.len() > 5 && names.is_sorted(), "{}: {names:?}", path.display());
            assert!(
                !names.iter().any(|name| name.contains(".prompt.")),
                "recordings are no weights"
            );
            for name in names {
                let tensor = checkpoint.require(name).unwrap();
                if let Some(size) = tensor.dtype.size() {
                    assert_eq!(tensor.bytes.len(), size * tensor.shape.iter().product::<usize>());
                }
            }
            let recorded = Checkpoint::open_safetensors(case.join("golden.safetensors")).unwrap();
            assert!(recorded.names().any(|name| name.ends_with(".t7.out")), "{}", case.display());
            opened += 1;
        }
        assert!(opened > 30);
    }

    /// Rows of stacked experts in a GGUF file, against the values that the reference read.
    #[test]
    fn gguf_values_are_the_recorded_ones() {
        let case = golden().join("gguf_qwen3moe_bf16");
        let checkpoint = Checkpoint::open(case.join("model.gguf")).unwrap();
        let recorded = Checkpoint::open_safetensors(case.join("golden.safetensors")).unwrap();
        let mut compared = 0;
        for name in recorded.names() {
            let Some(name) = name.strip_prefix("dequant.") else { continue };
            let Some(name) = name.strip_suffix(".rows") else { continue };
            let tensor = checkpoint.require(&format!("{name}.weight")).unwrap();
            assert_eq!((tensor.dtype, tensor.shape.len()), (Dtype::Bf16, 3), "{name}");
            let width = tensor.shape[2];
            let values = tensor.to_f32().unwrap();
            let rows = recorded.require(&format!("dequant.{name}.rows")).unwrap().to_i64().unwrap();
            let wanted = recorded.require(&format!("dequant.{name}.values")).unwrap();
            assert_eq!(wanted.shape, [rows.len(), width]);
            for (row, wanted) in rows.iter().zip(wanted.to_f32().unwrap().chunks(width)) {
                let start = *row as usize * width;
                assert_eq!(&values[start..start + width], wanted, "{name} row {row}");
            }
            compared += 1;
        }
        assert_eq!(compared, 3);
    }
}
