//! What a pass reports of itself: operations and bytes of weights, beside those counted by hand.

use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::hidden::Rows;
use moe_runner::runner::{ForwardInput, MoeRunner, Options, Report, Workspaces};
use moe_runner::weights::{FloatType, random_layer};

use super::layers::{options, plain, reported, rows, runner, variants};

/// Two operations for each weight that a token is multiplied by: a layer of 8 experts [48, 40], two of a token, a
/// gate [8, 48], and what the option has beside that.
#[test]
fn operations_are_two_for_each_weight_of_a_token() {
    let (hidden, inner, shared) = (48, 40, 56);
    let expert = 3 * hidden * inner;
    let gate = 8 * hidden;
    for (name, weights) in [
        ("plain", gate + 2 * expert),
        ("not gated", gate + 2 * (2 * hidden * inner)),
        ("weight on input", gate + expert),
        // experts between projections to a width of 24 and back
        ("latent", gate + hidden * 24 + 2 * (3 * 24 * inner) + 24 * hidden),
        ("shared", gate + 2 * expert + 3 * hidden * shared),
        ("two shared with biases", gate + 2 * expert + 2 * (3 * hidden * shared)),
    ] {
        let (_, spec) = variants().into_iter().find(|(other, _)| *other == name).unwrap();
        let layer = random_layer(&spec, FloatType::F32, 3).unwrap();
        let hidden = rows(F32, 7, 48, 5);
        let mut out = vec![0.0; hidden.len()];
        let input = ForwardInput::new(Rows::F32(&hidden));
        let (_, report) = reported(&mut runner(&layer, None, F32), &input, &mut out);
        assert_eq!(report.flops, (7 * 2 * weights) as f64, "{name}");
    }
}

/// A slot whose expert has no weights costs nothing.
#[test]
fn idle_experts_take_no_operations() {
    for name in ["identity experts", "skip experts"] {
        let (_, spec) = variants().into_iter().find(|(other, _)| *other == name).unwrap();
        let layer = random_layer(&spec, FloatType::F32, 3).unwrap();
        let hidden = rows(F32, 16, 48, 5);
        let mut out = vec![0.0; hidden.len()];
        let input = ForwardInput::new(Rows::F32(&hidden));
        let (_, report) = reported(&mut runner(&layer, None, F32), &input, &mut out);
        let slots = report.routing.ids.iter().filter(|id| id.0 < 8).count();
        assert!((1..32).contains(&slots), "{name}: {slots}");
        let gate = 16 * 11 * 48;
        assert_eq!(report.flops, (2 * (gate + slots * 3 * 48 * 40)) as f64, "{name}");
    }
}

/// An expert's weights are read once for each micro-batch that has a row for it, whatever passes came before in the
/// same memory.
#[test]
fn weights_are_counted_for_the_pass_that_read_them() {
    let layer = random_layer(&plain(), FloatType::F32, 3).unwrap();
    let options = Options { workspaces: Workspaces::new(), ..options(None, F32) };
    let hidden = rows(F32, 6, 48, 5);
    let read = |micro_batches: usize| -> Report {
        let runner = MoeRunner::new(layer.ready(&options).unwrap());
        let mut out = vec![0.0; hidden.len()];
        let input = ForwardInput::new(Rows::F32(&hidden));
        reported(&mut runner.with_micro_batches(micro_batches), &input, &mut out).1
    };
    for micro_batches in [1, 3, 1, 2] {
        let report = read(micro_batches);
        let lanes = report.routing.ids.chunks(6 / micro_batches * 2);
        let experts: usize = lanes
            .map(|ids| (0..8).filter(|expert| ids.iter().any(|id| id.0 == *expert)).count())
            .sum();
        assert_eq!(report.weight_bytes, experts * 3 * 48 * 40 * 4, "{micro_batches}");
    }
}
