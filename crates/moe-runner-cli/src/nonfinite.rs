//! Where a NaN or an infinity in an output comes from.

use moe_kernels::pool::ThreadPool;
use moe_runner::checkpoint::Checkpoint;
use moe_runner::checkpoint::architecture::{LayerEntry, Projection, StepTensors};
use moe_runner::doctor;
use moe_runner::experts::reference::{expert, project};
use moe_runner::runner::reference::expert_rows;
use moe_runner::spec::{Activation, RmsNorm};
use moe_runner::weights::{Expert, LoadedLayer, Matrix};

/// What made the output of a token NaN or infinite: a weight that is, or a number on the way that
/// left f32's range. `hidden` is the token's row, `experts` are those that it went to.
pub(crate) fn cause(
    checkpoint: &Checkpoint,
    layer: &LoadedLayer,
    entry: &LayerEntry,
    pool: &dyn ThreadPool,
    hidden: &[f32],
    experts: &[u32],
) -> String {
    if let Some(weights) = doctor::non_finite(checkpoint, entry, layer, experts, pool) {
        return weights.to_string();
    }
    let products = products(layer, entry, hidden, experts);
    if let Some(Product { of, largest }) = products.iter().find(|product| product.is_beyond()) {
        return format!("{of}: what comes out of it is {largest:.1e}, beyond f32 (3.4e38)");
    }
    let largest = products.iter().max_by(|a, b| a.largest.total_cmp(&b.largest));
    let finite = "all weights that it meets are finite";
    largest.map_or(finite.to_owned(), |Product { of, largest }| {
        format!(
            "{finite}; the largest number on the way is {largest:.1e}, out of {of}, and f32 ends at \
             3.4e38"
        )
    })
}

/// What one projection makes of the token, in float64.
struct Product {
    /// Whose it is, and the name of the projection.
    of: String,
    /// The largest magnitude.
    largest: f64,
}

impl Product {
    fn new(who: &str, projection: &Projection, rows: &[Vec<f64>]) -> Self {
        let all = rows.iter().flatten();
        let largest = all.fold(0f64, |most, v| if v.abs() <= most { most } else { v.abs() });
        Self { of: format!("{who}, '{}'", projection.module), largest }
    }

    fn is_beyond(&self) -> bool {
        self.largest > f64::from(f32::MAX) || self.largest.is_nan()
    }
}

/// All products of a token, in their order.
fn products(
    layer: &LoadedLayer,
    entry: &LayerEntry,
    hidden: &[f32],
    experts: &[u32],
) -> Vec<Product> {
    let (spec, tensors) = (&layer.spec, &entry.tensors);
    let row = [hidden.iter().map(|v| f64::from(*v)).collect::<Vec<f64>>()];
    let rows = expert_rows(layer, hidden);
    let mut products = Vec::new();
    for step in &tensors.input_transform {
        if let StepTensors::Linear(projection) = step {
            products.push(Product::new("before the experts", projection, &rows));
        }
    }
    for &id in experts {
        let Some(weights) = layer.experts.get(id as usize) else { continue };
        let parts = tensors.experts.get(id as usize);
        let names = [parts.gate.as_ref(), Some(&parts.up), Some(&parts.down)];
        let (activation, norm) = (spec.expert.activation, spec.expert.norm);
        products.extend(of_expert(
            &format!("expert {id}"),
            weights,
            names,
            activation,
            norm,
            &rows,
        ));
    }
    if let (Some(shared), Some(weights), Some(parts)) = (&spec.shared, &layer.shared, &tensors.shared)
        // behind a norm, they see another row, of an ordinary size
        && shared.input_norm.is_none()
    {
        for (index, weights) in weights.experts.iter().enumerate() {
            let parts = parts.experts.get(index);
            let names = [parts.gate.as_ref(), Some(&parts.up), Some(&parts.down)];
            let who = format!("shared expert {index}");
            products.extend(of_expert(&who, weights, names, shared.activation, None, &row));
        }
    }
    products
}

/// Those of one expert: gate, up, and what comes out of down.
fn of_expert(
    who: &str,
    weights: &Expert,
    [gate, up, down]: [Option<&Projection>; 3],
    activation: Activation,
    norm: Option<RmsNorm>,
    rows: &[Vec<f64>],
) -> Vec<Product> {
    let of = |projection: Option<&Projection>, matrix: Option<&Matrix>, bias: &Option<Vec<f32>>| {
        let rows = project(matrix?, bias.as_deref(), rows);
        Some(Product::new(who, projection?, &rows))
    };
    let out = || Some(Product::new(who, down?, &expert(weights, activation, norm, rows)));
    let gate = of(gate, weights.gate.as_ref(), &weights.gate_bias);
    let up = of(up, Some(&weights.up), &weights.up_bias);
    [gate, up, out()].into_iter().flatten().collect()
}
