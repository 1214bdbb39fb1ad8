//! Safetensors files, read and written without the library under test.

use std::collections::HashMap;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

/// A file's tensors as f64, by name, with their shapes and dtypes.
pub(crate) struct Values(HashMap<String, (Dtype, Vec<usize>, Vec<f64>)>);

impl Values {
    pub(crate) fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.tensors().into_iter().map(|(name, view)| {
            (name, (view.dtype(), view.shape().to_vec(), values(view.dtype(), view.data())))
        });
        Self(tensors.collect())
    }

    pub(crate) fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.0.keys().map(String::as_str).collect();
        names.sort();
        names
    }

    pub(crate) fn get(&self, name: &str) -> &[f64] {
        &self.0.get(name).unwrap_or_else(|| panic!("no '{name}' in {:?}", self.names())).2
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub(crate) fn shape(&self, name: &str) -> &[usize] {
        &self.0[name].1
    }

    pub(crate) fn dtype(&self, name: &str) -> Dtype {
        self.0[name].0
    }
}

fn values(dtype: Dtype, data: &[u8]) -> Vec<f64> {
    match dtype {
        Dtype::F32 => {
            data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect()
        }
        Dtype::F16 => {
            data.chunks_exact(2).map(|b| f16::from_le_bytes(b.try_into().unwrap()).into()).collect()
        }
        Dtype::BF16 => data
            .chunks_exact(2)
            .map(|b| bf16::from_le_bytes(b.try_into().unwrap()).into())
            .collect(),
        Dtype::I32 => {
            data.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()).into()).collect()
        }
        Dtype::I64 => {
            data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64).collect()
        }
        _ => data.iter().map(|b| f64::from(*b)).collect(),
    }
}

/// A tensor to write.
pub(crate) struct New<'a> {
    pub(crate) name: &'a str,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl<'a> New<'a> {
    pub(crate) fn f32(name: &'a str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { name, dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }

    pub(crate) fn i64(name: &'a str, shape: &[usize], values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { name, dtype: Dtype::I64, shape: shape.to_vec(), bytes }
    }
}

pub(crate) fn write(path: &Path, tensors: &[New]) {
    let views = tensors
        .iter()
        .map(|new| (new.name, TensorView::new(new.dtype, new.shape.clone(), &new.bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// `‖a−r‖² / ‖r‖²`
pub(crate) fn nmse(a: &[f64], r: &[f64]) -> f64 {
    assert_eq!(a.len(), r.len());
    let error: f64 = a.iter().zip(r).map(|(a, r)| (a - r).powi(2)).sum();
    error / r.iter().map(|r| r * r).sum::<f64>()
}
