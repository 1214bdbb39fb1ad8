//! Whether all weights are numbers.

use std::path::Path;

use crate::Error;
use crate::checkpoint::architecture::{Experts, LayerEntry, Projection, StepTensors};
use crate::weights::{Expert, LoadedLayer, Matrix, StepWeights};

/// Decodes every weight of a layer and reports the first one of each array that is infinite or
/// not a number. `path` is what the errors name: the checkpoint's.
pub fn scan_finite(path: &Path, entry: &LayerEntry, layer: &LoadedLayer) -> Vec<Error> {
    let mut scan = Scan { path, found: Vec::new(), row: Vec::new() };
    let tensors = &entry.tensors;
    if let Some(gate) = &layer.gate {
        scan.matrix(&tensors.gate, &gate.weight);
        scan.vector(&tensors.gate_bias, &gate.bias);
        scan.vector(&tensors.correction, &gate.correction);
        scan.vector(&tensors.per_expert_scale, &gate.per_expert_scale);
        scan.vector(&tensors.gate_input_scale, &gate.input_scale);
    }
    scan.experts(&tensors.experts, &layer.experts);
    scan.steps(&tensors.input_transform, &layer.input_transform);
    scan.steps(&tensors.output_transform, &layer.output_transform);
    if let (Some(tensors), Some(shared)) = (&tensors.shared, &layer.shared) {
        scan.experts(&tensors.experts, &shared.experts);
        scan.vector(&tensors.gate, &shared.gate);
        scan.vector(&tensors.input_norm, &shared.input_norm);
        scan.vector(&tensors.output_norm, &shared.output_norm);
    }
    scan.vector(&tensors.output_bias, &layer.output.bias);
    scan.vector(&tensors.output_norm, &layer.output.norm);
    scan.found
}

struct Scan<'a> {
    path: &'a Path,
    found: Vec<Error>,
    row: Vec<f32>,
}

impl Scan<'_> {
    fn experts(&mut self, tensors: &Experts, experts: &[Expert]) {
        for (index, expert) in experts.iter().enumerate() {
            let tensors = tensors.get(index);
            if let (Some(tensors), Some(gate)) = (&tensors.gate, &expert.gate) {
                self.matrix(tensors, gate);
            }
            self.matrix(&tensors.up, &expert.up);
            self.matrix(&tensors.down, &expert.down);
            let biases = [
                (&tensors.gate_bias, &expert.gate_bias),
                (&tensors.up_bias, &expert.up_bias),
                (&tensors.down_bias, &expert.down_bias),
            ];
            for (part, values) in biases {
                self.vector(&part.as_ref().map(|part| part.tensor.clone()), values);
            }
            self.vector(&tensors.norm, &expert.norm);
        }
    }

    fn steps(&mut self, tensors: &[StepTensors], steps: &[StepWeights]) {
        for step in tensors.iter().zip(steps) {
            match step {
                (StepTensors::Linear(tensors), StepWeights::Linear(matrix)) => {
                    self.matrix(tensors, matrix);
                }
                (StepTensors::RmsNorm(name), StepWeights::RmsNorm(values)) => {
                    self.vector(&Some(name.clone()), &Some(values.clone()));
                }
                _ => {}
            }
        }
    }

    fn matrix(&mut self, projection: &Projection, matrix: &Matrix) {
        self.row.resize(matrix.cols(), 0.0);
        for row in 0..matrix.rows() {
            matrix.decode_row(row, &mut self.row);
            let Some(col) = self.row.iter().position(|value| !value.is_finite()) else { continue };
            let expert = match projection.part.stack {
                Some(stack) => format!("expert {}, ", stack.index),
                None => String::new(),
            };
            let value = self.row[col];
            let reason = format!("{expert}row {row}, column {col} is {value}");
            self.found.push(Error::tensor(self.path, &projection.module, reason));
            return;
        }
    }

    fn vector(&mut self, name: &Option<String>, values: &Option<Vec<f32>>) {
        if let (Some(name), Some(values)) = (name, values)
            && let Some(index) = values.iter().position(|value| !value.is_finite())
        {
            let reason = format!("element {index} is {}", values[index]);
            self.found.push(Error::tensor(self.path, name, reason));
        }
    }
}
