//! Packed weights that are kept on disk: a second start has the first one's bits, and what is off is
//! packed anew.

use std::fs;
use std::path::{Path, PathBuf};

use moe_kernels::numerics::ggml::BlockType;
use moe_kernels::numerics::quantise::Qdq;
use moe_runner::checkpoint::{Checkpoint, architecture};
use moe_runner::experts::{PackCache, PackCacheUse, Progress};
use moe_runner::hidden::ActivationDtype::{self, Bf16, F32};
use moe_runner::runner::{MoeRunner, Options};
use moe_runner::spec::{Granularity, LayerSpec};
use moe_runner::weights::{
    Element, FloatType, LoadedLayer, Matrix, RandomFormat, RandomScaled, ScaleType, random_layer,
};

use super::layers::{forward, options, plain, rows, shared};

/// What a layer computes, packed with `cache`.
fn run(
    layer: &LoadedLayer,
    cache: &PackCache,
    dtype: ActivationDtype,
    kernel: Option<&str>,
) -> Vec<u32> {
    let options = Options { pack_cache: Some(cache.clone()), ..options(kernel, dtype) };
    let mut runner = MoeRunner::new(layer.ready(&options).unwrap());
    let hidden = rows(dtype, 5, layer.spec.dims.hidden, 3);
    forward(&mut runner, &hidden).iter().map(|v| v.to_bits()).collect()
}

fn without(layer: &LoadedLayer, dtype: ActivationDtype) -> Vec<u32> {
    let mut runner = MoeRunner::new(layer.ready(&options(None, dtype)).unwrap());
    let hidden = rows(dtype, 5, layer.spec.dims.hidden, 3);
    forward(&mut runner, &hidden).iter().map(|v| v.to_bits()).collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn counts(used: &PackCacheUse) -> (usize, usize, usize) {
    (used.mapped, used.written, used.warnings.len())
}

fn wide() -> LayerSpec {
    let mut spec = plain();
    spec.dims.hidden = 256;
    spec.dims.routed_hidden = 256;
    spec.dims.intermediate = 256;
    spec.shared = Some(shared());
    spec.shared.as_mut().unwrap().intermediate = 256;
    spec
}

fn scaled(element: Element, scales: ScaleType, group: usize) -> RandomFormat {
    with_rows(element, scales, group, None)
}

fn with_rows(
    element: Element,
    scales: ScaleType,
    group: usize,
    input: Option<Qdq>,
) -> RandomFormat {
    let block = [1, group];
    let granularity = Granularity::Group;
    RandomFormat::Scaled(RandomScaled { element, scales, granularity, block, input })
}

#[test]
fn the_second_start_maps_and_has_the_same_bits() {
    for format in [
        FloatType::Bf16.into(),
        FloatType::F32.into(),
        scaled(Element::Uint4, ScaleType::Bf16, 128),
        scaled(Element::E2m1, ScaleType::E8m0, 32),
        scaled(Element::E2m1, ScaleType::E4m3, 16),
        with_rows(Element::Int8, ScaleType::F32, 128, Some(Qdq::Int8Token)),
        with_rows(Element::E4m3, ScaleType::F32, 128, Some(Qdq::Fp8Token)),
        RandomFormat::Ggml(BlockType::Q4K),
        RandomFormat::Ggml(BlockType::Iq4Nl),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let layer = random_layer(&wide(), format, 7).unwrap();
        for dtype in [F32, Bf16] {
            let want = without(&layer, dtype);
            let first = PackCache::new(folder.path().join("made/when/needed"));
            assert_eq!(run(&layer, &first, dtype, None), want, "{format:?}");
            // routed and shared experts; another kernel or other rows have files of their own
            let used = first.used();
            assert_eq!((used.mapped + used.written, used.warnings.len()), (2, 0), "{used:?}");
            let second = PackCache::new(first.folder());
            assert_eq!(run(&layer, &second, dtype, None), want, "{format:?}");
            assert_eq!(counts(&second.used()), (2, 0, 0), "{format:?}");
            assert_eq!(second.used().mapped_bytes, used.written_bytes + used.mapped_bytes);
        }
    }
}

/// Whatever is wrong with a file: one warning that names it, and it is written anew.
#[test]
fn what_is_off_is_packed_anew() {
    let layer = random_layer(&plain(), FloatType::F32, 7).unwrap();
    let want = without(&layer, F32);
    let folder = tempfile::tempdir().unwrap();
    run(&layer, &PackCache::new(folder.path()), F32, None);
    let [path] = &files(folder.path())[..] else { panic!("one file") };
    let good = fs::read(path).unwrap();
    let header = u64::from_le_bytes(good[8..16].try_into().unwrap()) as usize;
    let sections = (32 + header).next_multiple_of(4096);
    let flipped = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes
    };
    // a file of another key, under this one's name
    let other_folder = tempfile::tempdir().unwrap();
    let other = random_layer(&plain(), FloatType::F32, 8).unwrap();
    run(&other, &PackCache::new(other_folder.path()), F32, None);
    let [other] = &files(other_folder.path())[..] else { panic!("one file") };
    for (what, bytes, says) in [
        ("empty", vec![], "is empty"),
        ("the magic", flipped(0), "no file of packed weights"),
        ("only the start", good[..20].to_vec(), "cut off"),
        ("cut in the header", good[..100].to_vec(), "cut off"),
        ("cut behind the header", good[..sections - 1].to_vec(), "cut off"),
        ("a byte less", good[..good.len() - 1].to_vec(), "cut off"),
        ("no sections", good[..sections].to_vec(), "cut off"),
        ("the length of the header", flipped(8), "its header is damaged"),
        ("a huge header", flipped(15), "cut off"),
        ("the header's digest", flipped(16), "its header is damaged"),
        ("the header", flipped(40), "its header is damaged"),
        ("the first byte of a section", flipped(sections), "is damaged"),
        ("the last byte of all", flipped(good.len() - 1), "is damaged"),
        ("another file", fs::read(other).unwrap(), "other weights than its name says"),
    ] {
        fs::write(path, bytes).unwrap();
        let cache = PackCache::new(folder.path());
        assert_eq!(run(&layer, &cache, F32, None), want, "{what}");
        let used = cache.used();
        assert_eq!(counts(&used), (0, 1, 1), "{what}: {used:?}");
        let warning = &used.warnings[0];
        assert!(warning.contains(says) && warning.contains(".packed"), "{what}: {warning}");
        assert_eq!(fs::read(path).unwrap(), good, "{what}: the same file again");
    }
    assert_eq!(files(folder.path()).len(), 1, "nothing temporary stays");
}

/// What differs in anything that matters has a key of its own.
#[test]
fn other_weights_and_kernels_have_other_files() {
    let folder = tempfile::tempdir().unwrap();
    let cache = PackCache::new(folder.path());
    let layer = random_layer(&plain(), FloatType::F32, 7).unwrap();
    run(&layer, &cache, F32, None);
    let mut files_before = 1;
    let mut another = |layer: &LoadedLayer, kernel, what: &str| {
        run(layer, &cache, F32, kernel);
        assert_eq!(files(folder.path()).len(), files_before + 1, "{what}");
        files_before += 1;
    };
    // one weight, somewhere in the middle
    let mut other = layer.clone();
    let up = &layer.experts[5].up;
    let mut values = vec![0.0; up.rows() * up.cols()];
    values.chunks_mut(up.cols()).enumerate().for_each(|(i, row)| up.decode_row(i, row));
    values[up.cols() * up.rows() / 2 + 3] += 1e-3;
    other.experts[5].up = Matrix::from_f32(&values, [up.rows(), up.cols()]).unwrap();
    another(&other, None, "a weight");
    let mut swapped = layer.clone();
    swapped.experts.swap(0, 1);
    another(&swapped, None, "two experts swapped");
    // windows of the same array
    for first in [0, 1] {
        let mut stacked = layer.clone();
        let halves = [&values[..], &values[..]].concat();
        let both = Matrix::from_f32(&halves, [2 * up.rows(), up.cols()]).unwrap();
        stacked.experts[5].up = both.rows_of(first, 2, up.rows()).unwrap();
        another(&stacked, None, "a window");
    }
    another(&layer, Some("cpu_portable"), "another kernel");
    assert_eq!(counts(&cache.used()), (0, 6, 0));
}

#[test]
fn a_cache_that_cannot_be_written_is_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let layer = random_layer(&plain(), FloatType::F32, 7).unwrap();
    let cache = PackCache::new(&file);
    assert_eq!(run(&layer, &cache, F32, None), without(&layer, F32));
    assert_eq!(counts(&cache.used()), (0, 0, 1));
    assert!(cache.used().warnings[0].contains("not written"), "{:?}", cache.used());
}

/// A checkpoint's weights are recognised by the times of its files, and by samples of them.
#[test]
fn a_checkpoint_that_has_changed_is_packed_anew() {
    let folder = tempfile::tempdir().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny-moe");
    let copy = folder.path().join("model");
    fs::create_dir(&copy).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(model.join(name), copy.join(name)).unwrap();
    }
    let cached = folder.path().join("cache");
    let start = || {
        let checkpoint = Checkpoint::open(&copy).unwrap();
        let entries = architecture::layers(&checkpoint).unwrap();
        let layer = LoadedLayer::load(&checkpoint, &entries[0]).unwrap();
        let cache = PackCache::of_checkpoint(&cached, &checkpoint).unwrap();
        let mut told = Vec::new();
        let options = Options { pack_cache: Some(cache.clone()), ..options(None, Bf16) };
        layer.into_ready(&options, &mut |progress| told.push(progress)).unwrap();
        let Some(Progress { done, total }) = told.last() else { panic!("nobody was told") };
        assert_eq!(done, total);
        (counts(&cache.used()), told.len())
    };
    let ((mapped, written, warnings), steps) = start();
    assert!(written > 0 && steps > 1 && (mapped, warnings) == (0, 0));
    assert_eq!(start(), ((written, 0, 0), 1));
    // the same content at another time: nobody can know without reading it
    let weights = fs::File::options().write(true).open(copy.join("model.safetensors")).unwrap();
    weights.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(start().0, (0, written, 0));
    // other content of the same size and time: samples tell
    let mut bytes = fs::read(copy.join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..].iter_mut().for_each(|byte| *byte ^= 1);
    fs::write(copy.join("model.safetensors"), bytes).unwrap();
    weights.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(start().0, (0, written, 0));
}
