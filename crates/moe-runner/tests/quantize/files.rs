//! What else is in the new folder, and when it is there.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::Path;

use moe_runner::checkpoint::{Checkpoint, Dtype};
use moe_runner::quantize::{Format, Options, quantize};

use super::{case, large_case, listing, load, options, write};

/// A folder that holds a case's checkpoint, and other files.
fn copy_of(case: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in listing(case).iter().filter(|name| *name != "golden.safetensors") {
        std::fs::copy(case.join(name), folder.path().join(name)).unwrap();
    }
    std::fs::write(folder.path().join("tokenizer.json"), "{\"\u{e9}\": 1}\r\n").unwrap();
    std::fs::write(folder.path().join("pytorch_model.bin"), "old").unwrap();
    std::fs::write(folder.path().join("train.log"), "not the model's").unwrap();
    std::fs::create_dir(folder.path().join("original")).unwrap();
    folder
}

#[test]
fn everything_else_of_the_model_is_copied_byte_for_byte() {
    let from = copy_of(&case("qwen2_moe_f16"));
    // as Python writes it
    let config = std::fs::read_to_string(from.path().join("config.json")).unwrap();
    let config = config.trim_end().strip_suffix('}').unwrap().trim_end().to_owned();
    let config = format!("{config},\n  \"limits\": [-Infinity, NaN]\n}}");
    std::fs::write(from.path().join("config.json"), &config).unwrap();
    let to = tempfile::tempdir().unwrap();
    let summary = write(from.path(), to.path(), &options(Format::Fp8)).unwrap();
    let left_out =
        ["original", "pytorch_model.bin", "train.log"].map(|name| from.path().join(name));
    assert_eq!(summary.left_out, left_out);

    let out = to.path().join("out");
    assert_eq!(listing(&out), ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(listing(to.path()), ["out"]);
    let tokenizer = |folder: &Path| std::fs::read(folder.join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer(&out), tokenizer(from.path()));
    let written = std::fs::read_to_string(out.join("config.json")).unwrap();
    assert!(written.starts_with(config.strip_suffix("\n}").unwrap()), "{written}");

    let (old, new) = (Checkpoint::open(from.path()).unwrap(), Checkpoint::open(&out).unwrap());
    let (mut copied, mut quantised) = (0, 0);
    for name in old.names() {
        let (a, b) = (old.require(name).unwrap(), new.require(name).unwrap());
        let expert = name.contains(".experts.") || name.contains(".shared_expert.");
        match expert {
            true => {
                assert_eq!((b.dtype, &b.shape), (Dtype::F8E4M3, &a.shape), "{name}");
                quantised += 1;
            }
            false => {
                assert_eq!(
                    (b.dtype, &b.shape, &*b.bytes),
                    (a.dtype, &a.shape, &*a.bytes),
                    "{name}"
                );
                copied += 1;
            }
        }
    }
    assert!(copied >= 3 && quantised >= 9, "{copied} {quantised}");
    assert_eq!(new.names().count(), copied + 2 * quantised);

    // modules that are floats are named, so that no engine looks for their scales
    let ignore = new.config().unwrap().str_list("quantization_config.ignore").unwrap().unwrap();
    for name in old.names().filter_map(|name| name.strip_suffix(".weight")) {
        let float = !name.contains(".experts.") && !name.contains(".shared_expert.");
        let matrix = old.require(&format!("{name}.weight")).unwrap().shape.len() == 2;
        assert_eq!(ignore.contains(&name), float && matrix, "{name}");
    }
}

#[test]
fn files_are_as_large_as_asked_for() {
    let to = tempfile::tempdir().unwrap();
    let max = 20_000;
    let options = Options { max_shard_bytes: max, ..options(Format::Int8) };
    let mut steps = Vec::new();
    let checkpoint = Checkpoint::open(case("olmoe_f16")).unwrap();
    let out = to.path().join("out");
    let summary = quantize(&checkpoint, &out, &options, &mut |progress| {
        steps.push((progress.done, progress.total));
        ControlFlow::Continue(())
    })
    .unwrap();
    assert!(steps.is_sorted() && steps.iter().all(|(_, total)| *total == summary.bytes_after));
    assert_eq!(steps.last().unwrap().0, summary.bytes_after);

    let new = Checkpoint::open(&out).unwrap();
    let files: BTreeSet<_> = new.names().map(|name| new.info(name).unwrap().file).collect();
    assert_eq!(files.len(), summary.shards);
    assert!(summary.shards > 3);
    for file in files {
        let bytes = new.names().map(|name| new.info(name).unwrap()).filter(|i| i.file == file);
        assert!(bytes.map(|info| info.bytes as u64).sum::<u64>() <= max);
    }
    let index = std::fs::read_to_string(out.join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    assert_eq!(index["metadata"]["total_size"], summary.bytes_after);
    assert_eq!(index["weight_map"].as_object().unwrap().len(), new.names().count());
}

/// A stack becomes a module for each expert; patterns keep experts as they are.
#[test]
fn patterns_leave_experts_alone() {
    let to = tempfile::tempdir().unwrap();
    let ignoring = |patterns: &[&str]| Options {
        ignore: patterns.iter().map(|pattern| pattern.to_string()).collect(),
        overwrite: true,
        ..options(Format::Fp8)
    };
    let dtype =
        |name: &str| Checkpoint::open(to.path().join("out")).unwrap().require(name).unwrap().dtype;
    write(&case("qwen2_moe_f16"), to.path(), &ignoring(&["re:.*\\.shared_expert\\."])).unwrap();
    load(&to.path().join("out"));
    assert_eq!(dtype("model.layers.0.mlp.shared_expert.up_proj.weight"), Dtype::F16);
    assert_eq!(dtype("model.layers.0.mlp.experts.0.up_proj.weight"), Dtype::F8E4M3);

    // one expert of a stack: it leaves the stack, and stays what it was
    let llama = case("llama4_published");
    let stack = "language_model.model.layers.1.feed_forward.experts";
    write(&llama, to.path(), &ignoring(&[&format!("re:{stack}\\.0\\.")])).unwrap();
    assert_eq!(dtype(&format!("{stack}.0.up_proj.weight")), Dtype::Bf16);
    assert_eq!(dtype(&format!("{stack}.1.up_proj.weight")), Dtype::F8E4M3);
    let (old, new) = (load(&llama), load(&to.path().join("out")));
    assert_eq!(super::values(&old[0].1.experts[0].down), super::values(&new[0].1.experts[0].down));

    // all of a stack: it stays one
    write(&llama, to.path(), &ignoring(&["re:.*layers\\.1\\.feed_forward\\.experts"])).unwrap();
    assert_eq!(dtype(&format!("{stack}.down_proj")), Dtype::Bf16);
    let two = "language_model.model.layers.3.feed_forward.experts.1.down_proj.weight";
    assert_eq!(dtype(two), Dtype::F8E4M3);
    load(&to.path().join("out"));

    let some = write(&llama, to.path(), &ignoring(&["re:.*up_proj"])).unwrap_err().to_string();
    assert!(some.contains("must have the same one"), "{some}");
    let all = write(&llama, to.path(), &ignoring(&["re:.*"])).unwrap_err().to_string();
    assert!(all.contains("nothing to quantise"), "{all}");
    let bad = write(&llama, to.path(), &ignoring(&["re:("])).unwrap_err().to_string();
    assert!(bad.contains("no usable pattern"), "{bad}");
}

/// Only matrices can be taken for something that has scales.
#[test]
fn vectors_are_not_named_as_ignored() {
    let (from, to) = (large_case(), tempfile::tempdir().unwrap());
    write(from.path(), to.path(), &options(Format::Mxfp4)).unwrap();
    let new = Checkpoint::open(to.path().join("out")).unwrap();
    let ignore = new.config().unwrap().str_list("quantization_config.ignore").unwrap().unwrap();
    assert!(new.contains("norm.weight") && !ignore.contains(&"norm"), "{ignore:?}");
    assert!(ignore.contains(&"model.layers.0.mlp.gate") && ignore.contains(&"lm_head"));
}
