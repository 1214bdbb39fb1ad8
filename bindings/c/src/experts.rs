//! Experts without a router: of a checkpoint, or in memory of the caller's.

use std::ffi::{CString, c_char, c_void};
use std::sync::{Arc, Mutex};

use moe_foreign::{Foreign, Function, activation, float_type, slice};
use moe_runner::hidden::ActivationDtype;
use moe_runner::oracle::Explanation;
use moe_runner::runner::RoutedExperts;
use moe_runner::spec::{ExpertSpec, WeightOn};
use moe_runner::weights::{self, Bytes, Expert, GateUp, Stack};
use moe_runner::{Error, Result, runner};

use crate::boundary::{Status, c_string, call, free, give, handle, sized, text};
use crate::checkpoint::Checkpoint;
use crate::forward::{Call, Routing, poisoned, product};
use crate::options::{Options, dtype, resolve};

/// The routed experts of a layer, ready to run on rows that the caller has routed.
pub struct Experts {
    experts: Mutex<RoutedExperts>,
    dtype: ActivationDtype,
    hidden: usize,
    explanation: CString,
}

impl Experts {
    fn new(
        spec: ExpertSpec,
        weight_on: WeightOn,
        experts: Vec<Expert>,
        options: &runner::Options,
    ) -> Result<Self> {
        let hidden = experts.first().map_or(0, |expert| expert.up.cols());
        let experts = RoutedExperts::new(spec, weight_on, experts, options)?;
        let explanation = Explanation::of(experts.choice(), options.dtype);
        let explanation = c_string(serde_json::json!(explanation).to_string());
        Ok(Self { experts: Mutex::new(experts), dtype: options.dtype, hidden, explanation })
    }
}

/// How the rows of gate and up projection stand in one stack.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The gate's I rows, then those of the up projection.
    Halves = 0,
    /// The up projection's I rows, then those of the gate.
    UpFirst = 1,
    /// By turns, the gate's first.
    Interleaved = 2,
    /// There is no gate projection: I rows.
    UpOnly = 3,
}

/// Experts as two stacks of floats in the caller's memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StackedExperts {
    /// sizeof(moe_stacked_experts).
    pub size: usize,
    /// E, how many experts.
    pub experts: usize,
    /// H, width of the rows.
    pub hidden: usize,
    /// I, width between the two products.
    pub intermediate: usize,
    /// The moe_dtype of both stacks.
    pub dtype: u32,
    /// The moe_layout of gate_up.
    pub layout: u32,
    /// Both stacks are stored [E, in, out] instead of [E, out, in].
    pub transposed: bool,
    /// Weights multiply the experts' input rows (Llama 4) instead of their output rows.
    pub weight_on_input: bool,
    /// [E, 2I, H]; [E, I, H] without a gate projection.
    pub gate_up: *const c_void,
    /// [E, H, I].
    pub down: *const c_void,
    /// [E, 2I] or [E, I], as the rows of gate_up; null: none. Copied.
    pub gate_up_bias: *const f32,
    /// [E, H]; null: none. Copied.
    pub down_bias: *const f32,
    /// The function between the products: "silu", "gelu", "gelu_tanh", "relu", "relu2",
    /// "clamped_swiglu", "swiglu_step" or "situ".
    pub activation: *const c_char,
    /// Steepness of clamped_swiglu's sigmoid (gpt-oss: 1.702).
    pub alpha: f32,
    /// Added to clamped_swiglu's up projection (gpt-oss: 1); situ's beta.
    pub beta: f32,
    /// What clamped_swiglu and swiglu_step clamp to (gpt-oss: 7).
    pub limit: f32,
    /// situ's lambda; 0: it has none.
    pub lambda: f32,
    /// Handed to `release`.
    pub owner: *mut c_void,
    /// Called once, on any thread, when the stacks are needed no longer: as soon as they are packed,
    /// unless the kernel reads them in place; at once where the call fails, but for a wrong size. Null:
    /// they stay until the handle is freed.
    pub release: Option<unsafe extern "C" fn(owner: *mut c_void)>,
}

/// Calls `release` when the last view of the stacks is gone.
struct Owner {
    owner: *mut c_void,
    release: Option<unsafe extern "C" fn(*mut c_void)>,
}

// SAFETY: the header says that `release` may be called on any thread
unsafe impl Send for Owner {}
// SAFETY: nothing but dropping it uses what is in it
unsafe impl Sync for Owner {}

impl Drop for Owner {
    fn drop(&mut self) {
        if let Some(release) = self.release {
            // SAFETY: the caller's function with the caller's argument, once
            unsafe { release(self.owner) }
        }
    }
}

/// # Safety
/// As the header says.
unsafe fn from_memory(stacks: StackedExperts, options: *const Options) -> Result<Experts> {
    // before anything can fail: it is released then, too
    let owner = Arc::new(Owner { owner: stacks.owner, release: stacks.release });
    // SAFETY: the caller's promise
    let options = unsafe { resolve(options)? };
    let layout = match stacks.layout {
        n if n == Layout::Halves as u32 => GateUp::Halves,
        n if n == Layout::UpFirst as u32 => GateUp::HalvesUpFirst,
        n if n == Layout::Interleaved as u32 => GateUp::Interleaved,
        n if n == Layout::UpOnly as u32 => GateUp::UpOnly,
        n => return Err(Error::input("layout", format!("{n} is no moe_layout"))),
    };
    let StackedExperts { experts, hidden, intermediate, alpha, beta, limit, lambda, .. } = stacks;
    let gated = layout != GateUp::UpOnly;
    let rows = if gated { product("gate_up", 2, intermediate)? } else { intermediate };
    // SAFETY: the caller's promise
    let name = unsafe { text("activation", stacks.activation)? };
    let name = name.ok_or_else(|| Error::input("activation", "is null"))?;
    let function = activation(Function { name, alpha, beta, limit, lambda })?;
    let float = float_type(dtype("dtype", stacks.dtype)?);
    let stack = |what, data, shape: [usize; 3]| {
        let len = product(what, product(what, shape[0], shape[1])?, shape[2])?;
        let len = product(what, len, float.size())?;
        // SAFETY: the caller's promise: they stay until `owner` is released
        let bytes = unsafe { Foreign::new(what, data, len, owner.clone())? };
        let bytes = Bytes::new(Arc::new(bytes));
        Ok(Stack { bytes, float, shape, transposed: stacks.transposed })
    };
    let bias = |what, data: *const f32, rows: usize| match data.is_null() {
        true => Ok(None),
        // SAFETY: the caller's promise
        false => unsafe { slice(what, data.cast(), product(what, experts, rows)?).map(Some) },
    };
    let stacked = weights::StackedExperts {
        gate_up: stack("gate_up", stacks.gate_up, [experts, rows, hidden])?,
        layout,
        down: stack("down", stacks.down, [experts, hidden, intermediate])?,
        gate_up_bias: bias("gate_up_bias", stacks.gate_up_bias, rows)?,
        down_bias: bias("down_bias", stacks.down_bias, hidden)?,
    };
    let bias = stacked.gate_up_bias.is_some() || stacked.down_bias.is_some();
    let spec = ExpertSpec { gated, activation: function, bias, norm: None };
    let weight_on = if stacks.weight_on_input { WeightOn::Input } else { WeightOn::Output };
    let experts = stacked.experts()?;
    drop(stacked);
    drop(owner);
    Experts::new(spec, weight_on, experts, &options)
}

/// Makes experts in the caller's memory ready to run. No stack is copied but into the order that the
/// kernel reads. `options` may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_experts_from_memory(
    stacks: *const StackedExperts,
    options: *const Options,
    experts: *mut *mut Experts,
) -> Status {
    // SAFETY: the caller's promise; zeros are null pointers and numbers
    unsafe {
        give(experts, || {
            let stacks = sized("stacks", stacks, size_of::<StackedExperts>())?;
            from_memory(stacks, options)
        })
    }
}

/// Makes the routed experts of layer `layer` of a checkpoint ready to run, in the number format that
/// they are stored in. `options` may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_experts_open(
    checkpoint: *const Checkpoint,
    layer: usize,
    options: *const Options,
    experts: *mut *mut Experts,
) -> Status {
    // SAFETY: the caller's promise
    unsafe {
        give(experts, || {
            let loaded = handle("checkpoint", checkpoint)?.load(layer)?;
            let (spec, weight_on) = (loaded.spec.expert, loaded.spec.router.weight_on);
            Experts::new(spec, weight_on, loaded.experts, &resolve(options)?)
        })
    }
}

/// Writes the sum over j of weights[t, j] * expert(ids[t, j])(hidden[t]) for every row t of `output`
/// [tokens, H]. `hidden` [tokens, H] and `output` have the dtype of the options, and must not overlap;
/// `ids` and `weights` are [tokens, top_k] for any top_k; an id that is negative, or no expert's, adds
/// nothing. After a failure `output` is unspecified.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_experts_forward(
    experts: *const Experts,
    hidden: *const c_void,
    tokens: usize,
    ids: *const i32,
    weights: *const f32,
    top_k: usize,
    output: *mut c_void,
) -> Status {
    call(|| {
        // SAFETY: the caller's promise
        let experts = unsafe { handle("experts", experts)? };
        let call = Call { hidden, output, tokens };
        // SAFETY: the caller's promise
        let (hidden, output) = unsafe { call.rows(experts.dtype, experts.hidden)? };
        // SAFETY: the caller's promise
        let (ids, weights) = unsafe { Routing { ids, weights, top_k }.slices(tokens)? };
        let mut experts = experts.experts.lock().map_err(|_| poisoned())?;
        experts.forward(hidden, ids, weights, output)
    })
}

/// Which kernel runs the experts, and why no other: as moe_layer_explain.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_experts_explain(experts: *const Experts) -> *const c_char {
    // SAFETY: the caller's promise
    unsafe { experts.as_ref() }.map_or(std::ptr::null(), |experts| experts.explanation.as_ptr())
}

/// Frees experts; null is ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_experts_free(experts: *mut Experts) {
    // SAFETY: the caller's promise
    unsafe { free(experts) }
}
