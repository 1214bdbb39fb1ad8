//! What goes wrong, and the status that says so: 1 for a run that failed, 2 for arguments that can
//! not be used.

use std::error::Error;
use std::fmt;
use std::process::ExitCode;

use crate::interrupt::INTERRUPTED;

/// The exit status for arguments that cannot be used.
pub(crate) const UNUSABLE: u8 = 2;

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

/// Prints an error and its causes, one a line, and returns the exit status.
pub(crate) fn print(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {}", one_line(&error.to_string()));
    for cause in error.chain().skip(1) {
        eprintln!("  because: {}", one_line(&cause.to_string()));
    }
    let any = |is: fn(&(dyn Error + 'static)) -> bool| error.chain().any(is);
    if any(|cause| cause.is::<Unusable>()) {
        ExitCode::from(UNUSABLE)
    } else if any(|cause| matches!(cause.downcast_ref(), Some(moe_runner::Error::Interrupted))) {
        ExitCode::from(INTERRUPTED)
    } else {
        ExitCode::FAILURE
    }
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
