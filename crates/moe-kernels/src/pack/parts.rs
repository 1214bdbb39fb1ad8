//! Packed weights taken apart, to be kept somewhere and put together again: their bytes, and all else.

use std::fmt;

use super::layout::{BLOCK, Group, Layout, Number, Offset, PANEL, STEP};
use super::order::{Columns, Order, PADDING};
use super::plan::Finish;
use super::{Packed, in_quads, panel_bytes};
use crate::gemm;
use crate::numerics::{DecodeScale, EncodeScale};
use crate::stored::{Bytes, Global, Misfit};

/// What packed weights are, beside their bytes. Many matrices of a layer have the same. It means
/// something to programs of the same [`VERSION`](super::VERSION) alone.
#[derive(Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Parts {
    /// The entry's name.
    gemm: String,
    rows: usize,
    cols: usize,
    layout: Layout,
    columns: Columns,
    // numbers as their bits: they may be NaN
    table: Vec<u32>,
    power: u32,
    divide: Option<u32>,
    multiply: Option<u32>,
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {}] for {}", self.rows, self.cols, self.gemm)
    }
}

impl Packed {
    /// The packed bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// All else.
    pub fn parts(&self) -> Parts {
        let (divide, multiply) = match self.finish.global {
            None => (None, None),
            Some(Global::Divide(EncodeScale(by))) => (Some(by.to_bits()), None),
            Some(Global::Multiply(DecodeScale(by))) => (None, Some(by.to_bits())),
        };
        Parts {
            gemm: self.gemm.name().into(),
            rows: self.rows,
            cols: self.cols,
            layout: self.layout,
            columns: self.columns.clone(),
            table: self.table.iter().map(|number| number.to_bits()).collect(),
            power: self.finish.power.to_bits(),
            divide,
            multiply,
        }
    }

    /// Packed weights again, without a copy: `bytes` may be part of a mapped file. Kernels read
    /// them fastest from a multiple of 64 bytes on.
    ///
    /// # Errors
    /// If this program has no such entry or this CPU cannot run it, or the parts do not belong
    /// together.
    pub fn from_parts(parts: &Parts, bytes: Bytes) -> Result<Packed, Misfit> {
        let mut entries = gemm::ALL.into_iter().flatten();
        let Some(gemm) = entries.find(|gemm| gemm.name() == parts.gemm && gemm.runs_here()) else {
            return Err(Misfit::new(format!("nothing here multiplies '{}'", parts.gemm)));
        };
        let layout = &parts.layout;
        let fits = (layout.codes, layout.quads) == (gemm.codes(), in_quads(gemm))
            && layout.is_sound()
            && parts.columns.are_sound(parts.cols, layout);
        let table: Option<[u32; 64]> = parts.table.as_slice().try_into().ok();
        let (true, Some(table)) = (fits, table) else {
            return Err(Misfit::new(format!("{parts:?} contradicts itself")));
        };
        let panel = panel_bytes(layout, &parts.columns.blocks);
        let needed = parts.rows.div_ceil(PANEL).checked_mul(panel);
        if needed != Some(bytes.len()) {
            return Err(Misfit::bytes(format_args!("{parts:?}"), bytes.len(), needed));
        }
        let number = f32::from_bits;
        let divide = parts.divide.map(|by| Global::Divide(EncodeScale(number(by))));
        let multiply = parts.multiply.map(|by| Global::Multiply(DecodeScale(number(by))));
        Ok(Packed {
            gemm,
            layout: *layout,
            columns: parts.columns.clone(),
            table: Box::new(table.map(number)),
            finish: Finish { power: number(parts.power), global: divide.or(multiply) },
            rows: parts.rows,
            cols: parts.cols,
            row_codes: None,
            bytes,
        })
    }
}

impl Layout {
    /// Whether a kernel can read a header like that.
    fn is_sound(&self) -> bool {
        let outer = self.outer_scale || self.outer_minimum;
        let offset = match self.offset {
            Offset::None => true,
            Offset::Zero(number) => !matches!(number, Number::Low4 | Number::High4),
            Offset::Minimum(Number::High4) => self.scale == Some(Number::Low4),
            Offset::Minimum(number) => number != Number::Low4,
        };
        match self.scale {
            None => self.group == Group::Block && self.offset == Offset::None && !outer,
            Some(scale) => offset && scale != Number::High4,
        }
    }
}

impl Columns {
    /// Whether they are the columns of a matrix of `cols` columns: a kernel reads as many elements of
    /// a row as there are steps, and as many sums as there are groups.
    fn are_sound(&self, cols: usize, layout: &Layout) -> bool {
        let steps = self.blocks.iter().map(|steps| usize::from(*steps));
        let groups: usize = steps.clone().map(|steps| layout.groups(steps)).sum();
        let order = match &self.order {
            Order::Straight { lead, cols: found, padded } => {
                let all = lead.checked_add(*found).filter(|_| *lead < STEP);
                let all = all.and_then(|all| all.checked_next_multiple_of(STEP));
                *found == cols
                    && if cols == 0 { (*lead, *padded) == (0, 0) } else { all == Some(*padded) }
            }
            Order::Permuted(places) => {
                let mut columns: Vec<u32> =
                    places.iter().copied().filter(|place| *place != PADDING).collect();
                columns.sort_unstable();
                columns.len() == cols && columns.iter().zip(0..).all(|(k, i)| *k == i)
            }
        };
        order
            && steps.clone().all(|steps| (1..=BLOCK / STEP).contains(&steps))
            && steps.sum::<usize>() * STEP == self.order.padded()
            && groups == self.groups.len()
    }
}

#[cfg(test)]
impl Parts {
    /// The same with one thing wrong.
    pub(crate) fn wrong(&self) -> Vec<(&'static str, Parts)> {
        let mut all = Vec::new();
        let mut add = |what, change: &dyn Fn(&mut Parts)| {
            let mut parts = self.clone();
            change(&mut parts);
            all.push((what, parts));
        };
        add("no such entry", &|parts| parts.gemm.push('x'));
        add("rows", &|parts| parts.rows += PANEL);
        add("columns", &|parts| parts.cols += 1);
        add("a table too short", &|parts| parts.table.truncate(63));
        add("quads", &|parts| parts.layout.quads ^= true);
        add("codes", &|parts| {
            parts.layout.codes = match parts.layout.codes {
                super::Codes::F32 => super::Codes::F16,
                _ => super::Codes::F32,
            };
        });
        add("an outer minimum", &|parts| parts.layout.outer_minimum ^= true);
        add("a block less", &|parts| parts.columns.blocks.truncate(parts.columns.blocks.len() - 1));
        add("a step more", &|parts| parts.columns.blocks[0] += 1);
        add("a group more", &|parts| parts.columns.groups.push(0));
        add("an order too long", &|parts| match &mut parts.columns.order {
            Order::Straight { padded, .. } => *padded += STEP,
            Order::Permuted(places) => places.push(0),
        });
        add("a column that is not there", &|parts| match &mut parts.columns.order {
            Order::Straight { cols, .. } => *cols += 1,
            Order::Permuted(places) => places[0] = parts.cols as u32,
        });
        all
    }
}
