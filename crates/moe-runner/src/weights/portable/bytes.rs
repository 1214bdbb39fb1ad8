//! Values as bytes, little-endian, one after the other; and back, with nothing trusted.

use std::borrow::Cow;

use crate::{Error, Result};

/// Appends values.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// What was written.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// A small number: the kind of what follows.
    pub fn tag(&mut self, tag: u8) {
        self.bytes.push(tag);
    }

    /// The place of `value` among `all` the values of its type.
    ///
    /// # Panics
    /// If it is not among them.
    pub fn choice<T: PartialEq>(&mut self, all: &[T], value: &T) {
        let place = all.iter().position(|other| other == value);
        self.tag(place.expect("every value of the type is listed") as u8);
    }

    /// A count or a length.
    pub fn count(&mut self, count: usize) {
        self.bytes.extend_from_slice(&(count as u64).to_le_bytes());
    }

    /// A number, bit by bit.
    pub fn f32(&mut self, value: f32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Bytes, after their number.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.bytes.extend_from_slice(bytes);
    }

    /// Pieces of bytes as one run, after their number.
    pub fn pieces<'a>(&mut self, pieces: impl Iterator<Item = Cow<'a, [u8]>>) {
        let at = self.bytes.len();
        self.count(0);
        pieces.for_each(|piece| self.bytes.extend_from_slice(&piece));
        let len = (self.bytes.len() - at - 8) as u64;
        self.bytes[at..at + 8].copy_from_slice(&len.to_le_bytes());
    }

    /// A vector that may be absent.
    pub fn vector(&mut self, values: Option<&[f32]>) {
        self.tag(u8::from(values.is_some()));
        if let Some(values) = values {
            self.count(values.len());
            values.iter().for_each(|v| self.f32(*v));
        }
    }
}

/// Reads what a [`Writer`] wrote.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

/// The bytes are not what they should be.
pub(super) fn broken(what: &str) -> Error {
    Error::input("expert weights as bytes", format!("not what was written: {what}"))
}

impl<'a> Reader<'a> {
    /// Of `bytes`, from their start.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Nothing may be left.
    ///
    /// # Errors
    /// If there is.
    pub fn finish(self) -> Result<()> {
        match self.rest {
            [] => Ok(()),
            rest => Err(broken(&format!("{} bytes are left over", rest.len()))),
        }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (taken, rest) =
            self.rest.split_at_checked(len).ok_or_else(|| broken("they end too early"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    /// What [`Writer::tag`] wrote.
    ///
    /// # Errors
    /// Here and below: if the bytes end before.
    pub fn tag(&mut self) -> Result<u8> {
        self.array::<1>().map(|[tag]| tag)
    }

    /// What [`Writer::choice`] wrote for the same `all`.
    ///
    /// # Errors
    /// If there is no such value.
    pub fn choice<T: Copy>(&mut self, all: &[T]) -> Result<T> {
        let place = usize::from(self.tag()?);
        all.get(place).copied().ok_or_else(|| broken(&format!("choice {place} of {}", all.len())))
    }

    /// What [`Writer::count`] wrote.
    ///
    /// # Errors
    /// If this machine cannot count so far.
    pub fn count(&mut self) -> Result<usize> {
        let count = u64::from_le_bytes(self.array()?);
        usize::try_from(count).map_err(|_| broken(&format!("a count of {count}")))
    }

    /// What [`Writer::f32`] wrote.
    ///
    /// # Errors
    /// As [`Self::tag`].
    pub fn f32(&mut self) -> Result<f32> {
        self.array().map(f32::from_le_bytes)
    }

    /// What [`Writer::bytes`] wrote.
    ///
    /// # Errors
    /// As [`Self::tag`].
    pub fn bytes(&mut self) -> Result<&'a [u8]> {
        let len = self.count()?;
        self.take(len)
    }

    /// What [`Writer::vector`] wrote.
    ///
    /// # Errors
    /// As [`Self::tag`].
    pub fn vector(&mut self) -> Result<Option<Vec<f32>>> {
        if self.tag()? == 0 {
            return Ok(None);
        }
        let len = self.count()?;
        let bytes = self.take(len.checked_mul(4).ok_or_else(|| broken("a length"))?)?;
        Ok(Some(bytes.as_chunks().0.iter().map(|v| f32::from_le_bytes(*v)).collect()))
    }
}
