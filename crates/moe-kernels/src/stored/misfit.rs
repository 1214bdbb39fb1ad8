//! Why arrays do not make a matrix.

use std::fmt;

/// Why arrays do not make a stored matrix: one line that says what was found and what is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit(String);

impl Misfit {
    pub(crate) fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }

    /// An array of `found` bytes for what needs `needed` (`None`: more than memory can hold).
    pub(crate) fn bytes(what: fmt::Arguments<'_>, found: usize, needed: Option<usize>) -> Self {
        match needed {
            Some(needed) => Self(format!("{what} needs {needed} bytes, there are {found}")),
            None => Self(format!("{what} is larger than memory")),
        }
    }
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Misfit {}
