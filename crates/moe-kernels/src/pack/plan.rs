//! What a stored matrix becomes: its layout, its columns, its numbers.

use super::blocks;
use super::integers;
use super::layout::{BLOCK, Codes, Group, Layout, Number, Offset, STEP};
use super::order::{Columns, Order};
use crate::numerics::e8m0;
use crate::operand::OperandKind;
use crate::stored::{self, Element, FloatType, Global, ScaleType, Stored, View, Zeros};

/// What happens to a sum before it is written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Finish {
    /// A power of two, which makes up for codes and scales that are read too small.
    pub(crate) power: f32,
    /// The scale of the whole matrix.
    pub(crate) global: Option<Global>,
}

/// How to pack a matrix.
pub(super) struct Plan {
    pub(super) layout: Layout,
    pub(super) columns: Columns,
    /// The numbers that codes stand for, over and over; for integers the number taken off.
    pub(super) table: [f32; 64],
    pub(super) finish: Finish,
    /// Stored code → packed code, for codes of a byte or less.
    pub(super) recode: Recode,
}

/// What makes packed codes of stored ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Recode {
    /// They are the same.
    Same,
    /// The highest bit changes: from unsigned integers to signed ones.
    Signed,
    /// NaN of E4M3 becomes zero, and the scale of its group NaN.
    NanToScale,
}

/// What the codes of `view` are once packed.
pub(crate) fn codes(view: &View) -> Codes {
    match view.stored() {
        Stored::Floats(floats) => match floats.float() {
            FloatType::F32 => Codes::F32,
            FloatType::F16 => Codes::F16,
            FloatType::Bf16 => Codes::Bf16,
        },
        Stored::Codes(codes) => match codes.element() {
            Element::E4m3 => Codes::E4m3,
            Element::E5m2 => Codes::E5m2,
            Element::Int8 | Element::Uint8 => Codes::Int8,
            Element::Uint4 | Element::Int4 | Element::E2m1 => Codes::Table4,
            Element::E2m3 | Element::E3m2 => Codes::Table6,
            Element::Uint1 | Element::Uint2 => Codes::Table2,
            Element::Uint3 => Codes::Table3,
            Element::Uint5 => Codes::Int5,
            Element::Uint6 => Codes::Int6,
        },
        Stored::Blocks(stored) => blocks::layout(stored.block()).0.codes,
    }
}

/// Whether all of `view`, before it is scaled, is what rows of that kind are multiplied by. Codes of 8
/// bits and fewer are for rows of bf16, integers for rows of bytes; zero points may bring them beyond it.
pub(crate) fn holds(rows: OperandKind, view: &View) -> bool {
    if rows == OperandKind::Int8 && integers::whole(codes(view), &points(view)).is_none() {
        return false;
    }
    let Stored::Codes(stored) = view.stored() else { return true };
    let range = match (rows, stored.element(), stored.zeros()) {
        (OperandKind::F32, ..) | (_, _, Zeros::None) => return true,
        // least values multiply sums of the rows themselves, which products of bytes do not look at
        (kind, _, Zeros::Minima(_)) => {
            return kind != OperandKind::Int8 || codes(view) != Codes::Int8;
        }
        (_, Element::Uint4, _) => -16.0..=0.0,
        (_, Element::Int8 | Element::Uint8, _) => -128.0..=128.0,
        (_, Element::Int4, Zeros::Same(_)) => -128.0..=128.0,
        _ => return false,
    };
    let [_, groups] = stored.scales().shape();
    let mut rows = (0..view.rows()).map(|row| view.stored_row(row));
    rows.all(|row| (0..groups).all(|group| range.contains(&zero(stored, row, group))))
}

/// Whether all columns of each packed group of `view` lie in one run of `size` columns, for products with
/// codes of rows of that kind.
pub(super) fn one_scale(rows: OperandKind, view: &View, size: usize) -> bool {
    let integers = rows == OperandKind::Int8;
    let (group, columns) = match view.stored() {
        Stored::Floats(_) => (Group::Block, Columns::ungrouped(view.cols())),
        // only rows of bytes bring scaled sums along
        Stored::Codes(stored) if matches!(stored.zeros(), Zeros::Minima(_)) && !integers => {
            return false;
        }
        Stored::Codes(stored) => code_columns(view, stored),
        Stored::Blocks(stored) if integers => {
            let group = blocks::layout(stored.block()).0.group;
            (group, block_columns(view, stored, group))
        }
        // no checkpoint of blocks quantises rows
        Stored::Blocks(_) => return false,
    };
    let run = |place: usize| columns.order.column(place).map(|k| k / size);
    size >= view.cols()
        || columns.ranges(group).all(|places| {
            let mut runs = places.filter_map(run);
            let first = runs.next();
            runs.all(|run| Some(run) == first)
        }) && matches!(columns.order, Order::Straight { .. })
}

/// The groups of codes, and their columns.
fn code_columns(view: &View, stored: &stored::Codes) -> (Group, Columns) {
    let (group, cols) = (stored.scales().block()[1], view.stored_cols());
    let sixteen = group == 16 && stored.group_of().is_none();
    let columns = match stored.group_of() {
        Some(groups) => Columns::gathered(cols, |k| groups[k]),
        None if sixteen => Columns::blocks(cols, Group::Sixteen, BLOCK),
        None if group >= stored.cols() => Columns::ungrouped(cols.len()),
        None if group.is_multiple_of(STEP) => Columns::runs(cols, group),
        None => Columns::gathered(cols, |k| (k / group) as u32),
    };
    (if sixteen { Group::Sixteen } else { Group::Block }, columns)
}

/// The columns of blocks.
fn block_columns(view: &View, stored: &stored::Blocks, group: Group) -> Columns {
    let (cols, len) = (view.stored_cols(), stored.block().block_len());
    match group {
        Group::Block => Columns::runs(cols, len),
        group => Columns::blocks(cols, group, len.min(BLOCK)),
    }
}

impl Plan {
    pub(super) fn of(view: &View) -> Plan {
        match view.stored() {
            Stored::Floats(_) => Plan {
                layout: Layout::plain(codes(view)),
                columns: Columns::ungrouped(view.cols()),
                table: points(view),
                finish: Finish { power: 1.0, global: None },
                recode: Recode::Same,
            },
            Stored::Codes(stored) => Plan::of_codes(view, stored),
            Stored::Blocks(stored) => Plan::of_blocks(view, stored),
        }
    }

    fn of_codes(view: &View, stored: &stored::Codes) -> Plan {
        let element = stored.element();
        let codes = codes(view);
        let nan = element == Element::E4m3 && has_nan(view, stored);
        let scale = scale(view, stored, nan);
        let offset = offset(view, stored);
        let (group, columns) = code_columns(view, stored);
        let layout = Layout { group, scale: Some(scale), offset, ..Layout::plain(codes) };
        let small = |is: bool| if is { 256.0 } else { 1.0 };
        let power = small(codes == Codes::E4m3) * small(scale == Number::E4m3);
        let recode = match element {
            Element::Uint8 => Recode::Signed,
            Element::E4m3 if nan => Recode::NanToScale,
            _ => Recode::Same,
        };
        let finish = Finish { power, global: stored.global() };
        Plan { layout, columns, table: points(view), finish, recode }
    }

    fn of_blocks(view: &View, stored: &stored::Blocks) -> Plan {
        let block = stored.block();
        let (mut layout, _) = blocks::layout(block);
        if layout.scale == Some(Number::E8m0) {
            let rows = (0..view.rows()).map(|row| stored.row(view.stored_row(row)));
            let mut scales = rows.flat_map(|row| row.chunks_exact(block.block_bytes()));
            if scales.any(|block| matches!(block[0], 0 | e8m0::NAN)) {
                layout.scale = Some(Number::Bf16);
            }
        }
        // ggml reads a code with a sign that E4M3 has no number for
        if layout.scale == Some(Number::E4m3) {
            let rows = (0..view.rows()).map(|row| stored.row(view.stored_row(row)));
            let mut blocks = rows.flat_map(|row| row.chunks_exact(block.block_bytes()));
            if blocks.any(|block| block[..4].contains(&0xff)) {
                layout.scale = Some(Number::F16);
            }
        }
        let columns = block_columns(view, stored, layout.group);
        let power = if layout.scale == Some(Number::E4m3) { 256.0 } else { 1.0 };
        let finish = Finish { power, global: None };
        Plan { layout, columns, table: points(view), finish, recode: Recode::Same }
    }
}

/// The numbers that the codes of `view` stand for, over and over; for integers the number taken off.
fn points(view: &View) -> [f32; 64] {
    match view.stored() {
        Stored::Floats(_) => [0.0; 64],
        Stored::Codes(stored) => table(stored.element(), stored.zeros()),
        Stored::Blocks(stored) => {
            let (_, numbers) = blocks::layout(stored.block());
            std::array::from_fn(|i| numbers.get(i % numbers.len().max(1)).copied().unwrap_or(0.0))
        }
    }
}

/// What codes of fewer than eight bits stand for, less the zero point that all have.
fn table(element: Element, zeros: &Zeros) -> [f32; 64] {
    let zero = match zeros {
        Zeros::Same(zero) => f32::from(*zero),
        Zeros::None | Zeros::Each(_) | Zeros::Minima(_) => 0.0,
    };
    match element.bits() {
        8 => [0.0; 64],
        bits => std::array::from_fn(|i| element.value((i % (1 << bits)) as u8) - zero),
    }
}

/// What is added to every packed code of a group, beyond what the table says: its zero point, made
/// negative. Unsigned bytes are packed as signed ones.
pub(super) fn zero(stored: &stored::Codes, row: usize, group: usize) -> f32 {
    let middle = if stored.element() == Element::Uint8 { 128.0 } else { 0.0 };
    let zero = middle - stored.zero(row, group);
    if stored.element() == Element::E4m3 { zero / 256.0 } else { zero }
}

/// What is added to every weight of a group. Unsigned bytes are packed as signed ones: what those lack
/// is in here, rounded once.
pub(super) fn minimum(stored: &stored::Codes, row: usize, group: usize) -> f32 {
    let Zeros::Minima(minima) = stored.zeros() else { return 0.0 };
    let minimum = minima.get(row, group);
    match stored.element() {
        Element::Uint8 => stored.scales().get(row, group).mul_add(128.0, minimum),
        _ => minimum,
    }
}

/// How zero points are stored: in the smallest type that holds all of them; minima as they are.
fn offset(view: &View, stored: &stored::Codes) -> Offset {
    let small = stored.element().bits() < 8;
    match stored.zeros() {
        Zeros::Minima(minima) => {
            return Offset::Minimum(match minima.stored() {
                ScaleType::F16 if small => Number::F16,
                ScaleType::Bf16 if small => Number::Bf16,
                _ => Number::F32,
            });
        }
        // The table has it.
        Zeros::None | Zeros::Same(_) if small => return Offset::None,
        Zeros::None | Zeros::Same(_) if zero(stored, 0, 0) == 0.0 => return Offset::None,
        _ => {}
    }
    let [_, groups] = stored.scales().shape();
    let (mut largest, mut whole) = (0.0f32, true);
    for row in 0..view.rows() {
        for group in 0..groups {
            let zero = zero(stored, view.stored_row(row), group);
            (largest, whole) = (largest.max(zero.abs()), whole && zero.fract() == 0.0);
        }
    }
    Offset::Zero(match largest {
        ..=127.0 if whole => Number::Int8,
        ..=2048.0 if whole => Number::F16,
        _ => Number::F32,
    })
}

/// How scales are stored: as they are, but for codes that the kernels do not read.
fn scale(view: &View, stored: &stored::Codes, nan: bool) -> Number {
    let scales = stored.scales();
    let [_, groups] = scales.shape();
    let any = |odd: fn(u8) -> bool| {
        let mut rows = (0..view.rows()).map(|row| view.stored_row(row));
        rows.any(|row| (0..groups).any(|group| odd(scales.get_bytes(row, group)[0])))
    };
    match scales.stored() {
        ScaleType::F32 => Number::F32,
        ScaleType::F16 => Number::F16,
        ScaleType::Bf16 => Number::Bf16,
        ScaleType::E8m0 if nan || any(|code| matches!(code, 0 | e8m0::NAN)) => Number::Bf16,
        ScaleType::E8m0 => Number::E8m0,
        ScaleType::E4m3 if nan || any(is_nan) => Number::F16,
        ScaleType::E4m3 => Number::E4m3,
    }
}

/// Whether an E4M3 code is NaN.
pub(super) fn is_nan(code: u8) -> bool {
    code & 0x7F == 0x7F
}

/// Whether any E4M3 code of the window is NaN.
fn has_nan(view: &View, stored: &stored::Codes) -> bool {
    let mut codes = vec![0; view.cols()];
    (0..view.rows()).any(|row| {
        stored.codes(view.stored_row(row), view.stored_cols(), &mut codes);
        codes.iter().fold(false, |nan, code| nan | is_nan(*code))
    })
}
