//! What kernels found wrong with the data: one sticky word on the device, read when asked for.

use std::fmt;

use crate::{Buffer, Gpu, Result, Stream, View};

/// Data that cannot be computed with. The first one that a kernel meets is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    kind: FaultKind,
    row: u32,
    column: u32,
    bits: u32,
}

/// What was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// A hidden state is NaN or infinite.
    Hidden,
    /// A router logit is NaN or +∞, or too large for f32 after its multiplier.
    Logit,
    /// A token's id is outside the vocabulary of the routing table.
    TokenId,
    /// An expert id from outside is no choice of this layer.
    ExpertId,
    /// An output is NaN or infinite.
    Output,
    /// More slots or rows go from one rank to another than have room there.
    Capacity,
    /// Another rank has not come.
    Rank,
}

impl Fault {
    /// What was wrong.
    pub fn kind(&self) -> FaultKind {
        self.kind
    }

    /// The token (row), from 0.
    pub fn row(&self) -> usize {
        self.row as usize
    }
}

impl Fault {
    /// Where it was met and what it is, without what it is part of.
    pub fn reason(&self) -> String {
        let Self { kind, row, column, bits } = *self;
        let value = f32::from_bits(bits);
        match kind {
            FaultKind::Hidden | FaultKind::Output => {
                format!("row {row}, column {column}: {value} is not a finite number")
            }
            FaultKind::Logit => format!(
                "token {row}, expert {column}: {value}; look for non-finite hidden states or gate \
                 weights"
            ),
            FaultKind::TokenId => {
                format!("token {row}: id {bits} is outside the vocabulary of the routing table")
            }
            FaultKind::ExpertId => {
                format!("token {row}, choice {column}: {bits} is no expert of this layer")
            }
            FaultKind::Capacity => format!(
                "token {row}: the {bits}. next rank has room for {column} slots or rows of this one; give more"
            ),
            FaultKind::Rank => format!("waited in vain for the {column}. next rank"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            FaultKind::Hidden => "hidden states",
            FaultKind::Logit => "router logits",
            FaultKind::TokenId => "input ids",
            FaultKind::ExpertId => "expert ids",
            FaultKind::Output => "output",
            FaultKind::Capacity | FaultKind::Rank => "exchange",
        };
        write!(f, "{what}: {}", self.reason())
    }
}

impl std::error::Error for Fault {}

/// The word that kernels leave a fault in.
#[derive(Debug)]
pub struct FaultWord {
    word: Buffer<u32>,
}

impl FaultWord {
    /// A word without a fault.
    ///
    /// # Errors
    /// If the GPU has no memory left.
    pub fn new(gpu: &Gpu, stream: &Stream) -> Result<Self> {
        let mut word = Buffer::new(gpu, 4, "the fault word")?;
        stream.fill(word.view_mut(), 0)?;
        Ok(Self { word })
    }

    /// Waits for the stream; then an error if a kernel met a fault since the last call. The word is
    /// clean afterwards.
    ///
    /// # Errors
    /// The fault, or what went wrong on the stream.
    pub fn check(&mut self, stream: &Stream) -> Result<()> {
        let mut word = [0; 4];
        stream.copy_out(self.word.view(), &mut word)?;
        let kind = match word[0] {
            0 => return Ok(()),
            1 => FaultKind::Hidden,
            2 => FaultKind::Logit,
            3 => FaultKind::TokenId,
            4 => FaultKind::ExpertId,
            6 => FaultKind::Capacity,
            7 => FaultKind::Rank,
            _ => FaultKind::Output,
        };
        stream.fill(self.word.view_mut(), 0)?;
        Err(Fault { kind, row: word[1], column: word[2], bits: word[3] }.into())
    }

    pub(crate) fn view(&self) -> View<'_, u32> {
        self.word.view()
    }
}
