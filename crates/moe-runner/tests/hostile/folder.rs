//! Folders that are incomplete, ambiguous, or point elsewhere.

use std::path::Path;

use moe_runner::checkpoint::{Checkpoint, Container};

use super::{one_line, safetensors_bytes, write};

const INDEX: &str = "model.safetensors.index.json";

/// A file with one tensor of four bytes.
fn shard(tensor: &str) -> Vec<u8> {
    let header = format!(r#"{{"{tensor}":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}}}"#);
    safetensors_bytes(&header, 4)
}

/// A folder with a config and shards 1 and 2, holding 'a' and 'b'.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "config.json", "{}");
    write(folder.path(), "model-00001-of-00002.safetensors", shard("a"));
    write(folder.path(), "model-00002-of-00002.safetensors", shard("b"));
    folder
}

fn index(folder: &Path, map: &str) {
    write(folder, INDEX, format!(r#"{{"metadata":{{"total_size":8}},"weight_map":{map}}}"#));
}

fn names(path: &Path) -> Vec<String> {
    Checkpoint::open(path).unwrap().names().map(str::to_owned).collect()
}

fn refused(path: &Path, file: &str, wanted: &str) {
    let message = one_line(Checkpoint::open(path).unwrap_err(), file);
    assert!(message.contains(wanted), "{message}\n  should say: {wanted}");
}

const RIGHT: &str =
    r#"{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}"#;

#[test]
fn the_index_names_the_files() {
    let folder = folder();
    index(folder.path(), RIGHT);
    write(folder.path(), "model.safetensors", "not looked at");
    write(folder.path(), "golden.safetensors", "not looked at");
    let opened = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(opened.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(opened.container(), Container::Safetensors);
    assert_eq!(
        opened.require("b").unwrap().file,
        folder.path().join("model-00002-of-00002.safetensors")
    );
}

#[test]
fn without_an_index_names_tell() {
    let folder = folder();
    write(folder.path(), "golden.safetensors", shard("c"));
    assert_eq!(names(folder.path()), ["a", "b"]);
    write(folder.path(), "model.safetensors", shard("d"));
    assert_eq!(names(folder.path()), ["d"]);
}

#[test]
fn shards_that_are_not_there() {
    let folder = folder();
    index(folder.path(), RIGHT);
    std::fs::remove_file(folder.path().join("model-00002-of-00002.safetensors")).unwrap();
    // what it holds may never be asked for
    let opened = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(opened.names().collect::<Vec<_>>(), ["a"]);
    let message = one_line(opened.require("b").unwrap_err(), "");
    assert!(message.contains("'b': is in 'model-00002-of-00002.safetensors', which"), "{message}");
    std::fs::remove_file(folder.path().join(INDEX)).unwrap();
    refused(folder.path(), "", "but no 'model-00002-of-00002.safetensors'");
    write(folder.path(), "model-00002-of-00002.safetensors", "");
    refused(folder.path(), "model-00002-of-00002.safetensors", "is empty");
}

/// Those that follow one that is not there hold what the index says that they hold.
#[test]
fn shards_behind_one_that_is_not_there() {
    let folder = folder();
    write(folder.path(), "model-00003-of-00003.safetensors", shard("c"));
    let all = format!(r#"{},"c":"model-00003-of-00003.safetensors"}}"#, &RIGHT[..RIGHT.len() - 1]);
    index(folder.path(), &all);
    std::fs::remove_file(folder.path().join("model-00001-of-00002.safetensors")).unwrap();
    let opened = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(opened.names().collect::<Vec<_>>(), ["b", "c"]);
    for (tensor, shard) in [("b", "model-00002-of-00002"), ("c", "model-00003-of-00003")] {
        let file = opened.require(tensor).unwrap().file;
        assert_eq!(file, folder.path().join(format!("{shard}.safetensors")));
    }
    let message = one_line(opened.require("a").unwrap_err(), "");
    assert!(message.contains("'a': is in 'model-00001-of-00002.safetensors', which"), "{message}");
}

#[test]
fn shards_of_any_stem() {
    let folder = folder();
    write(folder.path(), "layer-0-experts-0-3.safetensors", shard("c"));
    write(folder.path(), "golden.safetensors", shard("d"));
    assert_eq!(names(folder.path()), ["a", "b", "c"]);
    write(folder.path(), "other-00002-of-00002.safetensors", shard("e"));
    refused(folder.path(), "", "but no 'other-00001-of-00002.safetensors'");
    // the author's own format stands beside the hub's
    std::fs::remove_file(folder.path().join("other-00002-of-00002.safetensors")).unwrap();
    write(folder.path(), "consolidated-00001-of-00001.safetensors", shard("f"));
    assert_eq!(names(folder.path()), ["a", "b"]);
}

#[test]
fn a_folder_of_the_hubs_cache() {
    let folder = tempfile::tempdir().unwrap();
    let snapshots = folder.path().join("snapshots");
    let revision = |name: &str| {
        let path = snapshots.join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    };
    let first = revision("aaaa");
    refused(folder.path(), "", "without a whole snapshot");
    write(&first, "config.json", "{}");
    write(&first, "model.safetensors", shard("a"));
    assert_eq!(names(folder.path()), ["a"]);
    let second = revision("bbbb");
    write(&second, "config.json", "{}");
    write(&second, "model.safetensors", shard("b"));
    refused(folder.path(), "", "with 2 snapshots; name one of them");
    std::fs::create_dir(folder.path().join("refs")).unwrap();
    write(&folder.path().join("refs"), "main", "bbbb\n");
    assert_eq!(names(folder.path()), ["b"]);
}

#[test]
fn files_in_the_place_of_others() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n";
    let page = "\n<!DOCTYPE html><html><body>503</body></html>";
    for (text, wanted) in [(pointer, "is a Git-LFS pointer"), (page, "is a web page")] {
        for file in ["model.safetensors", "config.json", INDEX] {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), "config.json", "{}");
            write(folder.path(), "model.safetensors", shard("a"));
            write(folder.path(), file, text);
            refused(folder.path(), file, wanted);
        }
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "model.gguf", text);
        refused(&folder.path().join("model.gguf"), "model.gguf", wanted);
    }
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "config.json", "{}");
    write(folder.path(), "model-00001-of-00002.safetensors.incomplete", "half");
    refused(folder.path(), "", "a file that is still being fetched");
}

#[test]
fn an_index_that_points_elsewhere() {
    let folder = folder();
    let outside = folder.path().join("outside.safetensors");
    write(folder.path(), "outside.safetensors", shard("a"));
    let inner = folder.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    write(&inner, "config.json", "{}");
    for shard in [
        "../outside.safetensors",
        outside.to_str().unwrap(),
        "./../outside.safetensors",
        "..\\outside.safetensors",
        "",
        "..",
        "outside.safetensors\\u0000",
        "/etc/passwd",
    ] {
        index(&inner, &format!("{{\"a\":\"{}\"}}", shard.replace("..\\o", "..\\\\o")));
        refused(&inner, INDEX, "only safetensors files in the same folder are opened");
    }
}

#[test]
fn an_index_that_is_none() {
    let folder = folder();
    for (json, wanted) in [
        ("", "is empty"),
        ("garbage", "is no usable index"),
        ("{}", "missing field `weight_map`"),
        (r#"{"weight_map":[]}"#, "is no usable index"),
        (r#"{"weight_map":{"a":1}}"#, "is no usable index"),
        (
            r#"{"weight_map":{"a":"m.safetensors","a":"n.safetensors"}}"#,
            "'a': stands more than once",
        ),
        (r#"{"weight_map":{"a\u001b[2J":"m.safetensors"}}"#, "has control characters"),
    ] {
        write(folder.path(), INDEX, json);
        refused(folder.path(), INDEX, wanted);
    }
    write(folder.path(), INDEX, format!(r#"{{"x":{}"#, "[".repeat(1_000_000)));
    refused(folder.path(), INDEX, "is no usable index");
}

/// Where index and shards disagree, the tensors concerned cannot be had; others can.
#[test]
fn tensors_that_index_and_shards_disagree_about() {
    let folder = folder();
    let both = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"c":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    write(folder.path(), "model-00003-of-00003.safetensors", safetensors_bytes(both, 2));
    let map = RIGHT.replace('}', r#","d":"model-00003-of-00003.safetensors"}"#);
    index(folder.path(), &map);
    let opened = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(opened.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(opened.require("b").unwrap().bytes.len(), 4);
    let says = |name: &str| one_line(opened.tensor(name).unwrap_err(), "");
    let twice = says("a");
    assert!(
        twice.contains(
            "'a': stands in more than one file: model-00001-of-00002.safetensors, model-00003"
        ),
        "{twice}"
    );
    assert!(says("c").contains("'c': is not listed in model.safetensors.index.json"));
    assert!(says("d").contains("'d': is in model-00003-of-00003.safetensors according to"));
    let duplicates: Vec<_> = opened.duplicates().collect();
    assert_eq!(duplicates.len(), 1);
    assert_eq!((duplicates[0].0, duplicates[0].1.len()), ("a", 2));

    // Without an index, too.
    write(folder.path(), "model-00002-of-00002.safetensors", shard("a"));
    std::fs::remove_file(folder.path().join("model-00003-of-00003.safetensors")).unwrap();
    std::fs::remove_file(folder.path().join(INDEX)).unwrap();
    let opened = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(opened.names().collect::<Vec<_>>(), ["a"]);
    assert!(opened.tensor("a").unwrap_err().to_string().contains("more than one file"));
}

#[test]
fn paths_that_are_no_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    refused(&folder.path().join("nowhere"), "nowhere", "cannot open");
    refused(folder.path(), "", "holds no checkpoint");
    write(folder.path(), "m.gguf", "GGUF");
    refused(folder.path(), "", "to open 'm.gguf', name that file");
    write(folder.path(), "model.safetensors", shard("a"));
    refused(folder.path(), "", "holds no config.json");
    refused(&folder.path().join("model.safetensors"), "model.safetensors", "name the folder");
    write(folder.path(), "notes.txt", "hello");
    refused(&folder.path().join("notes.txt"), "notes.txt", "is no GGUF file");
    std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    std::fs::create_dir(folder.path().join("model.safetensors")).unwrap();
    write(folder.path(), "config.json", "{}");
    refused(folder.path(), "model.safetensors", "is a folder");
}

/// To open a pipe would wait for somebody to write to it.
#[cfg(unix)]
#[test]
fn a_pipe_is_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("model.safetensors");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    if !made.is_ok_and(|status| status.success()) {
        return eprintln!("SKIPPED: no mkfifo");
    }
    write(folder.path(), "config.json", "{}");
    refused(folder.path(), "model.safetensors", "is no regular file");
}

#[test]
fn a_missing_tensor_comes_with_near_names() {
    let folder = folder();
    write(folder.path(), "model.safetensors", shard("model.layers.0.mlp.experts.0.up_proj.weight"));
    let opened = Checkpoint::open(folder.path()).unwrap();
    let message =
        one_line(opened.require("model.layers.0.mlp.experts.1.up_proj.weight").unwrap_err(), "");
    assert!(
        message.contains("near names: model.layers.0.mlp.experts.0.up_proj.weight"),
        "{message}"
    );
    let message = one_line(opened.require("lm_head").unwrap_err(), "");
    assert!(message.ends_with("'lm_head': is missing"), "{message}");
}
