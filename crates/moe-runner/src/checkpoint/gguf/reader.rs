//! Reads numbers and strings from the front of a GGUF file, never past its end.

use std::path::Path;

use crate::checkpoint::file::printable;
use crate::{Error, Result};

/// A place in a file.
#[derive(Clone)]
pub(super) struct Reader<'a> {
    pub(super) path: &'a Path,
    pub(super) bytes: &'a [u8],
    /// At most `bytes.len()`.
    pub(super) at: usize,
}

impl<'a> Reader<'a> {
    /// An [`Error::File`] about this place.
    pub(super) fn error(&self, reason: impl std::fmt::Display) -> Error {
        Error::file(self.path, format!("byte {}: {reason}", self.at))
    }

    /// The next `count` bytes.
    pub(super) fn take(&mut self, count: u64) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        match usize::try_from(count) {
            Ok(count) if count <= rest.len() => {
                self.at += count;
                Ok(&rest[..count])
            }
            _ => Err(self.error(format_args!(
                "{count} bytes should follow, {} are there; the file is truncated or damaged",
                rest.len()
            ))),
        }
    }

    /// The next `N` bytes.
    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A count of things that take at least `size` bytes each: refused where the file has no room
    /// for so many.
    pub(super) fn count(&mut self, what: &str, size: u64) -> Result<u64> {
        let here = self.clone();
        let count = self.u64()?;
        let room = (self.bytes.len() - self.at) as u64 / size;
        if count > room {
            let reason = format!("{count} {what} should follow, the file has room for {room}");
            return Err(here.error(reason));
        }
        Ok(count)
    }

    /// The bytes of a string: a length and as many bytes.
    pub(super) fn string_bytes(&mut self) -> Result<&'a [u8]> {
        let length = self.u64()?;
        self.take(length)
    }

    /// A string that must be valid UTF-8.
    pub(super) fn string(&mut self, what: &str) -> Result<&'a str> {
        let here = self.clone();
        let bytes = self.string_bytes()?;
        std::str::from_utf8(bytes).map_err(|_| {
            let start = printable(&String::from_utf8_lossy(&bytes[..bytes.len().min(80)]));
            here.error(format_args!("{what} '{start}' is no valid UTF-8"))
        })
    }
}
