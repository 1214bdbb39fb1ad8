//! Where a NaN or an infinity in an output comes from.

use moe_runner::checkpoint::architecture::{LayerEntry, Projection};
use moe_runner::experts::reference::{expert, project};
use moe_runner::weights::{Expert, LoadedLayer, Matrix};

/// What made the output of a token NaN or infinite: a weight that is, or a sum that left f32's
/// range. `hidden` is the token's row, `experts` are those that it went to.
pub(crate) fn cause(
    layer: &LoadedLayer,
    entry: &LayerEntry,
    hidden: &[f32],
    experts: &[u32],
) -> String {
    let routed = experts.iter().filter_map(|&id| {
        let weights = layer.experts.get(id as usize)?;
        Some((format!("expert {id}"), weights, entry.tensors.experts.get(id as usize)))
    });
    let shared = layer.shared.iter().zip(&entry.tensors.shared).flat_map(|(weights, tensors)| {
        let all = weights.experts.iter().enumerate();
        all.map(|(i, weights)| (format!("shared expert {i}"), weights, tensors.experts.get(i)))
    });
    let all: Vec<_> = routed.chain(shared).collect();
    for (who, weights, tensors) in &all {
        let gate = weights.gate.as_ref().zip(tensors.gate.as_ref());
        let parts =
            gate.into_iter().chain([(&weights.up, &tensors.up), (&weights.down, &tensors.down)]);
        for (matrix, projection) in parts {
            if let Some(place) = bad_weight(matrix, projection) {
                return format!("{who}: {place}");
            }
        }
    }
    // behind a transformation, experts see other rows: those that overflow are not looked for
    if layer.spec.input_transform.steps.is_empty() {
        let row: Vec<f64> = hidden.iter().map(|v| f64::from(*v)).collect();
        for (who, weights, tensors) in &all {
            if let Some((tensor, what, value)) = overflow(layer, weights, &row) {
                let tensor = match tensor {
                    In::Gate => tensors.gate.as_ref().map_or("", |gate| &gate.module),
                    In::Up => &tensors.up.module,
                    In::Down => &tensors.down.module,
                };
                return format!("{who}, '{tensor}': {what} {value:.1e}, beyond f32 (3.4e38)");
            }
        }
    }
    let experts: Vec<String> = experts.iter().map(ToString::to_string).collect();
    format!(
        "all weights of its experts ({}) are finite: the sum of their outputs, or a step around \
         them, overflows",
        experts.join(", ")
    )
}

fn bad_weight(matrix: &Matrix, projection: &Projection) -> Option<String> {
    let mut values = vec![0.0; matrix.cols()];
    (0..matrix.rows()).find_map(|row| {
        matrix.decode_row(row, &mut values);
        let column = values.iter().position(|value| !value.is_finite())?;
        let value = values[column];
        Some(format!("tensor '{}', row {row}, column {column} is {value}", projection.module))
    })
}

/// Whose product it is.
enum In {
    Gate,
    Up,
    Down,
}

/// The first product of an expert that f32 cannot hold.
fn overflow(layer: &LoadedLayer, weights: &Expert, row: &[f64]) -> Option<(In, &'static str, f64)> {
    let row = [row.to_vec()];
    let largest = |rows: &[Vec<f64>]| {
        let all = rows.iter().flatten();
        let largest = all.fold(0f64, |most, v| if v.abs() <= most { most } else { v.abs() });
        (largest > f64::from(f32::MAX) || largest.is_nan()).then_some(largest)
    };
    let product =
        |matrix: &Matrix, bias: &Option<Vec<f32>>| largest(&project(matrix, bias.as_deref(), &row));
    if let Some(gate) = &weights.gate
        && let Some(value) = product(gate, &weights.gate_bias)
    {
        return Some((In::Gate, "a product of it with the token is", value));
    }
    if let Some(value) = product(&weights.up, &weights.up_bias) {
        return Some((In::Up, "a product of it with the token is", value));
    }
    let spec = &layer.spec.expert;
    // of a middle row that f32 does not hold either, in most cases
    let value = largest(&expert(weights, spec.activation, spec.norm, &row))?;
    Some((In::Down, "what comes out of it is", value))
}
