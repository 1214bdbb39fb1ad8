//! Checkpoints on disk: containers (safetensors, GGUF), `config.json`, and the table of
//! architectures that says which tensors make up which layer.

pub mod config;
pub mod container;
pub mod gguf;
mod tensor;

pub use config::Config;
pub use container::{Checkpoint, Container, TensorInfo};
pub use tensor::{Bytes, Dtype, Tensor};
