//! A rank that dies, errs, returns early or never arrives ends every other rank with an error that
//! names the rank, the layer and the step; nobody waits for ever.

mod layers;

use std::time::Duration;

use layers::{options, rows, sizes};
use moe_runner::comm::{Communicator, Groups, Options, run_ranks_with};
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::parallel::{ExchangeKind, Parallel};
use moe_runner::runner::{Batch, forward_batch};
use moe_runner::weights::{FloatType, random_layer};
use moe_runner::{Error, Result};

/// Long enough for a loaded machine to get through a healthy pass, short enough for a test.
const TIMEOUT: Duration = Duration::from_millis(1500);

/// Two passes on four ranks; before the second, rank 2 does `what` instead. Returns each rank's
/// error of that pass, and what the group ended with.
fn second_pass(
    exchange: ExchangeKind,
    what: impl Fn(&dyn Communicator) -> Result<()> + Sync,
) -> (String, Vec<String>) {
    let layer = random_layer(&layers::plain(), FloatType::F32, 1).unwrap();
    let options = options(None, F32);
    let parallel = Parallel { sizes: sizes(1, 4, 1, true), exchange, ..Parallel::default() };
    let hidden = rows(F32, 9, 48, 3);
    let batch = Batch { hidden: &hidden, router_logits: None, input_ids: None };
    let seen = std::sync::Mutex::new(Vec::new());
    let result = run_ranks_with(4, Options { timeout: TIMEOUT }, |world| {
        let groups = Groups::new(world.clone(), parallel.sizes)?;
        forward_batch(&layer, &options, &groups, &parallel, &batch, None)?;
        if world.rank() == 2 {
            return what(&**world);
        }
        let result = forward_batch(&layer, &options, &groups, &parallel, &batch, None);
        let error = result.expect_err("a pass without rank 2 cannot end well");
        seen.lock().unwrap().push(error.to_string());
        Err(error)
    });
    let ended = result.expect_err("the group failed").to_string();
    (ended, seen.into_inner().unwrap())
}

/// Every survivor names the rank and the layer.
fn expect_named(seen: &[String], cause: &str) {
    assert_eq!(seen.len(), 3, "{seen:?}");
    for error in seen {
        assert!(error.contains("rank 2"), "{error}");
        assert!(error.contains("model.layers.0.mlp"), "{error}");
        assert!(error.contains(cause), "{error}");
    }
}

#[test]
fn a_rank_that_panics() {
    for exchange in [ExchangeKind::AllToAll, ExchangeKind::Naive] {
        let (_, seen) = second_pass(exchange, |_| panic!("a bug in rank 2"));
        expect_named(&seen, "a bug in rank 2");
    }
}

#[test]
fn a_rank_that_returns_early() {
    for exchange in [ExchangeKind::AllToAll, ExchangeKind::Naive] {
        let (_, seen) = second_pass(exchange, |_| Ok(()));
        expect_named(&seen, "step");
    }
}

#[test]
fn a_rank_that_fails() {
    let (ended, _) = second_pass(ExchangeKind::AllToAll, |_| {
        Err(Error::Input { what: "hidden_states", reason: "row 3 is not finite".into() })
    });
    // its own error is what the group ends with
    assert!(ended.contains("row 3 is not finite"), "{ended}");
}

#[test]
fn a_rank_that_never_arrives() {
    for exchange in [ExchangeKind::AllToAll, ExchangeKind::Naive] {
        let (_, seen) = second_pass(exchange, |_| {
            std::thread::sleep(2 * TIMEOUT);
            Ok(())
        });
        expect_named(&seen, "dispatch");
    }
}
