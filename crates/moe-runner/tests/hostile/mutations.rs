//! Valid files with some of their bytes changed: they open or are refused, and what opens lies
//! within its file.

use std::path::Path;

use moe_runner::checkpoint::Checkpoint;
use proptest::prelude::*;

use super::gguf::{Gguf, array, pair, string};
use super::{read_all, safetensors_bytes, write};

/// A change to a file.
#[derive(Clone, Debug)]
enum Change {
    /// Another byte.
    Byte { at: prop::sample::Index, value: u8 },
    /// Eight bytes become this number.
    Number { at: prop::sample::Index, value: u64 },
    /// The n-th decimal number becomes this one.
    Digits { nth: prop::sample::Index, value: u64 },
    /// The end is missing.
    Cut { at: prop::sample::Index },
    /// Some bytes stand twice.
    Repeat { at: prop::sample::Index, count: usize },
}

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..200u64,
        any::<u64>(),
        Just(u64::MAX),
        Just(u64::MAX - 31),
        Just(1 << 63),
        Just(1 << 61),
        Just(1 << 32),
    ]
}

fn change() -> impl Strategy<Value = Change> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, value)| Change::Byte { at, value }),
        (at(), number()).prop_map(|(at, value)| Change::Number { at, value }),
        (at(), number()).prop_map(|(nth, value)| Change::Digits { nth, value }),
        at().prop_map(|at| Change::Cut { at }),
        (at(), 1..40usize).prop_map(|(at, count)| Change::Repeat { at, count }),
    ]
}

/// Applies a change to the first `front` bytes, where a file's header is; keeps a safetensors
/// file's header length right if it was, so that what is changed is looked at.
fn apply(bytes: &mut Vec<u8>, change: &Change, front: usize) {
    let front = front.min(bytes.len());
    if front == 0 {
        return;
    }
    match change {
        Change::Byte { at, value } => bytes[at.index(front)] = *value,
        Change::Number { at, value } => {
            let at = at.index(front);
            let end = bytes.len().min(at + 8);
            bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
        }
        Change::Digits { nth, value } => {
            let digit = |at: usize| bytes[at].is_ascii_digit();
            let starts: Vec<usize> =
                (8..front).filter(|at| digit(*at) && (*at == 0 || !digit(at - 1))).collect();
            if starts.is_empty() {
                return;
            }
            let start = starts[nth.index(starts.len())];
            let end = (start..bytes.len()).find(|at| !digit(*at)).unwrap_or(bytes.len());
            bytes.splice(start..end, value.to_string().into_bytes());
        }
        Change::Cut { at } => bytes.truncate(at.index(front)),
        Change::Repeat { at, count } => {
            let at = at.index(front);
            let again = bytes[at..bytes.len().min(at + count)].to_vec();
            bytes.splice(at..at, again);
        }
    }
}

const HEADER: &str = r#"{"__metadata__":{"format":"pt"},"gate":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"up.weight":{"dtype":"BF16","shape":[5],"data_offsets":[24,34]},"x":{"dtype":"F4","shape":[4],"data_offsets":[34,36]}}"#;

const CONFIG: &str = r#"{"model_type":"mixtral","num_local_experts":8,"list":[1,2.5,-3e2,true,null,"NaN"],
    "limits":[NaN,-Infinity],"sub":{"hidden_size":64,"text":"\u00e9\n\"\\"}}"#;

fn gguf() -> Vec<u8> {
    let mut gguf = Gguf::good();
    gguf.pairs.push(pair("tokens", 9, &array(8, 2, &[string(b"a"), string(b"bc")].concat())));
    gguf.pairs.push(pair("nested", 9, &array(9, 1, &array(4, 1, &[1, 2, 3, 4]))));
    gguf.pairs.push(pair("general.alignment", 4, &32u32.to_le_bytes()));
    gguf.pairs.push(pair("flag", 7, &[1]));
    gguf.bytes()
}

/// Opens, and reads all there is to read.
fn open_and_read(path: &Path) -> bool {
    let opened = match path.extension().is_some_and(|extension| extension == "safetensors") {
        true => Checkpoint::open_safetensors(path),
        false => Checkpoint::open(path),
    };
    let Ok(opened) = opened else {
        let message = opened.unwrap_err().to_string();
        assert!(!message.contains(char::is_control) && message.len() < 1000, "{message:?}");
        return false;
    };
    read_all(&opened);
    if let Some(metadata) = opened.metadata() {
        for key in metadata.keys() {
            assert!(metadata.get(key).is_some());
            let _ = (metadata.usize(key), metadata.f32(key), metadata.str(key), metadata.bool(key));
            let _ = (metadata.usize_list(key), metadata.f32_list(key));
        }
    }
    if let Some(config) = opened.config() {
        for key in ["num_local_experts", "list", "limits", "sub", "sub.hidden_size", "sub.text"] {
            let _ = (config.usize(key), config.f32(key), config.str(key), config.bool(key));
            let _ = (config.usize_list(key), config.f32_list(key), config.sub(key));
        }
    }
    true
}

#[test]
fn the_unchanged_files_open() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "m.gguf", gguf());
    write(folder.path(), "model.safetensors", safetensors_bytes(HEADER, 36));
    write(folder.path(), "config.json", CONFIG);
    assert!(open_and_read(&folder.path().join("m.gguf")));
    assert!(open_and_read(&folder.path().join("model.safetensors")));
    assert!(open_and_read(folder.path()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn changed_safetensors(changes in prop::collection::vec(change(), 1..4), repair in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = safetensors_bytes(HEADER, 36);
        for change in &changes {
            apply(&mut bytes, change, 8 + HEADER.len());
        }
        if repair && bytes.len() > 44 {
            let length = bytes.len() as u64 - 36 - 8;
            bytes[..8].copy_from_slice(&length.to_le_bytes());
        }
        write(folder.path(), "m.safetensors", bytes);
        open_and_read(&folder.path().join("m.safetensors"));
    }

    #[test]
    fn changed_gguf(changes in prop::collection::vec(change(), 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = gguf();
        let front = bytes.len() - 108;
        for change in &changes {
            apply(&mut bytes, change, front);
        }
        write(folder.path(), "m.gguf", bytes);
        open_and_read(&folder.path().join("m.gguf"));
    }

    #[test]
    fn changed_configs_and_indices(
        config in prop::collection::vec(change(), 0..3),
        index in prop::collection::vec(change(), 0..3),
    ) {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "model-00001.safetensors", safetensors_bytes(HEADER, 36));
        let mut config_bytes = CONFIG.as_bytes().to_vec();
        config.iter().for_each(|change| apply(&mut config_bytes, change, usize::MAX));
        write(folder.path(), "config.json", config_bytes);
        let mut index_bytes =
            br#"{"weight_map":{"gate":"model-00001.safetensors","x":"model-00001.safetensors"}}"#.to_vec();
        index.iter().for_each(|change| apply(&mut index_bytes, change, usize::MAX));
        write(folder.path(), "model.safetensors.index.json", index_bytes);
        open_and_read(folder.path());
    }

    #[test]
    fn garbage(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "m.safetensors", &bytes);
        open_and_read(&folder.path().join("m.safetensors"));
        write(folder.path(), "m.gguf", [b"GGUF\x03\0\0\0", &bytes[..]].concat());
        open_and_read(&folder.path().join("m.gguf"));
    }
}
