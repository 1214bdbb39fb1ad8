//! A model's `config.json`, read under alternative spellings and layer by layer. What it leaves out
//! is what the family's configuration class says.

use serde_json::Value;

use super::classes::Class;
use crate::checkpoint::Config;
use crate::spec::Activation;
use crate::{Error, Result};

/// Alternative spellings of a key; the first one that is present counts.
pub(super) type Keys = &'static [&'static str];

/// The text part of a config.
pub(super) struct Settings {
    pub config: Config,
    /// What counts where the config says nothing.
    pub class: &'static Class,
    /// Number of decoder layers; known before anything else is read.
    pub layers: usize,
}

/// No published model has a tenth of this many layers.
pub(super) const MAX_LAYERS: usize = 10_000;

impl Settings {
    /// Reads the number of layers.
    pub(super) fn new(config: Config, class: &'static Class, layers: Keys) -> Result<Self> {
        let mut settings = Self { config, class, layers: 0 };
        // hybrid models may state the pattern only
        let stated = settings.stated(layers).is_some();
        let pattern = if stated { None } else { settings.pattern()?.map(|p| p.len()) };
        settings.layers = match pattern {
            Some(count) => count,
            None => settings.need_size(layers, 0)?,
        };
        if settings.layers == 0 || settings.layers > MAX_LAYERS {
            let reason = format!("is {}; it must be 1 to {MAX_LAYERS}", settings.layers);
            return Err(settings.error(layers, reason));
        }
        Ok(settings)
    }

    /// The first of `keys` that the config has a value for; spellings of the family's class first.
    pub(super) fn stated(&self, keys: Keys) -> Option<&'static str> {
        let has = |key: &&'static str| self.config.get(key).is_some();
        let own = keys.iter().copied().filter(|key| self.class.reads(key)).find(has);
        own.or_else(|| keys.iter().copied().find(has))
            .or_else(|| self.class.other_spelling(keys, |key| self.config.get(key).is_some()))
    }

    /// Whether none of `keys` has a value, but one is written as `null`.
    pub(super) fn states_null(&self, keys: Keys) -> bool {
        self.stated(keys).is_none() && keys.iter().any(|key| self.config.is_null(key))
    }

    /// Where the value stands: in the config, or what the class makes of its absence or its `null`.
    fn find(&self, keys: Keys) -> Result<Option<(&Config, &'static str)>> {
        if let Some(key) = self.stated(keys) {
            return Ok(Some((&self.config, key)));
        }
        let in_class = |from: &'static Option<Config>| {
            let from = from.as_ref()?;
            keys.iter().copied().find(|key| from.get(key).is_some()).map(|key| (from, key))
        };
        match keys.iter().find(|key| self.config.is_null(key)) {
            None => Ok(in_class(&self.class.values)),
            Some(key) if self.class.refuses_null(key) => {
                Err(self.config.error(key, "is null, which this model's configuration cannot be"))
            }
            Some(_) => Ok(in_class(&self.class.null)),
        }
    }

    /// An error about the key in use.
    pub(super) fn error(&self, keys: Keys, reason: impl Into<String>) -> Error {
        let key = self.stated(keys).or(keys.first().copied()).unwrap_or_default();
        self.config.error(key, reason)
    }

    /// The error that none of `keys` has a value.
    pub(super) fn missing(&self, keys: Keys) -> Error {
        match keys {
            [] => self.config.missing(""),
            [key] => self.config.missing(key),
            [key, others @ ..] => self.config.error(
                key,
                format!(
                    "is missing (also looked for {}), and the model needs it",
                    others.join(", ")
                ),
            ),
        }
    }

    /// A size: one number, or the `layer`-th of a list.
    pub(super) fn size(&self, keys: Keys, layer: usize) -> Result<Option<usize>> {
        let Some((config, key)) = self.find(keys)? else { return Ok(None) };
        if !config.get(key).is_some_and(Value::is_array) {
            return config.usize(key);
        }
        let list = config.usize_list(key)?.unwrap_or_default();
        match list.get(layer) {
            Some(size) => Ok(Some(*size)),
            None => Err(self.too_short(key, list.len(), layer)),
        }
    }

    /// A size that must be there.
    pub(super) fn need_size(&self, keys: Keys, layer: usize) -> Result<usize> {
        self.size(keys, layer)?.ok_or_else(|| self.missing(keys))
    }

    /// A number, or the `layer`-th of a list (where it may be `null`).
    pub(super) fn number(&self, keys: Keys, layer: usize) -> Result<Option<f32>> {
        let Some((config, key)) = self.find(keys)? else { return Ok(None) };
        let Some(list) = config.get(key).and_then(Value::as_array) else {
            return config.f32(key);
        };
        match list.get(layer) {
            None => Err(self.too_short(key, list.len(), layer)),
            Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64().map(|x| x as f32).filter(|x| x.is_finite()) {
                Some(number) => Ok(Some(number)),
                None => Err(self.config.error(
                    key,
                    format!("has {value} for layer {layer}; it must be a finite number"),
                )),
            },
        }
    }

    /// A number that must be there.
    pub(super) fn need_number(&self, keys: Keys) -> Result<f32> {
        self.number(keys, 0)?.ok_or_else(|| self.missing(keys))
    }

    /// A truth value; `default` where neither the config nor the class has one. A `null` is false,
    /// as it is to the code that reads it.
    pub(super) fn flag(&self, keys: Keys, default: bool) -> Result<bool> {
        match self.find(keys)? {
            Some((config, key)) => Ok(config.bool(key)?.unwrap_or(default)),
            None => Ok(default && !self.states_null(keys)),
        }
    }

    /// A whole number that may be negative.
    pub(super) fn integer(&self, keys: Keys) -> Result<Option<i64>> {
        let Some((config, key)) = self.find(keys)? else { return Ok(None) };
        config.i64(key)
    }

    /// A list of layers.
    pub(super) fn list(&self, keys: Keys) -> Result<Option<Vec<usize>>> {
        let Some((config, key)) = self.find(keys)? else { return Ok(None) };
        config.usize_list(key)
    }

    /// A string.
    pub(super) fn text(&self, keys: Keys) -> Result<Option<&str>> {
        let Some((config, key)) = self.find(keys)? else { return Ok(None) };
        config.str(key)
    }

    /// The activation named by one of `keys`, or `default`.
    pub(super) fn activation(&self, keys: Keys, default: Activation) -> Result<Activation> {
        Ok(match self.text(keys)? {
            None => default,
            Some("silu" | "swish") => Activation::Silu,
            Some("gelu") => Activation::Gelu,
            Some("gelu_pytorch_tanh" | "gelu_new") => Activation::GeluTanh,
            Some("relu") => Activation::Relu,
            Some("relu2") => Activation::Relu2,
            Some("swigluoai" | "swiglu_oai") => Activation::ClampedSwiglu {
                alpha: self.number(&["swiglu_alpha"], 0)?.unwrap_or(1.702),
                beta: 1.0,
                limit: self.number(&["swiglu_limit"], 0)?.unwrap_or(7.0),
            },
            Some("situ") => Activation::Situ {
                beta: self.need_number(&["activation_situ_beta"])?,
                lambda: self.number(&["activation_situ_linear_beta"], 0)?,
            },
            Some(other) => {
                return Err(self.error(
                    keys,
                    format!(
                        "is '{other}'; known are silu, gelu, gelu_pytorch_tanh, gelu_new, relu, \
                         relu2, swigluoai and situ"
                    ),
                ));
            }
        })
    }

    /// One word for each decoder layer, in models that list kinds of layers: as letters, or as words.
    /// The class's own pattern counts only where the config has neither.
    pub(super) fn pattern(&self) -> Result<Option<Vec<String>>> {
        const LETTERS: &str = "hybrid_override_pattern";
        const WORDS: &str = "layers_block_type";
        let of = |config: &Config, words: &str| -> Result<Option<Vec<String>>> {
            if let Some(letters) = config.str(LETTERS)? {
                return Ok(Some(letters.chars().map(String::from).collect()));
            }
            let words = config.str_list(words)?;
            Ok(words.map(|words| words.into_iter().map(String::from).collect()))
        };
        let words = self.stated(&[WORDS]).unwrap_or(WORDS);
        match (of(&self.config, words)?, &self.class.values) {
            (None, Some(class)) => of(class, WORDS),
            (stated, _) => Ok(stated),
        }
    }

    fn too_short(&self, key: &str, len: usize, layer: usize) -> Error {
        self.config.error(key, format!("has {len} entries; layer {layer} needs one"))
    }
}
