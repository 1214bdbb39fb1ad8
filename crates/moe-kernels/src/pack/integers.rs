//! Weights as signed bytes, for products with rows of bytes.
//!
//! What codes of six bits and fewer stand for are whole numbers, or are once doubled a few times: FP4
//! has halves, GGUF's grids have eighths.

use super::layout::{BLOCK, Codes, STEP};
use super::plan::{self, Plan};
use super::quantised_rows;
use crate::numerics::quantise::Qdq;
use crate::operand::OperandKind;
use crate::stored::View;

/// What codes stand for as whole numbers of a signed byte, and how many times that is; `None` if there are
/// none.
pub(super) fn whole(codes: Codes, table: &[f32; 64]) -> Option<([f32; 64], f32)> {
    let table = match codes {
        Codes::Int8 => return Some((*table, 1.0)),
        Codes::F32 | Codes::F16 | Codes::Bf16 | Codes::E4m3 | Codes::E5m2 => return None,
        Codes::Int5 | Codes::Int6 => {
            let codes = 1 << codes.bits();
            std::array::from_fn(|i| (i % codes) as f32 - table[0])
        }
        Codes::Table2 | Codes::Table3 | Codes::Table4 | Codes::Table6 => *table,
    };
    let fits = |number: f32| number.fract() == 0.0 && (-128.0..=127.0).contains(&number);
    let whole = |times: &f32| table.iter().all(|number| fits(number * times));
    let times = [1.0, 2.0, 4.0, 8.0].into_iter().find(whole)?;
    Some((table.map(|number| number * times), times))
}

/// What is added to the whole numbers of a table so that none is below zero: no more than that takes, or sums
/// of 16 bits would overflow. (To bytes 128 are added.)
#[inline(always)]
pub(crate) fn lift(table: &[f32; 64]) -> i32 {
    table.iter().fold(0, |lift, number| lift.max(-*number as i32))
}

impl Plan {
    /// The same with whole numbers, which what happens to sums makes up for; `None` if there are none.
    pub(super) fn in_integers(mut self) -> Option<Plan> {
        let (table, times) = whole(self.layout.codes, &self.table)?;
        self.table = table;
        self.finish.power /= times;
        Some(self)
    }
}

/// How rows are best quantised to integers for products with `weights`: with a scale for as many columns
/// as share one of the weights, at least 32 and at most 256. `None` where the weights are no integers times
/// scales, or their columns have an order of their own.
pub fn integer_rows(weights: &View) -> Option<Qdq> {
    if !plan::holds(OperandKind::Int8, weights) {
        return None;
    }
    let ways = [STEP, BLOCK / 4, BLOCK / 2, BLOCK].map(|size| Qdq::Int8Group { size });
    ways.into_iter().find(|way| quantised_rows(OperandKind::Int8, weights, way))
}
