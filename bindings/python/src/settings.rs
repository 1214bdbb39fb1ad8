//! Keyword arguments that layers and experts have in common.

use moe_runner::hidden::ActivationDtype;
use moe_runner::runner::{NonFinite, Options};
use moe_runner::weights::{Expert, Matrix};
use pyo3::prelude::*;

use crate::errors::{self, OrRaise};

/// How a layer is to run, as Python says it.
pub(crate) struct Settings<'a> {
    /// A name, or "auto".
    pub(crate) dtype: &'a str,
    pub(crate) threads: Option<i64>,
    pub(crate) kernel: Option<&'a str>,
    /// "refuse" or "pass".
    pub(crate) non_finite: &'a str,
    /// "auto", "cpu", "cuda" or "cuda:N".
    pub(crate) device: &'a str,
}

impl Settings<'_> {
    /// The library's options; `auto` is the dtype where none is named.
    pub(crate) fn options(&self, py: Python<'_>, auto: ActivationDtype) -> PyResult<Options> {
        let dtype = match self.dtype {
            "auto" => auto,
            name => moe_foreign::activation_dtype(name).or_raise(py)?,
        };
        let threads = match self.threads.map(usize::try_from) {
            None => 0,
            Some(Ok(threads @ 1..)) => threads,
            Some(_) => {
                let given = self.threads.unwrap_or_default();
                return Err(errors::input(py, "threads", format!("{given}; at least 1 is needed")));
            }
        };
        let mut options = moe_foreign::options(dtype, threads, self.kernel).or_raise(py)?;
        options = moe_foreign::on_device(options, self.device).or_raise(py)?;
        options.non_finite = match self.non_finite {
            "refuse" => NonFinite::Refuse,
            "pass" => NonFinite::LetThrough,
            other => {
                let reason = format!("'{other}'; there are refuse and pass");
                return Err(errors::input(py, "non_finite", reason));
            }
        };
        Ok(options)
    }
}

/// The dtype of activations that a layer's own weights suggest: theirs, or bf16 where that is none.
pub(crate) fn auto(format: Option<moe_runner::spec::WeightFormat>) -> ActivationDtype {
    match format {
        Some(moe_runner::spec::WeightFormat::F32) => ActivationDtype::F32,
        Some(moe_runner::spec::WeightFormat::F16) => ActivationDtype::F16,
        _ => ActivationDtype::Bf16,
    }
}

/// Number formats of experts' weights, each once, and bytes as they are stored.
pub(crate) fn formats_and_bytes(experts: &[Expert]) -> (Vec<String>, usize) {
    let matrices =
        || experts.iter().flat_map(|expert| expert.gate.iter().chain([&expert.up, &expert.down]));
    let mut formats: Vec<String> = matrices().map(Matrix::describe).collect();
    formats.sort();
    formats.dedup();
    (formats, matrices().map(Matrix::stored_bytes).sum())
}

/// JSON as Python's own objects.
pub(crate) fn loads<'py>(py: Python<'py>, json: &serde_json::Value) -> PyResult<Bound<'py, PyAny>> {
    py.import("json")?.call_method1("loads", (json.to_string(),))
}
