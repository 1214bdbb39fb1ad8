//! The layer over many ranks (threads of this process) equals the layer on one.

mod layers;

use layers::{forward, nmse, options, rows, runner, sizes, splits, truth, variants};
use moe_runner::comm::{Groups, Sizes, run_ranks};
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::parallel::{ExchangeKind, Parallel, deal_rows};
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface};
use moe_runner::shared_experts::SharedOrder;
use moe_runner::weights::{FloatType, LoadedLayer, random_layer};
use moe_runner::{Error, Result};

const WIDTH: usize = 48;

/// The output of all rows, in their order, of a layer split as `parallel` says.
fn split(layer: &LoadedLayer, parallel: &Parallel, hidden: &[f32]) -> Result<Vec<f32>> {
    let options = options(None, F32);
    let deal = deal_rows(hidden.len() / WIDTH, parallel.sizes);
    let outputs = run_ranks(parallel.sizes.ranks(), |world| {
        let rank = world.rank();
        let groups = Groups::new(world.clone(), parallel.sizes)?;
        let mut runner = MoeRunner::on_rank(layer, &options, &groups, parallel)?;
        let mine = &hidden[deal[rank].start * WIDTH..deal[rank].end * WIDTH];
        let mut out = vec![f32::NAN; mine.len()];
        let result = runner.forward(&ForwardInput::new(Rows::F32(mine)), RowsMut::F32(&mut out))?;
        assert!(result.complete);
        Ok(out)
    })?;
    let mut all = vec![f32::NAN; hidden.len()];
    for (rows, out) in deal.iter().zip(&outputs) {
        let place = &mut all[rows.start * WIDTH..rows.end * WIDTH];
        // ranks with the same rows have the same output, bit by bit
        if place.iter().all(|v| !v.is_nan()) {
            assert_eq!(place, &out[..], "tensor-parallel ranks disagree");
        }
        place.copy_from_slice(out);
    }
    Ok(all)
}

#[test]
fn every_split_of_every_option_equals_one_rank() {
    for (name, spec) in variants() {
        let layer = random_layer(&spec, FloatType::F32, 11).unwrap();
        for tokens in [1, 7] {
            let hidden = rows(F32, tokens, WIDTH, tokens as u64);
            let truth = truth(&layer, &hidden);
            let one = forward(&mut runner(&layer, None, F32), &hidden);
            for (split_name, parallel) in splits() {
                let sliced = parallel.sizes.moe_tp() > 1;
                let got = match split(&layer, &parallel, &hidden) {
                    Ok(got) => got,
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
    for sizes in [Sizes::default(), sizes(2, 2, 1, true), sizes(2, 1, 1, false)] {
        let orders =
            [SharedOrder::NoOverlap, SharedOrder::DuringCombine, SharedOrder::SecondThread];
        let outputs: Vec<Vec<f32>> = orders
            .iter()
            .map(|&order| {
                let parallel = Parallel { sizes, order, ..Parallel::default() };
                split(&layer, &parallel, &hidden).unwrap()
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
    let error = split(&layer, &parallel, &rows(F32, 2, WIDTH, 1)).unwrap_err().to_string();
    assert!(error.contains("needs expert parallelism"), "{error}");
}
