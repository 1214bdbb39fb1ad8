//! A model's `config.json`, read under alternative spellings and layer by layer.

use serde_json::Value;

use super::row::Keys;
use crate::checkpoint::Config;
use crate::spec::Activation;
use crate::{Error, Result};

/// The text part of a config.
pub(super) struct Settings {
    pub config: Config,
    /// Number of decoder layers; known before anything else is read.
    pub layers: usize,
}

/// No published model has a tenth of this many layers.
pub(super) const MAX_LAYERS: usize = 10_000;

impl Settings {
    /// Reads the number of layers.
    pub(super) fn new(config: Config, layers: Keys) -> Result<Self> {
        let mut settings = Self { config, layers: 0 };
        settings.layers = match settings.size(layers, 0)? {
            Some(count) => count,
            // hybrid models may state the pattern only
            None => settings.pattern()?.map(|p| p.len()).ok_or_else(|| settings.missing(layers))?,
        };
        if settings.layers == 0 || settings.layers > MAX_LAYERS {
            let reason = format!("is {}; it must be 1 to {MAX_LAYERS}", settings.layers);
            return Err(settings.error(layers, reason));
        }
        Ok(settings)
    }

    /// The first of `keys` that has a value.
    fn present(&self, keys: Keys) -> Option<&'static str> {
        keys.iter().copied().find(|key| self.config.get(key).is_some())
    }

    /// Whether none of `keys` has a value, but one is written as `null`.
    pub(super) fn states_null(&self, keys: Keys) -> bool {
        self.present(keys).is_none() && keys.iter().any(|key| self.config.is_null(key))
    }

    /// An error about the key in use.
    pub(super) fn error(&self, keys: Keys, reason: impl Into<String>) -> Error {
        let key = self.present(keys).or(keys.first().copied()).unwrap_or_default();
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
        let Some(key) = self.present(keys) else { return Ok(None) };
        if !self.config.get(key).is_some_and(Value::is_array) {
            return self.config.usize(key);
        }
        let list = self.config.usize_list(key)?.unwrap_or_default();
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
        let Some(key) = self.present(keys) else { return Ok(None) };
        let Some(list) = self.config.get(key).and_then(Value::as_array) else {
            return self.config.f32(key);
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

    /// A truth value, or `default`.
    pub(super) fn flag(&self, keys: Keys, default: bool) -> Result<bool> {
        let Some(key) = self.present(keys) else { return Ok(default) };
        Ok(self.config.bool(key)?.unwrap_or(default))
    }

    /// A string.
    pub(super) fn text(&self, keys: Keys) -> Result<Option<&str>> {
        let Some(key) = self.present(keys) else { return Ok(None) };
        self.config.str(key)
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
            Some(other) => {
                return Err(self.error(
                    keys,
                    format!(
                        "is '{other}'; known are silu, gelu, gelu_pytorch_tanh, gelu_new, relu \
                         and relu2"
                    ),
                ));
            }
        })
    }

    /// One word for each decoder layer, in models that list kinds of layers.
    pub(super) fn pattern(&self) -> Result<Option<Vec<String>>> {
        if let Some(letters) = self.text(&["hybrid_override_pattern"])? {
            return Ok(Some(letters.chars().map(String::from).collect()));
        }
        let words = self.config.str_list("layers_block_type")?;
        Ok(words.map(|words| words.into_iter().map(String::from).collect()))
    }

    fn too_short(&self, key: &str, len: usize, layer: usize) -> Error {
        self.config.error(key, format!("has {len} entries; layer {layer} needs one"))
    }
}
