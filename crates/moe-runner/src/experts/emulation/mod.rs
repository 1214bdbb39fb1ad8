//! What hardware with native small floats computes, on any processor: emulation to the bit.
//!
//! Native units multiply quantised weights by quantised activations, add up in f32, and store every
//! intermediate result in the activations' dtype T. These kernels round at the same points and
//! nowhere else; `rnd` is to T, nearest, ties to even:
//!
//! ```text
//! x  = rnd(row)                    weight on the input: rnd(x · rnd(weight))
//! A1   x  = rnd(qdq(x))            quantised and dequantised in f32, as the matrix says
//! W1   w  = rnd(decode(codes))     NVFP4: rnd(e2m1 · (e4m3 · alpha)), both products in f32
//! G1   h  = rnd(Σ_k x·w + bias)    f32, k ascending, products rounded before they are added
//! act  a  = rnd(act(g)), rnd(a·u)  clamped functions: rnd(act(g, u))
//! A2, W2   as A1, W1
//! G2   y  = rnd((Σ_k a·w + bias) · weight)       weight on the input: without it
//! sum  Σ_j y_j in f32, by the exchange, in slot order; rnd when the layer's output is written
//! ```
//!
//! The order of every sum is fixed, element by element: results do not depend on threads, on other
//! rows, or on where whole experts are. Weights of any other format that a layer has beside the
//! emulated ones (its shared experts) are decoded and rounded alike. Speed is not the aim: each
//! weight is decoded once for all rows of a batch, and the work is spread over all threads.

mod operand;
mod product;

use moe_kernels::isa::Features;
use moe_kernels::rows::Tile;

use crate::experts::grouped::{self, Block, Product, Products};
use crate::experts::reference::stored_bytes;
use crate::experts::{
    Arithmetic, BuildCall, BuiltKernel, Caps, Determinism, ExpertCall, ExpertShape, Experts,
    Formats, Functions, KernelDesc, RowFormat, Scheme, Target,
};
use crate::hidden::ActivationDtype;
use crate::plan::Plan;
use crate::spec::{Activation, ActivationFormat, ExpertSpec, WeightFormat, WeightOn};
use crate::weights::Expert;
use crate::{Error, Result};
use operand::Operand;

/// NVFP4 weights and activations: four-bit tensor cores with scales of 16.
pub const EMULATION_NVFP4: KernelDesc = KernelDesc {
    name: "emulation_nvfp4",
    summary: "what native NVFP4 arithmetic gives: W4A4, intermediate results in the activations' dtype",
    target: Target::Cpu(Features::NONE),
    schemes: &[scheme(
        &[WeightFormat::Nvfp4],
        &[ActivationFormat::Nvfp4, ActivationFormat::Nvfp4Token],
    )],
    dtypes: &[ActivationDtype::F32, ActivationDtype::Bf16, ActivationDtype::F16],
    functions: Functions::All,
    multiples: (16, 16),
    arithmetic: Arithmetic::Rounded,
    caps: Caps::WEIGHS.with(Caps::UNGATED).with(Caps::INPUT_WEIGHTS).with(Caps::BY_NAME_ONLY),
    row_formats: RowFormat::ALL,
    determinism: Determinism::AnyBatch,
    build: |desc, call| Ok(BuiltKernel::Modular(Box::new(Emulation::new(desc, call)?))),
    dense: None,
};

/// The OCP MX formats, weights and activations in any of them; also activations in static FP8, or
/// not quantised at all.
pub const EMULATION_OCP_MX: KernelDesc = KernelDesc {
    name: "emulation_ocp_mx",
    summary: "what native OCP MX arithmetic gives: MXFP4, MXFP6 and MXFP8, mixed as the checkpoint says",
    schemes: &[scheme(
        &[
            WeightFormat::Mxfp4,
            WeightFormat::Mxfp6E2m3,
            WeightFormat::Mxfp6E3m2,
            WeightFormat::Mxfp8,
        ],
        &[
            ActivationFormat::Unquantised,
            ActivationFormat::Mxfp4,
            ActivationFormat::Mxfp6E2m3,
            ActivationFormat::Mxfp6E3m2,
            ActivationFormat::Mxfp8,
            ActivationFormat::Fp8Static,
        ],
    )],
    multiples: (32, 32),
    caps: EMULATION_NVFP4.caps.with(Caps::BIASES),
    ..EMULATION_NVFP4
};

/// MXFP8 weights and activations. Engines that emulate it leave the activations as they are, and so
/// show less error than the hardware has; this does not.
pub const EMULATION_MXFP8: KernelDesc = KernelDesc {
    name: "emulation_mxfp8",
    summary: "what native MXFP8 arithmetic gives: W8A8, activations quantised too",
    schemes: &[scheme(&[WeightFormat::Mxfp8], &[ActivationFormat::Mxfp8])],
    ..EMULATION_OCP_MX
};

const fn scheme(weights: &'static [WeightFormat], rows: &'static [ActivationFormat]) -> Scheme {
    Scheme { weights: Formats::Only(weights), rows: Formats::Only(rows), ..Scheme::ANY }
}

/// One of the emulation kernels, with its weights.
pub struct Emulation {
    desc: &'static KernelDesc,
    dtype: ActivationDtype,
    spec: ExpertSpec,
    weight_on: WeightOn,
    experts: Vec<EmulatedExpert>,
    shape: ExpertShape,
}

struct EmulatedExpert {
    gate: Option<Operand>,
    up: Operand,
    down: Operand,
    stored: Expert,
}

impl Emulation {
    /// Keeps views of the experts; intermediate results are rounded to the activations' dtype.
    ///
    /// # Errors
    /// [`Error::NoKernel`] for experts whose outputs are normalised, and for an expert whose gate and
    /// up projections want the rows that they share quantised differently.
    pub fn new(desc: &'static KernelDesc, call: BuildCall<'_>) -> Result<Self> {
        let dtype = call.dtype;
        if call.spec.norm.is_some() {
            return Err(Error::NoKernel(format!(
                "{}: weights are applied before the rounding, outputs cannot be normalised after it",
                desc.name
            )));
        }
        let emulated = |(e, expert): (usize, &Expert)| {
            if expert.gate.as_ref().is_some_and(|gate| gate.input != expert.up.input) {
                return Err(Error::NoKernel(format!(
                    "{}: expert {e}: the gate and up projections quantise their common rows \
                     differently ({:?} and {:?})",
                    desc.name,
                    expert.gate.as_ref().map(|gate| gate.input),
                    expert.up.input
                )));
            }
            Ok(EmulatedExpert {
                gate: expert.gate.as_ref().map(|gate| Operand::new(gate, dtype)),
                up: Operand::new(&expert.up, dtype),
                down: Operand::new(&expert.down, dtype),
                stored: expert.clone(),
            })
        };
        Ok(Self {
            desc,
            dtype,
            spec: *call.spec,
            weight_on: call.weight_on,
            experts: call.experts.iter().enumerate().map(emulated).collect::<Result<_>>()?,
            shape: call.shape(),
        })
    }
}

impl std::fmt::Debug for Emulation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (name, experts) = (self.desc.name, self.experts.len());
        write!(f, "{name} with {experts} experts, rounding to {}", self.dtype.name())
    }
}

impl Experts for Emulation {
    fn desc(&self) -> &'static KernelDesc {
        self.desc
    }

    fn shape(&self) -> ExpertShape {
        self.shape
    }

    fn scratch_bytes(&self, slots: usize, threads: usize) -> usize {
        grouped::scratch_bytes(self, slots, threads)
    }

    fn weight_bytes(&self, plan: &Plan) -> usize {
        plan.active().map(|e| stored_bytes(&self.experts[e].stored)).sum()
    }

    fn forward(&self, call: ExpertCall<'_>) -> Result<()> {
        grouped::forward(self, call)
    }
}

impl Products for Emulation {
    fn shape(&self) -> ExpertShape {
        self.shape
    }

    fn row_len(&self, product: Product) -> usize {
        match product {
            Product::First => self.shape.hidden,
            Product::Second => self.shape.intermediate,
        }
    }

    fn tile(&self, _product: Product, _plan: &Plan, _threads: usize) -> usize {
        product::LANES
    }

    fn scratch(&self, _rows: usize) -> usize {
        product::scratch(self.shape.hidden.max(self.shape.intermediate))
    }

    fn enter(&self, expert: usize, row: &mut [f32], weight: f32, _quantised: bool) {
        let dtype = self.dtype;
        row.iter_mut().for_each(|v| *v = dtype.round(*v));
        if self.weight_on == WeightOn::Input {
            let weight = dtype.round(weight);
            row.iter_mut().for_each(|v| *v = dtype.round(*v * weight));
        }
        self.experts[expert].up.quantise_input(row, None, &mut []);
    }

    fn between(&self, expert: usize, row: &mut [f32], whole: Option<f32>, scratch: &mut [f32]) {
        self.experts[expert].down.quantise_input(row, whole, scratch);
    }

    fn operand(
        &self,
        _product: Product,
        _expert: usize,
        row: &[f32],
        _whole: Option<f32>,
        into: &mut [f32],
    ) {
        into.copy_from_slice(row);
    }

    fn operand_len(&self, product: Product, _expert: usize) -> usize {
        self.row_len(product)
    }

    fn first(&self, block: Block<'_>, tile: &mut Tile<'_>, scratch: &mut [f32]) {
        gate_up(
            &self.experts[block.expert],
            self.spec.activation,
            self.dtype,
            block,
            tile,
            scratch,
        );
    }

    fn second(&self, block: Block<'_>, tile: &mut Tile<'_>, scratch: &mut [f32]) {
        let (dtype, expert) = (self.dtype, &self.experts[block.expert]);
        let bias = expert.stored.down_bias.as_deref();
        let Tile { cols, out, .. } = tile;
        product::rows(&expert.down, bias, block.rows, cols.clone(), scratch, |i, sums| {
            let weight = match self.weight_on {
                WeightOn::Output => block.weights[block.slots[i] as usize],
                WeightOn::Input => 1.0,
            };
            for (out, sum) in out.row_mut(i).iter_mut().zip(sums) {
                *out = dtype.round(sum * weight);
            }
        });
    }
}

/// The intermediate features `cols` of the rows `x`: first product and activation.
fn gate_up(
    expert: &EmulatedExpert,
    activation: Activation,
    dtype: ActivationDtype,
    block: Block<'_>,
    Tile { cols, out, .. }: &mut Tile<'_>,
    scratch: &mut [f32],
) {
    let (stored, x) = (&expert.stored, block.rows);
    let Some(gate) = &expert.gate else {
        product::rows(
            &expert.up,
            stored.up_bias.as_deref(),
            x,
            cols.clone(),
            scratch,
            |i, sums| {
                for (out, sum) in out.row_mut(i).iter_mut().zip(sums) {
                    *out = plain(activation, dtype.round(*sum), dtype);
                }
            },
        );
        return;
    };
    product::rows(gate, stored.gate_bias.as_deref(), x, cols.clone(), scratch, |i, sums| {
        for (out, sum) in out.row_mut(i).iter_mut().zip(sums) {
            *out = dtype.round(*sum);
        }
    });
    product::rows(&expert.up, stored.up_bias.as_deref(), x, cols.clone(), scratch, |i, sums| {
        for (out, sum) in out.row_mut(i).iter_mut().zip(sums) {
            *out = gated(activation, *out, dtype.round(*sum), dtype);
        }
    });
}

/// `act(x)`: the formula's value, rounded to f32 as arithmetic units give it, and to T.
fn plain(activation: Activation, x: f32, dtype: ActivationDtype) -> f32 {
    dtype.round(activation.plain(f64::from(x)) as f32)
}

/// `act(g) · u`. Functions without a clamp are stored before they are multiplied: two roundings.
fn gated(activation: Activation, g: f32, u: f32, dtype: ActivationDtype) -> f32 {
    match activation {
        Activation::Silu
        | Activation::Gelu
        | Activation::GeluTanh
        | Activation::Relu
        | Activation::Relu2 => dtype.round(plain(activation, g, dtype) * u),
        Activation::ClampedSwiglu { .. }
        | Activation::SwigluStep { .. }
        | Activation::Situ { .. } => {
            dtype.round(activation.gated(f64::from(g), f64::from(u)) as f32)
        }
    }
}
