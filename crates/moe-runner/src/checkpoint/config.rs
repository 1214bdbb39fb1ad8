//! `config.json`: the document, and getters that refuse what cannot be meant.

use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::file::{printable, stands_for_another};
use crate::{Error, Result};

/// Longest `config.json`, in bytes.
const MAX_BYTES: u64 = 16 << 20;

/// Most values in one. (A value takes some hundred bytes once it is parsed, in the worst case.)
const MAX_VALUES: usize = 1 << 18;

/// A parsed `config.json`, or a nested object of one. Cheap to clone.
///
/// A key may be a path with dots (`"ffn_config.moe_top_k"`). An absent key and `null` are `None`;
/// a value of the wrong type, a negative or absurd size, or a number that is not finite is an
/// [`Error::Config`] with the file and the full key.
#[derive(Clone)]
pub struct Config {
    path: Arc<PathBuf>,
    prefix: String,
    value: Arc<Value>,
}

impl Config {
    /// Reads a `config.json`.
    ///
    /// `NaN`, `Infinity` and `-Infinity`, which Python writes, are taken as if they stood in
    /// quotes: a file is not refused for them, a getter that needs a number refuses them.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::File`] if it is longer than 16 MiB, has more
    /// than 262144 values, is no JSON, is nested deeper than 128, or is no object.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |action| move |source| Error::Io { path: path.to_owned(), action, source };
        if !std::fs::metadata(path).map_err(io("open"))?.is_file() {
            return Err(Error::file(path, "is no regular file"));
        }
        let file = File::open(path).map_err(io("open"))?;
        let mut bytes = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(io("read"))?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(Error::file(path, "is longer than 16 MiB, which no model's config is"));
        }
        Self::parse(path, &bytes)
    }

    fn parse(path: &Path, json: &[u8]) -> Result<Self> {
        if let Some(reason) = stands_for_another(json) {
            return Err(Error::file(path, reason));
        }
        let json = Literals::find(json);
        if json.values > MAX_VALUES {
            let reason = format!("has more than {MAX_VALUES} values, which no model's config has");
            return Err(Error::file(path, reason));
        }
        let value: Value = serde_json::from_slice(&json.quoted).map_err(|error| {
            Error::file(path, format!("is no valid JSON: {}", printable(&error.to_string())))
        })?;
        if !value.is_object() {
            return Err(Error::file(path, "is no JSON object"));
        }
        Ok(Self::new(path, value))
    }

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

    /// Whether `key` is there, but `null`.
    pub fn is_null(&self, key: &str) -> bool {
        key.split('.')
            .try_fold(&*self.value, |value, part| value.get(part))
            .is_some_and(Value::is_null)
    }

    /// The nested object at `key`, with the same getters.
    ///
    /// # Errors
    /// [`Error::Config`] if the value is no object.
    pub fn sub(&self, key: &str) -> Result<Option<Self>> {
        self.read(key, "an object", |value| self.object(key, value))
    }

    /// Names of the object's values, in the order of the file: rules are tried in that order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.value.as_object().into_iter().flat_map(|object| object.keys().map(String::as_str))
    }

    /// The nested object at the one name `key`, dots included.
    ///
    /// # Errors
    /// [`Error::Config`] if the value is no object.
    pub fn entry(&self, key: &str) -> Result<Option<Self>> {
        self.convert(self.value.get(key), key, "an object", |value| self.object(key, value))
    }

    /// The value of the one name `key`, dots included.
    pub fn named(&self, key: &str) -> Option<&Value> {
        self.value.get(key)
    }

    /// The list of nested objects at `key`; empty where there is none.
    ///
    /// # Errors
    /// [`Error::Config`] if the value is anything else.
    pub fn sub_list(&self, key: &str) -> Result<Vec<Self>> {
        let list = self
            .read(key, "a list of objects", |value| list(value, |item| self.object(key, item)))?;
        Ok(list.unwrap_or_default())
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

    /// A list of numbers, each as [`Config::f32`] takes it.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else.
    pub fn f32_list(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.read(key, "a list of finite numbers", |value| list(value, finite))
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
        self.convert(self.get(key), key, wanted, convert)
    }

    fn object(&self, key: &str, value: &Value) -> Option<Self> {
        value.is_object().then(|| Self {
            path: self.path.clone(),
            prefix: format!("{}{key}.", self.prefix),
            value: Arc::new(value.clone()),
        })
    }

    fn convert<'a, T>(
        &self,
        value: Option<&'a Value>,
        key: &str,
        wanted: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(None) };
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => {
                let shown = match value {
                    Value::Array(items) => format!("a list of {}", items.len()),
                    Value::Object(_) => "an object".to_owned(),
                    other => printable(&other.to_string()),
                };
                Err(self.error(key, format!("is {shown}; it must be {wanted}")))
            }
        }
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Config({}, '{}')", self.path.display(), self.prefix)
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

/// JSON text made ready for the parser.
struct Literals<'a> {
    /// The text, with Python's literals for numbers that are not finite in quotes.
    quoted: Cow<'a, [u8]>,
    /// Not fewer than the values in the text: each but the first follows one of `[`, `{`, `,`.
    values: usize,
}

impl<'a> Literals<'a> {
    fn find(json: &'a [u8]) -> Self {
        let mut quoted = Vec::new();
        let mut copied = 0;
        let mut values = 1;
        let mut at = 0;
        while at < json.len() {
            match json[at] {
                b'"' => at = string_end(json, at),
                b'[' | b'{' | b',' => values += 1,
                _ => {
                    let rest = &json[at..];
                    let literal = [&b"NaN"[..], b"Infinity", b"-Infinity"];
                    if let Some(found) = literal.into_iter().find(|word| rest.starts_with(word)) {
                        quoted.extend_from_slice(&json[copied..at]);
                        quoted.push(b'"');
                        quoted.extend_from_slice(found);
                        quoted.push(b'"');
                        copied = at + found.len();
                        at = copied - 1;
                    }
                }
            }
            at += 1;
        }
        if copied == 0 {
            return Self { quoted: Cow::Borrowed(json), values };
        }
        quoted.extend_from_slice(&json[copied..]);
        Self { quoted: Cow::Owned(quoted), values }
    }
}

/// The closing quote of the string that opens at `open`; the text's end where there is none.
fn string_end(json: &[u8], open: usize) -> usize {
    let mut at = open + 1;
    while at < json.len() && json[at] != b'"' {
        at += if json[at] == b'\\' { 2 } else { 1 };
    }
    at
}
