//! A layer of a checkpoint: router, experts, shared experts.

use std::ffi::{CString, c_char, c_void};
use std::sync::Mutex;

use moe_runner::hidden::ActivationDtype;
use moe_runner::oracle::Explanation;
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface};

use crate::boundary::{Status, c_string, call, free, give, handle};
use crate::checkpoint::Checkpoint;
use crate::forward::{Call, Routing, poisoned};
use crate::options::{Options, resolve};

/// A layer of a checkpoint, ready to run.
pub struct Layer {
    runner: Mutex<MoeRunner>,
    dtype: ActivationDtype,
    hidden: usize,
    explanation: CString,
}

impl Layer {
    /// # Safety
    /// As the header says.
    unsafe fn forward(&self, rows: Call, routing: Option<Routing>) -> moe_runner::Result<()> {
        let mut runner = self.runner.lock().map_err(|_| poisoned())?;
        // SAFETY: the caller's promise
        let (hidden, output) = unsafe { rows.rows(self.dtype, self.hidden)? };
        let input = match routing {
            None => ForwardInput::new(hidden),
            Some(routing) => {
                // SAFETY: the caller's promise
                let (ids, weights) = unsafe { routing.slices(rows.tokens)? };
                ForwardInput::routed(hidden, ids, weights)
            }
        };
        runner.forward(&input, output).map(drop)
    }
}

/// Makes layer `layer` of a checkpoint, by its number in the model, ready to run: chooses a kernel, and
/// packs the weights for it. `options` may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_open(
    checkpoint: *const Checkpoint,
    layer: usize,
    options: *const Options,
    opened: *mut *mut Layer,
) -> Status {
    // SAFETY: the caller's promise
    unsafe {
        give(opened, || {
            let loaded = handle("checkpoint", checkpoint)?.load(layer)?;
            let options = resolve(options)?;
            let (dtype, hidden) = (options.dtype, loaded.spec.dims.hidden);
            let runner = MoeRunner::new(loaded.into_ready(&options, &mut |_| ())?);
            let explanation = Explanation::of(runner.choice(), dtype);
            let explanation = c_string(serde_json::json!(explanation).to_string());
            Ok(Layer { runner: Mutex::new(runner), dtype, hidden, explanation })
        })
    }
}

/// Width H of the layer's rows; 0 for null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_hidden_size(layer: *const Layer) -> usize {
    // SAFETY: the caller's promise
    unsafe { layer.as_ref() }.map_or(0, |layer| layer.hidden)
}

/// Runs the layer: routes `hidden` [tokens, H], and writes `output` [tokens, H], both of the dtype of
/// the options, which must not overlap. After a failure `output` is unspecified.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_forward(
    layer: *const Layer,
    hidden: *const c_void,
    tokens: usize,
    output: *mut c_void,
) -> Status {
    // SAFETY: the caller's promise
    call(|| unsafe { handle("layer", layer)?.forward(Call { hidden, output, tokens }, None) })
}

/// The same with routing that was finished elsewhere: neither gate nor router runs. `ids` [tokens,
/// top_k]: an id that is negative, or no expert's, adds nothing. `weights` [tokens, top_k]: what the
/// experts' rows are multiplied by, with any factor of the router in them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_forward_routed(
    layer: *const Layer,
    hidden: *const c_void,
    tokens: usize,
    ids: *const i32,
    weights: *const f32,
    top_k: usize,
    output: *mut c_void,
) -> Status {
    let routing = Routing { ids, weights, top_k };
    // SAFETY: the caller's promise
    call(|| unsafe {
        handle("layer", layer)?.forward(Call { hidden, output, tokens }, Some(routing))
    })
}

/// Which kernel runs the layer, and why no other: a JSON object with `dtype`, `chosen`, `why`, `able`
/// and `rejected`. Valid until the layer is freed; null for null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_explain(layer: *const Layer) -> *const c_char {
    // SAFETY: the caller's promise
    unsafe { layer.as_ref() }.map_or(std::ptr::null(), |layer| layer.explanation.as_ptr())
}

/// Frees a layer; null is ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_free(layer: *mut Layer) {
    // SAFETY: the caller's promise
    unsafe { free(layer) }
}
