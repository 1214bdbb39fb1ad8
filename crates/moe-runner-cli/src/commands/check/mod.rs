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
use crate::interrupt::{self, Asked};
use crate::measure::MachineLimits;
use crate::report::findings::{self, FindingJson};
use crate::report::progress::Progress;
use crate::report::{Report, say};
pub(super) use compare::Worst;
pub(super) use layer::LayerCheck;
use recorded::Recorded;

#[derive(Serialize)]
pub(super) struct CheckJson {
    pub(super) ok: bool,
    pub(super) verdict: String,
    pub(super) checkpoint: String,
    pub(super) architecture: String,
    /// The ranks, where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    split: Option<Sizes>,
    /// `None` with `--no-timing`.
    pub(super) machine: Option<MachineLimits>,
    /// Layers that were to be checked and are not, where the run was interrupted.
    #[serde(skip_serializing_if = "Option::is_none")]
    unchecked: Option<usize>,
    /// What the doctor found in files.
    pub(super) findings: Vec<FindingJson>,
    pub(super) layers: Vec<LayerCheck>,
    /// The acid test of this program's kernels, where no checkpoint was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    acid: Option<Vec<acid::Line>>,
}

/// What is told while the layers are checked, and when that is interrupted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Tell {
    /// Each layer as it is done, for people.
    Layers,
    /// Nothing before the end, and then an object for programs.
    Object,
    /// Nothing: another command asks.
    Nothing,
}

/// Runs the command.
pub(crate) fn run(args: &CheckArgs, common: &Common, json: bool) -> Result<Report> {
    let tell = if json { Tell::Object } else { Tell::Layers };
    let Checked { ok, reports, known } = check(args, common, tell)?;
    if !reports {
        return Ok(Report::silent(ok));
    }
    let known = held(&known);
    Report::new(ok, text::closing(&known), &*known)
}

/// What checking found.
pub(super) struct Checked {
    ok: bool,
    /// Whether this process tells of it, and no other one.
    reports: bool,
    pub(super) known: Arc<Mutex<CheckJson>>,
}

/// Checks the layers.
pub(super) fn check(args: &CheckArgs, common: &Common, tell: Tell) -> Result<Checked> {
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
    let common = &common.caching(Some(&opened.checkpoint))?;
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
    if ranks.reports() && tell != Tell::Nothing {
        let (known, chosen, json) = (known.clone(), entries.len(), tell == Tell::Object);
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

    if let Some(recorded) = &recorded {
        recorded.ensure_any_of(&entries)?;
    }

    let progress = Progress::new(entries.len());
    progress.doing("measuring the machine");
    let machine = match args.no_timing {
        true => None,
        false => Some(ranks.measure(&common.pool, common.gpu_in_use())?),
    };
    held(&known).machine = machine.clone();
    let shows = ranks.reports() && tell == Tell::Layers;
    let live = text::Live::new(entries.len(), original.is_some());
    if shows {
        let text = live.opening(&held(&known));
        progress.aside(|| say(&text));
    }
    let asked = Asked::here();
    for entry in entries {
        asked.go_on()?;
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
    if ranks.reports() {
        common.tell_of_cache();
    }
    let mut so_far = held(&known);
    let checks = &so_far.layers;
    let unsound = so_far.findings.iter().filter(|finding| finding.counts(args.strict));
    let unsound: Vec<&str> = unsound.map(|finding| finding.message.as_str()).collect();
    let passed = acid.iter().flatten().all(|line| line.ok);
    let ok = passed && checks.iter().all(|check| check.ok) && unsound.is_empty();
    let verdict = match passed {
        true => text::verdict(checks, &unsound),
        false => text::failed_acid(acid.iter().flatten()),
    };
    (so_far.ok, so_far.verdict, so_far.acid) = (ok, verdict, acid);
    drop(so_far);
    Ok(Checked { ok, reports: ranks.reports(), known })
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
pub(super) fn held(known: &Mutex<CheckJson>) -> MutexGuard<'_, CheckJson> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether `--against` names another checkpoint, not a file of recordings.
fn is_checkpoint(path: &Path) -> bool {
    path.is_dir() || path.extension().is_some_and(|extension| extension == "gguf")
}
