//! The command `moe-runner`: a table of modes, and what becomes of their results.

mod args;
mod builtin;
mod checkpoints;
mod commands;
mod failure;
mod formats;
mod input;
mod interrupt;
mod measure;
mod memory;
mod nonfinite;
mod outputs;
mod presets;
mod report;
mod splitting;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use args::{Args, Command, Common};
use report::Report;

fn main() -> ExitCode {
    failure::report_panics_as_bugs();
    let args = match Args::read() {
        Ok(args) => args,
        Err(status) => return status,
    };
    interrupt::watch();
    let json = args.common.json;
    match catch_unwind(AssertUnwindSafe(|| run(&args))) {
        Ok(Ok(report)) => report.print(json),
        Ok(Err(error)) => failure::print(&error),
        // the hook has said what happened
        Err(_) => ExitCode::FAILURE,
    }
}

fn run(args: &Args) -> anyhow::Result<Report> {
    let common = Common::resolve(&args.common)?;
    match &args.command {
        Command::Check(args) => commands::check::run(args, &common),
        Command::Run(args) => commands::run::run(args, &common),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Explain(args) => commands::explain::run(args, &common),
        Command::Bench(args) => commands::bench::run(args, &common),
        Command::Plan(args) => commands::plan::run(args, &common),
        Command::Quantize(args) => commands::quantize::run(args, &common),
    }
}
