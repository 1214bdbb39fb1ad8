//! The formats to write: their configuration, their tensors, and the quantisers that fill them.
//!
//! | format | configuration | tensors of a module `[N, K]` |
//! |---|---|---|
//! | fp8 | `float-quantized`, channel × token | `weight` F8_E4M3 `[N, K]`, `weight_scale` F32 `[N, 1]` |
//! | fp8-block | `float-quantized`, block × group | `weight`, `weight_scale` F32 `[⌈N/128⌉, ⌈K/128⌉]` |
//! | int8 | `int-quantized`, channel × token | `weight` I8 `[N, K]`, `weight_scale` F32 `[N, 1]` |
//! | w4a16 | `pack-quantized`, group | `weight_packed` I32 `[N, ⌈K/8⌉]`, `weight_scale` `[N, K/g]` in the dtype of the weights, `weight_shape` I64 `[2]` |
//! | nvfp4a16 | `nvfp4-pack-quantized` | `weight_packed` U8 `[N, K/2]`, `weight_scale` F8_E4M3 `[N, K/16]`, `weight_global_scale` F32 `[1]` |
//! | mxfp4 | `mxfp4-pack-quantized` | `weight_packed` U8 `[N, K/2]`, `weight_scale` U8 (E8M0) `[N, K/32]` |

use moe_kernels::numerics::EncodeScale;
use moe_kernels::numerics::quantise::weight::{self, NotFinite};
use serde_json::{Value, json};

use crate::checkpoint::{Bytes, Dtype};
use crate::spec::Granularity;
use crate::weights::{
    Codes, Element, FloatType, Global, Matrix, Packing, ScaleType, Scales, Zeros,
};

/// A number format of experts' weights, with what is done to the rows that they multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// FP8 E4M3, a scale for each output feature; activations FP8, a scale for each token.
    Fp8,
    /// FP8 E4M3 in blocks of 128 × 128; activations FP8, a scale for each 128 channels of a token.
    Fp8Block,
    /// INT8, a scale for each output feature; activations INT8, a scale for each token.
    Int8,
    /// INT4 in groups along K; activations as they are.
    W4a16 {
        /// Weights that share a scale; it divides K.
        group: usize,
    },
    /// NVFP4: FP4 in groups of 16, and a scale for each tensor; activations as they are.
    Nvfp4a16,
    /// MXFP4: FP4 in groups of 32; activations as they are.
    Mxfp4,
}

const BLOCK: usize = 128;

impl Format {
    /// Names, as [`Format::parse`] takes them.
    pub const NAMES: [&'static str; 6] = ["fp8", "fp8-block", "int8", "w4a16", "nvfp4a16", "mxfp4"];

    /// The format of that name. `group` is the size of a group, for the one that has a choice.
    pub fn parse(name: &str, group: usize) -> Option<Self> {
        Some(match name {
            "fp8" => Self::Fp8,
            "fp8-block" => Self::Fp8Block,
            "int8" => Self::Int8,
            "w4a16" => Self::W4a16 { group },
            "nvfp4a16" => Self::Nvfp4a16,
            "mxfp4" => Self::Mxfp4,
            _ => return None,
        })
    }

    /// The format's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp8 => "fp8",
            Self::Fp8Block => "fp8-block",
            Self::Int8 => "int8",
            Self::W4a16 { .. } => "w4a16",
            Self::Nvfp4a16 => "nvfp4a16",
            Self::Mxfp4 => "mxfp4",
        }
    }

    /// Why a matrix of `cols` columns cannot be stored in this format.
    pub(super) fn refuses(self, cols: usize) -> Option<String> {
        let group = match self {
            Self::Fp8 | Self::Fp8Block | Self::Int8 => return None,
            Self::W4a16 { group } => group,
            Self::Nvfp4a16 => 16,
            Self::Mxfp4 => 32,
        };
        if group > 0 && cols.is_multiple_of(group) {
            return None;
        }
        let advice = match [128, 64, 32, 16, 8].into_iter().find(|g| cols.is_multiple_of(*g)) {
            Some(fits) if matches!(self, Self::W4a16 { .. }) => format!("groups of {fits} do"),
            _ => "fp8 and int8 take any number".into(),
        };
        Some(format!(
            "has {cols} columns, which groups of {group} ({}) do not divide; {advice}",
            self.name()
        ))
    }

    /// The object at `quantization_config`, with the modules that are left as they are.
    pub(super) fn config(self, ignore: &[String]) -> Value {
        let arguments = |bits: usize, kind: &str, strategy: &str, group: Option<usize>| {
            json!({
                "dynamic": false,
                "group_size": group,
                "num_bits": bits,
                "strategy": strategy,
                "symmetric": true,
                "type": kind,
            })
        };
        let dynamic = |mut arguments: Value| {
            arguments["dynamic"] = true.into();
            arguments
        };
        let with = |mut arguments: Value, key: &str, value: Value| {
            arguments[key] = value;
            arguments
        };
        let (name, weights, inputs) = match self {
            Self::Fp8 => (
                "float-quantized",
                arguments(8, "float", "channel", None),
                dynamic(arguments(8, "float", "token", None)),
            ),
            Self::Fp8Block => (
                "float-quantized",
                with(
                    arguments(8, "float", "block", None),
                    "block_structure",
                    json!([BLOCK, BLOCK]),
                ),
                dynamic(arguments(8, "float", "group", Some(BLOCK))),
            ),
            Self::Int8 => (
                "int-quantized",
                arguments(8, "int", "channel", None),
                dynamic(arguments(8, "int", "token", None)),
            ),
            Self::W4a16 { group } => {
                ("pack-quantized", arguments(4, "int", "group", Some(group)), Value::Null)
            }
            Self::Nvfp4a16 => (
                "nvfp4-pack-quantized",
                with(
                    arguments(4, "float", "tensor_group", Some(16)),
                    "scale_dtype",
                    "torch.float8_e4m3fn".into(),
                ),
                Value::Null,
            ),
            Self::Mxfp4 => (
                "mxfp4-pack-quantized",
                with(arguments(4, "float", "group", Some(32)), "scale_dtype", "torch.uint8".into()),
                Value::Null,
            ),
        };
        json!({
            "config_groups": {
                "group_0": {
                    "format": name,
                    "input_activations": inputs,
                    "output_activations": null,
                    "targets": ["Linear"],
                    "weights": weights,
                },
            },
            "format": name,
            "ignore": ignore,
            "kv_cache_scheme": null,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        })
    }

    /// The tensors of a module `[rows, cols]`, whose floats are of type `float`: ending of the
    /// name, dtype and shape, in the order in which [`quantise`](Self::quantise) gives the bytes.
    pub(super) fn tensors(
        self,
        float: FloatType,
        [rows, cols]: [usize; 2],
    ) -> Vec<(&'static str, Dtype, Vec<usize>)> {
        const CODES: &str = ".weight";
        const PACKED: &str = ".weight_packed";
        const SCALES: &str = ".weight_scale";
        match self {
            Self::Fp8 => {
                vec![(CODES, Dtype::F8E4M3, vec![rows, cols]), (SCALES, Dtype::F32, vec![rows, 1])]
            }
            Self::Fp8Block => vec![
                (CODES, Dtype::F8E4M3, vec![rows, cols]),
                (SCALES, Dtype::F32, vec![rows.div_ceil(BLOCK), cols.div_ceil(BLOCK)]),
            ],
            Self::Int8 => {
                vec![(CODES, Dtype::I8, vec![rows, cols]), (SCALES, Dtype::F32, vec![rows, 1])]
            }
            Self::W4a16 { group } => vec![
                (PACKED, Dtype::I32, vec![rows, cols.div_ceil(8)]),
                (SCALES, dtype(float), vec![rows, cols / group]),
                (".weight_shape", Dtype::I64, vec![2]),
            ],
            Self::Nvfp4a16 => vec![
                (PACKED, Dtype::U8, vec![rows, cols / 2]),
                (SCALES, Dtype::F8E4M3, vec![rows, cols / 16]),
                (".weight_global_scale", Dtype::F32, vec![1]),
            ],
            Self::Mxfp4 => vec![
                (PACKED, Dtype::U8, vec![rows, cols / 2]),
                (SCALES, Dtype::U8, vec![rows, cols / 32]),
            ],
        }
    }

    /// Whether modules that are computed as one share a scale, and so their largest magnitude.
    pub(super) fn shares_scale(self) -> bool {
        self == Self::Nvfp4a16
    }

    /// The contents of [`tensors`](Self::tensors), and the matrix that a reader makes of them.
    /// `largest` is the largest magnitude of the modules that share a scale.
    pub(super) fn quantise(
        self,
        values: &[f32],
        [rows, cols]: [usize; 2],
        float: FloatType,
        largest: f32,
    ) -> Result<Quantised, NotFinite> {
        let dims = [rows, cols];
        let (bytes, element, scale, granularity, block, zeros, global) = match self {
            Self::Fp8 => {
                let weight::Quantised { codes, scales } = weight::fp8_channel(values, cols)?;
                let bytes = vec![codes.into(), float_bytes(&scales, FloatType::F32)];
                let channel = Granularity::Channel;
                (bytes, Element::E4m3, ScaleType::F32, channel, [1, 1], Zeros::None, None)
            }
            Self::Fp8Block => {
                let block = [BLOCK, BLOCK];
                let weight::Quantised { codes, scales } = weight::fp8_block(values, cols, block)?;
                let bytes = vec![codes.into(), float_bytes(&scales, FloatType::F32)];
                let blocks = Granularity::Block;
                (bytes, Element::E4m3, ScaleType::F32, blocks, block, Zeros::None, None)
            }
            Self::Int8 => {
                let weight::Quantised { codes, scales } = weight::int8_channel(values, cols)?;
                let codes: Vec<u8> = codes.into_iter().map(|code| code as u8).collect();
                let bytes = vec![codes.into(), float_bytes(&scales, FloatType::F32)];
                let channel = Granularity::Channel;
                (bytes, Element::Int8, ScaleType::F32, channel, [1, 1], Zeros::None, None)
            }
            Self::W4a16 { group } => {
                let (rounded, stored) = match float {
                    FloatType::F32 => (weight::ScaleType::F32, ScaleType::F32),
                    FloatType::F16 => (weight::ScaleType::F16, ScaleType::F16),
                    FloatType::Bf16 => (weight::ScaleType::Bf16, ScaleType::Bf16),
                };
                let weight::Quantised { codes, scales } =
                    weight::int4_group(values, cols, group, rounded)?;
                let shape: Vec<u8> =
                    dims.iter().flat_map(|size| (*size as i64).to_le_bytes()).collect();
                let bytes = vec![codes.into(), float_bytes(&scales, float), shape.into()];
                let zeros = Zeros::Same(8);
                (bytes, Element::Uint4, stored, Granularity::Group, [1, group], zeros, None)
            }
            Self::Nvfp4a16 => {
                let scale: EncodeScale = weight::nvfp4_global_scale(largest);
                let weight::Quantised { codes, scales } = weight::nvfp4(values, cols, scale)?;
                let stored = scale.0.to_le_bytes().to_vec();
                let bytes = vec![codes.into(), scales.into(), stored.into()];
                let (group, global) = (Granularity::Group, Some(Global::Divide(scale)));
                (bytes, Element::E2m1, ScaleType::E4m3, group, [1, 16], Zeros::None, global)
            }
            Self::Mxfp4 => {
                let weight::Quantised { codes, scales } = weight::mxfp4(values, cols)?;
                let bytes: Vec<Bytes> = vec![codes.into(), scales.into()];
                let group = Granularity::Group;
                (bytes, Element::E2m1, ScaleType::E8m0, group, [1, 32], Zeros::None, None)
            }
        };
        let scales = Scales::new(bytes[1].clone(), scale, granularity, block, dims);
        let packing = (element, Packing::Rows);
        let matrix = scales
            .and_then(|scales| Codes::new(packing, bytes[0].clone(), dims, scales, zeros, global))
            .map(Matrix::new)
            .expect("a quantiser gives as many codes and scales as its format has");
        Ok(Quantised { bytes, matrix })
    }
}

/// A quantised module.
pub(super) struct Quantised {
    /// Contents of its tensors.
    pub(super) bytes: Vec<Bytes>,
    /// What a reader makes of them.
    pub(super) matrix: Matrix,
}

/// The dtype of a tensor of these floats.
pub(super) fn dtype(float: FloatType) -> Dtype {
    match float {
        FloatType::F32 => Dtype::F32,
        FloatType::F16 => Dtype::F16,
        FloatType::Bf16 => Dtype::Bf16,
    }
}

/// `values`, which the type can hold, as little-endian bytes.
pub(super) fn float_bytes(values: &[f32], float: FloatType) -> Bytes {
    let bytes: Vec<u8> = match float {
        FloatType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        FloatType::F16 => {
            values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect()
        }
        FloatType::Bf16 => {
            values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
        }
    };
    bytes.into()
}
