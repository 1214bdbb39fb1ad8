//! The weights of the block, and the model of what it computes: right, or with mistakes.

use std::collections::BTreeSet;

use half::f16;

use crate::probes::{GATE, LEAD, RULER};
use crate::{Act, Family, Mistake, Probes, Score, Shared};

/// Gate and up of the channels, on the coordinate that is always one. The first measures the
/// weight: large, and the same after a swap.
const CHANNELS: [(f64, f64); 10] = [
    (6.0, 6.0),
    (2.0, 1.0),
    (1.0, 2.0),
    (-2.0, 1.0),
    (12.0, 1.0),
    (1.0, 12.0),
    (1.0, -12.0),
    (-12.0, 1.0),
    (0.5, -3.0),
    (3.0, 0.25),
];
/// Fed by the coordinate `big`: its product is beyond 16-bit floats.
const BIG_CHANNEL: usize = CHANNELS.len();
const BIG: f64 = 384.0;
/// Fed by biases alone.
const BIAS_CHANNEL: usize = BIG_CHANNEL + 1;
/// Seen through a large down weight: silu of a clamped gate is small, of an unclamped one nothing.
const LOW_CHANNEL: usize = BIAS_CHANNEL + 1;
const LOW: (f64, f64) = (-12.0, 6.0);
/// Gate, up and down of the shared expert's channels: the first measures its multiplier, the second its
/// activation.
const SHARED: [(f64, f64, f64); 2] = [(6.0, 3.0, 1.0 / 16.0), (-1.0, 4.0, 0.25)];
/// The logit of the shared expert's own gate, where it has one: no sigmoid is taken for 0, for 1 or for
/// the logit itself.
pub(crate) const SHARED_GATE: f64 = -1.0;

/// Tensor scale of up over that of gate, in formats that have one.
pub(crate) const UP_SCALE: f64 = 4.0;

/// Coordinates of the hidden state: the ruler, one, `big`, then the router's. What makes its length
/// right is the last one, so that the last group of columns meets a number too: a scale or a zero point
/// taken from the first group shows there, where all weights are zero.
const RULER_AT: usize = 0;
const ONE_AT: usize = 2;
const BIG_AT: usize = 3;
const ROUTER_AT: usize = 4;

/// A matrix `[rows, cols]`, nearly all of whose elements are zero.
#[derive(Clone, Debug)]
pub struct Sparse {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Row, column and value of what is not zero.
    pub entries: Vec<(usize, usize, f64)>,
}

impl Sparse {
    fn new(rows: usize, cols: usize) -> Self {
        Self { rows, cols, entries: Vec::new() }
    }

    fn set(&mut self, row: usize, col: usize, value: f64) {
        self.entries.push((row, col, value));
    }

    /// `W · x`.
    fn times(&self, x: &[f64]) -> Vec<f64> {
        let mut y = vec![0.0; self.rows];
        self.entries.iter().for_each(|(row, col, value)| y[*row] += value * x[*col]);
        y
    }

    /// The transpose.
    pub fn transposed(&self) -> Self {
        let entries = self.entries.iter().map(|(row, col, value)| (*col, *row, *value)).collect();
        Self { rows: self.cols, cols: self.rows, entries }
    }

    /// All elements, row after row.
    pub fn dense(&self) -> Vec<f64> {
        let mut values = vec![0.0; self.rows * self.cols];
        self.entries.iter().for_each(|(row, col, v)| values[row * self.cols + col] = *v);
        values
    }
}

/// One expert.
#[derive(Clone, Debug)]
pub struct ExpertWeights {
    /// `[I, H]`.
    pub gate: Sparse,
    /// `[I, H]`.
    pub up: Sparse,
    /// `[H, I]`.
    pub down: Sparse,
    /// `[I]`, `[I]` and `[H]`.
    pub biases: Option<[Vec<f64>; 3]>,
}

/// The block of a family, with all its weights.
#[derive(Debug)]
pub struct Block {
    /// What it is.
    pub family: &'static Family,
    /// What is asked.
    pub probes: Probes,
    /// The routed experts.
    pub experts: Vec<ExpertWeights>,
    /// The dense branch.
    pub shared: Option<ExpertWeights>,
    /// The router `[E, H]`.
    pub gate: Sparse,
    /// The correction bias of each expert.
    pub correction: Option<Vec<f64>>,
    /// First of the coordinates that are read.
    first: usize,
    reads: usize,
}

impl Block {
    /// The block of `family`.
    pub fn new(family: &'static Family) -> Self {
        let (e, h) = (family.experts, family.hidden);
        let first = ROUTER_AT + e;
        // an expert's weight each, a channel each but the first, a bias each, the shared expert's
        // channels (or the bias channel), the big channel, the low one
        let channels = first + e;
        let biases = channels + CHANNELS.len() - 1;
        let shared_at = biases + if family.biases { e } else { 0 };
        let big_at = shared_at + if family.biases { 1 } else { SHARED.len() };
        let low_at = big_at + 1;
        let reads = low_at - first + usize::from(family.act == Act::GptOss);
        assert!(first + reads <= h, "the coordinates of {} fit its width", family.name);

        let expert = |index: usize| {
            let mut weights = ExpertWeights {
                gate: Sparse::new(family.intermediate, h),
                up: Sparse::new(family.intermediate, h),
                down: Sparse::new(h, family.intermediate),
                biases: None,
            };
            for (channel, (gate, up)) in CHANNELS.into_iter().enumerate() {
                weights.gate.set(channel, ONE_AT, gate);
                weights.up.set(channel, ONE_AT, up);
                let (to, down) = match channel {
                    0 => (first + index, 1.0 / 32.0),
                    _ => (channels + channel - 1, 0.25),
                };
                weights.down.set(to, channel, down);
            }
            weights.gate.set(BIG_CHANNEL, BIG_AT, BIG);
            weights.up.set(BIG_CHANNEL, BIG_AT, BIG);
            weights.down.set(big_at, BIG_CHANNEL, (-17_f64).exp2());
            if family.act == Act::GptOss {
                weights.gate.set(LOW_CHANNEL, ONE_AT, LOW.0);
                weights.up.set(LOW_CHANNEL, ONE_AT, LOW.1);
                weights.down.set(low_at, LOW_CHANNEL, 1024.0);
            }
            if family.biases {
                let (mut gate, mut up, mut down) =
                    (vec![0.0; family.intermediate], vec![0.0; family.intermediate], vec![0.0; h]);
                (gate[BIAS_CHANNEL], up[BIAS_CHANNEL]) = (2.0, 0.5);
                weights.down.set(shared_at, BIAS_CHANNEL, 0.25);
                down[biases + index] = 1.0;
                weights.biases = Some([gate, up, down]);
            }
            weights
        };
        let shared = || {
            let mut weights = ExpertWeights {
                gate: Sparse::new(family.intermediate, h),
                up: Sparse::new(family.intermediate, h),
                down: Sparse::new(h, family.intermediate),
                biases: None,
            };
            for (channel, (gate, up, down)) in SHARED.into_iter().enumerate() {
                weights.gate.set(channel, ONE_AT, gate);
                weights.up.set(channel, ONE_AT, up);
                weights.down.set(shared_at + channel, channel, down);
            }
            weights
        };
        let mut gate = Sparse::new(e, h);
        (0..e).for_each(|expert| gate.set(expert, ROUTER_AT + expert, GATE));
        family.favoured().into_iter().for_each(|expert| gate.set(expert, ONE_AT, LEAD));
        Self {
            family,
            probes: Probes::of(family),
            experts: (0..e).map(expert).collect(),
            shared: (family.shared != Shared::None).then(shared),
            gate,
            correction: family.bias(),
            first,
            reads,
        }
    }

    /// The gate of the shared expert `[1, H]`, where it has one.
    pub fn shared_gate(&self) -> Option<Sparse> {
        let mut gate = Sparse::new(1, self.family.hidden);
        gate.set(0, ONE_AT, SHARED_GATE);
        (self.family.shared == Shared::Gated).then_some(gate)
    }

    /// How many coordinates are read.
    pub fn reads(&self) -> usize {
        self.reads
    }

    /// The coordinates that are read.
    pub fn read_coordinates(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.reads
    }

    /// Embeddings of the probes `[probes, H]`, of mean square one.
    pub fn embeddings(&self) -> Vec<Vec<f64>> {
        let embedding = |probe: usize| {
            let mut x = vec![0.0; self.family.hidden];
            x[RULER_AT] = RULER;
            x[ONE_AT] = 1.0;
            x[BIG_AT] = f64::from(u8::from(self.probes.big[probe]));
            let router = self.probes.coordinates(self.family, probe);
            x[ROUTER_AT..ROUTER_AT + router.len()].copy_from_slice(&router);
            let rest = self.family.hidden as f64 - x.iter().map(|v| v * v).sum::<f64>();
            assert!(rest > 0.0, "probe {probe} of {} is too long", self.family.name);
            x[self.family.hidden - 1] = rest.sqrt();
            x
        };
        (0..self.probes.len()).map(embedding).collect()
    }

    /// The head `[vocabulary, H]`: probes, which are never likely, then zero, the ruler, and one
    /// token for each coordinate that is read.
    pub fn head(&self) -> Vec<Vec<f64>> {
        let probes = self.probes.len();
        let mut rows = vec![vec![0.0; self.family.hidden]; self.vocabulary()];
        rows[..probes].iter_mut().for_each(|row| row[RULER_AT] = -1.0);
        rows[probes + 1][RULER_AT] = 0.5;
        for (row, at) in rows[probes + 2..].iter_mut().zip(self.read_coordinates()) {
            row[at] = 4.0;
        }
        rows
    }

    /// Tokens: the probes, zero, the ruler, the readings.
    pub fn vocabulary(&self) -> usize {
        self.probes.len() + 2 + self.reads
    }

    /// The readings of the routed and of the shared part, `[probes][reads]` each, with `mistakes`.
    pub fn simulate(&self, mistakes: &BTreeSet<Mistake>) -> [Vec<Vec<f64>>; 2] {
        let has = |mistake| mistakes.contains(&mistake);
        let family = self.family;
        let on_input = (family.weight_on_input || has(Mistake::WeightOnInput))
            && !has(Mistake::WeightOnOutput);
        let parts = self.embeddings().into_iter().zip(&self.probes.logits).map(|(x, logits)| {
            let mut routed = vec![0.0; family.hidden];
            for (expert, weight) in self.route(logits, mistakes) {
                let shift = usize::from(has(Mistake::ExpertsShifted));
                let expert = &self.experts[(expert + shift) % family.experts];
                let (before, mut after) = if on_input { (weight, 1.0) } else { (1.0, weight) };
                if has(Mistake::WeightTwice) {
                    after *= weight;
                }
                let row: Vec<f64> = x.iter().map(|v| v * before).collect();
                let (y, bias) = self.expert(expert, &row, mistakes);
                let once = match has(Mistake::WeightTwice) {
                    _ if has(Mistake::DownBiasUnweighted) => 1.0,
                    true => weight * weight,
                    false => weight,
                };
                for ((sum, y), bias) in routed.iter_mut().zip(y).zip(bias) {
                    *sum += after * y + once * bias;
                }
            }
            let shared = self.shared.as_ref().map_or(vec![0.0; family.hidden], |expert| {
                let gated = family.shared == Shared::Gated;
                let gate = if gated { sigmoid(SHARED_GATE) } else { 1.0 };
                let mistakes = mistakes.iter().filter_map(|one| one.of_shared()).collect();
                let (y, _) = self.expert(expert, &x, &mistakes);
                y.into_iter().map(|y| gate * y).collect()
            });
            let mut routed = routed[self.read_coordinates()].to_vec();
            if has(Mistake::ExpertsPermuted) {
                self.sort_experts(&mut routed);
            }
            (routed, shared[self.read_coordinates()].to_vec())
        });
        let (routed, shared) = parts.unzip();
        [routed, shared]
    }

    /// The readings of a probe in an order that says nothing of which expert is which.
    pub(crate) fn sort_experts(&self, readings: &mut [f64]) {
        let experts = self.family.experts;
        readings[..experts].sort_by(f64::total_cmp);
        if self.family.biases {
            let biases = experts + CHANNELS.len() - 1;
            readings[biases..biases + experts].sort_by(f64::total_cmp);
        }
    }

    /// The chosen experts of a row of logits and their weights.
    fn route(&self, logits: &[f64], mistakes: &BTreeSet<Mistake>) -> Vec<(usize, f64)> {
        let has = |mistake| mistakes.contains(&mistake);
        let family = self.family;
        let sigmoids = || logits.iter().map(|v| sigmoid(*v)).collect::<Vec<f64>>();
        let scores = match family.score {
            Score::Sigmoid if has(Mistake::SoftmaxForSigmoid) => softmax(logits),
            Score::Sigmoid => sigmoids(),
            Score::Softmax => softmax(logits),
            Score::SoftmaxOfChosen => logits.to_vec(),
        };
        let mut choice = scores.clone();
        if let (Some(bias), false) = (&self.correction, has(Mistake::BiasIgnored)) {
            // in float32, as the models compute it
            let times = match () {
                _ if has(Mistake::BiasTwice) => 2.0,
                _ if has(Mistake::BiasNegated) => -1.0,
                _ => 1.0,
            };
            let add = |(c, b): (&mut f64, &f64)| *c = f64::from(*c as f32 + (times * b) as f32);
            choice.iter_mut().zip(bias).for_each(add);
        }
        if let (Some((groups, keep)), false) = (family.groups, has(Mistake::GroupsIgnored)) {
            let size = family.experts / groups;
            let rate = |group: &[f64]| {
                let best = top(group, 2);
                match has(Mistake::GroupsByTheirBest) {
                    true => group[best[0]],
                    false => group[best[0]] + group[best[1]],
                }
            };
            let rates: Vec<f64> = choice.chunks(size).map(rate).collect();
            let kept = top(&rates, keep);
            let shut = if has(Mistake::ShutGroupsZero) { 0.0 } else { f64::NEG_INFINITY };
            for (expert, choice) in choice.iter_mut().enumerate() {
                if !kept.contains(&(expert / size)) {
                    *choice = shut;
                }
            }
        }
        if has(Mistake::BelowZeroLost) {
            choice.iter_mut().for_each(|choice| *choice = choice.max(0.0));
        }
        let ids = top(&choice, family.top_k);
        let of = |values: &[f64]| ids.iter().map(|id| values[*id]).collect::<Vec<f64>>();
        let mut weights = match family.score {
            _ if has(Mistake::SigmoidForSoftmax) => of(&sigmoids()),
            Score::SoftmaxOfChosen if has(Mistake::SoftmaxOverAll) => of(&softmax(logits)),
            Score::SoftmaxOfChosen => softmax(&of(logits)),
            _ if has(Mistake::BiasInWeights) => of(&choice),
            _ => of(&scores),
        };
        if (family.renormalise || has(Mistake::Renormalised)) && !has(Mistake::NotRenormalised) {
            let sum: f64 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        weights.iter_mut().for_each(|w| *w *= family.factor);
        let mut chosen: Vec<(usize, f64)> = ids.into_iter().zip(weights).collect();
        if has(Mistake::OnlyTheBest) {
            chosen.truncate(1);
        }
        if has(Mistake::LastDropped) {
            chosen.pop();
        }
        if has(Mistake::WeightsEqual) {
            let mean = chosen.iter().map(|(_, w)| w).sum::<f64>() / chosen.len() as f64;
            chosen.iter_mut().for_each(|(_, w)| *w = mean);
        }
        if has(Mistake::WeightsReversed) {
            let weights: Vec<f64> = chosen.iter().rev().map(|(_, w)| *w).collect();
            chosen.iter_mut().zip(weights).for_each(|((_, to), w)| *to = w);
        }
        chosen
    }

    /// An expert's output without and its down bias.
    fn expert(
        &self,
        expert: &ExpertWeights,
        x: &[f64],
        mistakes: &BTreeSet<Mistake>,
    ) -> (Vec<f64>, Vec<f64>) {
        let has = |mistake| mistakes.contains(&mistake);
        let row = |row: &[f64]| match has(Mistake::RowsInEightBits) {
            true => in_eight_bits(row),
            false => row.to_vec(),
        };
        let x = row(x);
        let (mut gate, mut up) = (expert.gate.times(&x), expert.up.times(&x));
        if let (Some([gate_bias, up_bias, _]), false) =
            (&expert.biases, has(Mistake::GateUpBiasMissing))
        {
            gate.iter_mut().zip(gate_bias).for_each(|(v, b)| *v += b);
            if !has(Mistake::UpBiasMissing) {
                up.iter_mut().zip(up_bias).for_each(|(v, b)| *v += b);
            }
        }
        if has(Mistake::InterleavedAsHalves) {
            let rows: Vec<f64> = gate.iter().zip(&up).flat_map(|(g, u)| [*g, *u]).collect();
            let (first, second) = rows.split_at(gate.len());
            (gate, up) = (first.to_vec(), second.to_vec());
        }
        if has(Mistake::HalvesAsInterleaved) {
            let rows = [&gate[..], &up[..]].concat();
            gate = rows.iter().step_by(2).copied().collect();
            up = rows.iter().skip(1).step_by(2).copied().collect();
        }
        if has(Mistake::GateUpSwapped) {
            std::mem::swap(&mut gate, &mut up);
        }
        let mut h: Vec<f64> = gate
            .iter()
            .zip(&up)
            .map(|(g, u)| activate(self.family.act, *g, *u, mistakes))
            .collect();
        if has(Mistake::HalfOverflow) {
            let beyond = |v: &&mut f64| v.abs() > 65504.0;
            h.iter_mut().filter(beyond).for_each(|v| *v = f64::INFINITY);
        }
        h = row(&h);
        let y = match has(Mistake::DownTransposed) {
            true => expert.down.transposed().times(&h),
            false => expert.down.times(&h),
        };
        let bias = match &expert.biases {
            Some([_, _, bias]) if !has(Mistake::DownBiasMissing) => bias.clone(),
            _ => vec![0.0; y.len()],
        };
        (y, bias)
    }
}

fn activate(act: Act, gate: f64, up: f64, mistakes: &BTreeSet<Mistake>) -> f64 {
    let has = |mistake| mistakes.contains(&mistake);
    match act {
        Act::GptOss => {
            let limit = if has(Mistake::ClampMissing) { f64::INFINITY } else { 7.0 };
            let alpha = if has(Mistake::AlphaIsOne) { 1.0 } else { 1.702 };
            let one = if has(Mistake::PlusOneMissing) { 0.0 } else { 1.0 };
            let below = if has(Mistake::GateClampedBelow) { -limit } else { f64::NEG_INFINITY };
            let gate = gate.clamp(below, limit);
            gate * sigmoid(alpha * gate) * (up.clamp(-limit, limit) + one)
        }
        Act::Silu if has(Mistake::GeluForSilu) => gate * normal_cdf(gate) * up,
        Act::Silu if has(Mistake::ReluForSilu) => gate.max(0.0) * up,
        Act::Silu if has(Mistake::ReluSquaredForSilu) => gate.max(0.0).powi(2) * up,
        Act::Silu if has(Mistake::SigmoidForSilu) => sigmoid(gate) * up,
        Act::Silu if has(Mistake::SiluMissing) => gate * up,
        Act::Silu => gate * sigmoid(gate) * up,
    }
}

/// Blocks of 32 as ggml's Q8_0: multiples of a 127th of the largest, which is stored in f16.
fn in_eight_bits(row: &[f64]) -> Vec<f64> {
    let block = |block: &[f64]| {
        let step = block.iter().fold(0.0, |max: f64, v| v.abs().max(max)) / 127.0;
        let stored = f16::from_f64(step).to_f64();
        let value = move |v: &f64| if step > 0.0 { (v / step).round() * stored } else { 0.0 };
        block.iter().map(value).collect::<Vec<f64>>()
    };
    row.chunks(32).flat_map(block).collect()
}

pub(crate) fn sigmoid(v: f64) -> f64 {
    1.0 / (1.0 + (-v).exp())
}

fn softmax(values: &[f64]) -> Vec<f64> {
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = values.iter().map(|v| (v - max).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|p| p / sum).collect()
}

/// Φ, by its series within 7 of zero: the channels' gates are small integers.
fn normal_cdf(v: f64) -> f64 {
    if v.abs() > 7.0 {
        return if v > 0.0 { 1.0 } else { 0.0 };
    }
    // Φ(v) = ½ + φ(v) Σ v^(2n+1) / (2n+1)!!  (Abramowitz and Stegun 26.2.11)
    let (mut term, mut sum, mut n) = (v, v, 1.0);
    while term.abs() > 1e-17 * sum.abs().max(1e-300) {
        term *= v * v / (2.0 * n + 1.0);
        sum += term;
        n += 1.0;
    }
    0.5 + sum * (-v * v / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

/// The `k` largest, ties to the lowest index.
fn top(values: &[f64], k: usize) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..values.len()).collect();
    ids.sort_by(|a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
    ids.truncate(k);
    ids
}
