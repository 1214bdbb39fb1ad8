//! The truth: every expert in scalar float64 arithmetic, for every format. Slow and obvious.

use moe_kernels::isa::{Cpu, Features};

use crate::experts::{
    Arithmetic, BuildCall, BuiltKernel, Caps, Determinism, ExpertCall, ExpertShape, Experts,
    Functions, KernelDesc, MonolithicCall, MonolithicExperts, RowFormat, RowMax, Scheme, Target,
};
use crate::hidden::ActivationDtype;
use crate::plan::Plan;
use crate::router::Routing;
use crate::spec::{Activation, ExpertSpec, RmsNorm, WeightOn};
use crate::weights::{Expert, Matrix};
use crate::{Error, Result};

/// The reference kernel.
pub const REFERENCE: KernelDesc = KernelDesc {
    name: "reference",
    summary: "scalar float64, every format: the truth that the others are measured against",
    target: Target::Cpu(Features::NONE),
    schemes: &[Scheme::ANY],
    dtypes: &[ActivationDtype::F32, ActivationDtype::Bf16, ActivationDtype::F16],
    functions: Functions::All,
    multiples: (1, 1),
    arithmetic: Arithmetic::F64,
    caps: Caps::QUANTISED_ROWS.with(Caps::ALL_EXPERTS).with(Caps::BY_NAME_ONLY),
    row_formats: RowFormat::ALL,
    determinism: Determinism::AnyBatch,
    build: |_, call| Ok(BuiltKernel::Modular(Box::new(Reference::new(call)))),
    dense: None,
};

/// The reference kernel that routes by itself and sums in float64.
pub const REFERENCE_MONOLITHIC: KernelDesc = KernelDesc {
    name: "reference_monolithic",
    summary: "scalar float64, routes by itself and sums in float64: the monolithic contract",
    caps: REFERENCE.caps.with(Caps::ROUTES),
    build: |_, call| Ok(BuiltKernel::Monolithic(Box::new(ReferenceMonolithic::new(call)))),
    dense: Some(&REFERENCE),
    ..REFERENCE
};

/// `Σ_k a[k]·b[k]`, in float64: four running sums, since one alone would wait for itself.
pub fn dot(a: &[f32], b: &[f64]) -> f64 {
    let (a4, a_rest) = a.as_chunks::<4>();
    let (b4, b_rest) = b.as_chunks::<4>();
    let mut sums = [0.0f64; 4];
    for (a, b) in a4.iter().zip(b4) {
        sums.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum += f64::from(*a) * b);
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| f64::from(*a) * b).sum();
    sums.iter().sum::<f64>() + rest
}

/// `rows · matrixᵀ + bias`, row by row, in float64. `rows` hold `matrix.cols()` values each, and
/// are quantised first where the matrix asks for it.
pub fn project(matrix: &Matrix, bias: Option<&[f32]>, rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let rows: Vec<Vec<f64>> = rows.iter().map(|row| matrix.input.apply_f64(row)).collect();
    product(matrix, bias, &rows)
}

/// [`project`], for rows that are quantised already.
fn product(matrix: &Matrix, bias: Option<&[f32]>, rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let mut out = vec![Vec::with_capacity(matrix.rows()); rows.len()];
    let mut weight = vec![0.0; matrix.cols()];
    for n in 0..matrix.rows() {
        matrix.decode_row(n, &mut weight);
        let bias = bias.map_or(0.0, |bias| f64::from(bias[n]));
        for (out, row) in out.iter_mut().zip(rows) {
            out.push(dot(&weight, row) + bias);
        }
    }
    out
}

/// `x / sqrt(mean(x²) + eps) · w`, in place.
pub fn rms_norm(norm: RmsNorm, weight: &[f32], row: &mut [f64]) {
    let offset = if norm.unit_offset { 1.0 } else { 0.0 };
    let scaled = |v: f64, w: f32| v * (offset + f64::from(w));
    if norm.scale_first {
        row.iter_mut().zip(weight).for_each(|(v, &w)| *v = scaled(*v, w));
    }
    let mean_square = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
    let inverse = 1.0 / (mean_square + f64::from(norm.eps)).sqrt();
    for (v, &w) in row.iter_mut().zip(weight) {
        *v = inverse * if norm.scale_first { *v } else { scaled(*v, w) };
    }
}

/// One expert on some rows: `down · act(gate·x, up·x)`, with biases and norm.
pub fn expert(
    expert: &Expert,
    activation: Activation,
    norm: Option<RmsNorm>,
    rows: &[Vec<f64>],
) -> Vec<Vec<f64>> {
    let middle = first_product(expert, activation, rows, false);
    let middle: Vec<Vec<f64>> = middle.iter().map(|row| expert.down.input.apply_f64(row)).collect();
    second_product(expert, norm, &middle)
}

/// `act(gate·x, up·x)`; `quantised`: of rows that are quantised already.
fn first_product(
    expert: &Expert,
    activation: Activation,
    rows: &[Vec<f64>],
    quantised: bool,
) -> Vec<Vec<f64>> {
    let project = if quantised { product } else { project };
    let up = project(&expert.up, expert.up_bias.as_deref(), rows);
    match &expert.gate {
        Some(gate) => project(gate, expert.gate_bias.as_deref(), rows)
            .iter()
            .zip(&up)
            .map(|(g, u)| g.iter().zip(u).map(|(g, u)| activation.gated(*g, *u)).collect())
            .collect(),
        None => up.iter().map(|u| u.iter().map(|u| activation.plain(*u)).collect()).collect(),
    }
}

/// `down · h`, of rows that are quantised already.
fn second_product(expert: &Expert, norm: Option<RmsNorm>, rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let mut out = product(&expert.down, expert.down_bias.as_deref(), rows);
    if let (Some(norm), Some(weight)) = (norm, &expert.norm) {
        out.iter_mut().for_each(|row| rms_norm(norm, weight, row));
    }
    out
}

/// Quantises the rows between the products, experts in plan order. With `row_max` they are slices of
/// rows that other ranks hold the rest of.
fn quantise_middle(
    middle: Vec<Vec<Vec<f64>>>,
    experts: &[&Expert],
    row_max: Option<RowMax<'_>>,
) -> Result<Vec<Vec<Vec<f64>>>> {
    let Some(row_max) = row_max else {
        let whole = |(rows, expert): (Vec<Vec<f64>>, &&Expert)| {
            rows.iter().map(|row| expert.down.input.apply_f64(row)).collect()
        };
        return Ok(middle.into_iter().zip(experts).map(whole).collect());
    };
    let largest = |row: &Vec<f64>| row.iter().fold(0.0f32, |max, v| max.max((*v as f32).abs()));
    let mut max: Vec<f32> = middle.iter().flatten().map(largest).collect();
    row_max(&mut max)?;
    let mut max = max.into_iter();
    let mut slice = |row: Vec<f64>, expert: &Expert| {
        let mut narrow: Vec<f32> = row.iter().map(|v| *v as f32).collect();
        let scratch = &mut vec![0.0; narrow.len() + 1];
        expert.down.input.apply_slice(
            Cpu::detect(),
            &mut narrow,
            max.next().unwrap_or(0.0),
            scratch,
        );
        narrow.into_iter().map(f64::from).collect()
    };
    let slices = middle.into_iter().zip(experts);
    Ok(slices.map(|(rows, e)| rows.into_iter().map(|row| slice(row, e)).collect()).collect())
}

/// Bytes of the file behind one expert's projections.
pub fn stored_bytes(expert: &Expert) -> usize {
    let gate = expert.gate.as_ref().map_or(0, Matrix::stored_bytes);
    gate + expert.up.stored_bytes() + expert.down.stored_bytes()
}

/// [`REFERENCE`] with its weights.
#[derive(Debug)]
pub struct Reference {
    spec: ExpertSpec,
    weight_on: WeightOn,
    experts: Vec<Expert>,
    shape: ExpertShape,
}

impl Reference {
    /// Keeps views of the weights as they are stored.
    pub fn new(call: BuildCall<'_>) -> Self {
        Self {
            spec: *call.spec,
            weight_on: call.weight_on,
            shape: call.shape(),
            experts: call.experts,
        }
    }

    fn expert(&self, e: usize, rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
        expert(&self.experts[e], self.spec.activation, self.spec.norm, rows)
    }

    /// A row as the experts see it: float64, times the weight where that is applied to the input.
    fn input_row(&self, row: &[f32], weight: f32) -> Vec<f64> {
        let factor = match self.weight_on {
            WeightOn::Output => 1.0,
            WeightOn::Input => f64::from(weight),
        };
        row.iter().map(|v| f64::from(*v) * factor).collect()
    }
}

impl Experts for Reference {
    fn desc(&self) -> &'static KernelDesc {
        &REFERENCE
    }

    fn shape(&self) -> ExpertShape {
        self.shape
    }

    fn scratch_bytes(&self, _slots: usize, _threads: usize) -> usize {
        0
    }

    fn weight_bytes(&self, plan: &Plan) -> usize {
        plan.active().map(|e| stored_bytes(&self.experts[e])).sum()
    }

    fn forward(&self, call: ExpertCall<'_>) -> Result<()> {
        let ExpertCall { rows, plan, weights, out, quantised, row_max, .. } = call;
        let experts: Vec<&Expert> = plan.active().map(|e| &self.experts[e]).collect();
        let first = plan.active().zip(&experts).map(|(e, expert)| {
            let width = expert.up.cols();
            let inputs: Vec<Vec<f64>> = plan
                .slots(e)
                .iter()
                .map(|&slot| {
                    let start = plan.row(slot) * width;
                    self.input_row(&rows[start..start + width], weights[slot as usize])
                })
                .collect();
            first_product(expert, self.spec.activation, &inputs, quantised)
        });
        let middle = quantise_middle(first.collect(), &experts, row_max)?;
        for ((e, expert), middle) in plan.active().zip(&experts).zip(&middle) {
            let outputs = second_product(expert, self.spec.norm, middle);
            let width = self.shape.hidden;
            for (place, row) in plan.range(e).zip(outputs) {
                for (out, v) in out[place * width..].iter_mut().zip(row) {
                    *out = v as f32;
                }
            }
        }
        Ok(())
    }
}

/// [`REFERENCE_MONOLITHIC`] with its weights.
#[derive(Debug)]
pub struct ReferenceMonolithic(Reference);

impl ReferenceMonolithic {
    /// Keeps views of the weights as they are stored.
    pub fn new(call: BuildCall<'_>) -> Self {
        Self(Reference::new(call))
    }
}

impl MonolithicExperts for ReferenceMonolithic {
    fn desc(&self) -> &'static KernelDesc {
        &REFERENCE_MONOLITHIC
    }

    fn shape(&self) -> ExpertShape {
        self.0.shape
    }

    fn weight_bytes(&self, routing: &Routing) -> usize {
        let mut ids: Vec<u32> = routing.ids.iter().map(|id| id.0).collect();
        ids.sort_unstable();
        ids.dedup();
        ids.iter().filter_map(|id| self.0.experts.get(*id as usize)).map(stored_bytes).sum()
    }

    fn forward(&self, call: MonolithicCall<'_>) -> Result<()> {
        let MonolithicCall { rows, logits, input_ids, router, routing, out } = call;
        let width = self.0.experts.first().map_or(0, |expert| expert.up.cols());
        if width == 0 {
            return Err(Error::input("experts", "there are none"));
        }
        let tokens = rows.len() / width;
        router.route(logits, input_ids, tokens, routing)?;
        let k = routing.top_k;
        for (t, (row, out)) in rows.chunks(width).zip(out.chunks_mut(width)).enumerate() {
            let mut sum = vec![0.0f64; width];
            for slot in t * k..(t + 1) * k {
                let (id, weight) = (routing.ids[slot].index(), routing.weights[slot]);
                if id >= self.0.experts.len() {
                    continue;
                }
                let y = self.0.expert(id, &[self.0.input_row(row, weight)]);
                let factor = match self.0.weight_on {
                    WeightOn::Output => f64::from(weight),
                    WeightOn::Input => 1.0,
                };
                for (sum, y) in sum.iter_mut().zip(&y[0]) {
                    *sum += factor * y;
                }
            }
            for (out, sum) in out.iter_mut().zip(sum) {
                *out = sum as f32;
            }
        }
        Ok(())
    }
}
