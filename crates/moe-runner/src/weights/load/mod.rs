//! From the names of a layer's tensors to its weights, with every tensor accounted for.
//!
//! `Loader` notes what is missing or wrong instead of stopping at it, so that one pass tells
//! everything: [`account`] returns the account, [`LoadedLayer::load`] fails on it.

pub(crate) mod accounting;
pub(crate) mod float;

pub use accounting::Accounting;

use super::quant::{self, Problem};
use super::{Expert, GateWeights, LoadedLayer, Matrix, OutputWeights, SharedWeights, StepWeights};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::architecture::{
    ExpertTensors, Experts, LayerEntry, LayerTensors, Projection, SharedTensors, StepTensors,
    VectorPart,
};
use crate::spec::{LayerSpec, Selection};
use crate::{Error, Result};
use accounting::Loader;

impl LoadedLayer {
    /// The layer with its weights, which stay in the mapped files where they can.
    ///
    /// # Errors
    /// [`Error::Tensor`] with file and name of the first tensor that is missing, of the wrong
    /// shape or dtype, held by several files, or of an expert that the model does not have.
    pub fn load(checkpoint: &Checkpoint, entry: &LayerEntry) -> Result<Self> {
        let mut loader = Loader::new(checkpoint);
        let layer = loader.layer(entry);
        match (layer, loader.finish(entry).into_error(checkpoint)) {
            (_, Some(error)) => Err(error),
            (Some(layer), None) => Ok(layer),
            (None, None) => Err(Error::Spec {
                layer: entry.spec.name.clone(),
                reason: "a weight that the layer needs has no tensor's name".into(),
            }),
        }
    }
}

/// A layer's weights, and what is missing, wrong, unexpected or duplicate in it, in one pass; no
/// weights where something is missing or wrong.
pub fn survey(checkpoint: &Checkpoint, entry: &LayerEntry) -> (Option<LoadedLayer>, Accounting) {
    let mut loader = Loader::new(checkpoint);
    let layer = loader.layer(entry);
    (layer, loader.finish(entry))
}

/// What is missing, wrong, unexpected or duplicate in a layer, without failing.
pub fn account(checkpoint: &Checkpoint, entry: &LayerEntry) -> Accounting {
    let mut loader = Loader::new(checkpoint);
    loader.layer(entry);
    loader.finish(entry)
}

/// A way of storing a projection: `None` if the checkpoint does not store it in this way.
type Format = fn(&mut Loader, &Projection) -> Option<Result<Matrix, Problem>>;

/// Every number format, the ones with tensors of their own (scales, packed words) first. A new
/// format is one more line: it looks at which tensors of the module are there and at their
/// dtypes, and gets them with [`Loader::claim`]; [`Loader::scheme`] is what the configuration says.
const FORMATS: &[Format] = &[quant::matrix, quant::blocks, float::matrix];

impl Loader<'_> {
    /// All of a layer; `None` where something is missing or wrong, which is noted.
    fn layer(&mut self, entry: &LayerEntry) -> Option<LoadedLayer> {
        let (mut spec, tensors) = (entry.spec.clone(), &entry.tensors);
        self.reserve([&tensors.per_expert_scale, &tensors.gate_input_scale]);
        let gate = self.gate(&spec, tensors);
        let experts = self.experts(&tensors.experts);
        let input_transform = self.steps(&tensors.input_transform, spec.dims.hidden);
        let output_transform = self.steps(&tensors.output_transform, spec.dims.routed_hidden);
        let shared = match &tensors.shared {
            Some(shared) => self.shared(shared, spec.dims.hidden).map(Some),
            None => Some(None),
        };
        let output = OutputWeights {
            bias: self.optional(&tensors.output_bias, spec.dims.hidden),
            norm: self.optional(&tensors.output_norm, spec.dims.hidden),
        };
        if let Some(scale) = self.optional(&tensors.global_scale, 1) {
            spec.routed_scale.factor *= scale[0];
        }
        Some(LoadedLayer {
            spec,
            gate: Some(gate?),
            experts: experts?,
            input_transform: input_transform?,
            output_transform: output_transform?,
            shared: shared?,
            output,
        })
    }

    fn gate(&mut self, spec: &LayerSpec, tensors: &LayerTensors) -> Option<GateWeights> {
        let (router, hidden) = (&spec.router, spec.dims.hidden);
        let weight = self.matrix(&tensors.gate);
        let hash_table = match (&tensors.hash_table, router.selection) {
            (Some(name), Selection::HashTable { vocabulary }) => {
                self.expert_ids(name, [vocabulary, router.top_k], router.experts)
            }
            _ => None,
        };
        let gate = GateWeights {
            bias: self.optional(&tensors.gate_bias, router.logits()),
            correction: self.optional(&tensors.correction, router.choices()),
            per_expert_scale: self.optional(&tensors.per_expert_scale, router.experts),
            input_scale: self.optional(&tensors.gate_input_scale, hidden),
            hash_table,
            weight: weight?,
        };
        Some(gate)
    }

    fn experts(&mut self, experts: &Experts) -> Option<Vec<Expert>> {
        let loaded: Vec<Option<Expert>> =
            (0..experts.count).map(|index| self.expert(&experts.get(index))).collect();
        let mut loaded: Vec<Expert> = loaded.into_iter().collect::<Option<_>>()?;
        quant::share_input_scale(&mut loaded);
        Some(loaded)
    }

    fn expert(&mut self, tensors: &ExpertTensors) -> Option<Expert> {
        let common = self.common_input(tensors);
        self.note(common)?;
        let gate = tensors.gate.as_ref().map(|gate| self.matrix(gate));
        let up = self.matrix(&tensors.up);
        let down = self.matrix(&tensors.down);
        let gate_bias = self.bias(&tensors.gate_bias);
        let up_bias = self.bias(&tensors.up_bias);
        let down_bias = self.bias(&tensors.down_bias);
        let norm = self.optional(&tensors.norm, tensors.down.rows);
        Some(Expert {
            gate: match gate {
                Some(gate) => Some(gate?),
                None => None,
            },
            up: up?,
            down: down?,
            gate_bias,
            up_bias,
            down_bias,
            norm,
        })
    }

    fn shared(&mut self, tensors: &SharedTensors, hidden: usize) -> Option<SharedWeights> {
        let experts = self.experts(&tensors.experts);
        let shared = SharedWeights {
            gate: tensors.gate.as_ref().and_then(|name| self.row(name, hidden)),
            input_norm: self.optional(&tensors.input_norm, hidden),
            output_norm: self.optional(&tensors.output_norm, hidden),
            experts: experts?,
        };
        Some(shared)
    }

    /// The weights of a transform's steps, which rows enter with `width` elements.
    fn steps(&mut self, steps: &[StepTensors], mut width: usize) -> Option<Vec<StepWeights>> {
        let loaded: Vec<Option<StepWeights>> = steps
            .iter()
            .map(|step| match step {
                StepTensors::Linear(projection) => {
                    width = projection.rows;
                    self.matrix(projection).map(StepWeights::Linear)
                }
                StepTensors::RmsNorm(name) => self.vector(name, width).map(StepWeights::RmsNorm),
            })
            .collect();
        loaded.into_iter().collect()
    }

    /// One projection, in whichever format it is stored.
    fn matrix(&mut self, projection: &Projection) -> Option<Matrix> {
        for format in FORMATS {
            match format(self, projection) {
                None => {}
                Some(Ok(matrix)) if self.checkpoint().metadata().is_none() => return Some(matrix),
                Some(Ok(matrix)) => {
                    let scaled = quant::times_its_scale(self, projection, matrix);
                    return self.note(scaled.map_err(|problem| match problem {
                        Problem::Wrong(error) => error,
                        Problem::Missing(name) => {
                            Error::tensor(self.checkpoint().path(), name, "is missing")
                        }
                    }));
                }
                Some(Err(Problem::Wrong(error))) => return self.note(Err(error)),
                Some(Err(Problem::Missing(name))) => {
                    self.note_missing(name);
                    return None;
                }
            }
        }
        let ending = if projection.part.stack.is_some() { "" } else { ".weight" };
        self.note_missing(format!("{}{ending}", projection.module));
        None
    }

    /// A vector that is the one row of a module, in whichever format it is stored.
    fn row(&mut self, name: &str, len: usize) -> Option<Vec<f32>> {
        let module = name.strip_suffix(".weight");
        let projection = module.map(|module| Projection::whole(module.to_string(), 1, len));
        match projection.filter(|projection| quant::is_quantised(self, projection)) {
            None => self.vector(name, len),
            Some(projection) => {
                let matrix = self.matrix(&projection)?;
                let mut row = vec![0.0; len];
                matrix.decode_row(0, &mut row);
                Some(row)
            }
        }
    }

    /// A vector that the layer may have.
    fn optional(&mut self, name: &Option<String>, len: usize) -> Option<Vec<f32>> {
        name.as_ref().and_then(|name| self.vector(name, len))
    }

    /// A vector of `len` floats, whatever dimensions of one stand beside it.
    fn vector(&mut self, name: &str, len: usize) -> Option<Vec<f32>> {
        let tensor = self.needed(name)?;
        let fits = tensor.shape.iter().filter(|size| **size != 1).all(|size| *size == len)
            && tensor.shape.iter().product::<usize>() == len;
        let result = match fits {
            true => tensor.to_f32(),
            false => Err(tensor.wrong_shape(&[len])),
        };
        self.note(result)
    }

    fn bias(&mut self, part: &Option<VectorPart>) -> Option<Vec<f32>> {
        let part = part.as_ref()?;
        let tensor = self.needed(&part.tensor)?;
        let result = float::vector(&tensor, part);
        self.note(result)
    }

    /// A table of expert ids.
    fn expert_ids(&mut self, name: &str, shape: [usize; 2], experts: usize) -> Option<Vec<u32>> {
        let tensor = self.needed(name)?;
        let ids = tensor.expect_shape(&shape).and_then(|()| tensor.to_i64()).and_then(|ids| {
            ids.into_iter()
                .map(|id| match u32::try_from(id) {
                    Ok(small) if (small as usize) < experts => Ok(small),
                    _ => Err(tensor.error(format!("names expert {id}, of {experts}"))),
                })
                .collect()
        });
        self.note(ids)
    }
}
