//! Files that are wrong, by accident or on purpose: each is refused with the file, the tensor and
//! the reason, and none makes the readers panic or look outside of the file.

mod config;
mod folder;
mod gguf;
mod mutations;
mod safetensors;

use std::path::Path;

use moe_runner::checkpoint::Checkpoint;

/// A safetensors file of this header and so many bytes of tensors.
fn safetensors_bytes(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend((0..data).map(|i| i as u8));
    bytes
}

/// The message with which a file of these bytes is refused, opened by its name's ending.
fn refusal(name: &str, bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    let opened = match name.ends_with(".gguf") {
        true => Checkpoint::open(&path),
        false => Checkpoint::open_safetensors(&path),
    };
    one_line(opened.expect_err("the file must be refused"), name)
}

/// An error's message, which must be one line and name the file.
fn one_line(error: moe_runner::Error, file: &str) -> String {
    let message = error.to_string();
    assert!(!message.contains(char::is_control), "{message:?}");
    assert!(message.contains(file), "{message:?} does not name {file}");
    assert!(message.len() < 1000, "{message:?}");
    message
}

/// Reads all of every tensor, as far as they can be read.
fn read_all(checkpoint: &Checkpoint) -> u64 {
    let mut sum = 0u64;
    for name in checkpoint.names() {
        let info = checkpoint.info(name).unwrap();
        let _ = (info.dtype.to_string(), info.shape.len(), info.bytes);
        match checkpoint.tensor(name) {
            Ok(tensor) => {
                let tensor = tensor.expect("a name from the list");
                if let Some(size) = tensor.dtype.size() {
                    assert_eq!(tensor.shape.iter().product::<usize>() * size, tensor.bytes.len());
                }
                sum += tensor.bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>();
            }
            // Whatever else is wrong with it, its place was checked when the file was opened.
            Err(error) => assert!(!error.to_string().contains("outside of its file"), "{error}"),
        }
    }
    sum
}

fn write(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    std::fs::write(folder.join(name), bytes).unwrap();
}
