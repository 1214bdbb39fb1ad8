//! `config.json`: the document, and getters that refuse what cannot be meant.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use crate::{Error, Result};

/// A parsed `config.json`, or a nested object of one. Cheap to clone.
///
/// A key may be a path with dots (`"ffn_config.moe_top_k"`). An absent key and `null` are `None`;
/// a value of the wrong type, a negative or absurd size, or a number that is not finite is an
/// [`Error::Config`] with the file and the full key.
#[derive(Clone, Debug)]
pub struct Config {
    path: Arc<PathBuf>,
    prefix: String,
    value: Arc<Value>,
}

impl Config {
    /// A document that is parsed already; `path` is what errors name.
    pub fn new(path: &Path, value: Value) -> Self {
        Self { path: Arc::new(path.to_owned()), prefix: String::new(), value: Arc::new(value) }
    }

    /// The value at `key`; `None` where it is absent or `null`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        key.split('.')
            .try_fold(&*self.value, |value, part| value.get(part))
            .filter(|v| !v.is_null())
    }

    /// The nested object at `key`, with the same getters.
    ///
    /// # Errors
    /// [`Error::Config`] if the value is no object.
    pub fn sub(&self, key: &str) -> Result<Option<Self>> {
        self.read(key, "an object", |value| {
            value.is_object().then(|| Self {
                path: self.path.clone(),
                prefix: format!("{}{key}.", self.prefix),
                value: Arc::new(value.clone()),
            })
        })
    }

    /// A size or count.
    ///
    /// # Errors
    /// [`Error::Config`] if it is no integer of 0 to 2^31.
    pub fn usize(&self, key: &str) -> Result<Option<usize>> {
        self.read(key, "an integer from 0 to 2147483648", size)
    }

    /// A signed integer.
    ///
    /// # Errors
    /// [`Error::Config`] if it is no integer of 64 bits.
    pub fn i64(&self, key: &str) -> Result<Option<i64>> {
        self.read(key, "an integer", Value::as_i64)
    }

    /// A number, rounded to f32; integers are accepted.
    ///
    /// # Errors
    /// [`Error::Config`] if it is no number, or not finite as f32.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.read(key, "a finite number", finite)
    }

    /// A truth value.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything but `true` and `false`.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "true or false", Value::as_bool)
    }

    /// A string.
    ///
    /// # Errors
    /// [`Error::Config`] if it is no string.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.read(key, "a string", Value::as_str)
    }

    /// A list of sizes or counts, each as [`Config::usize`] takes it.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else.
    pub fn usize_list(&self, key: &str) -> Result<Option<Vec<usize>>> {
        self.read(key, "a list of integers from 0 to 2147483648", |value| list(value, size))
    }

    /// A list of strings.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else.
    pub fn str_list(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.read(key, "a list of strings", |value| list(value, Value::as_str))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// An [`Error::Config`] about `key`.
    pub fn error(&self, key: &str, reason: impl Into<String>) -> Error {
        Error::config(&self.path, format!("{}{key}", self.prefix), reason)
    }

    /// The [`Error::Config`] of a key that is needed and absent.
    pub fn missing(&self, key: &str) -> Error {
        self.error(key, "is missing, and the model cannot be built without it")
    }

    fn read<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => Err(self.error(key, format!("is {value}; it must be {wanted}"))),
        }
    }
}

fn size(value: &Value) -> Option<usize> {
    value.as_u64().filter(|n| *n <= 1 << 31).and_then(|n| usize::try_from(n).ok())
}

fn finite(value: &Value) -> Option<f32> {
    value.as_f64().map(|x| x as f32).filter(|x| x.is_finite())
}

fn list<'a, T>(value: &'a Value, item: impl Fn(&'a Value) -> Option<T>) -> Option<Vec<T>> {
    value.as_array()?.iter().map(item).collect()
}
