//! `quantization_config`: which module is stored in which way, for every method that publishes
//! mixture-of-experts checkpoints.
//!
//! Whatever the method, a configuration comes down to [`Quantization`]: a list of modules that are
//! left alone, and rules that give the others a [`Scheme`]. What is not supported is an error for
//! the modules that it concerns, not for the checkpoint: attention in an unknown format does not
//! keep experts from being loaded.

mod compressed_tensors;
mod gptq;
mod mlx;
mod modelopt;
mod native;
mod pattern;
mod quark;
mod scheme;

pub use scheme::{InputScheme, MlxMode, MxElement, Number, ScaleShape, Scheme, WeightScheme};

use super::{Checkpoint, Config};
use crate::{Error, Result};
use pattern::{Matcher, Pattern};

/// Where a configuration may stand in `config.json`.
const KEYS: [&str; 5] = [
    "quantization_config",
    "text_config.quantization_config",
    "language_config.quantization_config",
    "compression_config",
    MLX,
];

/// Where MLX has its own.
const MLX: &str = "quantization";

/// ModelOpt's own file, beside `config.json`.
const MODELOPT_FILE: &str = "hf_quant_config.json";

/// What a checkpoint says about the formats of its weights.
#[derive(Clone, Debug)]
pub struct Quantization {
    config: Config,
    method: String,
    /// Which list of modules comes first: 0 for those that are left as floats, then those of the
    /// rules.
    matcher: Matcher,
    schemes: Vec<std::result::Result<Scheme, Unsupported>>,
}

#[derive(Clone, Debug)]
struct Rule {
    modules: Vec<Pattern>,
    scheme: std::result::Result<Scheme, Unsupported>,
}

/// What cannot be loaded: the key of the configuration, and why.
#[derive(Clone, Debug)]
struct Unsupported {
    key: String,
    reason: String,
}

impl Unsupported {
    fn new(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { key: key.into(), reason: reason.into() }
    }
}

/// What the reader of one method's configuration finds.
#[derive(Debug, Default)]
struct Rules {
    ignored: Vec<Pattern>,
    rules: Vec<Rule>,
}

impl Rules {
    /// One scheme for all modules but the ignored ones.
    fn all(ignored: Vec<Pattern>, scheme: std::result::Result<Scheme, Unsupported>) -> Self {
        Self { ignored, rules: vec![Rule { modules: vec![Pattern::All], scheme }] }
    }
}

impl Quantization {
    /// Reads the checkpoint's configuration; `None` where it has none. (GGUF files have none: each
    /// tensor has its type.)
    ///
    /// # Errors
    /// [`Error::Config`] with the key that is missing, unusable, or names a method that is not
    /// supported; also what [`Config::open`] says about `hf_quant_config.json`.
    pub fn of(checkpoint: &Checkpoint) -> Result<Option<Self>> {
        let Some(config) = checkpoint.config() else { return Ok(None) };
        // a copy made by MLX may still say what it was made from
        if let Some(own) = config.sub(MLX).unwrap_or_default().filter(mlx::is_own) {
            return Self::read(&own).map(Some);
        }
        for key in KEYS {
            if let Some(quantization) = config.sub(key)? {
                let outer = config.str("expert_dtype")?;
                let inner = config.str("text_config.expert_dtype")?;
                return Self::with_experts(&quantization, outer.or(inner)).map(Some);
            }
        }
        let beside = checkpoint.path().join(MODELOPT_FILE);
        if !beside.is_file() {
            return Ok(None);
        }
        let config = Config::open(&beside)?;
        let rules = modelopt::read(&config)?;
        Ok(Some(Self::new(&config, "modelopt", rules)))
    }

    /// Reads a configuration: the object at `quantization_config`.
    ///
    /// # Errors
    /// As [`Quantization::of`].
    pub fn read(config: &Config) -> Result<Self> {
        Self::with_experts(config, None)
    }

    /// As [`Quantization::read`]; `experts` is the model's own word for how routed experts are stored
    /// (DeepSeek-V4's `expert_dtype`).
    fn with_experts(config: &Config, experts: Option<&str>) -> Result<Self> {
        let experts = config.str("expert_dtype")?.or(experts);
        let method = config.str("quant_method")?.unwrap_or_default();
        // an error for what is stored so: models may have experts that are left as floats
        let unsupported = |what: &str| {
            let reason = format!(
                "{what}; supported are fp8, compressed-tensors, modelopt, quark, gptq, awq, auto-round, \
                 mxfp4, and MLX's own, which has no quant_method"
            );
            Rules::all(Vec::new(), Err(Unsupported::new("quant_method", reason)))
        };
        let rules = match method {
            "compressed-tensors" => compressed_tensors::read(config)?,
            // older files of compressed-tensors do not name themselves
            "" if config.get("config_groups").is_some() => compressed_tensors::read(config)?,
            // copies that ModelOpt made of models with FP8 of their own
            "fp8" if config.get("quant_algo").is_some() => {
                modelopt::over(config, native::fp8(config, experts)?)?
            }
            "fp8" => native::fp8(config, experts)?,
            "mxfp4" => native::mxfp4(config)?,
            "gptq" | "gptq_marlin" => gptq::gptq(config)?,
            "awq" | "awq_marlin" => gptq::awq(config)?,
            "auto-round" | "intel/auto-round" => gptq::auto_round(config)?,
            "quark" => quark::read(config)?,
            name if name.starts_with("modelopt") => modelopt::read(config)?,
            // MLX's own has no name
            "" if mlx::is_own(config) => {
                let rules = mlx::read(config)?;
                return Ok(Self::new(config, "mlx", rules));
            }
            "" => return Err(config.missing("quant_method")),
            other => unsupported(&format!("is '{other}'")),
        };
        let name = if method.is_empty() { "compressed-tensors" } else { method };
        Ok(Self::new(config, name, rules))
    }

    fn new(config: &Config, method: &str, rules: Rules) -> Self {
        let Rules { ignored, rules } = rules;
        let (mut modules, mut schemes) = (vec![ignored], vec![Ok(Scheme::FLOAT)]);
        for rule in rules {
            modules.push(rule.modules);
            schemes.push(rule.scheme);
        }
        let matcher = Matcher::new(modules);
        Self { config: config.clone(), method: method.to_string(), matcher, schemes }
    }

    /// `quant_method`.
    pub fn method(&self) -> &str {
        &self.method
    }

    /// Whether the configuration names `module` as one that is left as it is.
    pub fn ignores(&self, module: &str) -> bool {
        self.matcher.first(module) == Some(0)
    }

    /// How `module` (`model.layers.0.mlp.experts.0.gate_proj`) is stored; floats, where the
    /// configuration says nothing about it.
    ///
    /// # Errors
    /// [`Error::Config`] with the key that asks for something that is not supported, and what is.
    pub fn scheme(&self, module: &str) -> Result<Scheme> {
        match self.matcher.first(module).map(|list| &self.schemes[list]) {
            None => Ok(Scheme::FLOAT),
            Some(Ok(scheme)) => Ok(*scheme),
            Some(Err(Unsupported { key, reason })) => {
                Err(self.config.error(key, format!("{reason} (module '{module}')")))
            }
        }
    }

    /// The one scheme of `modules`, an expert's projections.
    ///
    /// # Errors
    /// As [`Quantization::scheme`]; [`Error::Config`] with two modules and their schemes if they
    /// differ.
    pub fn common_scheme(&self, modules: &[&str]) -> Result<Scheme> {
        let mut common: Option<(&str, Scheme)> = None;
        for module in modules {
            let scheme = self.scheme(module)?;
            match common {
                None => common = Some((module, scheme)),
                Some((first, other)) if other != scheme => {
                    return Err(self.mixed([first, module], [other, scheme]));
                }
                Some(_) => {}
            }
        }
        Ok(common.map_or(Scheme::FLOAT, |(_, scheme)| scheme))
    }

    /// Checks that the gate and up projections of an expert, which multiply the same rows, do not
    /// want them quantised in different ways. Their weights may be stored differently.
    ///
    /// # Errors
    /// As [`Quantization::common_scheme`].
    pub fn common_input(&self, gate: &str, up: &str) -> Result<()> {
        let schemes = [self.scheme(gate)?, self.scheme(up)?];
        match schemes[0].input == schemes[1].input {
            true => Ok(()),
            false => Err(self.mixed([gate, up], schemes)),
        }
    }

    fn mixed(&self, modules: [&str; 2], schemes: [Scheme; 2]) -> Error {
        let key = match self.method.as_str() {
            "compressed-tensors" => "config_groups",
            "quark" => "layer_quant_config",
            "gptq" => "dynamic",
            _ => "quantized_layers",
        };
        self.config.error(
            key,
            format!(
                "gives the projections of one expert different schemes: '{}' is {}, '{}' is {}; \
                 they must have the same one",
                modules[0], schemes[0], modules[1], schemes[1]
            ),
        )
    }
}

/// The names at `key` as patterns.
fn patterns(
    config: &Config,
    key: &str,
    make: impl Fn(&Config, &str, &str) -> Result<Pattern>,
) -> Result<Vec<Pattern>> {
    let names = config.str_list(key)?.unwrap_or_default();
    names.into_iter().map(|name| make(config, key, name)).collect()
}

/// A size that divides: at least 1.
fn positive(config: &Config, key: &str) -> Result<Option<usize>> {
    match config.usize(key)? {
        Some(0) => Err(config.error(key, "is 0; it must be at least 1")),
        size => Ok(size),
    }
}

/// Rows and columns of a block, both at least 1.
fn block_size(sizes: &[usize]) -> Option<[usize; 2]> {
    match sizes {
        [rows, cols] if *rows > 0 && *cols > 0 => Some([*rows, *cols]),
        _ => None,
    }
}
