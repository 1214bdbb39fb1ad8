//! The small checkpoint that `check` uses when none is named: two DeepSeek-V3 layers in bf16 with
//! random weights (sigmoid scores, correction bias, groups of experts, a scaling factor, a shared
//! expert), and what the reference library returned for them. Part of the program, so that an
//! installed one has it too.

use std::path::PathBuf;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::interrupt;

macro_rules! case {
    ($file:literal) => {
        include_bytes!(concat!("../builtin/", $file))
    };
}

const CONFIG: &[u8] = case!("config.json");
const MODEL: &[u8] = case!("model.safetensors");
const RECORDED: &[u8] = case!("recorded.safetensors");

/// The checkpoint, unpacked to a temporary folder that is removed when this is dropped.
pub(crate) struct Builtin {
    folder: TempDir,
}

impl Builtin {
    pub(crate) fn unpack() -> Result<Self> {
        let builtin = Self { folder: interrupt::temporary()? };
        for (name, content) in [
            ("config.json", CONFIG),
            ("model.safetensors", MODEL),
            ("recorded.safetensors", RECORDED),
        ] {
            let path = builtin.folder.path().join(name);
            std::fs::write(&path, content)
                .with_context(|| format!("{}: cannot be written", path.display()))?;
        }
        Ok(builtin)
    }

    /// The folder with `config.json` and the weights.
    pub(crate) fn checkpoint(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    /// The recorded inputs and outputs.
    pub(crate) fn recorded(&self) -> PathBuf {
        self.folder.path().join("recorded.safetensors")
    }
}
