//! The one error type of the library: what is wrong, where, and what to do about it.

use std::fmt::{self, Display, Write};
use std::path::{Path, PathBuf};

/// The result of everything here that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. Every message names the place (file, tensor, layer, expert) and, where there
/// is something to do, what to do. What it quotes may come from a hostile file: what it shows of
/// each part is one line, without control characters, of bounded length.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("{}: cannot {action}", line(path.display()))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// "open", "read", "write", …
        action: &'static str,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// A file is not what its name or its header says.
    #[error("{}: {}", line(path.display()), line(reason))]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// One tensor of a checkpoint is missing, of the wrong shape or dtype, or holds bad values.
    #[error("{}: tensor '{}': {}", line(path.display()), line(tensor), line(reason))]
    Tensor {
        /// The file that holds it, or the checkpoint's folder where it is missing.
        path: PathBuf,
        /// The tensor's full name.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// `config.json` (or the metadata of a GGUF file) has no, or no usable, value for a key.
    #[error("{}: '{}': {}", line(path.display()), line(key), line(reason))]
    Config {
        /// The file.
        path: PathBuf,
        /// The key, with its path in the document.
        key: String,
        /// What is wrong with its value.
        reason: String,
    },
    /// A layer's description contradicts itself.
    #[error("layer '{}': {}", line(layer), line(reason))]
    Spec {
        /// The layer's name in the checkpoint.
        layer: String,
        /// The contradiction.
        reason: String,
    },
    /// No layer of that name.
    #[error("no MoE layer '{name}'{}", near_list(.near))]
    UnknownLayer {
        /// What was asked for.
        name: String,
        /// The names closest to it.
        near: Vec<String>,
    },
    /// A second layer of the same name.
    #[error("layer '{name}' is registered already; names must be unique within a model")]
    DuplicateLayer {
        /// The name.
        name: String,
    },
    /// The caller's hidden states, logits or ids do not fit the layer.
    #[error("{what}: {reason}")]
    Input {
        /// Which input.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// No kernel can run this, or the named one cannot; every failing condition is listed.
    #[error("{0}")]
    NoKernel(String),
    /// A GPU, its driver or its compiler is missing, too old, or refused.
    #[error("{0}")]
    Device(String),
    /// Ranks of a group failed to meet, or a communication library refused.
    #[error("{0}")]
    Communication(String),
    /// The caller asked for an end before the work was done.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// An [`Error::File`].
    pub fn file(path: &Path, reason: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), reason: reason.into() }
    }

    /// An [`Error::Tensor`].
    pub fn tensor(path: &Path, tensor: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Tensor { path: path.to_owned(), tensor: tensor.into(), reason: reason.into() }
    }

    /// An [`Error::Config`].
    pub fn config(path: &Path, key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config { path: path.to_owned(), key: key.into(), reason: reason.into() }
    }

    /// An [`Error::Input`].
    pub fn input(what: &'static str, reason: impl Into<String>) -> Self {
        Self::Input { what, reason: reason.into() }
    }
}

/// Longest part of a message that is shown, in characters.
const MAX_SHOWN: usize = 2000;

/// What `text` shows, with control characters escaped, cut off after [`MAX_SHOWN`] characters.
fn line<T: Display>(text: T) -> Line<T> {
    Line(text)
}

struct Line<T>(T);

impl<T: Display> Display for Line<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        struct Escape<'a, 'b> {
            out: &'a mut fmt::Formatter<'b>,
            room: usize,
        }
        impl Write for Escape<'_, '_> {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                for c in text.chars() {
                    match self.room {
                        0 => return Ok(()),
                        1 => self.out.write_char('…')?,
                        _ if c.is_control() => write!(self.out, "{}", c.escape_default())?,
                        _ => self.out.write_char(c)?,
                    }
                    self.room -= 1;
                }
                Ok(())
            }
        }
        write!(Escape { out: f, room: MAX_SHOWN }, "{}", self.0)
    }
}

fn near_list(near: &[String]) -> String {
    match near {
        [] => String::new(),
        [one] => format!("; did you mean '{one}'?"),
        many => format!("; near ones: {}", many.join(", ")),
    }
}

/// Up to three of `candidates` that resemble `name`, best first: those that share at least two
/// thirds of its characters at their beginning and end.
pub(crate) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut near: Vec<(usize, &str)> = Vec::new();
    for candidate in candidates {
        let shared = |a: &mut dyn Iterator<Item = (u8, u8)>| a.take_while(|(a, b)| a == b).count();
        let prefix = shared(&mut name.bytes().zip(candidate.bytes()));
        let suffix = shared(&mut name.bytes().rev().zip(candidate.bytes().rev()));
        let longest = name.len().max(candidate.len());
        let different = longest - (prefix + suffix).min(longest);
        if different * 3 <= longest {
            near.push((different, candidate));
            near.sort();
            near.truncate(3);
        }
    }
    near.into_iter().map(|(_, candidate)| candidate.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_show_no_control_characters_and_end() {
        let path = Path::new("a\nb");
        let error = Error::config(path, "k\0", "is '\u{1b}[2J'");
        assert_eq!(error.to_string(), r"a\nb: 'k\u{0}': is '\u{1b}[2J'");
        let error = Error::file(path, "é".repeat(1 << 20)).to_string();
        assert_eq!(error.chars().count(), 6 + MAX_SHOWN);
        assert!(error.ends_with("é…"), "{error}");
    }
}
