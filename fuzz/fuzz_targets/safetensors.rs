//! The input is a safetensors file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_runner::checkpoint::Checkpoint;
use moe_runner_fuzz::{examine, write};

fuzz_target!(|data: &[u8]| {
    let path = write("m.safetensors", data);
    examine(|| Checkpoint::open_safetensors(&path));
});
