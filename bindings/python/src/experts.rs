//! `Experts`: routed experts without a router.

use std::sync::Mutex;
use std::time::Instant;

use moe_foreign::{Function, activation, gate_up};
use moe_runner::hidden::ActivationDtype;
use moe_runner::oracle::Explanation;
use moe_runner::runner::RoutedExperts;
use moe_runner::spec::{ExpertSpec, WeightOn};
use moe_runner::weights::{Expert, FloatType, GateUp, Stack, StackedExperts};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::PyType;

use crate::errors::{self, OrRaise};
use crate::layer::{Source, check_routing, check_rows, poisoned};
use crate::settings::{Settings, auto, formats_and_bytes, loads};
use crate::tensors::{Tensor, empty_like};

/// The routed experts of a layer, ready to run on rows that somebody else has routed.
#[pyclass(frozen, module = "moe_runner")]
pub(crate) struct Experts {
    state: Mutex<State>,
    facts: Facts,
}

struct State {
    experts: RoutedExperts,
    ids: Vec<i32>,
    weights: Vec<f32>,
}

/// What does not change.
struct Facts {
    hidden: usize,
    intermediate: usize,
    experts: usize,
    dtype: ActivationDtype,
    formats: Vec<String>,
    bytes: usize,
    explanation: Explanation,
}

impl Experts {
    fn make(
        py: Python<'_>,
        (spec, weight_on): (ExpertSpec, WeightOn),
        experts: Vec<Expert>,
        settings: &Settings<'_>,
    ) -> PyResult<Self> {
        let stored = experts.first().map(|expert| expert.up.format());
        let options = settings.options(py, auto(stored))?;
        let (formats, bytes) = formats_and_bytes(&experts);
        let (hidden, intermediate) =
            experts.first().map_or((0, 0), |expert| (expert.up.cols(), expert.up.rows()));
        let count = experts.len();
        let experts = py.detach(|| RoutedExperts::new(spec, weight_on, experts, &options));
        let experts = experts.or_raise(py)?;
        let explanation = Explanation::of(experts.choice(), options.dtype);
        let facts = Facts {
            hidden,
            intermediate,
            experts: count,
            dtype: options.dtype,
            formats,
            bytes,
            explanation,
        };
        let state = State { experts, ids: Vec::new(), weights: Vec::new() };
        Ok(Self { state: Mutex::new(state), facts })
    }
}

/// A stack `[E, out, in]` of all experts' weights, or `[E, in, out]`.
fn stack(
    what: &'static str,
    tensor: &Bound<'_, PyAny>,
    transposed: bool,
) -> PyResult<(Stack, FloatType)> {
    let tensor = Tensor::borrow(what, tensor)?;
    let &[experts, a, b] = tensor.shape() else {
        let shape = format!("of shape {:?}; all experts in one, [E, out, in]", tensor.shape());
        return tensor.fail(shape);
    };
    let (rows, cols) = if transposed { (b, a) } else { (a, b) };
    let (bytes, float) = tensor.stored()?;
    let shape = [experts, rows, cols].map(|size| size as usize);
    Ok((Stack { bytes, float, shape, transposed }, float))
}

#[pymethods]
impl Experts {
    #[new]
    #[pyo3(signature = (
        gate_up, down, *, activation="silu", layout="halves", transposed=false, gate_up_bias=None,
        down_bias=None, weight_on="output", alpha=1.0, beta=0.0, limit=0.0, lam=0.0, dtype="auto",
        threads=None, kernel=None, non_finite="refuse",
    ))]
    fn new(
        py: Python<'_>,
        gate_up: &Bound<'_, PyAny>,
        down: &Bound<'_, PyAny>,
        activation: &str,
        layout: &str,
        transposed: bool,
        gate_up_bias: Option<&Bound<'_, PyAny>>,
        down_bias: Option<&Bound<'_, PyAny>>,
        weight_on: &str,
        alpha: f32,
        beta: f32,
        limit: f32,
        lam: f32,
        dtype: &str,
        threads: Option<i64>,
        kernel: Option<&str>,
        non_finite: &str,
    ) -> PyResult<Self> {
        let layout = self::gate_up(layout).or_raise(py)?;
        let function = Function { name: activation, alpha, beta, limit, lambda: lam };
        let function = self::activation(function).or_raise(py)?;
        let weight_on = match weight_on {
            "output" => WeightOn::Output,
            "input" => WeightOn::Input,
            other => {
                let reason = format!("'{other}'; there are output and input");
                return Err(errors::input(py, "weight_on", reason));
            }
        };
        let (gate_up, _) = stack("gate_up", gate_up, transposed)?;
        let (down, _) = stack("down", down, transposed)?;
        let floats = |what, bias: Option<&Bound<'_, PyAny>>| -> PyResult<Option<Vec<f32>>> {
            let Some(bias) = bias else { return Ok(None) };
            let tensor = Tensor::borrow(what, bias)?;
            let mut buffer = Vec::new();
            let values = tensor.floats(&mut buffer)?.to_vec();
            Ok(Some(values))
        };
        let gate_up_bias = floats("gate_up_bias", gate_up_bias)?;
        let down_bias = floats("down_bias", down_bias)?;
        let stacked = StackedExperts {
            gate_up,
            layout,
            down,
            gate_up_bias: gate_up_bias.as_deref(),
            down_bias: down_bias.as_deref(),
        };
        let bias = gate_up_bias.is_some() || down_bias.is_some();
        let gated = layout != GateUp::UpOnly;
        let spec = ExpertSpec { gated, activation: function, bias, norm: None };
        let experts = stacked.experts().or_raise(py)?;
        drop(stacked);
        let settings = Settings { dtype, threads, kernel, non_finite, device: "auto" };
        Self::make(py, (spec, weight_on), experts, &settings)
    }

    /// The routed experts of a checkpoint's layer, in the number format that they are stored in.
    #[classmethod]
    #[pyo3(signature = (checkpoint, layer, *, dtype="auto", threads=None, kernel=None, non_finite="refuse"))]
    fn open(
        _class: &Bound<'_, PyType>,
        py: Python<'_>,
        checkpoint: Source<'_>,
        layer: i64,
        dtype: &str,
        threads: Option<i64>,
        kernel: Option<&str>,
        non_finite: &str,
    ) -> PyResult<Self> {
        let loaded = checkpoint.load(py, layer)?;
        let what = (loaded.spec.expert, loaded.spec.router.weight_on);
        let settings = Settings { dtype, threads, kernel, non_finite, device: "auto" };
        Self::make(py, what, loaded.experts, &settings)
    }

    /// The sum of the experts' outputs, weighted, for every row of `hidden` [..., H].
    #[pyo3(signature = (hidden, ids, weights, out=None))]
    fn forward<'py>(
        &self,
        hidden: &Bound<'py, PyAny>,
        ids: &Bound<'py, PyAny>,
        weights: &Bound<'py, PyAny>,
        out: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = hidden.py();
        let x = Tensor::borrow("hidden", hidden)?;
        let ids = Tensor::borrow("ids", ids)?;
        let weights = Tensor::borrow("weights", weights)?;
        let out = match out {
            Some(out) => out,
            None => empty_like(hidden)?,
        };
        let mut y = Tensor::borrow("out", &out)?;
        let tokens = check_rows(&x, &y, self.facts.hidden)?;
        check_routing(&ids, &weights, tokens)?;
        let rows = x.rows(self.facts.dtype)?;
        let output = y.rows_mut(self.facts.dtype)?;
        let mut state = self.state.lock_py_attached(py).map_err(|_| poisoned(py))?;
        let State { experts, ids: id_buffer, weights: weight_buffer } = &mut *state;
        let (ids, weights) = (ids.ids(id_buffer)?, weights.floats(weight_buffer)?);
        py.detach(|| experts.forward(rows, ids, weights, output)).or_raise(py)?;
        drop(state);
        Ok(out)
    }

    /// Seconds that `calls` passes take where Rust makes them: what else a call of `forward` takes is
    /// Python's part. For measuring.
    fn _seconds(
        &self,
        hidden: &Bound<'_, PyAny>,
        ids: &Bound<'_, PyAny>,
        weights: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        calls: usize,
    ) -> PyResult<f64> {
        let py = hidden.py();
        let x = Tensor::borrow("hidden", hidden)?;
        let ids = Tensor::borrow("ids", ids)?;
        let weights = Tensor::borrow("weights", weights)?;
        let mut y = Tensor::borrow("out", out)?;
        check_routing(&ids, &weights, check_rows(&x, &y, self.facts.hidden)?)?;
        let rows = x.rows(self.facts.dtype)?;
        let mut state = self.state.lock_py_attached(py).map_err(|_| poisoned(py))?;
        let State { experts, ids: id_buffer, weights: weight_buffer } = &mut *state;
        let (ids, weights) = (ids.ids(id_buffer)?, weights.floats(weight_buffer)?);
        let begun = Instant::now();
        for _ in 0..calls {
            let output = y.rows_mut(self.facts.dtype)?;
            experts.forward(rows, ids, weights, output).or_raise(py)?;
        }
        Ok(begun.elapsed().as_secs_f64())
    }

    /// Which kernel runs the experts, why, and why no other.
    fn explain<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        loads(py, &serde_json::json!(self.facts.explanation))
    }

    /// Bytes of working memory for `tokens` tokens of `top_k` experts; layers share it.
    fn workspace_bytes(&self, py: Python<'_>, tokens: usize, top_k: usize) -> PyResult<usize> {
        let state = self.state.lock_py_attached(py).map_err(|_| poisoned(py))?;
        Ok(state.experts.workspace_bytes(tokens, top_k))
    }

    /// H, width of the rows.
    #[getter]
    fn hidden_size(&self) -> usize {
        self.facts.hidden
    }

    /// I, width between the two products.
    #[getter]
    fn intermediate_size(&self) -> usize {
        self.facts.intermediate
    }

    /// E, how many there are.
    #[getter]
    fn num_experts(&self) -> usize {
        self.facts.experts
    }

    /// Dtype of the activations: "f32", "bf16" or "f16".
    #[getter]
    fn dtype(&self) -> &'static str {
        self.facts.dtype.name()
    }

    /// Number formats of the weights, in words.
    #[getter]
    fn formats(&self) -> Vec<String> {
        self.facts.formats.clone()
    }

    /// Bytes of the weights as they are stored.
    #[getter]
    fn nbytes(&self) -> usize {
        self.facts.bytes
    }

    /// Name of the kernel that runs.
    #[getter]
    fn kernel(&self) -> Option<&'static str> {
        self.facts.explanation.chosen
    }

    /// Why this one.
    #[getter]
    fn why(&self) -> &str {
        &self.facts.explanation.why
    }

    fn __repr__(&self) -> String {
        let Facts { hidden, intermediate, experts, formats, explanation, .. } = &self.facts;
        let (formats, kernel) = (formats.join(", "), explanation.chosen.unwrap_or_default());
        format!("Experts({experts} of [{intermediate}, {hidden}], {formats}, {kernel})")
    }
}
