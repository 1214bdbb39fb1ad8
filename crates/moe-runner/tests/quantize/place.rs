//! Nothing is lost: what else is, or appears, where the new checkpoint goes.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use moe_runner::checkpoint::{Checkpoint, Dtype};
use moe_runner::quantize::{Format, Leftover, Options, Progress, quantize};
use moe_runner::{Error, Result};

use super::{case, go_on, listing, options, write};

/// Quantises olmoe_f16 to `output`; `during` is done once, before the last tensor is written.
fn while_it_runs(output: &Path, options: &Options, during: impl FnOnce()) -> Result<()> {
    let checkpoint = Checkpoint::open(case("olmoe_f16"))?;
    let mut during = Some(during);
    let mut watch = |progress: Progress<'_>| {
        if 2 * progress.done > progress.total
            && let Some(during) = during.take()
        {
            during();
        }
        ControlFlow::Continue(())
    };
    quantize(&checkpoint, output, options, &mut watch).map(drop)
}

/// A folder is not replaced because it is there too late to be seen at the start.
#[test]
fn a_folder_that_appears_meanwhile_stays_and_the_new_one_is_named() {
    let to = tempfile::tempdir().unwrap();
    let out = to.path().join("out");
    let overwrite = Options { overwrite: true, ..options(Format::Fp8) };
    for (with_file, options) in [(true, options(Format::Fp8)), (false, overwrite)] {
        let error = while_it_runs(&out, &options, || {
            fs::create_dir(&out).unwrap();
            if with_file {
                fs::write(out.join("thesis.tex"), "years of work").unwrap();
            }
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("appeared while"), "{error}");
        assert_eq!(listing(&out), if with_file { vec!["thesis.tex"] } else { vec![] });
        // the work is not lost either
        let made = error.split("is complete: ").nth(1).unwrap();
        assert!(Checkpoint::open(Path::new(made)).is_ok(), "{error}");
        fs::remove_dir_all(made).unwrap();
        fs::remove_dir_all(&out).unwrap();
    }
    assert!(listing(to.path()).is_empty(), "{:?}", listing(to.path()));
}

#[test]
fn two_runs_into_one_name_do_not_both_succeed() {
    let to = tempfile::tempdir().unwrap();
    let out = to.path().join("out");
    let second = || write(&case("olmoe_f16"), to.path(), &options(Format::Int8));
    while_it_runs(&out, &options(Format::Fp8), || {
        let error = second().unwrap_err().to_string();
        assert!(error.contains("is being written by another run"), "{error}");
    })
    .unwrap();
    assert_eq!(listing(to.path()), ["out"]);
    let stored = Checkpoint::open(&out).unwrap();
    let tensor = stored.require("model.layers.0.mlp.experts.0.up_proj.weight").unwrap();
    assert_eq!(tensor.dtype, Dtype::F8E4M3, "the first run's");
}

/// Notes and logs in the folder are nobody's to delete; weights that the new index does not name are.
#[test]
fn overwriting_touches_a_checkpoints_files_alone() {
    let to = tempfile::tempdir().unwrap();
    let out = to.path().join("out");
    let many = Options { max_shard_bytes: 20_000, ..options(Format::Fp8) };
    write(&case("olmoe_f16"), to.path(), &many).unwrap();
    assert!(out.join("model.safetensors.index.json").exists());
    fs::write(out.join("notes.txt"), "mine").unwrap();
    fs::create_dir(out.join("logs")).unwrap();
    fs::write(out.join("logs/run.log"), "mine too").unwrap();

    let overwrite = Options { overwrite: true, ..options(Format::Int8) };
    write(&case("olmoe_f16"), to.path(), &overwrite).unwrap();
    assert_eq!(listing(&out), ["config.json", "logs", "model.safetensors", "notes.txt"]);
    assert_eq!(fs::read(out.join("notes.txt")).unwrap(), b"mine");
    assert_eq!(fs::read(out.join("logs/run.log")).unwrap(), b"mine too");
    let new = Checkpoint::open(&out).unwrap();
    let tensor = new.require("model.layers.0.mlp.experts.0.up_proj.weight").unwrap();
    assert_eq!(tensor.dtype, Dtype::I8);
}

/// Half of the new files are in place when one cannot be: everything is as it was.
#[test]
fn an_old_checkpoint_comes_back_when_the_new_one_cannot_follow() {
    let to = tempfile::tempdir().unwrap();
    let out = to.path().join("out");
    write(&case("olmoe_f16"), to.path(), &options(Format::Fp8)).unwrap();
    let before = |name: &str| fs::read(out.join(name)).unwrap();
    let old = (before("config.json"), before("model.safetensors"));
    let many = Options { overwrite: true, max_shard_bytes: 20_000, ..options(Format::Int8) };
    let said = |error: Result<()>| match error.unwrap_err() {
        Error::Io { source, .. } => source.to_string(),
        other => panic!("{other}"),
    };

    // in the way: a shard of another run, which was not there at the start
    let mut shard = String::new();
    let error = said(while_it_runs(&out, &many, || {
        let making = listing(&out).into_iter().find(|name| name.contains("partial")).unwrap();
        shard =
            listing(&out.join(making)).into_iter().find(|name| name.contains("-00002-")).unwrap();
        fs::write(out.join(&shard), "another's").unwrap();
    }));
    assert!(error.contains(&shard) && error.contains("is there"), "{error}");
    assert_eq!((before("config.json"), before("model.safetensors")), old);
    assert_eq!(before(&shard), b"another's");
    assert_eq!(listing(&out), ["config.json", &shard, "model.safetensors"]);
    fs::remove_file(out.join(&shard)).unwrap();

    // somebody works on the old one; its size may stay the same
    let blank = vec![b' '; old.0.len()];
    let error =
        said(while_it_runs(&out, &many, || fs::write(out.join("config.json"), &blank).unwrap()));
    assert!(error.contains("'config.json' was changed"), "{error}");
    assert_eq!((before("config.json"), before("model.safetensors")), (blank, old.1.clone()));
    fs::write(out.join("config.json"), &old.0).unwrap();
    let error =
        said(while_it_runs(&out, &many, || fs::write(out.join("config.json"), "{ }").unwrap()));
    assert!(error.contains("'config.json' was changed"), "{error}");
    assert_eq!((before("config.json"), before("model.safetensors")), (b"{ }".to_vec(), old.1));
    assert_eq!(listing(&out), ["config.json", "model.safetensors"]);
}

/// As after a kill between the old files' going and the new ones' coming.
#[test]
fn old_files_that_an_interrupted_run_put_aside_are_named() {
    let to = tempfile::tempdir().unwrap();
    let aside = to.path().join("out/.moe-runner-replaced-x1");
    fs::create_dir_all(&aside).unwrap();
    fs::write(aside.join("config.json"), "{}").unwrap();
    let overwrite = Options { overwrite: true, ..options(Format::Int8) };
    let error = write(&case("olmoe_f16"), to.path(), &overwrite).unwrap_err().to_string();
    assert!(error.contains(".moe-runner-replaced-x1: move them back"), "{error}");
    assert!(aside.join("config.json").exists());
}

#[test]
fn what_breaks_off_leaves_nothing() {
    let to = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(case("olmoe_f16")).unwrap();
    let mut calls = 0;
    let result = quantize(&checkpoint, &to.path().join("out"), &options(Format::Fp8), &mut |_| {
        calls += 1;
        if calls == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(result, Err(Error::Interrupted)), "{result:?}");
    assert_eq!((calls, listing(to.path())), (5, vec![]));
}

#[test]
fn folders_are_not_made_by_mistake() {
    let to = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(case("olmoe_f16")).unwrap();
    let out = to.path().join("modles/out");
    let error = quantize(&checkpoint, &out, &options(Format::Fp8), &mut go_on).unwrap_err();
    assert!(error.to_string().contains("modles: is no folder; make it first"), "{error}");
    assert!(listing(to.path()).is_empty());
}

/// Of a checkpoint with a hole of 8 TiB in it, no byte is written.
#[test]
fn what_the_disk_has_no_room_for_is_not_begun() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    fs::create_dir(&from).unwrap();
    fs::create_dir(&to).unwrap();
    fs::copy(case("olmoe_f16").join("config.json"), from.join("config.json")).unwrap();
    let bytes = fs::read(case("olmoe_f16").join("model.safetensors")).unwrap();
    let (length, rest) = bytes.split_at(8);
    let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
    let (header, data) = rest.split_at(length);
    let mut header: serde_json::Value = serde_json::from_slice(header).unwrap();
    let end = data.len() as u64 + (8 << 40);
    header["embedding"] = serde_json::json!({"dtype": "U8", "shape": [8u64 << 40], "data_offsets": [data.len(), end]});
    let header = header.to_string().into_bytes();
    let start = [&(header.len() as u64).to_le_bytes()[..], &header, data].concat();
    let path = from.join("model.safetensors");
    fs::write(&path, &start).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    if let Err(error) = file.set_len(start.len() as u64 + (8 << 40)) {
        eprintln!("SKIPPED: this file system has no files of 8 TiB with holes: {error}");
        return;
    }
    let checkpoint = Checkpoint::open(&from).unwrap();
    let mut stop = |_: Progress<'_>| ControlFlow::Break(());
    let result = quantize(&checkpoint, &to.join("out"), &options(Format::Fp8), &mut stop);
    let error = result.unwrap_err().to_string();
    assert!(error.contains("needs 8796.") && error.contains("are free"), "{error}");
    assert!(listing(&to).is_empty());
}

/// What a run left that began when the folder was not there yet.
#[test]
fn leftovers_beside_a_folder_that_came_later_are_removed() {
    let to = tempfile::tempdir().unwrap();
    let left = to.path().join(".out.partial-x1");
    fs::create_dir(&left).unwrap();
    fs::write(left.join(".moe-runner-quantize.lock"), "").unwrap();
    fs::create_dir(to.path().join("out")).unwrap();
    let summary = write(&case("olmoe_f16"), to.path(), &options(Format::Int8)).unwrap();
    assert_eq!(summary.leftovers, [Leftover { path: left, removed: true }]);
    assert_eq!(listing(to.path()), ["out"]);
}
