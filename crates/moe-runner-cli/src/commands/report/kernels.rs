//! Which kernel runs, and why not the others; and what the doctor found.

use super::super::check::CheckJson;
use super::super::explain::ExplainJson;
use super::html::{escape, paragraph, table};
use crate::checkpoints::ranges;
use crate::report::findings::FindingJson;
use moe_runner::doctor::Severity;

/// The section of kernels.
pub(super) fn section(explain: &ExplainJson) -> String {
    let mut out = paragraph(&format!(
        "Chosen for {}. → runs, · could run, ✗ cannot run, and what would change that.",
        explain.chosen_for
    ));
    for (answer, layers) in explain.groups() {
        let noun = if layers.len() == 1 { "Layer" } else { "Layers" };
        let title = format!("{noun} {}, {} activations", ranges(&layers), answer.dtype);
        out += &format!("<h3>{}</h3>\n", escape(&title));
        let chosen = match answer.chosen {
            Some(kernel) => ["→".to_owned(), kernel.to_owned(), answer.why.clone()],
            None => ["✗".to_owned(), "none".to_owned(), answer.why.clone()],
        };
        let able = answer.able.iter();
        let able = able.map(|able| ["·".to_owned(), able.kernel.to_owned(), able.reason.clone()]);
        let rejected = answer.rejected.iter().map(|rejected| {
            ["✗".to_owned(), rejected.kernel.to_owned(), rejected.reasons.join("; ")]
        });
        out += &table(&["", "kernel", "why"], [chosen].into_iter().chain(able).chain(rejected));
    }
    out
}

/// The section of findings: of files, then of layers.
pub(super) fn findings(check: &CheckJson) -> String {
    let of_layers = check.layers.iter().flat_map(|layer| &layer.findings);
    let all: Vec<&FindingJson> = check.findings.iter().chain(of_layers).collect();
    if all.is_empty() {
        return paragraph(
            "Nothing: no experts of zeros or copies, no scales or rows far off their neighbours, no router \
             that does not route, no files that end in zeros.",
        );
    }
    let rows = all.into_iter().map(|finding| {
        [
            match finding.severity {
                Severity::Error => "✗ error",
                Severity::Warning => "! warning",
                Severity::Note => "· note",
            }
            .to_owned(),
            finding.layer.map_or("files".to_owned(), |layer| layer.to_string()),
            finding.message.clone(),
        ]
    });
    table(&["", ">layer", "finding"], rows)
}

/// What is wrong with layers, one line each.
pub(super) fn problems(check: &CheckJson) -> String {
    let all = check.layers.iter().flat_map(|layer| {
        layer.problems.iter().map(|problem| [layer.layer.to_string(), problem.clone()])
    });
    let all: Vec<[String; 2]> = all.collect();
    match all.is_empty() {
        true => String::new(),
        false => table(&[">layer", "problem"], all),
    }
}
