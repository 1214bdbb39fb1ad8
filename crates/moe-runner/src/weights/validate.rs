//! Whether a layer's weights are what its description says: for layers that were put together by
//! hand. What a checkpoint loads is so by construction; either way a pass never meets a shape that
//! it does not expect.

use super::{Expert, GateWeights, LoadedLayer, Matrix, SharedWeights, StepWeights};
use crate::spec::{ExpertSpec, SharedSpec, Transform, TransformStep};
use crate::{Error, Result};

/// What does not fit; the layer's name is put before it.
type Fit = Result<(), String>;

impl LoadedLayer {
    /// Checks the weights against the description: every projection's shape, every bias and norm
    /// that is described or given.
    ///
    /// # Errors
    /// [`Error::Spec`] naming the first expert or tensor that does not fit.
    pub fn validate(&self) -> Result<()> {
        self.spec.validate()?;
        let fits = self.fits();
        fits.map_err(|reason| Error::Spec { layer: self.spec.name.clone(), reason })
    }

    fn fits(&self) -> Fit {
        let (spec, dims) = (&self.spec, self.spec.dims);
        if self.experts.len() != spec.router.experts {
            let (have, want) = (self.experts.len(), spec.router.experts);
            return Err(format!("{have} experts are given, the router chooses among {want}"));
        }
        for (e, expert) in self.experts.iter().enumerate() {
            expert_fits(expert, &spec.expert, dims.routed_hidden, dims.intermediate)
                .map_err(|reason| format!("expert {e}: {reason}"))?;
        }
        if let Some(gate) = &self.gate {
            self.gate_fits(gate).map_err(|reason| format!("gate: {reason}"))?;
        }
        for (what, transform, weights, width) in [
            ("input transform", &spec.input_transform, &self.input_transform, dims.hidden),
            (
                "output transform",
                &spec.output_transform,
                &self.output_transform,
                dims.routed_hidden,
            ),
        ] {
            transform_fits(transform, weights, width)
                .map_err(|reason| format!("{what}: {reason}"))?;
        }
        match (&spec.shared, &self.shared) {
            (Some(spec), Some(weights)) => {
                shared_fits(spec, weights, dims.hidden)
                    .map_err(|reason| format!("shared experts: {reason}"))?;
            }
            (None, None) => {}
            (Some(_), None) => return Err("shared experts are described, but not given".into()),
            (None, Some(_)) => return Err("shared experts are given, but not described".into()),
        }
        vector("output bias", &self.output.bias, spec.output.bias, dims.hidden)?;
        vector("output norm", &self.output.norm, spec.output.norm.is_some(), dims.hidden)
    }

    fn gate_fits(&self, gate: &GateWeights) -> Fit {
        let (spec, hidden) = (&self.spec, self.spec.dims.hidden);
        let logits = spec.router.logits();
        shape("weight", &gate.weight, [logits, hidden])?;
        vector("bias", &gate.bias, spec.gate.bias, logits)?;
        vector("input scale", &gate.input_scale, spec.gate.scaled_rms_eps.is_some(), hidden)
    }
}

/// `hidden` and `intermediate` are the widths of the rows at the ends and between the products.
fn expert_fits(expert: &Expert, spec: &ExpertSpec, hidden: usize, intermediate: usize) -> Fit {
    match (&expert.gate, spec.gated) {
        (Some(gate), true) => shape("gate projection", gate, [intermediate, hidden])?,
        (None, false) => {}
        (None, true) => return Err("no gate projection, but the experts are gated".into()),
        (Some(_), false) => {
            return Err("a gate projection, but the experts are not gated".into());
        }
    }
    shape("up projection", &expert.up, [intermediate, hidden])?;
    shape("down projection", &expert.down, [hidden, intermediate])?;
    vector("gate bias", &expert.gate_bias, spec.bias && spec.gated, intermediate)?;
    vector("up bias", &expert.up_bias, spec.bias, intermediate)?;
    vector("down bias", &expert.down_bias, spec.bias, hidden)?;
    vector("norm", &expert.norm, spec.norm.is_some(), hidden)
}

fn shared_fits(spec: &SharedSpec, weights: &SharedWeights, hidden: usize) -> Fit {
    if weights.experts.len() != spec.count {
        return Err(format!("{} are given, {} are described", weights.experts.len(), spec.count));
    }
    let expert_spec =
        ExpertSpec { gated: spec.gated, activation: spec.activation, bias: spec.bias, norm: None };
    for (e, expert) in weights.experts.iter().enumerate() {
        expert_fits(expert, &expert_spec, hidden, spec.intermediate)
            .map_err(|reason| format!("expert {e}: {reason}"))?;
    }
    vector("gate", &weights.gate, spec.sigmoid_gate, hidden)?;
    vector("input norm", &weights.input_norm, spec.input_norm.is_some(), hidden)?;
    vector("output norm", &weights.output_norm, spec.output_norm.is_some(), hidden)
}

fn transform_fits(spec: &Transform, weights: &[StepWeights], mut width: usize) -> Fit {
    if spec.steps.len() != weights.len() {
        return Err(format!("{} steps with weights for {}", spec.steps.len(), weights.len()));
    }
    for (i, (step, weights)) in spec.steps.iter().zip(weights).enumerate() {
        let fits = match (step, weights) {
            (TransformStep::Linear { width: to }, StepWeights::Linear(matrix)) => {
                let from = std::mem::replace(&mut width, *to);
                shape("projection", matrix, [*to, from])
            }
            (TransformStep::RmsNorm(_), StepWeights::RmsNorm(weight)) => match weight.len() {
                len if len == width => Ok(()),
                len => Err(format!("norm: {len} values, {width} are needed")),
            },
            _ => Err("its weights are of another kind".into()),
        };
        fits.map_err(|reason| format!("step {i}: {reason}"))?;
    }
    Ok(())
}

fn shape(what: &str, matrix: &Matrix, want: [usize; 2]) -> Fit {
    let have = [matrix.rows(), matrix.cols()];
    match have == want {
        true => Ok(()),
        false => Err(format!("the {what} is {have:?}, {want:?} is needed")),
    }
}

fn vector(what: &str, given: &Option<Vec<f32>>, described: bool, len: usize) -> Fit {
    match (given, described) {
        (None, false) => Ok(()),
        (Some(values), true) if values.len() == len => Ok(()),
        (Some(values), true) => {
            Err(format!("the {what} has {} values, {len} are needed", values.len()))
        }
        (None, true) => Err(format!("the {what} is described, but not given")),
        (Some(_), false) => Err(format!("the {what} is given, but not described")),
    }
}
