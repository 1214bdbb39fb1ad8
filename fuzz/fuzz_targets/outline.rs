//! The input is `config.json`, a line `---`, and the model's index; without the line there is no
//! index. There are no weights: all that is known of the model is what these say.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_runner::checkpoint::Checkpoint;
use moe_runner_fuzz::{bounded, folder, outline, write};

const INDEX: &str = "model.safetensors.index.json";

fuzz_target!(|data: &[u8]| {
    let line = b"\n---\n";
    let end = data.windows(line.len()).position(|window| window == line);
    write("config.json", &data[..end.unwrap_or(data.len())]);
    match end {
        Some(end) => {
            write(INDEX, &data[end + line.len()..]);
        }
        None => {
            let _ = std::fs::remove_file(folder().join(INDEX));
        }
    }
    bounded(|| Checkpoint::open_outline(&folder()), outline);
});
