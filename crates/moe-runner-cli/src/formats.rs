//! Number formats of weights, by the names that `bench` knows.

use anyhow::Result;
use moe_runner::hidden::ActivationDtype;
use moe_runner::weights::FloatType;

use crate::failure::unusable;

/// A format, and how random weights of it are made; `None`: not in this build.
struct Format {
    name: &'static str,
    float: Option<FloatType>,
}

const fn format(name: &'static str, float: Option<FloatType>) -> Format {
    Format { name, float }
}

/// Every format, plain floats first.
const FORMATS: &[Format] = &[
    format("f32", Some(FloatType::F32)),
    format("f16", Some(FloatType::F16)),
    format("bf16", Some(FloatType::Bf16)),
    format("fp8", None),
    format("fp8-tensor", None),
    format("fp8-block", None),
    format("int8", None),
    format("int8-weight", None),
    format("int4", None),
    format("int4-g32", None),
    format("mxfp4", None),
    format("mxfp6", None),
    format("mxfp8", None),
    format("nvfp4", None),
    format("nvfp4-w4a4", None),
    format("q8_0", None),
    format("q5_0", None),
    format("q4_0", None),
    format("q4_k", None),
    format("q6_k", None),
];

/// The format of that name, if this build can make weights of it. `whose`: who asks for it, where
/// that is not the user.
pub(crate) fn find(name: &str, whose: Option<&str>) -> Result<FloatType> {
    let able: Vec<&str> = FORMATS.iter().filter(|f| f.float.is_some()).map(|f| f.name).collect();
    let able = able.join(", ");
    match FORMATS.iter().find(|format| format.name == name) {
        Some(Format { float: Some(float), .. }) => Ok(*float),
        Some(_) => {
            let whose =
                whose.map_or(String::new(), |whose| format!(", in which {whose} is published,"));
            Err(unusable(format!(
                "--format {name}: {name} weights{whose} are not in this build; there are {able}"
            )))
        }
        None => Err(unusable(format!("--format {name}: no such format; there are {able}"))),
    }
}

/// Bytes of one weight.
pub(crate) fn bytes_per_weight(float: FloatType) -> usize {
    float.size()
}

/// The dtype of activations that goes with a format.
pub(crate) fn activations(float: FloatType) -> ActivationDtype {
    match float {
        FloatType::F32 => ActivationDtype::F32,
        FloatType::F16 => ActivationDtype::F16,
        FloatType::Bf16 => ActivationDtype::Bf16,
    }
}
