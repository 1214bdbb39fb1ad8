//! Checkpoints: opened once, whatever number of their layers is used.

use std::ffi::c_char;
use std::path::Path;

use moe_runner::checkpoint::architecture::{self, LayerEntry};
use moe_runner::weights::LoadedLayer;
use moe_runner::{Error, Result};

use crate::boundary::{Status, call, free, give, handle, text};

/// A checkpoint that is open, with its MoE layers.
pub struct Checkpoint {
    checkpoint: moe_runner::checkpoint::Checkpoint,
    layers: Vec<LayerEntry>,
}

impl Checkpoint {
    fn open(path: &str) -> Result<Self> {
        let checkpoint = moe_runner::checkpoint::Checkpoint::open(Path::new(path))?;
        let layers = architecture::layers(&checkpoint)?;
        Ok(Self { checkpoint, layers })
    }

    /// The weights of a layer, by its number in the model.
    pub(crate) fn load(&self, layer: usize) -> Result<LoadedLayer> {
        let entry =
            self.layers.iter().find(|entry| entry.spec.index == layer).ok_or_else(|| {
                let known: Vec<usize> = self.layers.iter().map(|entry| entry.spec.index).collect();
                Error::input("layer", format!("{layer} is no MoE layer; those are {known:?}"))
            })?;
        LoadedLayer::load(&self.checkpoint, entry)
    }
}

/// Opens the checkpoint at `path` (UTF-8): a folder with config.json and *.safetensors, or a .gguf
/// file. Headers are read; the files are mapped, and must not change while a handle made from this one
/// is being made.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_checkpoint_open(
    path: *const c_char,
    checkpoint: *mut *mut Checkpoint,
) -> Status {
    // SAFETY: the caller's promise
    unsafe {
        give(checkpoint, || {
            Checkpoint::open(text("path", path)?.ok_or_else(|| Error::input("path", "is null"))?)
        })
    }
}

/// Writes the numbers of the MoE layers, in order, the first `capacity` of them to `layers` (which may
/// be null if `capacity` is 0), and to `count` how many there are.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_checkpoint_layers(
    checkpoint: *const Checkpoint,
    layers: *mut usize,
    capacity: usize,
    count: *mut usize,
) -> Status {
    call(|| {
        // SAFETY: the caller's promise
        let checkpoint = unsafe { handle("checkpoint", checkpoint)? };
        // SAFETY: the caller's promise: `capacity` numbers have room there
        let room = unsafe { moe_foreign::slice_mut("layers", layers.cast(), capacity)? };
        // SAFETY: the caller's promise
        let count = unsafe { moe_foreign::slice_mut("count", count.cast(), 1)? };
        for (to, entry) in room.iter_mut().zip(&checkpoint.layers) {
            *to = entry.spec.index;
        }
        count[0] = checkpoint.layers.len();
        Ok(())
    })
}

/// Frees a checkpoint; null is ignored. What was made from it stays.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_checkpoint_free(checkpoint: *mut Checkpoint) {
    // SAFETY: the caller's promise
    unsafe { free(checkpoint) }
}
