//! Names and numbers of other languages, as options.

use moe_kernels::isa::physical_cores;
use moe_runner::hidden::ActivationDtype;
use moe_runner::runner::Options;
use moe_runner::spec::Activation;
use moe_runner::weights::{FloatType, GateUp};
use moe_runner::{Error, Result, experts};

/// The options of a layer: `threads` 0 is the physical cores that this process may use; a `kernel` is
/// used or refused, never replaced.
///
/// # Errors
/// If the threads cannot be started.
pub fn options(dtype: ActivationDtype, threads: usize, kernel: Option<&str>) -> Result<Options> {
    let threads = if threads == 0 { physical_cores() } else { threads };
    Ok(Options { kernel: kernel.map(str::to_owned), ..Options::new(dtype, threads)? })
}

/// The same on a device: "auto" and "cpu" are the processor, "cuda" and "cuda:N" an NVIDIA GPU, the first
/// or that of the number.
///
/// # Errors
/// [`Error::Input`] for another name; [`Error::Device`], in one line, for a GPU that cannot be had.
pub fn on_device(options: Options, device: &str) -> Result<Options> {
    let gpu = match device.split_once(':') {
        None if device == "auto" => return Ok(options),
        None if device == "cpu" => {
            return Ok(Options { device: Some(experts::Device::Cpu), ..options });
        }
        None if device == "cuda" => Some(0),
        Some(("cuda", number)) => number.parse().ok(),
        _ => None,
    };
    let unknown = || format!("'{device}'; there are auto, cpu, cuda and cuda:N");
    options.on_gpu(gpu.ok_or_else(|| Error::input("device", unknown()))?)
}

/// "f32", "bf16" or "f16".
///
/// # Errors
/// [`Error::Input`] for another name.
pub fn activation_dtype(name: &str) -> Result<ActivationDtype> {
    [ActivationDtype::F32, ActivationDtype::Bf16, ActivationDtype::F16]
        .into_iter()
        .find(|dtype| dtype.name() == name)
        .ok_or_else(|| Error::input("dtype", format!("'{name}'; there are f32, bf16 and f16")))
}

/// The same as a type of stored floats.
pub fn float_type(dtype: ActivationDtype) -> FloatType {
    match dtype {
        ActivationDtype::F32 => FloatType::F32,
        ActivationDtype::Bf16 => FloatType::Bf16,
        ActivationDtype::F16 => FloatType::F16,
    }
}

/// Which rows of gate and up are whose: "halves", "up_first", "interleaved" or "up_only".
///
/// # Errors
/// [`Error::Input`] for another name.
pub fn gate_up(name: &str) -> Result<GateUp> {
    Ok(match name {
        "halves" => GateUp::Halves,
        "up_first" => GateUp::HalvesUpFirst,
        "interleaved" => GateUp::Interleaved,
        "up_only" => GateUp::UpOnly,
        _ => {
            let reason = format!("'{name}'; there are halves, up_first, interleaved and up_only");
            return Err(Error::input("layout", reason));
        }
    })
}

/// The function between the experts' products, with its parameters, of which each function uses those
/// that it has.
#[derive(Clone, Copy, Debug)]
pub struct Function<'a> {
    /// Its name.
    pub name: &'a str,
    /// Steepness of clamped_swiglu's sigmoid.
    pub alpha: f32,
    /// Added to clamped_swiglu's up projection; situ's β.
    pub beta: f32,
    /// What clamped_swiglu and swiglu_step clamp to.
    pub limit: f32,
    /// situ's λ; 0: it has none.
    pub lambda: f32,
}

/// The activation of that name.
///
/// # Errors
/// [`Error::Input`] for a name that no function has.
pub fn activation(function: Function<'_>) -> Result<Activation> {
    let Function { name, alpha, beta, limit, lambda } = function;
    Ok(match name {
        "silu" => Activation::Silu,
        "gelu" => Activation::Gelu,
        "gelu_tanh" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        "relu2" => Activation::Relu2,
        "clamped_swiglu" => Activation::ClampedSwiglu { alpha, beta, limit },
        "swiglu_step" => Activation::SwigluStep { limit },
        "situ" => Activation::Situ { beta, lambda: (lambda != 0.0).then_some(lambda) },
        _ => {
            let known = "silu, gelu, gelu_tanh, relu, relu2, clamped_swiglu, swiglu_step and situ";
            return Err(Error::input("activation", format!("'{name}'; there are {known}")));
        }
    })
}
