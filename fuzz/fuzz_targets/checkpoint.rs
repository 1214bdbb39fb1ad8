//! The input is `config.json`, a line `---`, and the header of `model.safetensors`; the tensors'
//! bytes are made up, as many as the header asks for. So a mutation changes what a checkpoint says
//! of itself, and not one of the many weights that mean nothing to the reader.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_runner::checkpoint::Checkpoint;
use moe_runner_fuzz::{examine, folder, write};

/// Most bytes of tensors.
const MAX_DATA: usize = 1 << 20;

/// Every element is a usable number in every format: small floats, positive scales.
const BYTE: u8 = 0x3c;

fuzz_target!(|data: &[u8]| {
    let line = b"\n---\n";
    let end = data.windows(line.len()).position(|window| window == line);
    let Some(end) = end else { return };
    let (config, header) = (&data[..end], &data[end + line.len()..]);
    write("config.json", config);
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.resize(file.len() + data_len(header), BYTE);
    write("model.safetensors", &file);
    examine(|| Checkpoint::open(&folder()));
});

/// The largest number that ends in `]`: the end of the last tensor, in a header that is right.
fn data_len(header: &[u8]) -> usize {
    let ends = header.split(|byte| *byte == b']').filter_map(|part| {
        let digits = part.iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
        std::str::from_utf8(&part[part.len() - digits..]).ok()?.parse::<usize>().ok()
    });
    ends.filter(|end| *end <= MAX_DATA).max().unwrap_or(0)
}
