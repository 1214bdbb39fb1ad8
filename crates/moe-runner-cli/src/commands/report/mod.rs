//! `report`: what is known of a checkpoint's MoE layers, as one page with pictures. It has the numbers
//! of `check`, `plan`, `explain` and `bench`, and computes none of its own.

mod balance;
mod errors;
mod heat;
mod html;
mod kernels;
mod load;
mod page;
pub(super) mod roofline;
pub(super) mod svg;

use anyhow::Result;
use serde::Serialize;

use super::bench::result::BenchJson;
use super::check::{self, CheckJson, Tell};
use super::explain::{self, ExplainJson};
use super::plan::{self, PlanJson};
use crate::args::{Common, ReportArgs};
use crate::checkpoints::Opened;
use crate::outputs::{self, ensure_apart};
use crate::report::{Report, formula, units};

/// What the page tells, and `--json` prints.
#[derive(Serialize)]
struct Told<'a> {
    output: String,
    /// As `check --json` has it, and so on.
    check: &'a CheckJson,
    plan: &'a PlanJson,
    explain: &'a ExplainJson,
    bench: &'a [BenchJson],
    /// Routing and output as formulas, of layers that differ in them.
    formulas: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &ReportArgs, common: &Common) -> Result<Report> {
    let opened = Opened::open(&args.of.checkpoint)?;
    let entries = opened.select(&args.of.layers)?;
    let mut inputs: Vec<_> = args.bench.iter().map(|path| ("--bench", path.as_path())).collect();
    inputs.extend(args.against.iter().map(|path| ("--against", path.as_path())));
    inputs.extend(args.trace.as_deref().map(|path| ("--trace", path)));
    inputs.extend(args.input.as_deref().map(|path| ("--input", path)));
    ensure_apart(&[("--output", &args.output)], &inputs, Some(&opened.checkpoint))?;
    let mut formulas: Vec<String> = Vec::new();
    for entry in entries {
        let lines = [formula::routing(&entry.spec), vec![formula::output(&entry.spec)]].concat();
        if !formulas.contains(&lines.join("\n")) {
            formulas.push(lines.join("\n"));
        }
    }

    // what is quick first: what is wrong with files is told before the work
    let bench = args.bench.iter().map(|path| BenchJson::read(path)).collect::<Result<Vec<_>>>()?;
    let plan = plan::plan(&args.plan())?;
    let explain = explain::explain(&args.explain(), common)?;
    let checked = check::check(&args.check(), common, Tell::Nothing)?;
    let check = &*check::held(&checked.known);
    let told = Told {
        output: args.output.display().to_string(),
        check,
        plan: &plan,
        explain: &explain,
        bench: &bench,
        formulas,
    };
    let page = page::page(&told);
    outputs::write(&args.output, page.as_bytes())?;
    let text = format!("{}\nwrote {}, {}", check.verdict, told.output, units::bytes(page.len()));
    Report::new(check.ok, text, &told)
}
