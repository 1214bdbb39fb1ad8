//! GGUF files: key/values and tensors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// A value of a GGUF file's metadata.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// Any unsigned integer type.
    Unsigned(u64),
    /// Any signed integer type.
    Signed(i64),
    /// Either float type.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A string.
    String(String),
    /// A list; all values have one type.
    Array(Vec<Value>),
}

/// The key/values of a GGUF file.
#[derive(Clone, Debug)]
pub struct Metadata {
    path: PathBuf,
    values: BTreeMap<String, Value>,
}

impl Metadata {
    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The value at `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// A size or count, of any integer type.
    ///
    /// # Errors
    /// [`Error::Config`] if it is no integer of 0 to 2^31.
    pub fn usize(&self, key: &str) -> Result<Option<usize>> {
        self.read(key, "an integer from 0 to 2147483648", |value| match *value {
            Value::Unsigned(n) => usize::try_from(n).ok().filter(|n| *n <= 1 << 31),
            Value::Signed(n) => usize::try_from(n).ok().filter(|n| *n <= 1 << 31),
            _ => None,
        })
    }

    /// A number, rounded to f32; integers are accepted.
    ///
    /// # Errors
    /// [`Error::Config`] if it is no number, or not finite as f32.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.read(key, "a finite number", |value| {
            let number = match *value {
                Value::Unsigned(n) => n as f32,
                Value::Signed(n) => n as f32,
                Value::Float(x) => x as f32,
                _ => return None,
            };
            number.is_finite().then_some(number)
        })
    }

    /// A truth value.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "a truth value", |value| match *value {
            Value::Bool(truth) => Some(truth),
            _ => None,
        })
    }

    /// A string.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.read(key, "a string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// An [`Error::Config`] about `key`.
    pub fn error(&self, key: &str, reason: impl Into<String>) -> Error {
        Error::config(&self.path, key, reason)
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
            None => Err(self.error(key, format!("is {value:?}; it must be {wanted}"))),
        }
    }
}
