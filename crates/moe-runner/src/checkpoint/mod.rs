//! Checkpoints on disk: containers (safetensors, GGUF), `config.json`, and the table of
//! architectures that says which tensors make up which layer.

mod tensor;

pub use tensor::{Bytes, Dtype, Tensor};
