//! The number formats of experts' weights, each exact for every weight of the block.

use std::path::{Path, PathBuf};

use moe_kernels::numerics::{e2m1, e4m3, e8m0};
use safetensors::Dtype;
use serde_json::{Value, json};

use super::{GGUF, Tensor, Tensors};
use crate::Family;
use crate::block::{Sparse, UP_SCALE};

/// How experts' weights are stored; all else is floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// IEEE binary32, all of the checkpoint.
    F32,
    /// bfloat16, all of the checkpoint.
    Bf16,
    /// FP8 E4M3, a scale for each output feature; weights alone.
    Fp8,
    /// INT4 in groups of 32 with zero points that differ from group to group; weights alone.
    Int4,
    /// FP4 in groups of 32 with powers of two.
    Mxfp4,
    /// FP4 in groups of 16 with E4M3 scales and one scale a tensor; weights alone.
    Nvfp4,
    /// A GGUF file of IEEE binary32.
    GgufF32,
    /// A GGUF file, experts in IEEE binary16.
    GgufF16,
    /// A GGUF file, experts in blocks of 32 bytes with a scale.
    GgufQ8_0,
    /// A GGUF file, experts in blocks of 32 codes of four bits with a scale.
    GgufQ4_0,
    /// A GGUF file, experts in blocks of 32 values of FP4 with a power of two.
    GgufMxfp4,
}

/// Weights that share a scale.
const INT4_GROUP: usize = 32;

impl Form {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::Bf16,
        Self::Fp8,
        Self::Int4,
        Self::Mxfp4,
        Self::Nvfp4,
        Self::GgufF32,
        Self::GgufF16,
        Self::GgufQ8_0,
        Self::GgufQ4_0,
        Self::GgufMxfp4,
    ];

    /// Its name, as the command takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Int4 => "int4",
            Self::Mxfp4 => "mxfp4",
            Self::Nvfp4 => "nvfp4",
            Self::GgufF32 => "gguf-f32",
            Self::GgufF16 => "gguf-f16",
            Self::GgufQ8_0 => "gguf-q8_0",
            Self::GgufQ4_0 => "gguf-q4_0",
            Self::GgufMxfp4 => "gguf-mxfp4",
        }
    }

    /// What an engine opens of the checkpoint in `folder`: the folder, or the GGUF file in it.
    pub fn opened(self, folder: &Path) -> PathBuf {
        if self.is_gguf() { folder.join(GGUF) } else { folder.to_owned() }
    }

    /// The form of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|form| form.name() == name)
    }

    /// Whether weights are plain floats.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::Bf16)
    }

    /// Whether the checkpoint is one GGUF file.
    pub(super) fn is_gguf(self) -> bool {
        use Form::{GgufF16, GgufF32, GgufMxfp4, GgufQ4_0, GgufQ8_0};
        matches!(self, GgufF32 | GgufF16 | GgufQ8_0 | GgufQ4_0 | GgufMxfp4)
    }

    /// Why `family` is not written in this form.
    pub fn refuses(self, family: &Family) -> Option<String> {
        let published = self.is_float() || self == Self::Mxfp4 || self.is_gguf();
        let own = family.name == "gpt_oss" && !published;
        own.then(|| format!("gpt_oss is published in MXFP4 and floats, not in {}", self.name()))
    }

    /// A tensor of floats in the checkpoint's dtype.
    pub(super) fn float(self, shape: &[usize], values: impl IntoIterator<Item = f64>) -> Tensor {
        match self {
            Self::F32 => Tensor::f32(shape, values),
            _ => Tensor::bf16(shape, values),
        }
    }

    /// The object at `quantization_config`, in the words of compressed-tensors.
    pub(super) fn config(self, ignore: &[&str]) -> Value {
        let weights = |bits: usize, kind: &str, strategy: &str, group: Option<usize>| {
            json!({
                "dynamic": false,
                "group_size": group,
                "num_bits": bits,
                "strategy": strategy,
                "symmetric": self != Self::Int4,
                "type": kind,
            })
        };
        let (format, mut weights) = match self {
            Self::Fp8 => ("float-quantized", weights(8, "float", "channel", None)),
            Self::Int4 => ("pack-quantized", weights(4, "int", "group", Some(INT4_GROUP))),
            Self::Mxfp4 => ("mxfp4-pack-quantized", weights(4, "float", "group", Some(32))),
            Self::Nvfp4 => ("nvfp4-pack-quantized", weights(4, "float", "tensor_group", Some(16))),
            // floats, and GGUF files, which have no such object
            _ => return Value::Null,
        };
        match self {
            Self::Mxfp4 => weights["scale_dtype"] = "torch.uint8".into(),
            Self::Nvfp4 => weights["scale_dtype"] = "torch.float8_e4m3fn".into(),
            _ => {}
        }
        json!({
            "config_groups": {
                "group_0": {
                    "format": format,
                    "input_activations": null,
                    "output_activations": null,
                    "targets": ["Linear"],
                    "weights": weights,
                }
            },
            "format": format,
            "global_compression_ratio": null,
            "ignore": ignore,
            "kv_cache_scheme": null,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        })
    }

    /// Adds the tensors of the module `name`, whose weights are `matrix`. The tensor scale of an up
    /// projection differs from that of a gate.
    pub(super) fn add(self, name: &str, matrix: &Sparse, is_up: bool, to: &mut Tensors) {
        let (rows, cols) = (matrix.rows, matrix.cols);
        let mut add = |ending: &str, tensor| to.insert(format!("{name}{ending}"), tensor);
        match self {
            Self::Fp8 => {
                let mut codes = vec![0; rows * cols];
                let mut scales = vec![1.0; rows];
                for (row, col, value) in &matrix.entries {
                    // a code of a few units: exact with three bits of mantissa
                    scales[*row] = power_below(*value) / 4.0;
                    codes[row * cols + col] = e4m3::encode((value / scales[*row]) as f32);
                }
                let shape = vec![rows, cols];
                add(".weight", Tensor { dtype: Dtype::F8_E4M3, shape, bytes: codes });
                add(".weight_scale", Tensor::bf16(&[rows, 1], scales));
            }
            Self::Int4 => {
                let groups = cols / INT4_GROUP;
                let zero = |row: usize, group: usize| 4 + ((row * 5 + group * 3) % 8) as u8;
                let mut codes: Vec<u8> =
                    (0..rows * cols).map(|i| zero(i / cols, i % cols / INT4_GROUP)).collect();
                let mut scales = vec![0.5; rows * groups];
                for (row, col, value) in &matrix.entries {
                    scales[row * groups + col / INT4_GROUP] = value.abs() / 4.0;
                    let code = &mut codes[row * cols + col];
                    *code = if *value > 0.0 { *code + 4 } else { *code - 4 };
                }
                // eight zero points along the rows in a word
                let words = (0..rows / 8).flat_map(|word| (0..groups).map(move |g| (word, g)));
                let zeros = words.flat_map(|(word, group)| {
                    (0..4).map(move |pair| {
                        let row = word * 8 + pair * 2;
                        zero(row, group) | zero(row + 1, group) << 4
                    })
                });
                let zeros = Tensor {
                    dtype: Dtype::I32,
                    shape: vec![rows / 8, groups],
                    bytes: zeros.collect(),
                };
                let packed =
                    Tensor { dtype: Dtype::I32, shape: vec![rows, cols / 8], bytes: pairs(&codes) };
                let shape = [rows, cols].iter().flat_map(|n| (*n as i64).to_le_bytes()).collect();
                add(".weight_packed", packed);
                add(".weight_scale", Tensor::bf16(&[rows, groups], scales));
                add(".weight_zero_point", zeros);
                let shape = Tensor { dtype: Dtype::I64, shape: vec![2], bytes: shape };
                add(".weight_shape", shape);
            }
            Self::Mxfp4 => {
                let (codes, scales) = mxfp4(matrix);
                add(".weight_packed", Tensor::u8(&[rows, cols / 2], codes));
                add(".weight_scale", Tensor::u8(&[rows, cols / 32], scales));
            }
            Self::Nvfp4 => {
                let gate = if matrix.rows > matrix.cols { 2048.0 } else { 1.0 };
                let global = if is_up { gate * UP_SCALE } else { gate };
                let mut codes = vec![0; rows * cols];
                let mut scales = vec![e4m3::encode(1.0); rows * cols / 16];
                for (row, col, value) in &matrix.entries {
                    let (code, scale) = four_bits(*value);
                    codes[row * cols + col] = code;
                    scales[(row * cols + col) / 16] = e4m3::encode((scale * global) as f32);
                }
                let scale_shape = vec![rows, cols / 16];
                let scales = Tensor { dtype: Dtype::F8_E4M3, shape: scale_shape, bytes: scales };
                add(".weight_packed", Tensor::u8(&[rows, cols / 2], pairs(&codes)));
                add(".weight_scale", scales);
                add(".weight_global_scale", Tensor::f32(&[1], [global]));
            }
            _ => {
                add(".weight", self.float(&[rows, cols], matrix.dense()));
            }
        }
    }
}

/// Codes two to a byte, and scales, of a matrix in MXFP4.
pub(super) fn mxfp4(matrix: &Sparse) -> (Vec<u8>, Vec<u8>) {
    let (rows, cols) = (matrix.rows, matrix.cols);
    let mut codes = vec![0; rows * cols];
    let mut scales = vec![e8m0::from_exponent(0); rows * cols / 32];
    for (row, col, value) in &matrix.entries {
        let (code, scale) = four_bits(*value);
        codes[row * cols + col] = code;
        scales[(row * cols + col) / 32] = e8m0::from_exponent(scale.log2() as i32);
    }
    (pairs(&codes), scales)
}

/// `value` as an E2M1 code times a power of two.
pub(super) fn four_bits(value: f64) -> (u8, f64) {
    let power = power_below(value);
    // 1.0 to 1.5 of it: 4 or 6
    (e2m1::encode((value / power * 4.0) as f32), power / 4.0)
}

/// The greatest power of two that is not above `|value|`.
pub(super) fn power_below(value: f64) -> f64 {
    value.abs().log2().floor().exp2()
}

/// Codes of four bits, two to a byte.
fn pairs(codes: &[u8]) -> Vec<u8> {
    codes.chunks_exact(2).map(|pair| pair[0] | pair[1] << 4).collect()
}
