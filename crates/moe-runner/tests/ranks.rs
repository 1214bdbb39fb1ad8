//! The layer over many ranks (threads of this process) equals the layer on one.

mod layers;

use layers::{forward, nmse, options, rows, runner, sizes, split, splits, truth, variants};
use moe_runner::Error;
use moe_runner::comm::Sizes;
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::parallel::{ExchangeKind, Parallel};
use moe_runner::shared_experts::SharedOrder;
use moe_runner::weights::{FloatType, random_layer};

const WIDTH: usize = 48;

#[test]
fn every_split_of_every_option_equals_one_rank() {
    let options = options(None, F32);
    for (name, spec) in variants() {
        let layer = random_layer(&spec, FloatType::F32, 11).unwrap();
        for tokens in [1, 7] {
            let hidden = rows(F32, tokens, WIDTH, tokens as u64);
            let truth = truth(&layer, &hidden);
            let one = forward(&mut runner(&layer, None, F32), &hidden);
            for (split_name, parallel) in splits() {
                let sliced = parallel.sizes.moe_tp() > 1;
                let got = match split(&layer, &options, &parallel, &hidden) {
                    Ok(got) => got.output,
                    Err(Error::Spec { reason, .. }) if sliced && spec.expert.norm.is_some() => {
                        assert!(reason.contains("--ep"), "{reason}");
                        continue;
                    }
                    Err(error) => panic!("{name}, {split_name}: {error}"),
                };
                let scale =
                    if nmse(&one, &truth) <= 1e-11 { 1.0 } else { spec.routed_scale.factor };
                let got: Vec<f32> = got.iter().map(|v| v * scale).collect();
                let error = nmse(&got, &truth);
                assert!(error <= 1e-11, "{name}, {split_name}, {tokens} tokens: NMSE {error:e}");
                let whole = parallel.sizes.use_ep() && parallel.exchange == ExchangeKind::Auto;
                // sums over shared experts' slices differ in order; nothing else does
                if whole && (spec.shared.is_none() || parallel.sizes.tp == 1) {
                    assert_eq!(got, one, "{name}, {split_name}: only the placement differs");
                }
            }
        }
    }
}

#[test]
fn the_order_of_shared_experts_changes_no_bit() {
    let mut spec = layers::plain();
    spec.shared = Some(layers::shared());
    let layer = random_layer(&spec, FloatType::F32, 1).unwrap();
    let hidden = rows(F32, 13, WIDTH, 4);
    let options = options(None, F32);
    for sizes in [Sizes::default(), sizes(2, 2, 1, true), sizes(2, 1, 1, false)] {
        let orders =
            [SharedOrder::NoOverlap, SharedOrder::DuringCombine, SharedOrder::SecondThread];
        let outputs: Vec<Vec<f32>> = orders
            .iter()
            .map(|&order| {
                let parallel = Parallel { sizes, order, ..Parallel::default() };
                split(&layer, &options, &parallel, &hidden).unwrap().output
            })
            .collect();
        assert_eq!(outputs[0], outputs[1], "{sizes:?}");
        assert_eq!(outputs[0], outputs[2], "{sizes:?}");
    }
}

#[test]
fn all_to_all_without_whole_experts_is_refused() {
    let layer = random_layer(&layers::plain(), FloatType::F32, 1).unwrap();
    let parallel = Parallel {
        sizes: sizes(2, 1, 1, false),
        exchange: ExchangeKind::AllToAll,
        ..Parallel::default()
    };
    let error = split(&layer, &options(None, F32), &parallel, &rows(F32, 2, WIDTH, 1))
        .unwrap_err()
        .to_string();
    assert!(error.contains("needs expert parallelism"), "{error}");
}
