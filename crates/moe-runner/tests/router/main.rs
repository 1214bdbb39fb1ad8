//! The router's promises: recordings, an independent reference, hand-computed cases, an ablation
//! of every option, invariances, and the defects of other routers that must not come back.

mod ablation;
mod cases;
mod defects;
mod golden;
mod properties;
mod reference;
mod trace;

use moe_runner::router::{LogicalId, Router, RouterTensors, Routing};
use moe_runner::spec::{RouterSpec, Score};

/// Routes rows of logits; the rows' width is the spec's.
fn route(spec: &RouterSpec, scale: f32, tensors: RouterTensors, logits: &[f32]) -> Routing {
    route_with_ids(spec, scale, tensors, logits, None)
}

fn route_with_ids(
    spec: &RouterSpec,
    scale: f32,
    tensors: RouterTensors,
    logits: &[f32],
    input_ids: Option<&[u32]>,
) -> Routing {
    let router = Router::new(spec.clone(), scale, tensors).unwrap();
    let mut out = Routing::new();
    router.route(logits, input_ids, logits.len() / spec.logits(), &mut out).unwrap();
    out
}

/// Softmax routing with another score, not renormalised.
fn scored(score: Score, experts: usize, top_k: usize) -> RouterSpec {
    RouterSpec { score, ..RouterSpec::softmax(experts, top_k, false) }
}

fn correction(bias: &[f32]) -> RouterTensors {
    RouterTensors { correction: Some(bias.to_vec()), ..RouterTensors::default() }
}

fn ids(routing: &Routing) -> Vec<u32> {
    routing.ids.iter().map(|id| id.0).collect()
}

fn logical(ids: &[u32]) -> Vec<LogicalId> {
    ids.iter().map(|&id| LogicalId(id)).collect()
}

/// Distance in units in the last place; numbers of different sign are far apart, ±0 are equal.
fn ulps(a: f32, b: f32) -> u32 {
    if a == b {
        return 0;
    }
    if a.is_nan() || b.is_nan() || a.is_sign_negative() != b.is_sign_negative() {
        return u32::MAX;
    }
    a.to_bits().abs_diff(b.to_bits())
}

#[track_caller]
fn assert_weights(actual: &[f32], expected: &[f64]) {
    assert_eq!(actual.len(), expected.len(), "{actual:?}, expected {expected:?}");
    for (&actual, &expected) in actual.iter().zip(expected) {
        assert!(ulps(actual, expected as f32) <= 1, "{actual}, expected {expected}");
    }
}

/// Reproducible numbers in −1..1 for fixed inputs.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f64 / (1 << 23) as f64 - 1.0) as f32
        })
        .collect()
}
