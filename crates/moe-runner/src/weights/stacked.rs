//! Experts as engines hold them: all of a projection in one tensor, in memory that stays theirs.

use std::ops::Range;

use super::{Bytes, Expert, FloatType, Floats, Matrix};
use crate::{Error, Result};

/// One projection of all experts: floats `[E, out, in]`, or `[E, in, out]`.
#[derive(Clone, Debug)]
pub struct Stack {
    /// Little-endian floats. May be anybody's memory ([`Bytes::new`]); it is not copied.
    pub bytes: Bytes,
    /// Their type.
    pub float: FloatType,
    /// E, and output and input features, in this order whatever the order in memory.
    pub shape: [usize; 3],
    /// Stored as `[E, in, out]`.
    pub transposed: bool,
}

/// Where the gate's and the up projection's rows stand among those of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateUp {
    /// The gate's I rows, then those of the up projection.
    Halves,
    /// The up projection's I rows, then those of the gate.
    HalvesUpFirst,
    /// By turns, the gate's first.
    Interleaved,
    /// There is no gate projection: all rows are the up projection's.
    UpOnly,
}

/// The experts of a layer as stacks.
#[derive(Clone, Debug)]
pub struct StackedExperts<'a> {
    /// `[E, 2I, H]`, or `[E, I, H]` without a gate projection.
    pub gate_up: Stack,
    /// Which rows are whose.
    pub layout: GateUp,
    /// `[E, H, I]`.
    pub down: Stack,
    /// `[E, 2I]`, or `[E, I]`: in the order of the rows of `gate_up`.
    pub gate_up_bias: Option<&'a [f32]>,
    /// `[E, H]`.
    pub down_bias: Option<&'a [f32]>,
}

impl StackedExperts<'_> {
    /// One [`Expert`] for each, as views: no weight is copied.
    ///
    /// # Errors
    /// [`Error::Input`] if a stack's bytes are not what its shape needs, or the shapes do not fit
    /// each other.
    pub fn experts(&self) -> Result<Vec<Expert>> {
        let [experts, rows, hidden] = self.gate_up.shape;
        let gated = self.layout != GateUp::UpOnly;
        if gated && rows % 2 != 0 {
            return Err(wrong("gate_up", format!("{rows} rows are not those of two projections")));
        }
        let intermediate = if gated { rows / 2 } else { rows };
        if self.down.shape != [experts, hidden, intermediate] {
            let (have, want) = (self.down.shape, [experts, hidden, intermediate]);
            return Err(wrong("down", format!("its shape is {have:?}, {want:?} is needed")));
        }
        for (what, bias, len) in [
            ("gate_up_bias", self.gate_up_bias, experts * rows),
            ("down_bias", self.down_bias, experts * hidden),
        ] {
            if let Some(bias) = bias
                && bias.len() != len
            {
                return Err(wrong(what, format!("{} values, {len} are needed", bias.len())));
            }
        }
        let (gate_up, down) = (self.gate_up.check("gate_up")?, self.down.check("down")?);
        (0..experts).map(|e| self.expert(e, &gate_up, &down, intermediate)).collect()
    }

    fn expert(&self, e: usize, gate_up: &Each, down: &Each, intermediate: usize) -> Result<Expert> {
        let [_, rows, hidden] = self.gate_up.shape;
        let (both, down) = (gate_up.matrix(e)?, down.matrix(e)?);
        // first row and step of the gate, then of the up projection
        let (gate, up) = match self.layout {
            GateUp::Halves => (Some((0, 1)), (intermediate, 1)),
            GateUp::HalvesUpFirst => (Some((intermediate, 1)), (0, 1)),
            GateUp::Interleaved => (Some((0, 2)), (1, 2)),
            GateUp::UpOnly => (None, (0, 1)),
        };
        let of = |(first, step)| {
            let rows = both.rows_of(first, step, intermediate);
            rows.ok_or_else(|| wrong("gate_up", "experts without rows".into()))
        };
        let bias = self.gate_up_bias.map(|all| &all[e * rows..(e + 1) * rows]);
        let bias_of = |(first, step): (usize, usize)| {
            bias.map(|b| b.iter().skip(first).step_by(step).take(intermediate).copied().collect())
        };
        Ok(Expert {
            gate: gate.map(of).transpose()?,
            up: of(up)?,
            down,
            gate_bias: gate.and_then(bias_of),
            up_bias: bias_of(up),
            down_bias: self.down_bias.map(|all| all[e * hidden..(e + 1) * hidden].to_vec()),
            norm: None,
        })
    }
}

/// A stack whose bytes are as many as its shape needs.
struct Each<'a> {
    what: &'static str,
    stack: &'a Stack,
    /// Bytes of one expert.
    len: usize,
}

impl Stack {
    fn check(&self, what: &'static str) -> Result<Each<'_>> {
        let [experts, rows, cols] = self.shape;
        let len = rows.checked_mul(cols).and_then(|len| len.checked_mul(self.float.size()));
        match len.filter(|len| len.checked_mul(experts) == Some(self.bytes.len())) {
            Some(len) => Ok(Each { what, stack: self, len }),
            None => {
                let (bytes, shape, float) = (self.bytes.len(), self.shape, self.float.name());
                Err(wrong(what, format!("{bytes} bytes are not {shape:?} of {float}")))
            }
        }
    }
}

impl Each<'_> {
    fn matrix(&self, e: usize) -> Result<Matrix> {
        let Stack { bytes, float, shape: [_, rows, cols], transposed } = self.stack;
        let range: Range<usize> = e * self.len..(e + 1) * self.len;
        let bytes = bytes.slice(range).ok_or_else(|| wrong(self.what, "too few bytes".into()))?;
        let make = if *transposed { Floats::transposed } else { Floats::row_major };
        let floats = make(bytes, *float, [*rows, *cols]);
        floats.map(Matrix::new).map_err(|misfit| wrong(self.what, misfit.to_string()))
    }
}

fn wrong(what: &'static str, reason: String) -> Error {
    Error::input(what, reason)
}
