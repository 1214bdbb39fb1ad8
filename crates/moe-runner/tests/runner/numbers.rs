//! Whole layers whose output can be written down: every expert adds a number of its own.

use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::runner::{ForwardInput, MoeRunnerInterface};
use moe_runner::spec::{Activation, Dims, RouterSpec};
use moe_runner::weights::{FloatType, LoadedLayer, Matrix, random_layer};

use super::layers::{plain, runner};

const WIDTH: usize = 8;

/// Expert e makes `numbers[e]` of a row that begins with 1.
fn layer(numbers: &[f32], top_k: usize) -> LoadedLayer {
    let mut spec = plain();
    spec.dims = Dims { hidden: WIDTH, routed_hidden: WIDTH, intermediate: WIDTH };
    spec.router = RouterSpec::softmax(numbers.len(), top_k, true);
    spec.expert.gated = false;
    spec.expert.activation = Activation::Relu;
    let mut layer = random_layer(&spec, FloatType::F32, 1).unwrap();
    let first = |value: f32| {
        let mut values = [0.0; WIDTH * WIDTH];
        values[0] = value;
        Matrix::from_f32(&values, [WIDTH, WIDTH]).unwrap()
    };
    for (expert, number) in layer.experts.iter_mut().zip(numbers) {
        (expert.up, expert.down) = (first(1.0), first(*number));
    }
    layer
}

/// Rows that begin with 1.
fn ones(tokens: usize) -> Vec<f32> {
    (0..tokens * WIDTH).map(|i| f32::from(u8::from(i % WIDTH == 0))).collect()
}

/// What the layer makes of each row.
fn numbers(layer: &LoadedLayer, call: &ForwardInput<'_>, tokens: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; tokens * WIDTH];
    runner(layer, None, F32).forward(call, RowsMut::F32(&mut out)).unwrap();
    out.iter().step_by(WIDTH).copied().collect()
}

#[test]
fn any_of_three_hundred_experts_answers() {
    const EXPERTS: usize = 300;
    let own: Vec<f32> = (0..EXPERTS).map(|e| e as f32 + 1.0).collect();
    // token t asks for expert t
    let logits: Vec<f32> =
        (0..EXPERTS * EXPERTS).map(|i| f32::from(u8::from(i / EXPERTS == i % EXPERTS))).collect();
    let hidden = ones(EXPERTS);
    let call =
        ForwardInput { router_logits: Some(&logits), ..ForwardInput::new(Rows::F32(&hidden)) };
    assert_eq!(numbers(&layer(&own, 1), &call, EXPERTS), own);
}

/// 1 + 2⁻²⁴ + 2⁻²⁴ is 1 from left to right, and 1 + 2⁻²³ from right to left.
#[test]
fn a_token_adds_its_experts_in_the_order_of_its_choice() {
    const SMALL: f32 = 1.0 / (1 << 24) as f32;
    let hidden = ones(2);
    let call = ForwardInput::routed(Rows::F32(&hidden), &[0, 1, 2, 2, 1, 0], &[1.0; 6]);
    let sums = numbers(&layer(&[1.0, SMALL, SMALL], 3), &call, 2);
    assert_eq!(sums, [1.0, 1.0 + 2.0 * SMALL]);
}
