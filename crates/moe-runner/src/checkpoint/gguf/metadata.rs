//! The key/values of a GGUF file. They stay in the mapped file; what is kept is where they lie.

use std::borrow::Cow;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::reader::Reader;
use crate::checkpoint::file::{MAX_NAME, printable};
use crate::checkpoint::tensor::Bytes;
use crate::{Error, Result};

/// Most key/values of a file; published ones have fewer than a hundred.
const MAX_KEYS: u64 = 1 << 16;

/// Deepest nesting of arrays of arrays.
const MAX_DEPTH: u32 = 4;

/// A value of a GGUF file's metadata.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Value<'a> {
    /// Any unsigned integer type.
    Unsigned(u64),
    /// Any signed integer type.
    Signed(i64),
    /// Either float type.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A string. In arrays, what is no valid UTF-8 (tokens are arbitrary bytes) is replaced.
    String(Cow<'a, str>),
    /// A list.
    Array(Array<'a>),
}

/// An array in a GGUF file's metadata; all items have one type.
#[derive(Clone, Debug, PartialEq)]
pub struct Array<'a> {
    kind: Kind,
    len: u64,
    items: &'a [u8],
}

impl<'a> Array<'a> {
    /// Number of items.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no items.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The items, in order, decoded on the way.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let kind = self.kind;
        let mut reader = Reader { path: Path::new(""), bytes: self.items, at: 0 };
        // The items were checked when the file was opened, so none is lost here.
        (0..self.len).map_while(move |_| decode(kind, &mut reader).ok())
    }
}

/// The key/values of a GGUF file.
///
/// An absent key is `None`; a value of the wrong type, a negative or absurd size, or a number that
/// is not finite is an [`Error::Config`] with the file and the key. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metadata {
    path: PathBuf,
    bytes: Bytes,
    /// Sorted by key.
    values: Arc<[Stored]>,
}

/// Where a value lies in the file.
#[derive(Debug)]
struct Stored {
    key: Box<str>,
    kind: Kind,
    range: Range<usize>,
}

impl Metadata {
    /// Reads `count` key/values, and leaves the reader behind them.
    pub(super) fn read(reader: &mut Reader<'_>, bytes: &Bytes, count: u64) -> Result<Self> {
        if count > MAX_KEYS {
            return Err(
                reader.error(format_args!("{count} key/values; at most {MAX_KEYS} are taken"))
            );
        }
        let mut values = Vec::new();
        for _ in 0..count {
            let here = reader.clone();
            let key = reader.string("key")?;
            if key.len() > MAX_NAME || key.chars().any(char::is_control) {
                return Err(here.error(format_args!("'{}' is no usable key", printable(key))));
            }
            let kind = Kind::read(reader)?;
            let start = reader.at;
            let checked = match kind {
                Kind::String => reader.string("value").map(drop),
                _ => skip(kind, reader, MAX_DEPTH),
            };
            checked.map_err(|error| match error {
                Error::File { path, reason } => Error::Config { path, key: key.to_owned(), reason },
                other => other,
            })?;
            values.push(Stored { key: key.into(), kind, range: start..reader.at });
        }
        values.sort_by(|a, b| a.key.cmp(&b.key));
        if let Some(pair) = values.windows(2).find(|pair| pair[0].key == pair[1].key) {
            return Err(Error::config(
                reader.path,
                &*pair[0].key,
                "stands more than once in the file",
            ));
        }
        Ok(Self { path: reader.path.to_owned(), bytes: bytes.clone(), values: values.into() })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The value at `key`.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        let i = self.values.binary_search_by(|stored| (*stored.key).cmp(key)).ok()?;
        let Stored { kind, range, .. } = &self.values[i];
        let bytes = self.bytes.get(range.clone())?;
        decode(*kind, &mut Reader { path: &self.path, bytes, at: 0 }).ok()
    }

    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.iter().map(|stored| &*stored.key)
    }

    /// A size or count, of any integer type.
    ///
    /// # Errors
    /// [`Error::Config`] if it is no integer of 0 to 2^31.
    pub fn usize(&self, key: &str) -> Result<Option<usize>> {
        self.read_as(key, "an integer from 0 to 2147483648", |value| size(&value))
    }

    /// A list of sizes or counts, each as [`Metadata::usize`] takes it.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else.
    pub fn usize_list(&self, key: &str) -> Result<Option<Vec<usize>>> {
        self.read_as(key, "a list of integers from 0 to 2147483648", |value| match value {
            Value::Array(array) => array.iter().map(|item| size(&item)).collect(),
            _ => None,
        })
    }

    /// A number, rounded to f32; integers are accepted.
    ///
    /// # Errors
    /// [`Error::Config`] if it is no number, or not finite as f32.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.read_as(key, "a finite number", |value| finite(&value))
    }

    /// A list of numbers, each as [`Metadata::f32`] takes it.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else.
    pub fn f32_list(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.read_as(key, "a list of finite numbers", |value| match value {
            Value::Array(array) => array.iter().map(|item| finite(&item)).collect(),
            _ => None,
        })
    }

    /// A truth value.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.read_as(key, "a truth value", |value| match value {
            Value::Bool(truth) => Some(truth),
            _ => None,
        })
    }

    /// A string.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.read_as(key, "a string", |value| match value {
            Value::String(Cow::Borrowed(text)) => Some(text),
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

    fn read_as<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        convert: impl FnOnce(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let shown = match &value {
            Value::Unsigned(n) => n.to_string(),
            Value::Signed(n) => n.to_string(),
            Value::Float(x) => x.to_string(),
            Value::Bool(truth) => truth.to_string(),
            Value::String(text) => format!("'{}'", printable(text)),
            Value::Array(array) => format!("a list of {}", array.len),
        };
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => Err(self.error(key, format!("is {shown}; it must be {wanted}"))),
        }
    }
}

fn size(value: &Value<'_>) -> Option<usize> {
    let n = match *value {
        Value::Unsigned(n) => n,
        Value::Signed(n) => u64::try_from(n).ok()?,
        _ => return None,
    };
    usize::try_from(n).ok().filter(|n| *n <= 1 << 31)
}

fn finite(value: &Value<'_>) -> Option<f32> {
    let number = match *value {
        Value::Unsigned(n) => n as f32,
        Value::Signed(n) => n as f32,
        Value::Float(x) => x as f32,
        _ => return None,
    };
    number.is_finite().then_some(number)
}

/// The type of a value, by its number in the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn read(reader: &mut Reader<'_>) -> Result<Self> {
        let here = reader.clone();
        Ok(match reader.u32()? {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            8 => Self::String,
            9 => Self::Array,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            other => return Err(here.error(format_args!("there is no value type {other}"))),
        })
    }

    /// Bytes of a value; of strings and arrays, what they have at least.
    fn size(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::String | Self::U64 | Self::I64 | Self::F64 => 8,
            Self::Array => 4 + 8,
        }
    }
}

/// Checks that a value is complete, and leaves the reader behind it.
fn skip(kind: Kind, reader: &mut Reader<'_>, depth: u32) -> Result<()> {
    match kind {
        Kind::String => reader.string_bytes().map(drop),
        Kind::Bool => match reader.take(1)? {
            [0 | 1] => Ok(()),
            other => Err(reader.error(format_args!("{other:?} is no truth value"))),
        },
        Kind::Array if depth == 0 => {
            Err(reader.error(format_args!("arrays are nested deeper than {MAX_DEPTH}")))
        }
        Kind::Array => {
            let item = Kind::read(reader)?;
            let len = reader.count("items", item.size())?;
            skip_items(item, len, reader, depth - 1)
        }
        _ => reader.take(kind.size()).map(drop),
    }
}

fn skip_items(item: Kind, len: u64, reader: &mut Reader<'_>, depth: u32) -> Result<()> {
    match item {
        Kind::String | Kind::Array | Kind::Bool => {
            (0..len).try_for_each(|_| skip(item, reader, depth))
        }
        // A product that overflows is no length that a file has.
        _ => reader.take(len.saturating_mul(item.size())).map(drop),
    }
}

/// A value that has been skipped without an error before.
fn decode<'a>(kind: Kind, reader: &mut Reader<'a>) -> Result<Value<'a>> {
    // The next `N` bytes as a number.
    macro_rules! number {
        ($type:ty) => {
            <$type>::from_le_bytes(reader.array()?)
        };
    }
    Ok(match kind {
        Kind::U8 => Value::Unsigned(number!(u8).into()),
        Kind::U16 => Value::Unsigned(number!(u16).into()),
        Kind::U32 => Value::Unsigned(number!(u32).into()),
        Kind::U64 => Value::Unsigned(number!(u64)),
        Kind::I8 => Value::Signed(number!(i8).into()),
        Kind::I16 => Value::Signed(number!(i16).into()),
        Kind::I32 => Value::Signed(number!(i32).into()),
        Kind::I64 => Value::Signed(number!(i64)),
        Kind::F32 => Value::Float(number!(f32).into()),
        Kind::F64 => Value::Float(number!(f64)),
        Kind::Bool => Value::Bool(number!(u8) != 0),
        Kind::String => Value::String(String::from_utf8_lossy(reader.string_bytes()?)),
        Kind::Array => {
            let item = Kind::read(reader)?;
            let len = reader.u64()?;
            let start = reader.at;
            skip_items(item, len, reader, MAX_DEPTH)?;
            Value::Array(Array { kind: item, len, items: &reader.bytes[start..reader.at] })
        }
    })
}
