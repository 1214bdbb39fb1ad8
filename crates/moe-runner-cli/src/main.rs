//! The program `moe-runner`.

use std::process::ExitCode;

fn main() -> ExitCode {
    moe_runner_cli::main(std::env::args_os()).into()
}
