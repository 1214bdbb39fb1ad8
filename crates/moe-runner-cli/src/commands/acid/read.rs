//! `acid read`

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use moe_acid::ReadingsFile;
use serde_json::Value;

use super::{Line, report};
use crate::report::Report;

#[derive(clap::Args, Debug)]
#[command(after_help = "\
A file is JSON: {\"family\": \"mixtral\", \"engine\": \"name and version\",
\"log_probabilities\": [[...], ...]}, with a row for each token of the prompt in
probes.json: the logits or log-probabilities of all tokens at its position. Several
may stand in a file, one after another; what an engine refused is passed over.

Examples:
  moe-runner acid write ./acid --family mixtral --form bf16
  python crates/moe-acid/askers/ask_transformers.py ./acid/mixtral-bf16 > said.json
  moe-runner acid read said.json")]
pub(super) struct ReadArgs {
    /// What engines said.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Show what was read at each probe, beside what is right.
    #[arg(long)]
    table: bool,
}

pub(super) fn run(args: &ReadArgs) -> Result<Report> {
    let mut all = Vec::new();
    for path in &args.files {
        let text = fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
        for said in serde_json::Deserializer::from_slice(&text).into_iter::<Value>() {
            let file = said.and_then(|said| match said.get("refused") {
                Some(_) => Ok(None),
                None => serde_json::from_value(said).map(Some),
            });
            let file = file.with_context(|| {
                format!("{}: is not what an engine said, as JSON", path.display())
            })?;
            if let Some(file) = file {
                all.push(line(path, file, args.table)?);
            }
        }
    }
    if all.is_empty() {
        return Err(anyhow!("nothing was said: no readings in these files"));
    }
    report(&all)
}

fn line(path: &Path, file: ReadingsFile, table: bool) -> Result<Line> {
    let (block, readings) =
        file.read().map_err(|reason| anyhow!("{}: {reason}", path.display()))?;
    let engine = if file.engine.is_empty() { path.display().to_string() } else { file.engine };
    Ok(Line::new(engine, &block, &readings, table))
}
