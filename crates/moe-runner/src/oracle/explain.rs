//! A choice in words, as plain data: for reports, and for other languages.

use serde::Serialize;

use super::{Choice, Rejection};
use crate::hidden::ActivationDtype;

/// Which kernel runs a layer, why, and why no other.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    /// Dtype of the activations that it was chosen for.
    pub dtype: &'static str,
    /// The kernel; `None`: none can run the layer, or the named one cannot.
    pub chosen: Option<&'static str>,
    /// Why this one, or why none.
    pub why: String,
    /// Kernels that could run too.
    pub able: Vec<Able>,
    /// Kernels that cannot.
    pub rejected: Vec<Rejected>,
}

/// A kernel that could run too.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Able {
    /// Its name.
    pub kernel: &'static str,
    /// Why it does not.
    pub reason: String,
}

/// A kernel that cannot run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rejected {
    /// Its name.
    pub kernel: &'static str,
    /// Every condition that it fails, and what would change that.
    pub reasons: Vec<String>,
}

impl Explanation {
    /// Of a choice for activations in `dtype`.
    pub fn of(choice: &Choice, dtype: ActivationDtype) -> Self {
        let able = choice.able.iter();
        Self {
            dtype: dtype.name(),
            chosen: Some(choice.kernel.name),
            why: format!("{}: {}", choice.why, choice.kernel.summary),
            able: able
                .map(|(kernel, reason)| Able { kernel: kernel.name, reason: reason.clone() })
                .collect(),
            rejected: choice.rejected.iter().map(Rejected::of).collect(),
        }
    }
}

impl Rejected {
    /// In words.
    pub fn of(rejection: &Rejection) -> Self {
        let reasons = rejection.reasons.iter().map(ToString::to_string).collect();
        Self { kernel: rejection.kernel.name, reasons }
    }
}
