//! What the doctor found, as programs and people read it.

use std::path::PathBuf;

use moe_runner::doctor::{Finding, FindingKind, Severity};
use serde::Serialize;

use super::table::{Tone, toned};
use crate::failure::one_line;

/// A finding as programs read it.
#[derive(Serialize)]
pub(crate) struct FindingJson {
    pub(crate) severity: Severity,
    pub(crate) kind: FindingKind,
    /// `None` for what concerns a file.
    pub(crate) layer: Option<usize>,
    /// Routed experts.
    pub(crate) experts: Vec<usize>,
    /// Of the first tensor.
    pub(crate) file: PathBuf,
    pub(crate) tensors: Vec<String>,
    /// All of it in a sentence, without the severity.
    pub(crate) message: String,
}

impl From<Finding> for FindingJson {
    fn from(finding: Finding) -> Self {
        let message = one_line(&finding.to_string());
        let Finding { kind, severity, layer, experts, file, names, .. } = finding;
        Self { severity, kind, layer, experts, file, tensors: names, message }
    }
}

impl FindingJson {
    /// "warning: experts 5, 7: …".
    pub(crate) fn line(&self) -> String {
        let word = match self.severity {
            Severity::Error => toned(Tone::Bad, "error"),
            Severity::Warning => "warning".into(),
            Severity::Note => "note".into(),
        };
        format!("{word}: {}", self.message)
    }

    /// Whether it makes the exit status 1.
    pub(crate) fn counts(&self, strict: bool) -> bool {
        self.severity >= if strict { Severity::Warning } else { Severity::Error }
    }
}

/// As programs read them.
pub(crate) fn all(findings: Vec<Finding>) -> Vec<FindingJson> {
    findings.into_iter().map(FindingJson::from).collect()
}
