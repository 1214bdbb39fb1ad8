//! From one token's logits to scores, in float64.

use crate::spec::{RouterSpec, Score};
use crate::{Error, Result};

/// Widens a row of logits, applies multiplier and soft cap, and refuses what cannot be compared.
///
/// −∞ masks an expert: it stays −∞ whatever the multiplier and the cap.
pub(super) fn prepare(
    spec: &RouterSpec,
    token: usize,
    row: &[f32],
    logits: &mut Vec<f64>,
) -> Result<()> {
    logits.clear();
    let multiplier = f64::from(spec.logit_multiplier);
    for (expert, &raw) in row.iter().enumerate() {
        if raw.is_nan() || raw == f32::INFINITY {
            return Err(bad_logit(token, expert, raw));
        }
        if raw == f32::NEG_INFINITY {
            logits.push(f64::NEG_INFINITY);
            continue;
        }
        let mut logit = f64::from(raw) * multiplier;
        if let Some(cap) = spec.soft_cap {
            let cap = f64::from(cap);
            logit = (logit / cap).tanh() * cap;
        }
        if !(logit as f32).is_finite() {
            return Err(bad_logit(token, expert, logit as f32));
        }
        logits.push(logit);
    }
    Ok(())
}

fn bad_logit(token: usize, expert: usize, value: f32) -> Error {
    Error::input(
        "router logits",
        format!(
            "token {token}, expert {expert}: {value}; look for non-finite hidden states or gate weights"
        ),
    )
}

/// Scores of all choices. A masked expert scores 0.
pub(super) fn scores(score: Score, logits: &[f64], scores: &mut Vec<f64>) {
    scores.clear();
    match score {
        Score::Softmax => {
            scores.extend_from_slice(logits);
            softmax(scores);
        }
        Score::Sigmoid => scores.extend(logits.iter().map(|&l| sigmoid(l))),
        Score::SqrtSoftplus => scores.extend(logits.iter().map(|&l| softplus(l).sqrt())),
        Score::Logits => {
            scores.extend(logits.iter().map(|&l| if l == f64::NEG_INFINITY { 0.0 } else { l }));
        }
    }
}

/// In place. Of nothing but −∞: zeros.
pub(super) fn softmax(values: &mut [f64]) {
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        values.fill(0.0);
        return;
    }
    let mut sum = 0.0;
    for value in values.iter_mut() {
        *value = (*value - max).exp();
        sum += *value;
    }
    for value in values.iter_mut() {
        *value /= sum;
    }
}

/// `1 / (1 + e⁻ˣ)`; 0 at −∞.
pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `ln(1 + eˣ)` without overflow and without loss where x is very negative; 0 at −∞.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// `ln sigmoid(x)`; −∞ at −∞.
pub(super) fn log_sigmoid(x: f64) -> f64 {
    -softplus(-x)
}
