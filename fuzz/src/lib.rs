//! What the fuzz targets have in common: files in a folder of this process, and what must hold of
//! whatever a file contains. A panic, a crash, a hang, or more memory than a small file can be
//! worth is a bug.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::PathBuf;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use moe_kernels::pool::Inline;
use moe_runner::checkpoint::{Checkpoint, architecture};
use moe_runner::weights::{Expert, LoadedLayer, Matrix, account, survey};
use moe_runner::{Result, doctor};

/// Most that may be allocated at one time for an input, which is smaller than a megabyte.
const MEMORY: usize = 64 << 20;

/// Layers and experts that are loaded of a model; a table may promise thousands.
const LAYERS: usize = 3;

/// The folder that inputs are written to: in memory where the system has that.
static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a temporary folder")
});

/// Writes a file of this process's folder. A new file each time: the old one may still be mapped.
pub fn write(name: &str, bytes: &[u8]) -> PathBuf {
    let path = FOLDER.path().join(name);
    let _ = std::fs::remove_file(&path);
    std::fs::write(&path, bytes).expect("room in the temporary folder");
    path
}

/// The folder itself.
pub fn folder() -> PathBuf {
    FOLDER.path().to_owned()
}

/// Opens a checkpoint, reads every tensor, loads some layers if there are any, and has the doctor look
/// at them; then the same by headers alone.
pub fn examine(open: impl FnOnce() -> Result<Checkpoint>) {
    bounded(open, |checkpoint| {
        tensors(checkpoint);
        metadata(checkpoint);
        layers(checkpoint);
        findings(&doctor::files(checkpoint));
        outline(&checkpoint.outline());
    });
}

/// Opens a checkpoint and looks at it, in little memory.
pub fn bounded(open: impl FnOnce() -> Result<Checkpoint>, look: impl FnOnce(&Checkpoint)) {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    match open() {
        Ok(checkpoint) => look(&checkpoint),
        Err(error) => one_line(&error),
    }
    let peak = PEAK.load(Ordering::Relaxed).saturating_sub(before);
    assert!(peak <= MEMORY, "{peak} bytes were allocated");
}

/// Every tensor lies in its file, and is as long as its shape says.
fn tensors(checkpoint: &Checkpoint) {
    for name in checkpoint.names() {
        let info = checkpoint.info(name).expect("a name from the list");
        match checkpoint.tensor(name) {
            Ok(tensor) => {
                let tensor = tensor.expect("a name from the list");
                assert_eq!(tensor.bytes.len(), info.bytes);
                if let Some(size) = tensor.dtype.size() {
                    let elements = tensor.shape.iter().product::<usize>();
                    assert_eq!(tensor.bytes.len(), elements * size);
                }
                // Bytes outside of the mapping would crash here.
                std::hint::black_box(tensor.bytes.iter().fold(0u8, |sum, byte| sum ^ byte));
            }
            Err(error) => {
                one_line(&error);
                assert!(!error.to_string().contains("outside of its file"), "{error}");
            }
        }
    }
}

fn metadata(checkpoint: &Checkpoint) {
    let Some(metadata) = checkpoint.metadata() else { return };
    for key in metadata.keys() {
        assert!(metadata.get(key).is_some(), "'{key}' was checked when the file was opened");
        let _ = (metadata.usize(key), metadata.f32(key), metadata.str(key), metadata.bool(key));
        let _ = (metadata.usize_list(key), metadata.f32_list(key));
    }
}

/// Descriptions of layers are valid, and what loads can be decoded.
fn layers(checkpoint: &Checkpoint) {
    let layers = match architecture::layers(checkpoint) {
        Ok(layers) => layers,
        Err(error) => return one_line(&error),
    };
    for entry in layers.iter().take(LAYERS) {
        assert!(entry.spec.validate().is_ok());
        let complete = account(checkpoint, entry).is_complete();
        match LoadedLayer::load(checkpoint, entry) {
            Ok(layer) => {
                assert!(complete, "a layer loaded that is not complete");
                let shared = layer.shared.iter().flat_map(|shared| &shared.experts);
                layer.experts.iter().take(LAYERS).chain(shared.take(LAYERS)).for_each(expert);
                layer.gate.iter().for_each(|gate| ends(&gate.weight));
                findings(&doctor::examine(checkpoint, entry, &layer, &Inline));
            }
            Err(error) => one_line(&error),
        }
    }
}

/// What `inspect` looks at.
pub fn outline(checkpoint: &Checkpoint) {
    match architecture::overlooked(checkpoint) {
        Ok(problems) => problems.iter().for_each(one_line),
        Err(error) => return one_line(&error),
    }
    let Ok(layers) = architecture::layers(checkpoint) else { return };
    for entry in layers.iter().take(LAYERS) {
        let (_, accounting) = survey(checkpoint, entry);
        accounting.wrong.iter().for_each(one_line);
        findings(&doctor::formats(checkpoint, entry));
    }
}

fn findings(found: &[doctor::Finding]) {
    for finding in found {
        let message = finding.to_string();
        assert!(!message.contains(char::is_control), "{message:?}");
    }
}

fn expert(expert: &Expert) {
    let Expert { gate, up, down, .. } = expert;
    gate.iter().chain([up, down]).for_each(ends);
}

/// Decodes the first and the last row.
fn ends(matrix: &Matrix) {
    let mut row = vec![0.0; matrix.cols()];
    for index in [0, matrix.rows() - 1] {
        matrix.decode_row(index, &mut row);
    }
    std::hint::black_box(&row);
}

/// Messages are for people: one line, nothing that moves a terminal's cursor.
fn one_line(error: &moe_runner::Error) {
    let message = error.to_string();
    assert!(!message.contains(char::is_control), "{message:?}");
    assert!(message.chars().count() < 5000, "{message:?}");
}

/// Counts the bytes that are allocated, and the most that ever were.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came; counting changes nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are the same.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;
