//! The table of architectures and the loading of layers.

mod accounting;
mod block;
mod defaults;
mod docs;
mod families;
mod gguf;
mod gguf_scales;
mod golden;
mod layouts;
mod outline;
mod recorded;
mod synthetic;
mod variants;
