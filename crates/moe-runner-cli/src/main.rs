//! The command `moe-runner`: a table of modes, and what becomes of their results.

mod args;
mod builtin;
mod checkpoints;
mod choice;
mod commands;
mod failure;
mod formats;
mod gpu;
mod input;
mod interrupt;
mod measure;
mod memory;
mod nonfinite;
mod outputs;
mod presets;
mod report;
mod routing;
mod splitting;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use args::{Args, Command, Common};
use report::Report;

fn main() -> ExitCode {
    failure::report_panics_as_bugs();
    interrupt::watch();
    let args = match Args::read() {
        Ok(args) => args,
        Err(status) => return status,
    };
    let json = args.json;
    match catch_unwind(AssertUnwindSafe(|| run(&args.command, json))) {
        Ok(Ok(report)) => report.print(json),
        Ok(Err(error)) => failure::print(&error, json),
        // the hook has said what happened
        Err(_) => failure::bug(json),
    }
}

fn run(command: &Command, json: bool) -> anyhow::Result<Report> {
    match command {
        Command::Check(args) => {
            let common = Common::resolve(&args.kernel, args.threads.count()?, args.seed.seed)?;
            commands::check::run(args, &common.with_device()?, json)
        }
        Command::Run(args) => {
            let common = Common::resolve(&args.kernel, args.threads.count()?, 0)?;
            commands::run::run(args, &common.with_device()?)
        }
        Command::Inspect(args) => commands::inspect::run(args, args.threads.count()?),
        Command::Explain(args) => {
            commands::explain::run(args, &Common::resolve(&args.kernel, 1, 0)?)
        }
        Command::Bench(args) => {
            let common = Common::resolve(&args.kernel, args.threads.count()?, args.seed.seed)?;
            commands::bench::run(args, &common.with_device()?)
        }
        Command::Plan(args) => commands::plan::run(args),
        Command::Quantize(args) => commands::quantize::run(args),
        Command::Acid(args) => commands::acid::run(args),
    }
}
