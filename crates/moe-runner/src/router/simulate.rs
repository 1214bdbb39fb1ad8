//! Routing that ignores the logits: loads of a known shape, for measurements.

use std::str::FromStr;

use super::select::top_k;
use super::{LogicalId, Routing};
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
    random: SplitMix64,
}

impl Simulator {
    /// A simulator whose choices follow from `seed` alone.
    pub fn new(strategy: Strategy, seed: u64) -> Self {
        Self { strategy, random: SplitMix64(seed) }
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
        for (token, (ids, weights)) in
            ids.chunks_exact_mut(k).zip(weights.chunks_exact_mut(k)).enumerate()
        {
            match self.strategy {
                Strategy::UniformRandom => {
                    scratch.choice.clear();
                    scratch.choice.extend((0..experts).map(|_| self.random.uniform() as f32));
                    scratch.chosen.resize(k, Default::default());
                    top_k(&scratch.choice, &mut scratch.chosen);
                    for (id, candidate) in ids.iter_mut().zip(&scratch.chosen) {
                        *id = LogicalId(candidate.id);
                    }
                }
                Strategy::Normal => {
                    for id in ids {
                        let place = 1.0 / (1.0 + (-self.random.normal()).exp());
                        let id_below = ((place * experts as f64) as usize).min(experts - 1);
                        *id = LogicalId(id_below as u32);
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

/// SplitMix64 (Steele, Lea, Flood 2014): 64 bits of state, every seed as good as any other.
#[derive(Clone, Debug)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// In (0, 1): 53 bits, shifted off zero so that a logarithm is finite.
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) * (-53_f64).exp2()
    }

    /// N(0, 1), by Box and Muller.
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::SplitMix64;

    /// The first outputs for seed 0, as published with the reference implementation.
    #[test]
    fn splitmix64_vectors() {
        let mut random = SplitMix64(0);
        let expected = [0xE220_A839_7B1D_CDAF, 0x6E78_9E6A_A1B9_65F4, 0x06C4_5D18_8009_454F];
        assert_eq!(expected.map(|_| random.next()), expected);
    }
}
