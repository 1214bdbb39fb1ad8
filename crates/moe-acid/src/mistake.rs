//! Known mistakes: what engines got wrong in public, each a switch of the block's model.

use std::fmt;

use crate::{Act, Family, Score, Shared};

/// A mistake that a checkpoint can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum Mistake {
    GateUpSwapped,
    ExpertsShifted,
    ExpertsPermuted,
    WeightsReversed,
    WeightOnInput,
    WeightOnOutput,
    OnlyTheBest,
    LastDropped,
    WeightTwice,
    WeightsEqual,
    HalfOverflow,
    BiasInWeights,
    BiasIgnored,
    BiasTwice,
    BiasNegated,
    GroupsIgnored,
    GroupsByTheirBest,
    ShutGroupsZero,
    BelowZeroLost,
    NotRenormalised,
    Renormalised,
    SoftmaxForSigmoid,
    SigmoidForSoftmax,
    SoftmaxOverAll,
    GeluForSilu,
    ReluForSilu,
    ReluSquaredForSilu,
    SigmoidForSilu,
    SiluMissing,
    DownBiasUnweighted,
    DownBiasMissing,
    GateUpBiasMissing,
    UpBiasMissing,
    ClampMissing,
    AlphaIsOne,
    PlusOneMissing,
    GateClampedBelow,
    InterleavedAsHalves,
    HalvesAsInterleaved,
    DownTransposed,
    SharedGateUpSwapped,
    SharedGeluForSilu,
    SharedReluForSilu,
    SharedSiluMissing,
    /// No mistake: engines that multiply blocks of integers round the rows, too.
    RowsInEightBits,
}

impl Mistake {
    /// In words that a bug report can quote.
    pub fn words(self) -> &'static str {
        match self {
            Self::GateUpSwapped => "gate and up swapped",
            Self::ExpertsShifted => "experts shifted by one",
            Self::ExpertsPermuted => "experts in another order",
            Self::WeightsReversed => "weights in the wrong order",
            Self::WeightOnInput => "weight on the input, not the output",
            Self::WeightOnOutput => "weight on the output, not the input",
            Self::OnlyTheBest => "only the best expert",
            Self::LastDropped => "the last of the chosen experts dropped",
            Self::WeightTwice => "weight applied twice",
            Self::WeightsEqual => "the same weight for all chosen experts",
            Self::HalfOverflow => "16-bit overflow between the products",
            Self::BiasInWeights => "correction bias in the weights",
            Self::BiasIgnored => "correction bias ignored",
            Self::BiasTwice => "correction bias added twice",
            Self::BiasNegated => "correction bias subtracted",
            Self::GroupsIgnored => "groups ignored",
            Self::GroupsByTheirBest => "groups rated by their best expert alone",
            Self::ShutGroupsZero => "experts of shut groups count as zero",
            Self::BelowZeroLost => "choices below zero lose to none",
            Self::NotRenormalised => "renormalisation missing",
            Self::Renormalised => "renormalised though the configuration says no",
            Self::SoftmaxForSigmoid => "softmax for sigmoid",
            Self::SigmoidForSoftmax => "sigmoid for softmax",
            Self::SoftmaxOverAll => "softmax over all experts, not the chosen",
            Self::GeluForSilu => "gelu for silu",
            Self::ReluForSilu => "relu for silu",
            Self::ReluSquaredForSilu => "squared relu for silu",
            Self::SigmoidForSilu => "sigmoid for silu",
            Self::SiluMissing => "silu missing",
            Self::DownBiasUnweighted => "down bias not weighted",
            Self::DownBiasMissing => "down bias missing",
            Self::GateUpBiasMissing => "gate and up biases missing",
            Self::UpBiasMissing => "up bias missing",
            Self::ClampMissing => "clamp missing",
            Self::AlphaIsOne => "alpha is 1",
            Self::PlusOneMissing => "up + 1 missing",
            Self::GateClampedBelow => "gate clamped on both sides",
            Self::InterleavedAsHalves => "interleaved gate and up read as halves",
            Self::HalvesAsInterleaved => "halves of gate and up read as interleaved",
            Self::DownTransposed => "down projection transposed",
            Self::SharedGateUpSwapped => "shared expert: gate and up swapped",
            Self::SharedGeluForSilu => "shared expert: gelu for silu",
            Self::SharedReluForSilu => "shared expert: relu for silu",
            Self::SharedSiluMissing => "shared expert: silu missing",
            Self::RowsInEightBits => "rows rounded to 8 bits in blocks of 32",
        }
    }

    /// What an engine is free to do.
    pub fn is_freedom(self) -> bool {
        self == Self::RowsInEightBits
    }

    /// What it is to the shared expert: the mistake of an expert that it makes there.
    pub(crate) fn of_shared(self) -> Option<Self> {
        match self {
            Self::SharedGateUpSwapped => Some(Self::GateUpSwapped),
            Self::SharedGeluForSilu => Some(Self::GeluForSilu),
            Self::SharedReluForSilu => Some(Self::ReluForSilu),
            Self::SharedSiluMissing => Some(Self::SiluMissing),
            free => free.is_freedom().then_some(free),
        }
    }

    /// Those that `family`'s checkpoint can show.
    pub fn of(family: &Family) -> Vec<Self> {
        let mut all = vec![Self::GateUpSwapped, Self::ExpertsShifted];
        if family.top_k > 1 {
            all.extend([Self::WeightsReversed, Self::OnlyTheBest]);
        }
        all.push(match family.weight_on_input {
            true => Self::WeightOnOutput,
            false => Self::WeightOnInput,
        });
        if family.correction.is_some() {
            all.extend([
                Self::BiasInWeights,
                Self::BiasIgnored,
                Self::BiasTwice,
                Self::BiasNegated,
            ]);
        }
        if family.groups.is_some() {
            all.push(Self::GroupsIgnored);
            match family.is_negative() {
                true => all.extend([Self::ShutGroupsZero, Self::BelowZeroLost]),
                false => all.push(Self::GroupsByTheirBest),
            }
        }
        match family.act {
            Act::GptOss => all.extend([
                Self::DownBiasUnweighted,
                Self::DownBiasMissing,
                Self::GateUpBiasMissing,
                Self::UpBiasMissing,
                Self::ClampMissing,
                Self::AlphaIsOne,
                Self::PlusOneMissing,
                Self::GateClampedBelow,
                Self::InterleavedAsHalves,
                Self::DownTransposed,
            ]),
            // a clamp keeps everything small
            Act::Silu => all.push(Self::HalfOverflow),
        }
        if family.is_negative() {
            // the rest is what the other checkpoint of the family shows
            return all;
        }
        all.extend([Self::WeightTwice, Self::ExpertsPermuted]);
        if family.shared != Shared::None {
            all.extend([
                Self::SharedGateUpSwapped,
                Self::SharedGeluForSilu,
                Self::SharedReluForSilu,
                Self::SharedSiluMissing,
            ]);
        }
        if family.top_k > 1 {
            all.push(Self::WeightsEqual);
        }
        if family.top_k > 2 {
            all.push(Self::LastDropped);
        }
        match (family.renormalise, family.top_k) {
            (true, _) => all.push(Self::NotRenormalised),
            (false, 2..) if family.score == Score::Softmax => all.push(Self::Renormalised),
            _ => {}
        }
        match family.score {
            Score::Sigmoid => all.push(Self::SoftmaxForSigmoid),
            Score::Softmax => all.push(Self::SigmoidForSoftmax),
            Score::SoftmaxOfChosen => {
                all.extend([Self::SigmoidForSoftmax, Self::SoftmaxOverAll]);
            }
        }
        if family.act == Act::Silu {
            all.extend([
                Self::GeluForSilu,
                Self::ReluForSilu,
                Self::ReluSquaredForSilu,
                Self::SigmoidForSilu,
                Self::SiluMissing,
                Self::HalvesAsInterleaved,
            ]);
        }
        all
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.words())
    }
}
