//! What a command says: one text for people, one JSON object for programs.

pub(crate) mod bars;
pub(crate) mod findings;
pub(crate) mod formula;
pub(crate) mod progress;
pub(crate) mod table;
pub(crate) mod trace;
pub(crate) mod units;
pub(crate) mod width;

use std::io::{self, Write};

use serde::Serialize;

use crate::{failure, interrupt};

/// Prints what is known so far, for people, on standard output. Where that cannot be, the process ends:
/// nobody would learn the rest, and what is not known yet is not right.
pub(crate) fn say(text: &str) {
    let mut out = io::stdout().lock();
    let text = width::wrap_lines(text, width::width());
    if let Err(error) = writeln!(out, "{text}").and_then(|()| out.flush()) {
        interrupt::end(match error.kind() {
            io::ErrorKind::BrokenPipe => failure::UNREAD,
            _ => cannot_write(error),
        });
    }
}

/// Says so; the exit status.
fn cannot_write(error: io::Error) -> u8 {
    failure::print(&anyhow::Error::new(error).context("cannot write to standard output"), false)
}

/// The result of a command.
pub(crate) struct Report {
    text: String,
    json: String,
    ok: bool,
}

impl Report {
    /// `ok`: nothing is wrong; it decides the exit status.
    pub(crate) fn new(ok: bool, text: String, json: &impl Serialize) -> anyhow::Result<Self> {
        Ok(Self { text, json: serde_json::to_string_pretty(json)?, ok })
    }

    /// Another process reports; `ok` still decides this one's exit status.
    pub(crate) fn silent(ok: bool) -> Self {
        Self { text: String::new(), json: String::new(), ok }
    }

    /// The exit status.
    fn status(&self) -> u8 {
        if self.ok { failure::SUCCESS } else { failure::FAILURE }
    }

    /// The object for programs.
    pub(crate) fn into_json(self) -> String {
        self.json
    }

    /// Prints one of both on standard output, and returns the exit status. A reader that has gone away is no failure.
    pub(crate) fn print(&self, json: bool) -> u8 {
        let wrapped;
        let text = match json {
            true => &self.json,
            false => {
                wrapped = width::wrap_lines(self.text.trim_end(), width::width());
                &wrapped
            }
        };
        if text.is_empty() {
            return self.status();
        }
        let mut out = io::stdout().lock();
        match writeln!(out, "{text}").and_then(|()| out.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => cannot_write(error),
            _ => self.status(),
        }
    }
}
