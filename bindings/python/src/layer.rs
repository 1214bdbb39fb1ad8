//! `Checkpoint` and `Layer`.

use std::path::PathBuf;
use std::sync::Mutex;

use moe_runner::checkpoint::architecture::{self, LayerEntry};
use moe_runner::oracle::Explanation;
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface};
use moe_runner::weights::LoadedLayer;
use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use crate::errors::{self, OrRaise};
use crate::settings::{Settings, auto, formats_and_bytes, loads};
use crate::tensors::{Tensor, empty_like};

/// A checkpoint that is open: a folder with config.json and *.safetensors, or a .gguf file.
///
/// Headers are read, the files are mapped. Layers and Experts take one in place of a path, so that
/// many of them open it once.
#[pyclass(frozen, module = "moe_runner")]
pub(crate) struct Checkpoint {
    path: PathBuf,
    checkpoint: moe_runner::checkpoint::Checkpoint,
    entries: Vec<LayerEntry>,
    architecture: String,
}

impl Checkpoint {
    fn open(path: PathBuf) -> moe_runner::Result<Self> {
        let checkpoint = moe_runner::checkpoint::Checkpoint::open(&path)?;
        let entries = architecture::layers(&checkpoint)?;
        let architecture = architecture::describe(&checkpoint)?.architecture;
        Ok(Self { path, checkpoint, entries, architecture })
    }

    /// The weights of a layer, by its number in the model.
    pub(crate) fn load(&self, py: Python<'_>, layer: i64) -> PyResult<LoadedLayer> {
        let index = usize::try_from(layer).ok();
        let entry = self.entries.iter().find(|entry| Some(entry.spec.index) == index);
        let Some(entry) = entry else {
            let known = format!("{layer} is no MoE layer; those are {:?}", self.layers());
            return Err(errors::input(py, "layer", known));
        };
        py.detach(|| LoadedLayer::load(&self.checkpoint, entry)).or_raise(py)
    }
}

#[pymethods]
impl Checkpoint {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        py.detach(|| Self::open(path)).or_raise(py)
    }

    /// Numbers of the MoE layers in the model, in order.
    #[getter]
    fn layers(&self) -> Vec<usize> {
        self.entries.iter().map(|entry| entry.spec.index).collect()
    }

    /// The model's type, such as "qwen3_moe".
    #[getter]
    fn architecture(&self) -> &str {
        &self.architecture
    }

    /// Where it is.
    #[getter]
    fn path(&self) -> PathBuf {
        self.path.clone()
    }

    fn __repr__(&self) -> String {
        let (path, layers) = (self.path.display(), self.entries.len());
        format!("Checkpoint({path}, {}, {layers} MoE layers)", self.architecture)
    }
}

/// A checkpoint that is open, or the path of one.
#[derive(FromPyObject)]
pub(crate) enum Source<'py> {
    Open(PyRef<'py, Checkpoint>),
    Path(PathBuf),
}

impl Source<'_> {
    /// The weights of a layer, by its number in the model.
    pub(crate) fn load(self, py: Python<'_>, layer: i64) -> PyResult<LoadedLayer> {
        match self {
            Self::Open(checkpoint) => checkpoint.load(py, layer),
            Self::Path(path) => Checkpoint::new(py, path)?.load(py, layer),
        }
    }
}

/// A layer of a checkpoint, ready to run: router, experts, shared experts, everything.
#[pyclass(frozen, module = "moe_runner")]
pub(crate) struct Layer {
    runner: Mutex<State>,
    facts: Facts,
}

struct State {
    runner: MoeRunner,
    ids: Vec<i32>,
    weights: Vec<f32>,
    logits: Vec<f32>,
}

/// What does not change.
struct Facts {
    name: String,
    index: usize,
    hidden: usize,
    experts: usize,
    top_k: usize,
    dtype: moe_runner::hidden::ActivationDtype,
    formats: Vec<String>,
    bytes: usize,
    explanation: Explanation,
}

#[pymethods]
impl Layer {
    #[new]
    #[pyo3(signature = (
        checkpoint, layer, *, dtype="auto", threads=None, kernel=None, non_finite="refuse",
        device="auto",
    ))]
    fn new(
        py: Python<'_>,
        checkpoint: Source<'_>,
        layer: i64,
        dtype: &str,
        threads: Option<i64>,
        kernel: Option<&str>,
        non_finite: &str,
        device: &str,
    ) -> PyResult<Self> {
        let loaded = checkpoint.load(py, layer)?;
        let stored = loaded.experts.first().map(|expert| expert.up.format());
        let settings = Settings { dtype, threads, kernel, non_finite, device };
        let options = settings.options(py, auto(stored))?;
        let (formats, bytes) = formats_and_bytes(&loaded.experts);
        let spec = loaded.spec.clone();
        let ready = py.detach(|| loaded.into_ready(&options, &mut |_| ()));
        let runner = MoeRunner::new(ready.or_raise(py)?);
        let facts = Facts {
            index: spec.index,
            hidden: spec.dims.hidden,
            experts: spec.router.experts,
            top_k: spec.router.top_k,
            dtype: options.dtype,
            formats,
            bytes,
            explanation: Explanation::of(runner.choice(), options.dtype),
            name: spec.name,
        };
        let (ids, weights, logits) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { runner: Mutex::new(State { runner, ids, weights, logits }), facts })
    }

    /// Runs the layer on `hidden` [..., H], and returns `out`, or a new tensor.
    #[pyo3(signature = (hidden, out=None, *, ids=None, weights=None, router_logits=None, input_ids=None))]
    fn forward<'py>(
        &self,
        hidden: &Bound<'py, PyAny>,
        out: Option<Bound<'py, PyAny>>,
        ids: Option<&Bound<'py, PyAny>>,
        weights: Option<&Bound<'py, PyAny>>,
        router_logits: Option<&Bound<'py, PyAny>>,
        input_ids: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = hidden.py();
        let x = Tensor::borrow("hidden", hidden)?;
        let out = match out {
            Some(out) => out,
            None => empty_like(hidden)?,
        };
        let mut y = Tensor::borrow("out", &out)?;
        let tokens = check_rows(&x, &y, self.facts.hidden)?;
        let borrow = |what, given: Option<&Bound<'py, PyAny>>| {
            given.map(|tensor| Tensor::borrow(what, tensor)).transpose()
        };
        let ids = borrow("ids", ids)?;
        let weights = borrow("weights", weights)?;
        let logits = borrow("router_logits", router_logits)?;
        let token_ids = borrow("input_ids", input_ids)?;
        let mut state = self.runner.lock_py_attached(py).map_err(|_| poisoned(py))?;
        let State { runner, ids: id_buffer, weights: weight_buffer, logits: logit_buffer } =
            &mut *state;
        let mut input = ForwardInput::new(x.rows(self.facts.dtype)?);
        match (&ids, &weights) {
            (None, None) => {}
            (Some(ids), Some(weights)) => {
                check_routing(ids, weights, tokens)?;
                let (hidden, ids) = (input.hidden, ids.ids(id_buffer)?);
                input = ForwardInput::routed(hidden, ids, weights.floats(weight_buffer)?);
            }
            _ => return Err(errors::input(py, "ids", "ids and weights belong together")),
        }
        if let Some(logits) = &logits {
            input.router_logits = Some(logits.floats(logit_buffer)?);
        }
        let token_ids = token_ids.map(|given| given.token_ids()).transpose()?;
        input.input_ids = token_ids.as_deref();
        let output = y.rows_mut(self.facts.dtype)?;
        py.detach(|| runner.forward(&input, output)).or_raise(py)?;
        drop(state);
        Ok(out)
    }

    /// Which kernel runs the layer, why, and why no other.
    fn explain<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        loads(py, &serde_json::json!(self.facts.explanation))
    }

    /// Bytes of working memory for `tokens` tokens; layers share it.
    fn workspace_bytes(&self, py: Python<'_>, tokens: usize) -> PyResult<usize> {
        let state = self.runner.lock_py_attached(py).map_err(|_| poisoned(py))?;
        Ok(state.runner.workspace_bytes(tokens))
    }

    /// The layer's name in the checkpoint.
    #[getter]
    fn name(&self) -> &str {
        &self.facts.name
    }

    /// Its number in the model.
    #[getter]
    fn layer(&self) -> usize {
        self.facts.index
    }

    /// H, width of the rows.
    #[getter]
    fn hidden_size(&self) -> usize {
        self.facts.hidden
    }

    /// E, how many experts there are to choose from.
    #[getter]
    fn num_experts(&self) -> usize {
        self.facts.experts
    }

    /// k, how many are chosen for a token.
    #[getter]
    fn top_k(&self) -> usize {
        self.facts.top_k
    }

    /// Dtype of the activations: "f32", "bf16" or "f16".
    #[getter]
    fn dtype(&self) -> &'static str {
        self.facts.dtype.name()
    }

    /// Number formats of the routed experts' weights, in words.
    #[getter]
    fn formats(&self) -> Vec<String> {
        self.facts.formats.clone()
    }

    /// Bytes of the routed experts' weights as they are stored.
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
        let Facts { name, hidden, experts, top_k, explanation, .. } = &self.facts;
        let kernel = explanation.chosen.unwrap_or_default();
        format!("Layer({name}, hidden {hidden}, {top_k} of {experts} experts, {kernel})")
    }
}

/// Checks that `hidden` and `out` are as many rows of `width` in memory apart; returns how many.
pub(crate) fn check_rows(hidden: &Tensor<'_>, out: &Tensor<'_>, width: usize) -> PyResult<usize> {
    let (tokens, given) = hidden.tokens_and_width()?;
    if given != width {
        return hidden.fail(format!("rows of {given}, the experts' have {width}"));
    }
    if out.shape() != hidden.shape() {
        return out.fail(format!("of shape {:?}, hidden has {:?}", out.shape(), hidden.shape()));
    }
    hidden.apart_from(out)?;
    Ok(tokens)
}

/// Checks that `ids` and `weights` are `[tokens, k]`.
pub(crate) fn check_routing(ids: &Tensor<'_>, weights: &Tensor<'_>, tokens: usize) -> PyResult<()> {
    let (rows, _) = ids.tokens_and_width()?;
    if rows != tokens {
        return ids.fail(format!("{rows} rows for {tokens} tokens"));
    }
    match ids.shape() == weights.shape() {
        true => Ok(()),
        false => {
            weights.fail(format!("of shape {:?}, ids have {:?}", weights.shape(), ids.shape()))
        }
    }
}

/// After a panic the state is not known.
pub(crate) fn poisoned(py: Python<'_>) -> PyErr {
    errors::input(py, "layer", "an earlier call on it ended in a bug; make it anew")
}
