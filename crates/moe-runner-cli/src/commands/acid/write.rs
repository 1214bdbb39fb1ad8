//! `acid write`

use std::path::PathBuf;

use anyhow::{Context, Result};
use moe_acid::Block;
use moe_acid::write::checkpoint;
use serde::Serialize;

use super::{families, forms};
use crate::failure::unusable;
use crate::report::Report;

#[derive(clap::Args, Debug)]
pub(super) struct WriteArgs {
    /// Folder to write to: a checkpoint in FAMILY-FORM for each. None of them may be there.
    folder: PathBuf,
    /// Architectures: all, or names with commas between.
    #[arg(long, value_name = "NAMES", default_value = "all")]
    family: String,
    /// Number formats of the experts: all, or some of f32, bf16, fp8, int4, mxfp4, nvfp4, and of
    /// gguf-f32, gguf-f16, gguf-q8_0, gguf-q4_0, gguf-mxfp4: one file for llama.cpp.
    #[arg(long, value_name = "NAMES", default_value = "f32,bf16")]
    form: String,
}

#[derive(Serialize)]
struct WriteJson {
    written: Vec<String>,
    left_out: Vec<String>,
}

pub(super) fn run(args: &WriteArgs) -> Result<Report> {
    let mut json = WriteJson { written: Vec::new(), left_out: Vec::new() };
    let forms = forms(&args.form)?;
    let mut planned = Vec::new();
    for family in families(&args.family)? {
        for form in &forms {
            let path = args.folder.join(format!("{}-{}", family.name, form.name()));
            if let Some(reason) = form.refuses(family) {
                json.left_out.push(reason);
            } else if path.exists() {
                return Err(unusable(format!("{}: is there already", path.display())));
            } else {
                planned.push((family, *form, path));
            }
        }
    }
    for (family, form, path) in planned {
        checkpoint(&Block::new(family), form, &path)
            .with_context(|| format!("{}: cannot be written", path.display()))?;
        json.written.push(path.display().to_string());
    }
    let mut text = String::new();
    json.written.iter().for_each(|path| text += &format!("{path}\n"));
    json.left_out.iter().for_each(|reason| text += &format!("left out: {reason}\n"));
    text += "Each prompt of probes.json is one forward pass. Save its log-probabilities as acid read\n\
             takes them (see its help), or use an asker of crates/moe-acid/askers.\n";
    Report::new(true, text, &json)
}
