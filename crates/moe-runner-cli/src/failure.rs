//! What goes wrong, and the status that says so.

use std::error::Error;
use std::fmt;
use std::io::Write;

use serde::Serialize;

/// The exit status of a run that did what it was to do, and found nothing wrong.
pub(crate) const SUCCESS: u8 = 0;

/// The exit status of a run that failed.
pub(crate) const FAILURE: u8 = 1;

/// The exit status for arguments that cannot be used.
pub(crate) const UNUSABLE: u8 = 2;

/// The exit status of an interrupted run, as shells have it.
pub(crate) const INTERRUPTED: u8 = 130;

/// The exit status where nobody reads what a run has yet to say, as shells have it (a broken pipe).
pub(crate) const UNREAD: u8 = 141;

/// An argument that cannot be used: a name that does not exist, a number out of range. A kernel
/// that exists but cannot run the layer is not one of these: the run was tried.
#[derive(Debug)]
struct Unusable(String);

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Unusable {}

/// An error with exit status 2.
pub(crate) fn unusable(what: impl Into<String>) -> anyhow::Error {
    Unusable(what.into()).into()
}

/// An error as programs read it.
#[derive(Serialize)]
struct ErrorJson {
    /// What kind of thing is wrong, in one word.
    kind: &'static str,
    message: String,
    causes: Vec<String>,
}

/// Prints an error and its causes, one a line, and with `json` an object on standard output as well;
/// returns the exit status.
pub(crate) fn print(error: &anyhow::Error, json: bool) -> u8 {
    let message = one_line(&error.to_string());
    let causes: Vec<String> =
        error.chain().skip(1).map(|cause| one_line(&cause.to_string())).collect();
    eprintln!("error: {message}");
    causes.iter().for_each(|cause| eprintln!("  because: {cause}"));
    let kind = kind(error);
    if json {
        print_json(ErrorJson { kind, message, causes });
    }
    match kind {
        "arguments" => UNUSABLE,
        "interrupted" => INTERRUPTED,
        _ => FAILURE,
    }
}

/// After a panic, which its hook has told of.
pub(crate) fn bug(json: bool) -> u8 {
    if json {
        let message = "internal error; this is a bug in moe-runner, please report it".into();
        print_json(ErrorJson { kind: "bug", message, causes: Vec::new() });
    }
    FAILURE
}

fn print_json(error: ErrorJson) {
    // plain texts: they cannot fail to be written; a reader that has gone away needs none
    if let Ok(text) = serde_json::to_string_pretty(&serde_json::json!({ "error": error })) {
        let _ = writeln!(std::io::stdout(), "{text}");
    }
}

/// The kind of the first cause that has one.
pub(crate) fn kind(error: &anyhow::Error) -> &'static str {
    let known = error.chain().find_map(|cause| {
        if cause.is::<Unusable>() {
            return Some("arguments");
        }
        if cause.is::<std::io::Error>() {
            return Some("io");
        }
        Some(match cause.downcast_ref::<moe_runner::Error>()? {
            moe_runner::Error::Io { .. } => "io",
            moe_runner::Error::File { .. } => "file",
            moe_runner::Error::Tensor { .. } => "tensor",
            moe_runner::Error::Config { .. } => "config",
            moe_runner::Error::Spec { .. } => "spec",
            moe_runner::Error::NoKernel(_) => "no_kernel",
            moe_runner::Error::Device(_) => "device",
            moe_runner::Error::Communication(_) => "communication",
            moe_runner::Error::Interrupted => "interrupted",
            _ => "input",
        })
    });
    known.unwrap_or("input")
}

/// Names from files may hold anything; what is printed is one line that moves no cursor.
pub(crate) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// A panic is a bug of this program: one line that says so and where.
pub(crate) fn report_panics_as_bugs() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map_or_else(String::new, |at| format!(" at {at}"));
        let payload = info.payload();
        let what = payload
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("of unknown kind");
        eprintln!(
            "error: internal error{place}: {}; this is a bug in moe-runner, please report it",
            one_line(what)
        );
    }));
}
