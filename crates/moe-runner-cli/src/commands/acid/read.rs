//! `acid read`

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use moe_acid::ReadingsFile;

use super::{Line, report};
use crate::report::Report;

#[derive(clap::Args, Debug)]
#[command(after_help = "\
A file is JSON: {\"family\": \"mixtral\", \"engine\": \"name and version\",
\"log_probabilities\": [[...], ...]}, with a row for each token of the prompt in
probes.json: the logits or log-probabilities of all tokens at its position.

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
    let lines: Vec<Line> =
        args.files.iter().map(|path| line(path, args.table)).collect::<Result<_>>()?;
    report(&lines)
}

fn line(path: &Path, table: bool) -> Result<Line> {
    let text = fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let file: ReadingsFile = serde_json::from_slice(&text)
        .with_context(|| format!("{}: is not what an engine said, as JSON", path.display()))?;
    let (block, readings) =
        file.read().map_err(|reason| anyhow!("{}: {reason}", path.display()))?;
    let engine = if file.engine.is_empty() { path.display().to_string() } else { file.engine };
    Ok(Line::new(engine, &block, &readings, table))
}
