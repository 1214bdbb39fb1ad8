//! The small checkpoint that `check` uses when none is named: two DeepSeek-V3 layers in bf16 with
//! random weights (sigmoid scores, correction bias, groups of experts, a scaling factor, a shared
//! expert), and what the reference library returned for them. Part of the program, so that an
//! installed one has it too.

use std::path::PathBuf;

use anyhow::{Context, Result};
use tempfile::TempDir;

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
        let folder = TempDir::with_prefix("moe-runner-")
            .context("cannot make a temporary folder for the checkpoint that comes with it")?;
        let builtin = Self { folder };
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

    /// Removes the folder, for when nothing is dropped any more.
    pub(crate) fn remove(&self) {
        let _ = std::fs::remove_dir_all(self.folder.path());
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
