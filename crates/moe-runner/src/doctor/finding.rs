//! What the doctor finds: data, and its one sentence.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Something that a user of the checkpoint should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is.
    pub kind: FindingKind,
    /// How bad it is.
    pub severity: Severity,
    /// The decoder layer; `None` for what concerns a file.
    pub layer: Option<usize>,
    /// The routed experts that it concerns, in order; none where it is not about routed experts.
    pub experts: Vec<usize>,
    /// The file that holds the first of `names`.
    pub file: PathBuf,
    /// The tensors or modules that it concerns, in order; several experts may share one.
    pub names: Vec<String>,
    /// What is the matter with the first of them: the end of a sentence that its name begins.
    pub detail: String,
}

/// How bad a [`Finding`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Worth knowing; nothing is wrong.
    Note,
    /// Hardly meant.
    Warning,
    /// No model that anybody trained or converted on purpose.
    Error,
}

/// Kinds of [`Finding`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FindingKind {
    /// A file ends in zeros where weights should be.
    ZeroTail,
    /// A weight is NaN or infinite.
    NonFinite,
    /// A projection holds nothing but zeros.
    ZeroWeights,
    /// The router's gate, or an expert's row of it, holds nothing but zeros.
    ZeroGate,
    /// Many rows of a projection are zeros.
    ZeroRows,
    /// Weights of several experts, or gate and up projection of one, are the same.
    Copies,
    /// Weights of one expert, or of one row, are far larger or smaller than those beside it.
    OffScale,
    /// All tokens go to the same experts.
    CollapsedRouting,
    /// The configuration says quantised, the weights are floats.
    Skipped,
    /// A stored scale of activations is absent, not positive, not finite, a placeholder, or of a
    /// range that no data had.
    Uncalibrated,
    /// A scale of weights is NaN or infinite.
    BadScale,
    /// A scale of weights is so large or small that it can hardly be meant.
    AbsurdScale,
    /// Experts of the layer are stored in different formats.
    Inconsistent,
    /// Gate and up projection of an expert have different scales for their tensors. Nothing is
    /// lost here, each keeps its own; engines that merge the two use one of them.
    GateUpScales,
    /// Gate and up projections have different stored scales of activations. The one with the
    /// largest range counts for all.
    InputScales,
}

impl FindingKind {
    /// How bad it is, where nothing else is known of it.
    pub(super) fn severity(self) -> Severity {
        match self {
            Self::ZeroTail | Self::NonFinite | Self::ZeroWeights | Self::ZeroGate => {
                Severity::Error
            }
            Self::CollapsedRouting | Self::BadScale => Severity::Error,
            Self::ZeroRows | Self::Copies | Self::OffScale | Self::Skipped => Severity::Warning,
            Self::Uncalibrated | Self::AbsurdScale | Self::Inconsistent => Severity::Warning,
            Self::GateUpScales | Self::InputScales => Severity::Note,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::ZeroTail => "a file that ends in zeros",
            Self::NonFinite => "no finite weights",
            Self::ZeroWeights => "weights of zeros",
            Self::ZeroGate => "a gate of zeros",
            Self::ZeroRows => "rows of zeros",
            Self::Copies => "copies",
            Self::OffScale => "far off their neighbours",
            Self::CollapsedRouting => "collapsed routing",
            Self::Skipped => "left as floats, although the configuration says quantised",
            Self::Uncalibrated => "not calibrated",
            Self::BadScale => "scales that are no numbers",
            Self::AbsurdScale => "scales that cannot be meant",
            Self::Inconsistent => "in another format than the other experts",
            Self::GateUpScales => "gate and up with different tensor scales",
            Self::InputScales => "different scales of the same activations",
        }
    }
}

impl fmt::Display for Finding {
    /// "experts 5, 7-9: weights of zeros: 'NAME' in FILE is …; and 3 more".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.experts.as_slice() {
            [] => {}
            [one] => write!(f, "expert {one}: ")?,
            many => write!(f, "experts {}: ", Ranges(many))?,
        }
        let file = self.file.file_name().unwrap_or(self.file.as_os_str()).to_string_lossy();
        write!(f, "{}: ", self.kind.words())?;
        match self.names.first() {
            Some(name) => write!(f, "'{name}' in {file} {}", self.detail)?,
            None => write!(f, "{file} {}", self.detail)?,
        }
        match self.names.len().saturating_sub(1) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

/// Numbers in order, runs of them as `first-last`; at most eight runs.
struct Ranges<'a>(&'a [usize]);

impl fmt::Display for Ranges<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        let runs = self.0.chunk_by(|a, b| a + 1 == *b);
        for (count, run) in runs.enumerate() {
            if count == SHOWN {
                return f.write_str(", …");
            }
            f.write_str(if count == 0 { "" } else { ", " })?;
            match run {
                [one] => write!(f, "{one}")?,
                run => write!(f, "{}-{}", run[0], run[run.len() - 1])?,
            }
        }
        Ok(())
    }
}

/// Findings of one layer as they are made: one for each kind and severity.
pub(super) struct Findings {
    layer: usize,
    found: Vec<Finding>,
}

/// What a finding is about.
pub(super) struct About<'a> {
    /// The routed expert.
    pub(super) expert: Option<usize>,
    pub(super) file: &'a Path,
    pub(super) name: &'a str,
}

impl Findings {
    pub(super) fn new(layer: usize) -> Self {
        Self { layer, found: Vec::new() }
    }

    /// Adds to the finding of this kind, or begins one.
    pub(super) fn add(&mut self, kind: FindingKind, about: About, detail: impl FnOnce() -> String) {
        self.add_as(kind, kind.severity(), about, detail);
    }

    /// The same, of another severity than usual.
    pub(super) fn add_as(
        &mut self,
        kind: FindingKind,
        severity: Severity,
        about: About,
        detail: impl FnOnce() -> String,
    ) {
        let same = |finding: &Finding| finding.kind == kind && finding.severity == severity;
        let place = self.found.iter().position(same).unwrap_or_else(|| {
            self.found.push(Finding {
                kind,
                severity,
                layer: Some(self.layer),
                experts: Vec::new(),
                file: about.file.to_owned(),
                names: Vec::new(),
                detail: detail(),
            });
            self.found.len() - 1
        });
        let finding = &mut self.found[place];
        if let Some(expert) = about.expert
            && !finding.experts.contains(&expert)
        {
            finding.experts.push(expert);
        }
        if finding.names.last().is_none_or(|last| last != about.name) {
            finding.names.push(about.name.to_owned());
        }
    }

    /// The worst first.
    pub(super) fn finish(mut self) -> Vec<Finding> {
        self.found.iter_mut().for_each(|finding| finding.experts.sort_unstable());
        self.found.sort_by_key(|finding| (std::cmp::Reverse(finding.severity), finding.kind));
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_experts_are_short() {
        assert_eq!(Ranges(&[5, 7, 8, 9, 20]).to_string(), "5, 7-9, 20");
        let odd: Vec<usize> = (0..40).map(|n| 2 * n).collect();
        assert!(Ranges(&odd).to_string().ends_with("14, …"));
    }
}
