//! The table of architectures and the loading of layers.

mod block;
mod golden;
