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

use std::ops::Range;

use moe_kernels::isa::Isa;
use moe_kernels::kernel::{RowsMut, Tile};
use moe_kernels::region::for_each;

use crate::experts::cpu::{SharedPool, largest_magnitude};
use crate::experts::reference::stored_bytes;
use crate::experts::{
    Determinism, Device, ExpertCall, ExpertSet, ExpertShape, Experts, Formats, KernelDesc,
    RowFormat,
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
    device: Device::Cpu,
    isa: Isa::Portable,
    compute_capability: 0,
    weights: Formats::Only(&[WeightFormat::Nvfp4]),
    activations: Formats::Only(&[ActivationFormat::Nvfp4, ActivationFormat::Nvfp4Token]),
    dtypes: &[ActivationDtype::F32, ActivationDtype::Bf16, ActivationDtype::F16],
    multiples: (16, 16),
    biases: false,
    norms: false,
    rounds: true,
    weighs: true,
    row_formats: RowFormat::ALL,
    takes_quantised: false,
    monolithic: false,
    overlaps_shared: true,
    by_name_only: true,
    determinism: Determinism::AnyBatch,
};

/// The OCP MX formats, weights and activations in any of them; also activations in static FP8, or
/// not quantised at all.
pub const EMULATION_OCP_MX: KernelDesc = KernelDesc {
    name: "emulation_ocp_mx",
    summary: "what native OCP MX arithmetic gives: MXFP4, MXFP6 and MXFP8, mixed as the checkpoint says",
    weights: Formats::Only(&[
        WeightFormat::Mxfp4,
        WeightFormat::Mxfp6E2m3,
        WeightFormat::Mxfp6E3m2,
        WeightFormat::Mxfp8,
    ]),
    activations: Formats::Only(&[
        ActivationFormat::Unquantised,
        ActivationFormat::Mxfp4,
        ActivationFormat::Mxfp6E2m3,
        ActivationFormat::Mxfp6E3m2,
        ActivationFormat::Mxfp8,
        ActivationFormat::Fp8Static,
    ]),
    multiples: (32, 32),
    biases: true,
    ..EMULATION_NVFP4
};

/// MXFP8 weights and activations. Engines that emulate it leave the activations as they are, and so
/// show less error than the hardware has; this does not.
pub const EMULATION_MXFP8: KernelDesc = KernelDesc {
    name: "emulation_mxfp8",
    summary: "what native MXFP8 arithmetic gives: W8A8, activations quantised too",
    weights: Formats::Only(&[WeightFormat::Mxfp8]),
    activations: Formats::Only(&[ActivationFormat::Mxfp8]),
    ..EMULATION_OCP_MX
};

/// All of them.
pub const EMULATIONS: [&KernelDesc; 3] = [&EMULATION_NVFP4, &EMULATION_OCP_MX, &EMULATION_MXFP8];

/// One of the emulation kernels, with its weights.
pub struct Emulation {
    desc: &'static KernelDesc,
    dtype: ActivationDtype,
    pool: SharedPool,
    spec: ExpertSpec,
    weight_on: WeightOn,
    experts: Vec<EmulatedExpert>,
    shape: ExpertShape,
    buffers: Buffers,
}

struct EmulatedExpert {
    gate: Option<Operand>,
    up: Operand,
    down: Operand,
    stored: Expert,
}

#[derive(Default)]
struct Buffers {
    x: Vec<f32>,
    h: Vec<f32>,
    y: Vec<f32>,
    max: Vec<f32>,
    blocks: Vec<Range<usize>>,
    active: Vec<usize>,
}

impl Emulation {
    /// Keeps views of `set`; intermediate results are rounded to `dtype`.
    ///
    /// # Errors
    /// [`Error::NoKernel`] for experts whose outputs are normalised, and for an expert whose gate and
    /// up projections want the rows that they share quantised differently.
    pub fn new(
        desc: &'static KernelDesc,
        set: ExpertSet<'_>,
        dtype: ActivationDtype,
        pool: SharedPool,
    ) -> Result<Self> {
        if set.spec.norm.is_some() {
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
            pool,
            spec: *set.spec,
            weight_on: set.weight_on,
            experts: set.experts.iter().enumerate().map(emulated).collect::<Result<_>>()?,
            shape: set.shape(),
            buffers: Buffers::default(),
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

    fn workspace_bytes(&self, slots: usize) -> usize {
        slots * (2 * self.shape.hidden + self.shape.intermediate) * size_of::<f32>()
    }

    fn weight_bytes(&self, plan: &Plan) -> usize {
        plan.active().map(|e| stored_bytes(&self.experts[e].stored)).sum()
    }

    fn forward(&mut self, call: ExpertCall<'_>) -> Result<()> {
        let ExpertCall { rows, stride, plan, weights, out, row_max, .. } = call;
        let (ExpertShape { hidden, intermediate, .. }, dtype) = (self.shape, self.dtype);
        let slots = plan.slots_planned();
        let Buffers { x, h, y, max, blocks, active } = &mut self.buffers;
        active.clear();
        active.extend(plan.active());
        blocks.clear();
        blocks.extend(active.iter().map(|e| plan.range(*e)));
        x.resize(slots * hidden, 0.0);
        h.resize(slots * intermediate, 0.0);
        y.resize(slots * hidden, 0.0);
        let (experts, activation, weight_on) =
            (&self.experts, self.spec.activation, self.weight_on);
        let (pool, active, blocks) = (&*self.pool, &*active, &*blocks);

        let mut x_rows = RowsMut::new(x, slots, hidden, hidden);
        for_each(
            pool,
            x_rows.tiles(blocks, hidden.max(1)),
            |Tile { block, out: mut tile, .. }| {
                let e = active[block];
                for (i, &slot) in plan.slots(e).iter().enumerate() {
                    let to = tile.row_mut(i);
                    to.copy_from_slice(&rows[plan.row(slot) * stride..][..hidden]);
                    to.iter_mut().for_each(|v| *v = dtype.round(*v));
                    if weight_on == WeightOn::Input {
                        let weight = dtype.round(weights[slot as usize]);
                        to.iter_mut().for_each(|v| *v = dtype.round(*v * weight));
                    }
                    experts[e].up.quantise_input(to, None);
                }
            },
        );

        let mut h_rows = RowsMut::new(h, slots, intermediate, intermediate);
        for_each(pool, h_rows.tiles(blocks, product::LANES), |Tile { block, cols, out: tile }| {
            let expert = &experts[active[block]];
            let x = &x[blocks[block].start * hidden..blocks[block].end * hidden];
            gate_up(expert, activation, dtype, x, cols, tile);
        });
        // slices of rows that other ranks hold the rest of are quantised as the whole rows would be
        max.clear();
        if let Some(row_max) = row_max {
            max.extend(h.chunks_exact(intermediate.max(1)).map(largest_magnitude));
            max.resize(slots, 0.0);
            row_max(max)?;
        }
        let max = &*max;
        let mut h_rows = RowsMut::new(h, slots, intermediate, intermediate);
        for_each(
            pool,
            h_rows.tiles(blocks, intermediate.max(1)),
            |Tile { block, out: mut tile, .. }| {
                for (i, slot) in blocks[block].clone().enumerate() {
                    let whole = max.get(slot).copied();
                    experts[active[block]].down.quantise_input(tile.row_mut(i), whole);
                }
            },
        );

        let mut y_rows = RowsMut::new(y, slots, hidden, hidden);
        for_each(
            pool,
            y_rows.tiles(blocks, product::LANES),
            |Tile { block, cols, out: mut tile }| {
                let e = active[block];
                let (expert, rows) = (&experts[e], &blocks[block]);
                let h = &h[rows.start * intermediate..rows.end * intermediate];
                let bias = expert.stored.down_bias.as_deref();
                product::rows(&expert.down, bias, h, cols, |i, sums| {
                    let weight = match weight_on {
                        WeightOn::Output => weights[plan.slots(e)[i] as usize],
                        WeightOn::Input => 1.0,
                    };
                    for (out, sum) in tile.row_mut(i).iter_mut().zip(sums) {
                        *out = dtype.round(sum * weight);
                    }
                });
            },
        );

        for &e in active {
            for (i, &slot) in plan.range(e).zip(plan.slots(e)) {
                let to = &mut out[slot as usize * stride..][..hidden];
                to.copy_from_slice(&y[i * hidden..(i + 1) * hidden]);
            }
        }
        Ok(())
    }
}

/// The intermediate features `cols` of the rows `x`: first product and activation.
fn gate_up(
    expert: &EmulatedExpert,
    activation: Activation,
    dtype: ActivationDtype,
    x: &[f32],
    cols: Range<usize>,
    mut out: RowsMut<'_>,
) {
    let stored = &expert.stored;
    let Some(gate) = &expert.gate else {
        product::rows(&expert.up, stored.up_bias.as_deref(), x, cols, |i, sums| {
            for (out, sum) in out.row_mut(i).iter_mut().zip(sums) {
                *out = plain(activation, dtype.round(*sum), dtype);
            }
        });
        return;
    };
    product::rows(gate, stored.gate_bias.as_deref(), x, cols.clone(), |i, sums| {
        for (out, sum) in out.row_mut(i).iter_mut().zip(sums) {
            *out = dtype.round(*sum);
        }
    });
    product::rows(&expert.up, stored.up_bias.as_deref(), x, cols, |i, sums| {
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
