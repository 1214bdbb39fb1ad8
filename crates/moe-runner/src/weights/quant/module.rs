//! The tensors of one module, by role.

use super::names;
use crate::Error;
use crate::checkpoint::architecture::{Projection, Stack};
use crate::checkpoint::{Dtype, Tensor};
use crate::weights::load::accounting::Loader;
use crate::weights::{Matrix, Misfit, ScaleType, Stored};

/// Why a projection could not be loaded.
#[derive(Debug)]
pub(crate) enum Problem {
    /// A tensor of this name is needed and absent.
    Missing(String),
    /// A tensor or the configuration is not what it must be.
    Wrong(Error),
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        Self::Wrong(error)
    }
}

pub(crate) type Result<T, E = Problem> = std::result::Result<T, E>;

/// A module and where its tensors are gotten from.
pub(crate) struct Module<'l, 'a> {
    pub(crate) loader: &'l mut Loader<'a>,
    pub(crate) projection: &'l Projection,
}

impl Module<'_, '_> {
    /// Rows and columns of the stored matrix, of which the projection may be a part.
    pub(super) fn dims(&self) -> [usize; 2] {
        [self.projection.part.of, self.projection.cols]
    }

    /// The name of the first tensor that is there.
    pub(crate) fn name(&self, endings: &[&str]) -> Option<String> {
        let names = endings.iter().map(|ending| format!("{}{ending}", self.projection.module));
        names.into_iter().find(|name| self.loader.checkpoint().contains(name))
    }

    /// The first tensor that is there; of a stack, the part of this matrix; of two scales of gate and
    /// up in one array, this projection's.
    pub(crate) fn find(&mut self, endings: &[&str]) -> Result<Option<Tensor>> {
        let Some(name) = self.name(endings) else { return Ok(None) };
        let Some(tensor) = self.loader.claim(&name)? else { return Ok(None) };
        let tensor = match self.projection.part.stack {
            Some(stack) => layer_of(&tensor, stack)?,
            None => tensor,
        };
        Ok(Some(self.own_half(tensor)))
    }

    /// Gate and up in one array may have a tensor's scale each: `[2]`, gate first.
    fn own_half(&self, tensor: Tensor) -> Tensor {
        let Projection { rows, part, .. } = self.projection;
        let is_half = part.of == 2 * rows && part.of > 2;
        let is_scale = scale_of(tensor.dtype).is_some_and(|kind| FLOATS.contains(&kind));
        if !is_half || !is_scale || tensor.shape.iter().product::<usize>() != 2 {
            return tensor;
        }
        let (size, half) = (tensor.bytes.len() / 2, usize::from(part.first > 0));
        match tensor.bytes.slice(half * size..(half + 1) * size) {
            Some(bytes) => Tensor { shape: vec![1], bytes, ..tensor },
            None => tensor,
        }
    }

    /// As [`find`](Self::find). If none is there, the one is missing whose ending other tensors of
    /// the checkpoint have, or else the first.
    pub(super) fn need(&mut self, endings: &[&str]) -> Result<Tensor> {
        if let Some(tensor) = self.find(endings)? {
            return Ok(tensor);
        }
        let mut named = endings.iter().filter(|ending| !ending.is_empty());
        let usual = named.find(|ending| self.loader.checkpoint().any_name_ends(ending));
        Err(Problem::Missing(format!("{}{}", self.projection.module, usual.unwrap_or(&endings[0]))))
    }

    /// Gives all tensors of the module a role: one problem is enough to tell about.
    pub(super) fn set_all_aside(&mut self) {
        let (checkpoint, projection) = (self.loader.checkpoint(), self.projection);
        let module = &projection.module;
        for name in checkpoint.names_below(module) {
            let ending = &name[module.len()..];
            if names::ALL.iter().any(|endings| endings.contains(&ending)) {
                // what is wrong with one of them is not what is being told
                let _ = self.find(&[ending]);
            }
        }
        let _ = self.set_zero_bias_aside();
    }

    /// Some writers give every module a bias. One of zeros is set aside; any other must have a role
    /// in the model.
    pub(super) fn set_zero_bias_aside(&mut self) -> Result<()> {
        let Some(name) = self.name(names::BIAS) else { return Ok(()) };
        let bias = self.loader.checkpoint().tensor(&name)?;
        if bias.as_ref().is_some_and(|bias| bias.blank) {
            return self.set_aside(names::BIAS);
        }
        match bias.map(|bias| bias.to_f32()).transpose()? {
            Some(values) if values.iter().all(|b| *b == 0.0) => self.set_aside(names::BIAS),
            _ => Ok(()),
        }
    }

    /// A tensor with one positive, finite element.
    pub(super) fn need_scale(&mut self, endings: &[&str]) -> Result<f32> {
        let tensor = self.need(endings)?;
        scale_value(&tensor).map_err(Problem::Wrong)
    }

    /// Gives tensors a role that say nothing which is not known otherwise.
    pub(super) fn set_aside(&mut self, endings: &[&str]) -> Result<()> {
        self.find(endings).map(|_| ())
    }

    /// The projection's part of the whole matrix.
    pub(super) fn part(&self, whole: impl Into<Stored>) -> Result<Matrix> {
        let part = self.projection.part;
        let matrix = Matrix::new(whole);
        matrix.rows_of(part.first, part.step, self.projection.rows).ok_or_else(|| {
            Problem::Wrong(Error::tensor(
                self.loader.checkpoint().path(),
                &self.projection.module,
                format!("has no rows {}.. in steps of {}", part.first, part.step),
            ))
        })
    }
}

/// The value of a stored scale, which must be one to divide by.
pub(crate) fn scale_value(tensor: &Tensor) -> Result<f32, Error> {
    if tensor.shape.iter().product::<usize>() != 1 {
        return Err(tensor.error(format!("has shape {:?}; one scale is needed", tensor.shape)));
    }
    let value = tensor.to_f32()?[0];
    if !(value.is_finite() && value > 0.0) {
        return Err(tensor.error(format!(
            "is {value}; a scale must be positive and finite (was this expert calibrated?)"
        )));
    }
    Ok(value)
}

/// One matrix's part of a stack. A tensor with one element is shared by all.
fn layer_of(tensor: &Tensor, stack: Stack) -> Result<Tensor, Error> {
    let Stack { index, count, flat } = stack;
    if tensor.shape.iter().product::<usize>() == 1 && count != 1 {
        return Ok(tensor.clone());
    }
    let shape = match tensor.shape.split_first() {
        Some((first, rest)) if *first == count && !flat => rest.to_vec(),
        Some((first, rest)) if flat && count > 0 && first.is_multiple_of(count) => {
            [&[first / count], rest].concat()
        }
        _ => {
            return Err(tensor.error(format!(
                "has shape {:?}, which is no stack of {count} matrices",
                tensor.shape
            )));
        }
    };
    let size = tensor.bytes.len() / count.max(1);
    let bytes = tensor.bytes.slice(index * size..(index + 1) * size);
    let bytes = bytes.ok_or_else(|| tensor.error("holds fewer bytes than its shape says"))?;
    Ok(Tensor { shape, bytes, ..tensor.clone() })
}

/// Checks a tensor's dtype.
pub(super) fn expect_dtype(tensor: &Tensor, dtypes: &[Dtype]) -> Result<(), Error> {
    if dtypes.contains(&tensor.dtype) {
        return Ok(());
    }
    let names: Vec<String> = dtypes.iter().map(Dtype::to_string).collect();
    Err(tensor.error(format!("is {}; {} is needed", tensor.dtype, names.join(" or "))))
}

/// Checks a shape, whatever dimensions of one stand in it.
pub(super) fn expect_dims(tensor: &Tensor, shape: &[usize]) -> Result<(), Error> {
    let squeeze = |shape: &[usize]| shape.iter().copied().filter(|n| *n != 1).collect::<Vec<_>>();
    if squeeze(&tensor.shape) == squeeze(shape) {
        return Ok(());
    }
    Err(tensor.error(format!("has shape {:?}, the layer needs {shape:?}", tensor.shape)))
}

/// Integers in words of 32 bits.
pub(super) const WORDS: &[Dtype] = &[Dtype::I32, Dtype::U32];

/// The type of a tensor of scales; bytes are powers of two. `None` for what cannot be one.
pub(crate) fn scale_of(dtype: Dtype) -> Option<ScaleType> {
    match dtype {
        Dtype::F32 => Some(ScaleType::F32),
        Dtype::F16 => Some(ScaleType::F16),
        Dtype::Bf16 => Some(ScaleType::Bf16),
        Dtype::F8E4M3 => Some(ScaleType::E4m3),
        Dtype::F8E8M0 | Dtype::U8 => Some(ScaleType::E8m0),
        _ => None,
    }
}

/// A tensor that does not fit the others of its matrix.
pub(super) fn misfit(tensor: &Tensor) -> impl Fn(Misfit) -> Problem {
    |misfit| Problem::Wrong(tensor.error(format!("cannot be read: {misfit}")))
}

/// The type of a tensor of scales, which must be one of `allowed`.
pub(super) fn scale_type(tensor: &Tensor, allowed: &[ScaleType]) -> Result<ScaleType, Error> {
    scale_of(tensor.dtype).filter(|stored| allowed.contains(stored)).ok_or_else(|| {
        let names: Vec<String> = allowed.iter().map(ScaleType::to_string).collect();
        tensor.error(format!("is {}; scales here are {}", tensor.dtype, names.join(" or ")))
    })
}

/// Scales that are not rounded to few bits.
pub(super) const FLOATS: &[ScaleType] = &[ScaleType::F32, ScaleType::F16, ScaleType::Bf16];
