//! Routing that ignores the logits: loads of a known shape, for measurements.

use std::str::FromStr;

use super::scratch::Scratch;
use super::select::top_k;
use super::{LogicalId, Routing};
use crate::random::Random;
use crate::spec::{RouterSpec, WeightFrom};
use crate::{Error, Result};

/// How a [`Simulator`] chooses experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// k different experts, each set equally likely; weights 1.
    UniformRandom,
    /// Each slot `floor(sigmoid(N(0,1))·E)`, so the middle ids are popular and a token may have
    /// one expert twice; weights `|N(0,1)|`, normalised per token.
    Normal,
    /// Token t has experts t·k, t·k + 1, … modulo E: as balanced as can be; weights 1.
    RoundRobin,
}

impl Strategy {
    /// All strategies.
    pub const ALL: [Self; 3] = [Self::UniformRandom, Self::Normal, Self::RoundRobin];

    /// The name, as [`FromStr`] reads it.
    pub fn name(self) -> &'static str {
        match self {
            Self::UniformRandom => "uniform_random",
            Self::Normal => "normal_routing",
            Self::RoundRobin => "round_robin",
        }
    }
}

impl std::fmt::Display for Strategy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Strategy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|strategy| strategy.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::input("routing strategy", format!("'{name}' is none of {names}"))
        })
    }
}

/// Routes by a [`Strategy`]; the same seed and calls yield the same routing on every machine.
#[derive(Clone, Debug)]
pub struct Simulator {
    strategy: Strategy,
    random: Random,
}

impl Simulator {
    /// A simulator whose choices follow from `seed` alone.
    pub fn new(strategy: Strategy, seed: u64) -> Self {
        Self { strategy, random: Random::new(seed) }
    }

    /// Routes `tokens` tokens among all [`RouterSpec::choices`], `top_k` each. Jointly weighted
    /// shared experts get weight 1. Neither scaling factor nor per-expert scale applies.
    ///
    /// # Errors
    /// If the spec contradicts itself.
    pub fn route(&mut self, spec: &RouterSpec, tokens: usize, out: &mut Routing) -> Result<()> {
        out.clear();
        spec.validate().map_err(|reason| Error::input("router", reason))?;
        let (experts, k) = (spec.choices(), spec.top_k);
        let shared = match spec.weight_from {
            WeightFrom::JointSoftmax { shared } => shared,
            _ => 0,
        };
        out.resize(tokens, k, shared);
        out.shared_weights.fill(1.0);
        let Routing { ids, weights, scratch, .. } = out;
        weights.fill(1.0);
        if scratch.is_empty() {
            scratch.push(Scratch::default());
        }
        let scratch = &mut scratch[0];
        for (token, (ids, weights)) in
            ids.chunks_exact_mut(k).zip(weights.chunks_exact_mut(k)).enumerate()
        {
            match self.strategy {
                Strategy::UniformRandom => {
                    scratch.choice.clear();
                    scratch.choice.extend((0..experts).map(|_| self.random.unit() as f32));
                    scratch.chosen.resize(k, Default::default());
                    top_k(&scratch.choice, &mut scratch.chosen);
                    for (id, candidate) in ids.iter_mut().zip(&scratch.chosen) {
                        *id = LogicalId(candidate.id);
                    }
                }
                Strategy::Normal => {
                    for id in ids {
                        let place = 1.0 / (1.0 + (-self.random.normal()).exp());
                        // Below E: |N| stays under 9, as no uniform number is below 2⁻⁵⁴.
                        *id = LogicalId((place * experts as f64) as u32);
                    }
                    scratch.weights.clear();
                    scratch.weights.extend((0..k).map(|_| self.random.normal().abs()));
                    let sum: f64 = scratch.weights.iter().sum();
                    for (weight, &drawn) in weights.iter_mut().zip(&scratch.weights) {
                        *weight = (drawn / sum) as f32;
                    }
                }
                Strategy::RoundRobin => {
                    for (slot, id) in ids.iter_mut().enumerate() {
                        *id = LogicalId(((token * k + slot) % experts) as u32);
                    }
                }
            }
        }
        Ok(())
    }
}
