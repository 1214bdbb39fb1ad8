//! `check`: is every layer right, and what does it do on this machine?

mod compare;
mod layer;
mod recorded;
mod text;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use moe_runner::checkpoint::architecture::overlooked;
use moe_runner::comm::Sizes;
use moe_runner::doctor;
use serde::Serialize;

use super::acid;
use crate::args::{CheckArgs, Common};
use crate::builtin::Builtin;
use crate::checkpoints::Opened;
use crate::failure::unusable;
use crate::input::Input;
use crate::interrupt;
use crate::measure::MachineLimits;
use crate::report::findings::{self, FindingJson};
use crate::report::progress::Progress;
use crate::report::{Report, say};
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
    /// Layers that were to be checked and are not, where the run was interrupted.
    #[serde(skip_serializing_if = "Option::is_none")]
    unchecked: Option<usize>,
    /// What the doctor found in files.
    findings: Vec<FindingJson>,
    layers: Vec<LayerCheck>,
    /// The acid test of this program's kernels, where no checkpoint was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    acid: Option<Vec<acid::Line>>,
}

/// Runs the command.
pub(crate) fn run(args: &CheckArgs, common: &Common, json: bool) -> Result<Report> {
    if args.tokens == 0 {
        return Err(unusable("--tokens 0: there is nothing to compare; give at least 1"));
    }
    let parallel = args.splitting.parallel()?;
    let ranks = args.splitting.ranks(common.gpu)?;
    let builtin = args.checkpoint.is_none().then(Builtin::unpack).transpose()?;
    let path = match (&builtin, &args.checkpoint) {
        (Some(builtin), _) => builtin.checkpoint(),
        (None, Some(path)) => path.clone(),
        (None, None) => unreachable!("one of both is there"),
    };
    let opened = Opened::open(&path)?;
    // layers that no check of a layer would look at
    if let Some(problem) = overlooked(&opened.checkpoint)?.into_iter().next() {
        return Err(problem.into());
    }
    let entries = opened.select(&args.layers)?;
    let known = Arc::new(Mutex::new(CheckJson {
        ok: false,
        verdict: String::new(),
        checkpoint: match builtin {
            Some(_) => "the small one that comes with moe-runner".into(),
            None => path.display().to_string(),
        },
        architecture: opened.description.architecture.clone(),
        split: ranks.split(),
        machine: None,
        unchecked: None,
        findings: findings::all(doctor::files(&opened.checkpoint)),
        layers: Vec::with_capacity(entries.len()),
        acid: None,
    }));
    if ranks.reports() {
        let (known, chosen) = (known.clone(), entries.len());
        interrupt::last_words(move || tell_what_is_known(&known, chosen, json));
    }
    let single = args.layers.is_single();
    let input = match &args.input {
        Some(path) => Some(Input::open(path, &args.input_name, !single)?),
        None => None,
    };
    let mut against = args.against.clone();
    against
        .extend(builtin.as_ref().map(|builtin| builtin.recorded()).filter(|_| against.is_empty()));
    let (mut recorded, mut original) = (None, None);
    for path in &against {
        let twice = match is_checkpoint(path) {
            true => original.replace(Opened::open(path)?).is_some(),
            false => recorded.replace(Recorded::open(path, single)?).is_some(),
        };
        if twice {
            let what =
                "--against: takes one file of recordings and one checkpoint, not two of a kind";
            return Err(unusable(what));
        }
    }

    let progress = Progress::new(entries.len());
    progress.doing("measuring the machine");
    let machine = match args.no_timing {
        true => None,
        false => Some(ranks.measure(&common.pool, common.gpu_in_use())?),
    };
    held(&known).machine = machine;
    let shows = ranks.reports() && !json;
    let live = text::Live::new(entries.len());
    if shows {
        let text = live.opening(&held(&known));
        progress.aside(|| say(&text));
    }
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
            strict: args.strict,
            ranks: &ranks,
            parallel: &parallel,
        };
        let check = check.run()?;
        progress.step();
        if shows {
            let text = live.layer(&check, progress.left());
            progress.aside(|| say(&text));
        }
        held(&known).layers.push(check);
    }
    let acid = match builtin.is_some() && ranks.split().is_none() {
        true => {
            progress.doing("the acid test");
            Some(acid::quick(common)?)
        }
        false => None,
    };
    drop(progress);
    let mut known = held(&known);
    let checks = &known.layers;
    if let Some(recorded) = &recorded
        && checks.iter().all(|check| !check.inputs.starts_with("recorded"))
        && checks.iter().all(|check| check.recorded.is_empty() && check.problems.is_empty())
    {
        return Err(recorded.no_layer());
    }
    let unsound = known.findings.iter().filter(|finding| finding.counts(args.strict));
    let unsound: Vec<&str> = unsound.map(|finding| finding.message.as_str()).collect();
    let passed = acid.iter().flatten().all(|line| line.ok);
    let ok = passed && checks.iter().all(|check| check.ok) && unsound.is_empty();
    let verdict = match passed {
        true => text::verdict(checks, &unsound),
        false => text::failed_acid(acid.iter().flatten()),
    };
    if !ranks.reports() {
        return Ok(Report::silent(ok));
    }
    (known.ok, known.verdict, known.acid) = (ok, verdict, acid);
    Report::new(ok, text::closing(&known), &*known)
}

/// The run is interrupted: what is known by now.
fn tell_what_is_known(known: &Mutex<CheckJson>, chosen: usize, json: bool) {
    let mut known = held(known);
    let left = chosen - known.layers.len();
    known.unchecked = Some(left);
    known.verdict = text::interrupted(&known.layers, left);
    let report = Report::new(false, text::closing(&known), &*known);
    // plain data: it cannot fail to be written
    if let Ok(report) = report {
        report.print(json);
    }
}

/// What is behind the lock; a panic elsewhere has been reported, and what is known stays known.
fn held(known: &Mutex<CheckJson>) -> MutexGuard<'_, CheckJson> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether `--against` names another checkpoint, not a file of recordings.
fn is_checkpoint(path: &Path) -> bool {
    path.is_dir() || path.extension().is_some_and(|extension| extension == "gguf")
}
