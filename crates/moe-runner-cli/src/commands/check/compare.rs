//! Outputs beside each other: how far apart, and where.

use moe_runner::router::Routing;
use serde::Serialize;

/// What one forward pass returned: the true output, as the layer's dtype holds it.
pub(super) struct Forward {
    pub(super) output: Vec<f64>,
    pub(super) logits: Vec<f32>,
    pub(super) routing: Routing,
}

/// Where the error is largest.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Worst {
    pub(crate) index: usize,
    pub(crate) nmse: f64,
}

/// `value ≤ bound`; NaN is not.
pub(super) fn within(value: f64, bound: f64) -> bool {
    value <= bound
}

/// The largest of some differences; NaN where one is.
pub(super) fn largest(differences: impl Iterator<Item = f64>) -> f64 {
    differences.fold(0.0, |most, one| if most.is_nan() || one <= most { most } else { one })
}

/// `‖y−r‖² / ‖r‖²`
pub(super) fn nmse(pairs: impl Iterator<Item = (f64, f64)>) -> f64 {
    let add = |(error, norm), (y, r): (f64, f64)| (error + (y - r).powi(2), norm + r * r);
    ratio(pairs.fold((0.0, 0.0), add))
}

fn ratio((error, norm): (f64, f64)) -> f64 {
    match norm {
        // exactly nothing, and nothing was asked for
        0.0 if error == 0.0 => 0.0,
        _ => error / norm,
    }
}

/// `‖y−r‖²` and `‖r‖²` of every token.
pub(super) struct Errors {
    tokens: Vec<(f64, f64)>,
}

impl Errors {
    /// Of outputs `[T, width]` against the truth.
    pub(super) fn of(width: usize, output: &[f64], truth: &[f64]) -> Self {
        let rows = output.chunks_exact(width).zip(truth.chunks_exact(width));
        let squares = |(y, r): (&[f64], &[f64])| {
            let pairs = y.iter().zip(r);
            pairs.fold((0.0, 0.0), |(e, n), (y, r)| (e + (y - r).powi(2), n + r * r))
        };
        Self { tokens: rows.map(squares).collect() }
    }

    pub(super) fn nmse(&self) -> f64 {
        ratio(self.tokens.iter().fold((0.0, 0.0), |sum, t| (sum.0 + t.0, sum.1 + t.1)))
    }

    pub(super) fn worst_token(&self) -> Option<Worst> {
        worst(self.tokens.iter().map(|token| ratio(*token)))
    }

    /// The experts that the errors come from: each expert's share of them, relative to the outputs of
    /// its tokens; `None` for experts without tokens.
    ///
    /// A token's error is the sum of what its experts add to it, `Σ_e w² x_e` if they err
    /// independently of each other, with an `x_e` of each expert for all of its tokens. Those that
    /// explain all tokens best are found by Richardson and Lucy's iteration: an expert whose other
    /// tokens are right is not blamed for a neighbour's fault.
    pub(super) fn by_expert(&self, routing: &Routing, experts: usize) -> ByExpert {
        const STEPS: usize = 200;
        let slots: Vec<(usize, usize, f64)> = (0..self.tokens.len())
            .flat_map(|t| {
                let ids = routing.ids_of(t).iter().map(|id| id.index());
                ids.zip(routing.weights_of(t)).map(move |(e, w)| (t, e, f64::from(*w).powi(2)))
            })
            .filter(|(_, e, w)| *e < experts && *w > 0.0)
            .collect();
        let all: f64 = self.tokens.iter().map(|token| token.1).sum();
        // what is no number is wrong beyond measure, and still adds up
        let error = |t: usize| match self.tokens[t].0 {
            e if e.is_finite() => e,
            _ => 1e12 * all.max(1.0),
        };
        let mut weights = vec![0.0; experts];
        slots.iter().for_each(|(_, e, w)| weights[*e] += w);
        let mut x = vec![1.0; experts];
        for _ in 0..STEPS {
            let mut told = vec![0.0; self.tokens.len()];
            slots.iter().for_each(|(t, e, w)| told[*t] += w * x[*e]);
            let mut factors = vec![0.0; experts];
            for (t, e, w) in &slots {
                if told[*t] > 0.0 {
                    factors[*e] += w * error(*t) / told[*t];
                }
            }
            for ((x, factor), weight) in x.iter_mut().zip(factors).zip(&weights) {
                *x = if *weight > 0.0 { *x * factor / weight } else { 0.0 };
            }
        }
        let mut norms = vec![0.0; experts];
        slots.iter().for_each(|(t, e, _)| norms[*e] += self.tokens[*t].1);
        ByExpert { parts: (0..experts).map(|e| (x[e] * weights[e], norms[e])).collect() }
    }
}

/// Errors that experts made, and `‖r‖²` of their tokens.
pub(super) struct ByExpert {
    parts: Vec<(f64, f64)>,
}

impl ByExpert {
    /// Of every expert that has tokens.
    pub(super) fn nmse(&self) -> Vec<Option<f64>> {
        self.parts.iter().map(|part| (part.1 > 0.0).then(|| ratio(*part))).collect()
    }

    /// The expert that has the largest part in the errors of its tokens.
    pub(super) fn worst(&self) -> Option<Worst> {
        // What an expert of few tokens seems to err may be chance: as if each had an average expert's
        // tokens beside its own, that are right.
        let sum: f64 = self.parts.iter().map(|part| part.1).sum();
        let mean = sum / self.parts.len().max(1) as f64;
        let Worst { index, .. } = worst(self.parts.iter().map(|(e, n)| ratio((*e, n + mean))))?;
        Some(Worst { index, nmse: ratio(self.parts[index]) })
    }

    /// The expert that more than half of all errors come from.
    pub(super) fn culprit(&self) -> Option<Worst> {
        let all: f64 = self.parts.iter().map(|part| part.0).sum();
        self.worst().filter(|worst| 2.0 * self.parts[worst.index].0 > all)
    }
}

fn worst(errors: impl Iterator<Item = f64>) -> Option<Worst> {
    let all = errors.enumerate().map(|(index, nmse)| Worst { index, nmse });
    // NaN is the worst of all
    let key = |w: &Worst| if w.nmse.is_nan() { f64::INFINITY } else { w.nmse };
    all.max_by(|a, b| key(a).total_cmp(&key(b)).then(b.index.cmp(&a.index)))
}

#[cfg(test)]
mod tests {
    use moe_runner::random::Random;
    use moe_runner::router::LogicalId;

    use super::*;

    /// Each of 16 experts in turn errs, in tokens that it shares with three others.
    #[test]
    fn the_expert_that_errs_is_found() {
        let (tokens, k, experts, width) = (24, 4, 16, 8);
        for faulty in 0..experts {
            let mut random = Random::new(faulty as u64);
            let mut ids = Vec::new();
            for _ in 0..tokens {
                let mut all: Vec<u32> = (0..experts as u32).collect();
                all.sort_by_cached_key(|_| random.bits());
                ids.extend(all[..k].iter().map(|id| LogicalId(*id)));
            }
            let weights = (0..tokens * k).map(|_| 0.05 + random.unit() as f32).collect();
            let routing = Routing::from_parts(k, ids, weights).unwrap();
            let truth: Vec<f64> = (0..tokens * width).map(|_| random.normal()).collect();
            let mut output: Vec<f64> =
                truth.iter().map(|v| v * (1.0 + 1e-3 * random.normal())).collect();
            for t in 0..tokens {
                let slot = routing.ids_of(t).iter().position(|id| id.index() == faulty);
                let Some(slot) = slot else { continue };
                let weight = f64::from(routing.weights_of(t)[slot]);
                for v in &mut output[t * width..][..width] {
                    *v += 0.1 * weight * random.normal();
                }
            }
            let errors = Errors::of(width, &output, &truth);
            let parts = errors.by_expert(&routing, experts);
            assert_eq!(parts.worst().unwrap().index, faulty);
            let of_faulty = parts.nmse()[faulty].unwrap();
            assert!(of_faulty > 1e-4, "{of_faulty}");
            assert!(parts.nmse().iter().flatten().all(|nmse| *nmse <= of_faulty));
        }
    }
}
