//! The table of architectures and the loading of layers.

mod accounting;
mod block;
mod families;
mod gguf;
mod golden;
mod layouts;
mod synthetic;
