//! The command `moe-runner`: a table of modes, and what becomes of their results. A library, so that
//! other languages have the command without another process.

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
mod times;

use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use args::{Args, Command, Common, ThreadArgs};
use report::Report;

/// Runs the command as a program: `args` with the program's own name first. Prints, and returns the
/// exit status. From then on interruptions and panics of this process are the command's.
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    failure::report_panics_as_bugs();
    let args = match Args::read(args) {
        Ok(args) => args,
        Err(status) => return status,
    };
    let json = args.json;
    interrupt::watch(json);
    match catch_unwind(AssertUnwindSafe(|| run(&args.command, json))) {
        Ok(Ok(report)) => report.print(json),
        Ok(Err(error)) => failure::print(&error, json),
        // the hook has said what happened
        Err(_) => failure::bug(json),
    }
}

/// Why [`report`] has none.
#[derive(Debug)]
pub struct Failure {
    /// What kind of thing is wrong, in one word, as `--json` tells it.
    pub kind: &'static str,
    /// The error and its causes, in one line.
    pub message: String,
}

/// Runs the command as a function: `args` with any name first. Returns the JSON object that `--json`
/// prints, whatever its verdict. Once `stop` is set, what takes long ends at the next layer, tensor or
/// batch size, with a failure of the kind "interrupted"; nothing half-done is left.
///
/// # Errors
/// Where the command prints an error in place of a report.
pub fn report(
    args: impl IntoIterator<Item = OsString>,
    stop: Arc<AtomicBool>,
) -> Result<String, Failure> {
    interrupt::stop_when(stop);
    let args = Args::parse(args)
        .map_err(|error| Failure { kind: "arguments", message: args::message(&error) })?;
    match run(&args.command, true) {
        Ok(report) => Ok(report.into_json()),
        Err(error) => Err(Failure {
            kind: failure::kind(&error),
            message: failure::one_line(&format!("{error:#}")),
        }),
    }
}

fn run(command: &Command, json: bool) -> anyhow::Result<Report> {
    match command {
        Command::Check(args) => {
            let common = Common::resolve(&args.kernel, &args.host, args.seed.seed)?;
            commands::check::run(args, &common.with_device()?, json)
        }
        Command::Run(args) => {
            let common = Common::resolve(&args.kernel, &args.host, 0)?;
            commands::run::run(args, &common.with_device()?)
        }
        Command::Inspect(args) => commands::inspect::run(args, args.threads.count()?),
        Command::Explain(args) => commands::explain::run(
            args,
            &Common::resolve(&args.kernel, &ThreadArgs::one().into(), 0)?,
        ),
        Command::Bench(args) => {
            let common = Common::resolve(&args.kernel, &args.host, args.seed.seed)?;
            commands::bench::run(args, &common.with_device()?)
        }
        Command::Plan(args) => commands::plan::run(args),
        Command::Report(args) => {
            let common =
                Common::resolve(&args.kernel, &args.threads.clone().into(), args.seed.seed)?;
            commands::report::run(args, &common.with_device()?)
        }
        Command::Quantize(args) => commands::quantize::run(args),
        Command::Acid(args) => commands::acid::run(args),
    }
}
