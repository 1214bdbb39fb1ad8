//! Experts without a checkpoint and without a router: two stacked tensors in memory of one's own, a
//! kernel chosen for them, and rows that somebody else has routed.

use std::sync::Arc;

use moe_runner::hidden::{ActivationDtype, Rows, RowsMut};
use moe_runner::runner::{Options, RoutedExperts};
use moe_runner::spec::{Activation, ExpertSpec, WeightOn};
use moe_runner::weights::{Bytes, FloatType, GateUp, Stack, StackedExperts};

const EXPERTS: usize = 4;
const HIDDEN: usize = 64;
const INTERMEDIATE: usize = 32;

fn main() -> moe_runner::Result<()> {
    // [E, 2I, H] and [E, H, I], as an engine holds them; nothing is copied until it is packed
    let stack = |shape: [usize; 3], seed: f32| {
        let values = (0..shape.iter().product()).map(|i: usize| (i as f32 * seed).sin());
        let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
        Stack {
            bytes: Bytes::new(Arc::new(bytes)),
            float: FloatType::F32,
            shape,
            transposed: false,
        }
    };
    let stacked = StackedExperts {
        gate_up: stack([EXPERTS, 2 * INTERMEDIATE, HIDDEN], 0.7),
        layout: GateUp::Halves,
        down: stack([EXPERTS, HIDDEN, INTERMEDIATE], 0.3),
        gate_up_bias: None,
        down_bias: None,
    };
    let spec = ExpertSpec { gated: true, activation: Activation::Silu, bias: false, norm: None };
    let options = Options::new(ActivationDtype::F32, 2)?;
    let mut experts = RoutedExperts::new(spec, WeightOn::Output, stacked.experts()?, &options)?;
    println!("{}: {}", experts.choice().kernel.name, experts.choice().why);
    for rejection in &experts.choice().rejected {
        println!("not {rejection}");
    }

    // two tokens of two slots; the last slot's expert is not here
    let hidden: Vec<f32> = (0..2 * HIDDEN).map(|i| (i as f32 * 0.1).sin()).collect();
    let (ids, weights) = ([2, 0, 3, -1], [0.75, 0.25, 1.0, 0.5]);
    let mut output = vec![0.0; hidden.len()];
    experts.forward(Rows::F32(&hidden), &ids, &weights, RowsMut::F32(&mut output))?;
    println!("output begins {:.4?}", &output[..4]);
    Ok(())
}
