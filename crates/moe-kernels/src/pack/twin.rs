//! The kernels' scalar twin: the promise of [`gemm`](crate::gemm), word by word, on rows as they
//! are before they are packed into lines.

use half::{bf16, f16};

use super::layout::{Codes, Number, Offset, STEP};
use super::order::Order;
use super::plan::Plan;
use super::rows::{code_size, row_numbers, write_row};
use crate::numerics::{DecodeScale, EncodeScale, e4m3, e5m2, e8m0};
use crate::stored::{Global, View};

/// `out[i][j] = Σ_k x[i][k] · w[j][k]` for rows `x`, one after the other.
pub(crate) fn product(view: &View, x: &[f32]) -> Vec<f32> {
    let plan = Plan::of(view);
    let order: &Order = &plan.columns.order;
    let rows = x.len() / view.cols();
    let mut places = vec![0.0; rows * order.padded()];
    for (x, places) in x.chunks(view.cols()).zip(places.chunks_mut(order.padded())) {
        order.apply(x, places);
    }
    let size = code_size(plan.layout.codes);
    let mut out = vec![0.0; rows * view.rows()];
    for row in 0..view.rows() {
        let mut codes = vec![0; order.padded() * size];
        let mut numbers = vec![0; row_numbers(&plan)];
        write_row(view, &plan, row, &mut codes, &mut numbers);
        let codes: Vec<f32> = codes.chunks_exact(size).map(|code| value(&plan, code)).collect();
        for (i, places) in places.chunks(order.padded()).enumerate() {
            out[i * view.rows() + row] = element(&plan, places, &codes, &numbers);
        }
    }
    out
}

/// One sum.
fn element(plan: &Plan, places: &[f32], codes: &[f32], mut numbers: &[u8]) -> f32 {
    let layout = &plan.layout;
    let mut products = places.iter().zip(codes);
    let mut next = |number: Number| {
        let (bytes, rest) = numbers.split_at(number.size());
        numbers = rest;
        decode(number, bytes)
    };
    let mut acc = 0.0f32;
    for steps in &plan.columns.blocks {
        let steps = usize::from(*steps);
        let outer_scale = if layout.outer_scale { next(Number::F16) } else { 1.0 };
        let outer_minimum = if layout.outer_minimum { next(Number::F16) } else { 1.0 };
        let groups = layout.groups(steps);
        for _ in 0..groups {
            let (mut sum, mut sum_x) = (0.0f32, 0.0f64);
            for (x, code) in products.by_ref().take(steps * STEP / groups) {
                sum = code.mul_add(*x, sum);
                sum_x += f64::from(*x);
            }
            let sum_x = sum_x as f32;
            let Some(scale) = layout.scale else {
                acc += sum;
                continue;
            };
            let (scale, high) = match scale {
                Number::Low4 => {
                    let both = next(Number::Int8) as i8 as u8;
                    (f32::from(both & 15), f32::from(both >> 4))
                }
                scale => (next(scale), 0.0),
            };
            let scale = scale * outer_scale;
            match layout.offset {
                Offset::None => acc = scale.mul_add(sum, acc),
                Offset::Zero(number) => {
                    sum = next(number).mul_add(sum_x, sum);
                    acc = scale.mul_add(sum, acc);
                }
                Offset::Minimum(number) => {
                    acc = scale.mul_add(sum, acc);
                    let minimum = if number == Number::High4 { high } else { next(number) };
                    acc = (minimum * outer_minimum).mul_add(sum_x, acc);
                }
            }
        }
    }
    let acc = acc * plan.finish.power;
    match plan.finish.global {
        None => acc,
        Some(Global::Multiply(DecodeScale(by))) => acc * by,
        Some(Global::Divide(EncodeScale(by))) => acc / by,
    }
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

fn decode(number: Number, bytes: &[u8]) -> f32 {
    match number {
        Number::F32 => f32::from_le_bytes(bytes.try_into().unwrap()),
        Number::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
        Number::Bf16 => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
        Number::E8m0 => e8m0::decode(bytes[0]),
        Number::E4m3 => e4m3::decode(bytes[0]) / 256.0,
        Number::Int8 => f32::from(bytes[0] as i8),
        Number::Low4 | Number::High4 => panic!("two numbers in a byte"),
    }
}
