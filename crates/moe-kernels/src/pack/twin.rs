//! The kernels' scalar twin: the promise of [`gemm`](crate::gemm), word by word, on rows as they
//! are before they are packed into lines.

use half::{bf16, f16};

use super::layout::{BLOCK, Codes, Group, Number, Offset, STEP};
use super::order::PADDING;
use super::plan::{Plan, Recode, is_nan, minimum, zero};
use super::unit::{code_bytes, row_codes};
use crate::numerics::ggml::{Parts, unsigned_e4m3};
use crate::numerics::quantise::{GroupScale, Qdq};
use crate::numerics::{DecodeScale, EncodeScale, e4m3, e5m2};
use crate::operand::OperandKind;
use crate::stored::{Global, Stored, View};

/// A row as the promise names its parts.
struct Row {
    /// The numbers of the codes, at their places.
    codes: Vec<f32>,
    groups: Vec<Numbers>,
}

/// The numbers of a group: those that its format lacks are zero.
#[derive(Clone, Copy, Default)]
struct Numbers {
    places: usize,
    scale: Option<f32>,
    zero: f32,
    minimum: f32,
}

/// `out[i][j] = Σ_k x[i][k] · w[j][k]` for rows `x`, one after the other, multiplied as `kind`; as codes
/// where they were `quantised` so.
pub(crate) fn product(
    view: &View,
    x: &[f32],
    kind: OperandKind,
    quantised: Option<&Qdq>,
) -> Vec<f32> {
    let plan = Plan::of(view);
    let order = &plan.columns.order;
    let rows = x.len() / view.cols();
    let mut places = vec![0.0; rows * order.padded()];
    // for each place the scale of its column
    let mut scales = quantised.map(|_| vec![0.0; places.len()]);
    for (i, (x, places)) in x.chunks(view.cols()).zip(places.chunks_mut(order.padded())).enumerate()
    {
        if let (Some(qdq), Some(scales)) = (quantised, &mut scales) {
            let (codes, of_columns) = coded(qdq, x);
            order.apply(&codes, places);
            order.apply(&of_columns, &mut scales[i * order.padded()..][..order.padded()]);
            continue;
        }
        order.apply(x, places);
        if kind == OperandKind::Bf16 {
            places.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
        }
    }
    let mut out = vec![0.0; rows * view.rows()];
    for row in 0..view.rows() {
        let numbers = match view.stored() {
            Stored::Blocks(stored) => block_row(view, &plan, stored, row),
            _ => code_row(view, &plan, row),
        };
        for (i, places) in places.chunks(order.padded()).enumerate() {
            let scales = scales.as_ref().map(|scales| &scales[i * order.padded()..]);
            out[i * view.rows() + row] = element(&plan, places, scales, &numbers, kind);
        }
    }
    out
}

/// What makes the scale of a group's values.
type Rule = Box<dyn Fn(&[f32]) -> f32>;

/// The codes of a quantised row as numbers, and each one's scale.
fn coded(qdq: &Qdq, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let largest = |x: &[f32]| x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let (size, fp8, scale): (usize, bool, Rule) = match *qdq {
        Qdq::Fp8Token => {
            (x.len(), true, Box::new(move |x| (largest(x) / 448.0).max(1.0 / (448.0 * 512.0))))
        }
        Qdq::Fp8Static { scale } => (x.len(), true, Box::new(move |_| scale)),
        Qdq::Fp8Group { size, scale: GroupScale::F32 } => {
            (size, true, Box::new(move |x| largest(x).max(1e-10) / 448.0))
        }
        Qdq::Fp8Group { size, scale: GroupScale::PowerOfTwo } => {
            let up = |x: f32| 2f32.powi(x.log2().ceil() as i32);
            (size, true, Box::new(move |x| up(largest(x).max(1e-10) / 448.0)))
        }
        Qdq::Int8Token => (x.len(), false, Box::new(move |x| largest(x).max(1e-10) / 127.0)),
        Qdq::Int8Static { scale } => (x.len(), false, Box::new(move |_| scale)),
        Qdq::Int8Group { size } => (size, false, Box::new(move |x| largest(x).max(1e-10) / 127.0)),
        _ => unreachable!("{qdq:?}"),
    };
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for group in x.chunks(size.max(1)) {
        let nan = group.iter().any(|x| x.is_nan());
        let scale = if nan { f32::NAN } else { scale(group) };
        codes.extend(group.iter().map(|x| match fp8 {
            true => e4m3::round(x / scale),
            false => (x / scale).round_ties_even(),
        }));
        scales.resize(codes.len(), scale);
    }
    (codes, scales)
}

/// One sum; `scales`: of the columns at the places, where they have some.
fn element(
    plan: &Plan,
    places: &[f32],
    scales: Option<&[f32]>,
    row: &Row,
    kind: OperandKind,
) -> f32 {
    let mut products = places.iter().zip(&row.codes);
    let mut acc = 0.0f32;
    let mut place = 0;
    for group in &row.groups {
        // padding has none
        let scale_of_row = scales.map(|scales| {
            let of_group = &scales[place..place + group.places];
            of_group.iter().copied().find(|scale| *scale != 0.0).unwrap_or(0.0)
        });
        place += group.places;
        let (mut sum, mut sum_x) = (0.0f32, 0.0f64);
        let of_group: Vec<(f32, f32)> =
            products.by_ref().take(group.places).map(|(x, code)| (*x, code + group.zero)).collect();
        of_group.iter().for_each(|(x, _)| sum_x += f64::from(*x));
        match kind {
            OperandKind::F32 => of_group.iter().for_each(|(x, w)| sum = w.mul_add(*x, sum)),
            OperandKind::Int8 => {
                let exact: f64 = of_group.iter().map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                sum = exact as f32;
            }
            OperandKind::Bf16 | OperandKind::TileBf16 => {
                for (x, w) in of_group.as_chunks::<2>().0.iter().flat_map(|[a, b]| [b, a]) {
                    sum = normal(normal(*w).mul_add(normal(*x), sum));
                }
            }
        }
        let mut sum_x = sum_x as f32;
        if let Some(of_row) = scale_of_row {
            sum_x *= of_row;
        }
        let scale = match (group.scale, scale_of_row) {
            (None, None) => {
                acc += sum;
                continue;
            }
            (None, Some(scale)) | (Some(scale), None) => scale,
            (Some(scale), Some(of_row)) => scale * of_row,
        };
        acc = scale.mul_add(sum, acc);
        if matches!(plan.layout.offset, Offset::Minimum(_)) {
            acc = group.minimum.mul_add(sum_x, acc);
        }
    }
    let acc = acc * plan.finish.power;
    match plan.finish.global {
        None => acc,
        Some(Global::Multiply(DecodeScale(by))) => acc * by,
        Some(Global::Divide(EncodeScale(by))) => acc / by,
    }
}

/// What dot products of bf16 make of numbers below the normal ones.
fn normal(value: f32) -> f32 {
    if value.abs() < f32::MIN_POSITIVE { 0f32.copysign(value) } else { value }
}

/// A row of floats, or of codes with scales in an array of their own.
fn code_row(view: &View, plan: &Plan, row: usize) -> Row {
    let size = code_bytes(plan.layout.codes);
    let mut codes = vec![0; plan.columns.order.padded() * size];
    row_codes(view, plan, row, 0..plan.columns.order.padded(), &mut codes);
    let codes = codes.chunks_exact(size).map(|code| value(plan, code)).collect();
    let mut groups = Vec::new();
    let mut stored_groups = plan.columns.groups.iter();
    let mut place = 0;
    for steps in &plan.columns.blocks {
        let count = plan.layout.groups(usize::from(*steps));
        for stored_group in stored_groups.by_ref().take(count) {
            let places = usize::from(*steps) * STEP / count;
            let mut group = Numbers { places, ..Numbers::default() };
            if let Stored::Codes(stored) = view.stored() {
                let row = view.stored_row(row);
                group.scale = Some(0.0);
                if *stored_group != PADDING {
                    let number = *stored_group as usize;
                    let small = if plan.layout.scale == Some(Number::E4m3) { 256.0 } else { 1.0 };
                    group.scale = Some(stored.scales().get(row, number) / small);
                    if matches!(plan.layout.offset, Offset::Zero(_)) {
                        group.zero = zero(stored, row, number);
                    }
                    group.minimum = minimum(stored, row, number);
                }
                let mut columns =
                    (place..place + places).filter_map(|at| plan.columns.order.column(at));
                let nan = |k: usize| {
                    let mut code = [0];
                    let k = view.stored_cols().start + k;
                    stored.codes(row, k..k + 1, &mut code);
                    is_nan(code[0])
                };
                if plan.recode == Recode::NanToScale && columns.any(nan) {
                    group.scale = Some(f32::NAN);
                }
            }
            place += places;
            groups.push(group);
        }
    }
    Row { codes, groups }
}

/// A row of blocks.
fn block_row(view: &View, plan: &Plan, stored: &crate::stored::Blocks, row: usize) -> Row {
    let layout = &plan.layout;
    let (len, bytes) = (stored.block().block_len(), stored.block().block_bytes());
    let row = stored.row(view.stored_row(row));
    let cols = view.stored_cols();
    let mut all: Vec<Parts> = Vec::new();
    for block in row.chunks_exact(bytes) {
        let mut parts = Parts::new();
        stored.block().take_apart(block, &mut parts);
        all.push(parts);
    }
    let first = cols.start - cols.start % STEP;
    let padded = plan.columns.order.padded();
    let codes = (first..first + padded).map(|k| match cols.contains(&k) {
        true => value(plan, &all[k / len].codes[k % len..][..1]),
        // Of padding, whose product is zero.
        false => value(plan, &[0]),
    });
    let f16 = |bytes: [u8; 2]| f16::from_le_bytes(bytes).to_f32();
    let size = if layout.group == Group::Block { len.min(BLOCK) } else { layout.group_len() };
    let mut groups = Vec::new();
    let mut k = first;
    while k < first + padded {
        let places = (size - k % size).min(first + padded - k);
        let (parts, group) = (&all[k / len], k % len / size);
        let sub = parts.scales[group];
        let (scale, minimum) = (f32::from(sub as i8), f32::from(parts.minima[group]));
        let outer = match layout.scale {
            Some(Number::E8m0 | Number::Bf16) => crate::numerics::e8m0::decode(parts.scale[0]),
            Some(Number::E4m3) => unsigned_e4m3(sub) / 256.0,
            Some(Number::F16) if layout.group == Group::Sixteen => unsigned_e4m3(sub),
            _ => f16(parts.scale),
        };
        groups.push(Numbers {
            places,
            scale: Some(if layout.outer_scale { outer * scale } else { outer }),
            zero: 0.0,
            minimum: f16(parts.minimum) * if layout.outer_minimum { minimum } else { 1.0 },
        });
        k += places;
    }
    Row { codes: codes.collect(), groups }
}

/// What a packed code stands for.
fn value(plan: &Plan, code: &[u8]) -> f32 {
    let index = usize::from(code[0]);
    match plan.layout.codes {
        Codes::F32 => f32::from_le_bytes(code.try_into().unwrap()),
        Codes::F16 => f16::from_le_bytes(code.try_into().unwrap()).to_f32(),
        Codes::Bf16 => bf16::from_le_bytes(code.try_into().unwrap()).to_f32(),
        Codes::Int8 => f32::from(code[0] as i8),
        Codes::E4m3 => e4m3::decode(code[0]) / 256.0,
        Codes::E5m2 => e5m2::decode(code[0]),
        Codes::Table2 | Codes::Table3 | Codes::Table4 | Codes::Table6 => plan.table[index],
        Codes::Int5 | Codes::Int6 => index as f32 - plan.table[0],
    }
}
