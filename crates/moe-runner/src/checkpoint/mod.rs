//! Checkpoints on disk: containers (safetensors, GGUF), `config.json`, and the table of
//! architectures that says which tensors make up which layer.
//!
//! What a file holds is never trusted: sizes and offsets are checked before they are used, and
//! a file that is wrong is an [`Error`](crate::Error) that names it.

pub mod architecture;
mod config;
mod container;
mod file;
mod folder;
pub mod gguf;
mod outline;
mod places;
pub mod quantization;
mod safetensors;
mod tail;
mod tensor;
mod write;

pub use config::Config;
pub use container::{Checkpoint, Container, Seen, TensorInfo};
pub use file::StoredDtype;
pub(crate) use file::map;
pub(crate) use tail::TailTensor;
pub use tensor::{Bytes, Dtype, Tensor};
pub(crate) use write::Temporary;
pub use write::{NewTensor, Writer, write_safetensors};
