//! Opening a checkpoint allocates no more than its own size and the bound that
//! [`Checkpoint::open`] states, whatever the files hold. Measured, on the files that make the
//! most of their bytes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use moe_runner::checkpoint::Checkpoint;

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

const BOUND: usize = 512 << 20;

/// The most that opening takes, and whether it opens.
fn opening(path: &Path) -> (usize, bool) {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let opened = Checkpoint::open(path).is_ok();
    (PEAK.load(Ordering::Relaxed) - before, opened)
}

fn write_safetensors(path: &Path, header: &str) {
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    std::fs::write(path, bytes).unwrap();
}

/// One test, because the counters are shared by all threads.
#[test]
fn memory_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.safetensors");
    let config = folder.path().join("config.json");
    std::fs::write(&config, "{}").unwrap();
    let check = |what: &str, file: &Path, opens: bool| {
        let size = std::fs::metadata(file).unwrap().len() as usize;
        let path = if file.extension().unwrap() == "gguf" { file } else { folder.path() };
        let (peak, opened) = opening(path);
        println!("{what}: {} MiB for a file of {} MiB", peak >> 20, size >> 20);
        assert_eq!(opened, opens, "{what}");
        assert!(peak <= size + BOUND, "{what}: {peak} bytes for a file of {size}");
    };

    // As many tensors as are taken, each as small as can be, with as many dimensions as can be.
    let entries: Vec<String> = (0..1 << 20)
        .map(|i| {
            format!(r#""{i:x}":{{"dtype":"U8","shape":[0,1,1,1,1,1,1,1],"data_offsets":[0,0]}}"#)
        })
        .collect();
    write_safetensors(&model, &format!("{{{}}}", entries.join(",")));
    check("most tensors", &model, true);
    // Listed by an index, too.
    let index = folder.path().join("model.safetensors.index.json");
    let listed: Vec<String> =
        (0..1 << 20).map(|i| format!(r#""{i:x}_":"model.safetensors""#)).collect();
    std::fs::write(&index, format!(r#"{{"weight_map":{{{}}}}}"#, listed.join(","))).unwrap();
    drop((entries, listed));
    check("most tensors, none of them listed", &model, true);
    std::fs::remove_file(&index).unwrap();

    // One name as long as a header can be, with an escape, so that it is not borrowed.
    write_safetensors(&model, &format!("{{\"\\n{}\":1}}", "x".repeat(99_999_000)));
    check("longest name", &model, false);
    // Headers and counts that promise more than there is.
    std::fs::write(&model, 100_000_000u64.to_le_bytes()).unwrap();
    check("promised header", &model, false);
    let gguf = folder.path().join("m.gguf");
    for (tensors, pairs) in [(u64::MAX, 0), (0, u64::MAX), (1 << 20, 1 << 16)] {
        let counts = [u64::to_le_bytes(tensors), u64::to_le_bytes(pairs)].concat();
        std::fs::write(&gguf, [b"GGUF\x03\0\0\0", &counts[..]].concat()).unwrap();
        check("promised counts", &gguf, false);
    }

    // Configs of as many values as are taken.
    write_safetensors(&model, "{}");
    for unit in ["0,", "[],", "{},", "[0],", "{\"\":0},", "{\"\":{\"\":0}},"] {
        let values = unit.matches(['[', '{', ',']).count();
        let json = format!("{{\"\":[{}0]}}", unit.repeat(((1 << 18) - 8) / values));
        std::fs::write(&config, json).unwrap();
        check(&format!("config of {unit}"), &config, true);
    }
}
