//! `check`: is every layer right, and what does it do on this machine?

mod layer;
mod recorded;
mod text;

use std::path::Path;

use anyhow::Result;
use moe_runner::comm::Sizes;
use serde::Serialize;

use crate::args::{CheckArgs, Common};
use crate::builtin::Builtin;
use crate::checkpoints::{LayerChoice, Opened};
use crate::failure::unusable;
use crate::input::Input;
use crate::measure::MachineLimits;
use crate::report::Report;
use crate::report::progress::Progress;
use layer::LayerCheck;
use recorded::Recorded;

#[derive(Serialize)]
struct CheckJson {
    ok: bool,
    verdict: String,
    checkpoint: String,
    architecture: String,
    /// The ranks, where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    split: Option<Sizes>,
    /// `None` with `--no-timing`.
    machine: Option<MachineLimits>,
    layers: Vec<LayerCheck>,
}

/// Runs the command.
pub(crate) fn run(args: &CheckArgs, common: &Common) -> Result<Report> {
    if args.tokens == 0 {
        return Err(unusable("--tokens 0: there is nothing to compare; give at least 1"));
    }
    let parallel = args.splitting.parallel()?;
    let ranks = args.splitting.ranks()?;
    let builtin = args.checkpoint.is_none().then(Builtin::unpack).transpose()?;
    let path = match (&builtin, &args.checkpoint) {
        (Some(builtin), _) => builtin.checkpoint(),
        (None, Some(path)) => path.clone(),
        (None, None) => unreachable!("one of both is there"),
    };
    let opened = Opened::open(&path)?;
    let entries = opened.select(&args.layers)?;
    let single = matches!(&args.layers, LayerChoice::Some(layers) if layers.len() == 1);
    let input = match &args.input {
        Some(path) => Some(Input::open(path, &args.input_name, !single)?),
        None => None,
    };
    let against = args.against.clone().or(builtin.as_ref().map(Builtin::recorded));
    let (mut recorded, mut original) = (None, None);
    match &against {
        Some(path) if is_checkpoint(path) => original = Some(Opened::open(path)?),
        Some(path) => recorded = Some(Recorded::open(path, single)?),
        None => {}
    }

    let progress = Progress::new(entries.len() + 1);
    progress.doing("measuring the machine");
    let machine = match args.no_timing {
        true => None,
        false => Some(ranks.measure(&common.pool)?),
    };
    progress.step();
    let mut checks = Vec::with_capacity(entries.len());
    for entry in entries {
        progress.doing(entry.spec.name.clone());
        let check = layer::Checker {
            opened: &opened,
            entry,
            common,
            machine: machine.as_ref(),
            input: input.as_ref(),
            recorded: recorded.as_ref(),
            original: original.as_ref(),
            tokens: args.tokens,
            ranks: &ranks,
            parallel: &parallel,
        };
        checks.push(check.run()?);
        progress.step();
    }
    drop(progress);
    if let Some(recorded) = &recorded
        && checks.iter().all(|check| check.recorded.is_empty() && check.problems.is_empty())
    {
        return Err(recorded.no_layer());
    }
    let ok = checks.iter().all(|check| check.ok);
    if !ranks.reports() {
        return Ok(Report::silent(ok));
    }
    let json = CheckJson {
        ok,
        verdict: text::verdict(&checks),
        checkpoint: match builtin {
            Some(_) => "the small one that comes with moe-runner".into(),
            None => path.display().to_string(),
        },
        architecture: opened.description.architecture.clone(),
        split: ranks.split(),
        machine,
        layers: checks,
    };
    Report::new(json.ok, text::text(&json), &json)
}

/// Whether `--against` names another checkpoint, not a file of recordings.
fn is_checkpoint(path: &Path) -> bool {
    path.is_dir() || path.extension().is_some_and(|extension| extension == "gguf")
}
