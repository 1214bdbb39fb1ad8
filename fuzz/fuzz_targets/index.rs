//! The input is the index of a folder with two shards, which hold 'a' and 'b', 'b' and 'c'.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_runner::checkpoint::Checkpoint;
use moe_runner_fuzz::{examine, folder, write};

fuzz_target!(init: {
    write("config.json", b"{}");
    write("model-00001-of-00002.safetensors", &shard("a", "b"));
    write("model-00002-of-00002.safetensors", &shard("b", "c"));
}, |data: &[u8]| {
    write("model.safetensors.index.json", data);
    examine(|| Checkpoint::open(&folder()));
});

fn shard(first: &str, second: &str) -> Vec<u8> {
    let header = format!(
        r#"{{"{first}":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}},"{second}":{{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}}}"#
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(&[1; 8]);
    bytes
}
