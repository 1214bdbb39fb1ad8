//! `quantize`: a copy of a checkpoint with quantised experts.

use std::collections::BTreeSet;

use anyhow::Result;
use moe_runner::Error;
use moe_runner::checkpoint::Checkpoint;
use moe_runner::quantize::{Format, Leftover, Options, ProjectionError, quantize};
use serde::Serialize;

use crate::args::QuantizeArgs;
use crate::checkpoints::ranges;
use crate::failure::{one_line, unusable};
use crate::interrupt::{self, Asked};
use crate::outputs::ensure_named;
use crate::report::Report;
use crate::report::progress::Progress;
use crate::report::table::{Columns, Facts};
use crate::report::units::{self, plural};

const DEFAULT_GROUP: usize = 128;

/// Up to so many layers have lines of their own.
const IN_FULL: usize = 8;

#[derive(Serialize)]
struct QuantizeJson {
    checkpoint: String,
    output: String,
    format: &'static str,
    bytes_before: u64,
    bytes_after: u64,
    shards: usize,
    left_out: Vec<String>,
    leftovers: Vec<LeftoverJson>,
    errors: Vec<ErrorJson>,
}

/// What an earlier run left.
#[derive(Serialize)]
struct LeftoverJson {
    path: String,
    removed: bool,
}

#[derive(Serialize)]
struct ErrorJson {
    layer: usize,
    projection: &'static str,
    modules: usize,
    nmse: f64,
    max_relative: f64,
}

/// Runs the command.
pub(crate) fn run(args: &QuantizeArgs) -> Result<Report> {
    ensure_named("--output", &args.output)?;
    let options = Options {
        format: format(args)?,
        ignore: args.ignore.clone(),
        max_shard_bytes: args.max_shard_size,
        overwrite: args.overwrite,
        threads: args.threads.count()?,
    };
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    interrupt::ends_in_order();
    let asked = Asked::here();
    let mut bar: Option<Progress> = None;
    let summary = quantize(&checkpoint, &args.output, &options, &mut |progress| {
        let bar = bar.get_or_insert_with(|| Progress::of_bytes(progress.total));
        bar.at(progress.done);
        bar.doing(one_line(progress.tensor));
        asked.to_stop()
    });
    let summary = summary.map_err(with_option)?;
    drop(bar);
    let json = QuantizeJson {
        checkpoint: args.checkpoint.display().to_string(),
        output: args.output.display().to_string(),
        format: options.format.name(),
        bytes_before: summary.bytes_before,
        bytes_after: summary.bytes_after,
        shards: summary.shards,
        left_out: summary.left_out.iter().map(|path| path.display().to_string()).collect(),
        leftovers: summary.leftovers.iter().map(LeftoverJson::new).collect(),
        errors: summary.errors.iter().map(ErrorJson::new).collect(),
    };
    Report::new(true, text(&json), &json)
}

/// Where the way out is an option: which.
fn with_option(error: Error) -> Error {
    match error {
        Error::File { path, reason } if reason.ends_with("or overwrite it") => {
            Error::File { path, reason: format!("{reason}: --overwrite") }
        }
        other => other,
    }
}

fn format(args: &QuantizeArgs) -> Result<Format> {
    let group = match (args.group_size, args.format.as_str()) {
        (Some(0), _) => return Err(unusable("--group-size 0: must be at least 1")),
        (Some(group), "w4a16") => group,
        (Some(_), other) => {
            return Err(unusable(format!("--group-size: only w4a16 has a choice, not {other}")));
        }
        (None, _) => DEFAULT_GROUP,
    };
    Format::parse(&args.format, group).ok_or_else(|| {
        let names = Format::NAMES.join(", ");
        unusable(format!("--format {}: no such format; there are {names}", args.format))
    })
}

impl LeftoverJson {
    fn new(leftover: &Leftover) -> Self {
        Self { path: leftover.path.display().to_string(), removed: leftover.removed }
    }
}

impl ErrorJson {
    fn new(error: &ProjectionError) -> Self {
        let ProjectionError { layer, role, modules, nmse, max_relative } = *error;
        Self { layer, projection: role.name(), modules, nmse, max_relative }
    }
}

fn text(json: &QuantizeJson) -> String {
    let mut facts = Facts::new();
    facts.add(
        "written",
        format!("{}, {}", one_line(&json.output), plural(json.shards, "safetensors file")),
    );
    let (before, after) = (json.bytes_before as usize, json.bytes_after as usize);
    facts.add(
        "size",
        format!(
            "{} of {}, {:.0} %",
            units::bytes(after),
            units::bytes(before),
            100.0 * after as f64 / before.max(1) as f64
        ),
    );
    facts.add("format", format!("{} (compressed-tensors)", json.format));
    if !json.left_out.is_empty() {
        facts.add("not copied", one_line(&json.left_out.join(", ")));
    }
    for leftover in &json.leftovers {
        let what = match leftover.removed {
            true => "of an interrupted run, removed",
            false => "looks like an interrupted run's; remove it if it is",
        };
        facts.add("left over", format!("{}: {what}", one_line(&leftover.path)));
    }
    let mut table = Columns::new(&[">layer", "projection", ">modules", ">NMSE", ">max error"]);
    for group in groups(&json.errors) {
        let layers: Vec<usize> = group.iter().map(|error| error.layer).collect();
        let nmse = || group.iter().map(|error| error.nmse);
        let nmse = [nmse().fold(f64::INFINITY, f64::min), nmse().fold(0.0, f64::max)];
        let largest = group.iter().map(|error| error.max_relative).fold(0.0, f64::max);
        table.row([
            ranges(&layers),
            group[0].projection.to_owned(),
            group.iter().map(|error| error.modules).sum::<usize>().to_string(),
            match nmse.map(|nmse| format!("{nmse:.2e}")) {
                [least, most] if least == most => most,
                [least, most] => format!("{least} to {most}"),
            },
            format!("{:.2} %", 100.0 * largest),
        ]);
    }
    format!(
        "{facts}\n{table}\nNMSE is |w' - w|^2 / |w|^2; the largest error is a share of its module's largest weight.\n"
    )
}

/// Errors that stand in one line: each alone, or of many layers those of one projection.
fn groups(errors: &[ErrorJson]) -> Vec<Vec<&ErrorJson>> {
    let layers: BTreeSet<usize> = errors.iter().map(|error| error.layer).collect();
    let mut groups: Vec<Vec<&ErrorJson>> = Vec::new();
    for error in errors {
        let alike = |group: &&mut Vec<&ErrorJson>| group[0].projection == error.projection;
        match groups.iter_mut().find(alike).filter(|_| layers.len() > IN_FULL) {
            Some(group) => group.push(error),
            None => groups.push(vec![error]),
        }
    }
    groups
}
