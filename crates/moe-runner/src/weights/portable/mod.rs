//! Experts as bytes, to move them between ranks: complete, and bit by bit the same when read again.
//!
//! What is written describes itself: codes as they are stored, their scales, zero points, the
//! quantisation of each projection's input, biases and norms. A matrix that is a window of a larger
//! array takes only its own rows along. Both ends are the same version of this library: this is no
//! file format.

mod arrays;
mod bytes;
mod input;

pub use bytes::{Reader, Writer};

use super::{ActivationQuant, Expert, Matrix};
use crate::Result;
use bytes::broken;

impl Expert {
    /// This expert as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut to = Writer::default();
        to.tag(u8::from(self.gate.is_some()));
        self.gate.iter().chain([&self.up, &self.down]).for_each(|matrix| matrix.write(&mut to));
        for vector in [&self.gate_bias, &self.up_bias, &self.down_bias, &self.norm] {
            to.vector(vector.as_deref());
        }
        to.into_bytes()
    }

    /// The expert that [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// If it did not write these bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let from = &mut Reader::new(bytes);
        let gate = match from.tag()? {
            0 => None,
            _ => Some(Matrix::read(from)?),
        };
        let expert = Self {
            gate,
            up: Matrix::read(from)?,
            down: Matrix::read(from)?,
            gate_bias: from.vector()?,
            up_bias: from.vector()?,
            down_bias: from.vector()?,
            norm: from.vector()?,
        };
        from.finish()?;
        Ok(expert)
    }
}

impl Matrix {
    fn write(&self, to: &mut Writer) {
        self.input.write(to);
        let cols = self.view().stored_cols();
        to.count(cols.start);
        to.count(cols.end);
        arrays::write_array(self.view(), to);
    }

    /// A copy that has its own rows alone, in order.
    pub(super) fn own_rows(&self) -> Self {
        let mut to = Writer::default();
        self.write(&mut to);
        Self::read(&mut Reader::new(&to.into_bytes())).expect("what was written can be read")
    }

    fn read(from: &mut Reader<'_>) -> Result<Self> {
        let input = ActivationQuant::read(from)?;
        let cols = from.count()?..from.count()?;
        let all = Self::new(arrays::read_array(from)?).with_input(input);
        let (start, end) = (cols.start, cols.end);
        all.cols_of(cols).ok_or_else(|| broken(&format!("columns {start} to {end}")))
    }
}

#[cfg(test)]
mod tests;
