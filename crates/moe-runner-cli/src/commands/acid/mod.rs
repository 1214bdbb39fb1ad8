//! `acid`: tiny checkpoints whose log-probabilities spell out what an engine's block computed.

mod ask;
mod ours;
mod read;
mod selftest;
mod write;

use anyhow::Result;
use clap::Subcommand;
use moe_acid::write::Form;
use moe_acid::{Block, Decoder, FAMILIES, Family, Readings};
use serde::Serialize;

use crate::args::common::Common;
use crate::failure::unusable;
use crate::report::Report;
use crate::report::table::{Columns, Tone, toned};

/// `acid`
#[derive(clap::Args, Debug)]
pub(crate) struct AcidArgs {
    #[command(subcommand)]
    command: AcidCommand,
}

#[derive(Subcommand, Debug)]
enum AcidCommand {
    /// Write the checkpoints, for any engine to load.
    Write(write::WriteArgs),
    /// Say what an engine's log-probabilities mean.
    Read(read::ReadArgs),
    /// Ask a running server: vLLM, SGLang or llama-server.
    Ask(ask::AskArgs),
    /// Ask the kernels of this program.
    Run(ours::OursArgs),
    /// Put every known mistake into a model of the block, and show that each is named.
    #[command(name = "self")]
    SelfTest,
}

/// Runs the command.
pub(crate) fn run(args: &AcidArgs) -> Result<Report> {
    match &args.command {
        AcidCommand::Write(args) => write::run(args),
        AcidCommand::Ask(args) => ask::run(args),
        AcidCommand::Read(args) => read::run(args),
        AcidCommand::Run(args) => ours::run(args),
        AcidCommand::SelfTest => selftest::run(),
    }
}

/// What the acid test says of this program's kernels, quickly: for `check`.
pub(crate) fn quick(common: &Common) -> Result<Vec<Line>> {
    ours::quick(common)
}

/// The families of `all` or of a list of names.
fn families(names: &str) -> Result<Vec<&'static Family>> {
    if names == "all" {
        return Ok(FAMILIES.iter().collect());
    }
    let find = |name: &str| {
        Family::named(name).ok_or_else(|| {
            let known: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
            unusable(format!("--family {name}: there are all, {}", known.join(", ")))
        })
    };
    names.split(',').map(find).collect()
}

/// The forms of `all` or of a list of names.
fn forms(names: &str) -> Result<Vec<Form>> {
    if names == "all" {
        return Ok(Form::ALL.to_vec());
    }
    let find = |name: &str| {
        Form::named(name).ok_or_else(|| {
            let known = Form::ALL.map(Form::name).join(", ");
            unusable(format!("--form {name}: there are all, {known}"))
        })
    };
    names.split(',').map(find).collect()
}

/// What was found of one checkpoint.
#[derive(Serialize)]
pub(crate) struct Line {
    pub(crate) family: String,
    /// Who computed: an engine, or a kernel of this program with the form of the weights.
    engine: String,
    pub(crate) ok: bool,
    pub(crate) faults: Vec<String>,
    /// What the engine chose where the model leaves a choice.
    notes: Vec<String>,
    /// Mistakes that this checkpoint cannot tell from the named ones.
    same_as: Vec<&'static str>,
    residual: f64,
    routed_multiplier: f64,
    shared_multiplier: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    readings: Option<Vec<ProbeJson>>,
}

/// What was read at one probe.
#[derive(Serialize)]
struct ProbeJson {
    probe: &'static str,
    /// `null`: not finite.
    read: Vec<Option<f64>>,
    expected: Vec<f64>,
}

impl Line {
    fn new(engine: String, block: &Block, readings: &Readings, table: bool) -> Self {
        let verdict = Decoder::new(block).verdict(readings);
        Self {
            family: block.family.name.into(),
            engine,
            ok: verdict.is_right(),
            faults: verdict.faults().to_vec(),
            notes: verdict.notes.iter().map(ToString::to_string).collect(),
            same_as: verdict.same.iter().map(|mistake| mistake.words()).collect(),
            residual: verdict.residual,
            routed_multiplier: verdict.routed,
            shared_multiplier: verdict.shared,
            readings: table.then(|| probes(block, readings)),
        }
    }

    fn verdict(&self) -> String {
        match self.ok {
            true => toned(Tone::Good, "right"),
            false => toned(Tone::Bad, &self.faults.join("; ")),
        }
    }
}

fn probes(block: &Block, readings: &Readings) -> Vec<ProbeJson> {
    let [routed, shared] = block.simulate(&Default::default());
    let rows = block.probes.names.iter().zip(&readings.0).zip(routed.iter().zip(&shared));
    rows.map(|((probe, read), (routed, shared))| ProbeJson {
        probe,
        read: read.iter().map(|v| v.is_finite().then_some(*v)).collect(),
        expected: routed.iter().zip(shared).map(|(r, s)| r + s).collect(),
    })
    .collect()
}

#[derive(Serialize)]
struct LinesJson<'a> {
    ok: bool,
    checkpoints: &'a [Line],
}

/// The report of all lines.
fn report(lines: &[Line]) -> Result<Report> {
    let ok = lines.iter().all(|line| line.ok);
    let mut table = Columns::new(&["checkpoint", "computed by", "verdict"]);
    for line in lines {
        table.row([line.family.clone(), line.engine.clone(), line.verdict()]);
    }
    let mut text = table.to_string();
    for line in lines {
        for same in &line.same_as {
            text += &format!("{}: the same readings as '{same}'\n", line.family);
        }
        if !line.notes.is_empty() {
            text += &format!("{}: {}\n", line.family, line.notes.join("; "));
        }
        for probe in line.readings.iter().flatten() {
            text += &format!("\n{}, probe '{}': read (expected)\n", line.family, probe.probe);
            for (at, (read, expected)) in probe.read.iter().zip(&probe.expected).enumerate() {
                if read.is_none_or(|read| read.abs() > 5e-3) || expected.abs() > 5e-3 {
                    let read = read.map_or("not finite".into(), |read| format!("{read:.4}"));
                    text += &format!("  {at:3}  {read} ({expected:.4})\n");
                }
            }
        }
    }
    Report::new(ok, text, &LinesJson { ok, checkpoints: lines })
}
