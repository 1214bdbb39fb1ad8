//! The input is a GGUF file, with whatever layers it describes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_runner::checkpoint::Checkpoint;
use moe_runner_fuzz::{examine, write};

fuzz_target!(|data: &[u8]| {
    let path = write("m.gguf", data);
    examine(|| Checkpoint::open(&path));
});
