//! What cannot be done, or cannot be finished: nothing that loads is left behind.

use std::ops::ControlFlow;
use std::path::Path;

use moe_runner::checkpoint::architecture::{self, LayerEntry};
use moe_runner::checkpoint::{Checkpoint, Dtype, NewTensor, write_safetensors};
use moe_runner::quantize::{Format, Options, quantize};

use super::{case, go_on, listing, options, write};

/// A copy of a case in which one element of a tensor is NaN.
fn with_nan(case: &Path, tensor: &str, element: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(case.join("config.json"), folder.path().join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(case).unwrap();
    let tensors: Vec<(NewTensor, Vec<u8>)> = checkpoint
        .names()
        .map(|name| {
            let stored = checkpoint.require(name).unwrap();
            let mut bytes = stored.bytes.to_vec();
            if name == tensor {
                assert_eq!(stored.dtype, Dtype::F16);
                bytes[2 * element..2 * element + 2].copy_from_slice(&0x7e00u16.to_le_bytes());
            }
            (NewTensor { name: stored.name, dtype: stored.dtype, shape: stored.shape }, bytes)
        })
        .collect();
    let borrowed = tensors.iter().map(|(tensor, bytes)| (tensor.clone(), bytes.as_slice()));
    write_safetensors(&folder.path().join("model.safetensors"), &[], borrowed).unwrap();
    folder
}

/// The last expert is unusable: by then, most of the files are written.
#[test]
fn an_error_half_way_leaves_nothing() {
    let last = "model.layers.1.mlp.experts.7.up_proj.weight";
    let from = with_nan(&case("olmoe_f16"), last, 64 * 3 + 5);
    let to = tempfile::tempdir().unwrap();
    let options = Options { max_shard_bytes: 10_000, ..options(Format::W4a16 { group: 4 }) };
    let checkpoint = Checkpoint::open(from.path()).unwrap();
    let mut seen = 0;
    let error = quantize(&checkpoint, &to.path().join("out"), &options, &mut |progress| {
        seen = progress.done;
        // whatever there is so far, it is no checkpoint
        for name in listing(to.path()) {
            assert!(Checkpoint::open(to.path().join(&name)).is_err(), "{name} opens");
        }
        assert!(!to.path().join("out").exists());
        ControlFlow::Continue(())
    });
    let error = error.unwrap_err().to_string();
    for part in ["model.safetensors", last, "row 3, column 5 is NaN"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(seen > 50_000, "{seen}");
    assert!(listing(to.path()).is_empty(), "{:?}", listing(to.path()));
}

#[test]
fn what_is_there_is_not_overwritten_by_accident() {
    let to = tempfile::tempdir().unwrap();
    let out = to.path().join("out");
    let case = case("olmoe_f16");
    let overwrite = Options { overwrite: true, ..options(Format::Int8) };
    let says = |options: &Options, wanted: &str| {
        let error = write(&case, to.path(), options).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    };
    std::fs::create_dir(&out).unwrap();
    write(&case, to.path(), &options(Format::Fp8)).unwrap();
    says(&options(Format::Int8), "is not empty");
    let before = std::fs::read(out.join("config.json")).unwrap();
    write(&case, to.path(), &overwrite).unwrap();
    assert_ne!(std::fs::read(out.join("config.json")).unwrap(), before);
    assert_eq!(listing(to.path()), ["out"]);

    // an error leaves the old one
    let bad = Options { format: Format::W4a16 { group: 48 }, ..overwrite.clone() };
    says(&bad, "groups of 48");
    assert!(Checkpoint::open(&out).is_ok());

    std::fs::remove_file(out.join("config.json")).unwrap();
    says(&overwrite, "no checkpoint");
    std::fs::remove_dir_all(&out).unwrap();
    std::fs::write(&out, "a file").unwrap();
    says(&overwrite, "is no folder");
}

/// Not even when asked to.
#[test]
fn the_checkpoint_itself_is_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(case("olmoe_f16").join(name), model.join(name)).unwrap();
    }
    let checkpoint = Checkpoint::open(&model).unwrap();
    let overwrite = Options { overwrite: true, ..options(Format::Fp8) };
    for output in [model.clone(), folder.path().to_owned(), model.join("../model")] {
        let error = quantize(&checkpoint, &output, &overwrite, &mut go_on).unwrap_err();
        assert!(error.to_string().contains("holds the checkpoint that is to be"), "{error}");
    }
    // a folder inside of it is another one
    quantize(&checkpoint, &model.join("fp8"), &overwrite, &mut go_on).unwrap();
}

/// Files of the checkpoint that stand elsewhere, behind links, as in a folder of a hub's cache.
#[cfg(unix)]
#[test]
fn files_behind_the_checkpoints_links_are_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let (model, files) = (folder.path().join("model"), folder.path().join("files"));
    std::fs::create_dir(&model).unwrap();
    std::fs::create_dir(&files).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(case("olmoe_f16").join(name), files.join(name)).unwrap();
        std::os::unix::fs::symlink(files.join(name), model.join(name)).unwrap();
    }
    let before = std::fs::read(files.join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(&model).unwrap();
    let overwrite = Options { overwrite: true, ..options(Format::Fp8) };
    let error = quantize(&checkpoint, &files, &overwrite, &mut go_on).unwrap_err().to_string();
    assert!(error.contains("of the checkpoint that is to be quantised"), "{error}");
    assert_eq!(std::fs::read(files.join("model.safetensors")).unwrap(), before);
}

#[test]
fn checkpoints_that_cannot_be_quantised() {
    let to = tempfile::tempdir().unwrap();
    let says = |case: &Path, format: Format, wanted: &str| {
        let error = write(case, to.path(), &options(format)).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}\n  should say: {wanted}");
        assert!(listing(to.path()).is_empty());
    };
    says(&case("gguf_qwen3moe_bf16/model.gguf"), Format::Fp8, "has no config.json");
    says(&case("quant_qwen3_moe_fp8_block"), Format::Fp8, "is quantised already (fp8)");
    says(&case("gpt_oss_mxfp4"), Format::Fp8, "is quantised already (mxfp4)");
    says(&case("gpt_oss"), Format::Fp8, "as a stack with biases");
    let sizes = case("olmoe_f16");
    says(&sizes, Format::W4a16 { group: 128 }, "has 64 columns, which groups of 128 (w4a16)");
    says(&sizes, Format::W4a16 { group: 128 }, "do not divide; groups of 64 do");
    says(&sizes, Format::Mxfp4, "has 44 columns, which groups of 32 (mxfp4) do not divide");
    says(&sizes, Format::W4a16 { group: 0 }, "'config_groups.group_0.weights.group_size': is 0");
}

/// Names come from one table: what is written under them is found under them.
#[test]
fn stacks_are_written_under_the_names_of_modules() {
    let checkpoint = Checkpoint::open(case("llama4_published")).unwrap();
    let entries: Vec<LayerEntry> = architecture::layers(&checkpoint).unwrap();
    let names = entries[0].tensors.experts_by_module.as_ref().unwrap();
    assert_eq!(names.up, "language_model.model.layers.1.feed_forward.experts.{e}.up_proj");
}

/// Stacks of an architecture whose quantised checkpoints are published with a module for each expert.
#[test]
fn stacks_become_modules() {
    let to = tempfile::tempdir().unwrap();
    write(&case("granitemoe"), to.path(), &options(Format::Fp8)).unwrap();
    let checkpoint = Checkpoint::open(to.path().join("out")).unwrap();
    for entry in moe_runner::checkpoint::architecture::layers(&checkpoint).unwrap() {
        assert!(entry.tensors.experts.up.ends_with("block_sparse_moe.experts.{e}.up_proj"));
        assert!(moe_runner::weights::account(&checkpoint, &entry).is_complete());
    }
}
