//! How logits become expert ids and weights, as plain data. Every field can change alone.

use serde::{Deserialize, Serialize};

use super::{MAX_EXPERTS, MAX_SIZE};

/// The routing of one layer.
///
/// ```text
/// logits = soft_cap(logits · multiplier)
/// score  = softmax | sigmoid | √softplus | logits
/// choice = score + bias   (or logits + bias)
/// groups: keep the best groups of experts; the others' choice := fill
/// ids    = the k largest choices, ties to the lowest id | sparsemixer | table[token id]
/// w      = score[ids] | softmax(logits[ids]) | sigmoid(logits[ids]) | joint softmax
/// w      = renormalise(w) · scale · per_expert_scale[ids]
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouterSpec {
    /// E: experts with weights; ids 0..E.
    pub experts: usize,
    /// Ids E..E+count without weights (longcat's identity experts, zaya's skip class).
    pub idle: Option<IdleExperts>,
    /// k: experts per token.
    pub top_k: usize,
    /// Multiplies the logits (muse_spark).
    pub logit_multiplier: f32,
    /// `tanh(l/c)·c` (laguna).
    pub soft_cap: Option<f32>,
    /// From logits to scores.
    pub score: Score,
    /// Where a bias enters the choice. It never enters the weights.
    pub correction: Correction,
    /// Choose among the best groups of experts only.
    pub groups: Option<Groups>,
    /// How ids are chosen.
    pub selection: Selection,
    /// Where weights come from.
    pub weight_from: WeightFrom,
    /// What is done to the k weights of a token.
    pub renormalise: Renormalise,
    /// Weights are multiplied by a stored vector, by id (gemma4).
    pub per_expert_scale: bool,
    /// What weights multiply.
    pub weight_on: WeightOn,
}

/// Router outputs without an expert behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum IdleExperts {
    /// The token's hidden state, times the weight, is added (longcat).
    Identity {
        /// How many.
        count: usize,
    },
    /// Nothing is added (zaya).
    Skip {
        /// How many.
        count: usize,
    },
}

/// From logits to scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Score {
    /// Over all experts.
    Softmax,
    /// Each by itself.
    Sigmoid,
    /// `√(ln(1+eˡ))` (deepseek_v4).
    SqrtSoftplus,
    /// The logits themselves.
    Logits,
}

/// Where the correction bias enters the choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Correction {
    /// There is none.
    None,
    /// Added to the score.
    OnScore,
    /// Added to the logit, and the sum is the choice (kolibri1).
    OnLogits,
}

/// Group-limited choice: experts stand in `count` contiguous groups of equal size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Groups {
    /// Number of groups; divides the number of experts.
    pub count: usize,
    /// Groups that stay eligible.
    pub keep: usize,
    /// How a group is rated.
    pub score: GroupScore,
    /// What the choice of the other groups' experts becomes.
    pub fill: GroupFill,
}

/// How a group is rated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupScore {
    /// By its best expert (deepseek_v2).
    Max,
    /// By the sum of its best two (deepseek_v3).
    TopTwoSum,
}

/// What the choice of experts outside the kept groups becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupFill {
    /// Never chosen.
    NegativeInfinity,
    /// Chosen before a negative choice of a kept group.
    Zero,
}

/// How ids are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Selection {
    /// The k largest choices; ties to the lowest id.
    TopK,
    /// `top_k / groups` from each of `groups` contiguous groups (interns1_pro).
    TopKPerGroup {
        /// Number of groups; divides the number of experts and k.
        groups: usize,
    },
    /// phimoe: the two largest choices, each weighted by its own softmax over the logits within
    /// `2·eps` of the maximum (the second's without the first). k is 2.
    SparseMixer {
        /// `router_jitter_noise`.
        eps: f32,
    },
    /// `table[token id]` (deepseek_v4's first layers); the weights still come from the gate.
    HashTable {
        /// Rows of the table.
        vocabulary: usize,
    },
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WeightFrom {
    /// The score of the chosen experts, without the bias.
    Score,
    /// Softmax over the logits of the chosen experts.
    SoftmaxChosen,
    /// Sigmoid of each chosen expert's logit.
    SigmoidChosen,
    /// Softmax over the log-sigmoids of the chosen experts' and of `shared` further logits, which
    /// become the weights of the shared experts (inkling).
    JointSoftmax {
        /// Shared experts, whose logits stand after all others.
        shared: usize,
    },
}

/// What is done to the k weights of a token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Renormalise {
    /// Nothing.
    None,
    /// `w / (Σw + eps)`; as in all of these, a divisor that is not positive is 1 instead.
    Sum {
        /// Added to the sum.
        eps: f32,
    },
    /// `w / max(Σw, floor)` (ernie).
    SumFloor {
        /// The least divisor.
        floor: f32,
    },
    /// `w / ‖w‖_p` (dbrx).
    PNorm {
        /// The order of the norm.
        p: f32,
    },
}

/// What weights multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WeightOn {
    /// The expert's output.
    Output,
    /// The expert's input (llama4); the output is not weighted.
    Input,
}

impl RouterSpec {
    /// Plain softmax routing over `experts`, the weights of the `top_k` renormalised or not: the
    /// starting point from which a family changes what differs.
    pub fn softmax(experts: usize, top_k: usize, renormalise: bool) -> Self {
        Self {
            experts,
            idle: None,
            top_k,
            logit_multiplier: 1.0,
            soft_cap: None,
            score: Score::Softmax,
            correction: Correction::None,
            groups: None,
            selection: Selection::TopK,
            weight_from: WeightFrom::Score,
            renormalise: if renormalise {
                Renormalise::Sum { eps: 0.0 }
            } else {
                Renormalise::None
            },
            per_expert_scale: false,
            weight_on: WeightOn::Output,
        }
    }

    /// Number of ids that can be chosen: experts, identity and skip experts.
    pub fn choices(&self) -> usize {
        self.experts.saturating_add(match self.idle {
            Some(IdleExperts::Identity { count } | IdleExperts::Skip { count }) => count,
            None => 0,
        })
    }

    /// E_total: columns of the router logits; [`Self::choices`] and jointly weighted shared experts.
    pub fn logits(&self) -> usize {
        self.choices().saturating_add(match self.weight_from {
            WeightFrom::JointSoftmax { shared } => shared,
            _ => 0,
        })
    }

    /// Checks that the options fit each other; the error says what does not.
    pub fn validate(&self) -> Result<(), String> {
        let choices = self.choices();
        if self.experts == 0 || self.logits() > MAX_EXPERTS {
            return Err(format!("{} experts; there must be 1 to {MAX_EXPERTS}", self.experts));
        }
        if self.top_k == 0 || self.top_k > choices {
            return Err(format!("top-k is {}, of {choices} experts", self.top_k));
        }
        if !self.logit_multiplier.is_finite() {
            return Err(format!("logit multiplier is {}", self.logit_multiplier));
        }
        if let Some(cap) = self.soft_cap
            && !(cap.is_finite() && cap > 0.0)
        {
            return Err(format!("soft cap is {cap}; it must be positive"));
        }
        if let Some(groups) = self.groups {
            if groups.count == 0 || !choices.is_multiple_of(groups.count) {
                return Err(format!(
                    "{choices} experts do not divide into {} groups",
                    groups.count
                ));
            }
            if groups.keep == 0 || groups.keep > groups.count {
                return Err(format!("{} of {} groups are kept", groups.keep, groups.count));
            }
            let size = choices / groups.count;
            if groups.score == GroupScore::TopTwoSum && size < 2 {
                return Err("groups of one expert cannot be rated by their best two".into());
            }
            if groups.fill == GroupFill::NegativeInfinity && self.top_k > groups.keep * size {
                return Err(format!(
                    "top-k is {}, but {} groups of {size} experts hold fewer",
                    self.top_k, groups.keep
                ));
            }
        }
        match self.selection {
            Selection::TopK => {}
            Selection::TopKPerGroup { .. } if self.groups.is_some() => {
                return Err(
                    "top-k per group and a limit to the best groups exclude each other".into()
                );
            }
            Selection::TopKPerGroup { groups } => {
                if groups == 0
                    || !choices.is_multiple_of(groups)
                    || !self.top_k.is_multiple_of(groups)
                {
                    return Err(format!(
                        "{groups} groups divide neither {choices} experts nor top-k {}",
                        self.top_k
                    ));
                }
            }
            Selection::SparseMixer { eps } => {
                if self.top_k != 2 || choices < 2 {
                    return Err("sparsemixer chooses exactly two experts".into());
                }
                if !(eps.is_finite() && eps >= 0.0) {
                    return Err(format!("sparsemixer's epsilon is {eps}"));
                }
                if self.weight_from != WeightFrom::Score {
                    return Err("sparsemixer has its own weights".into());
                }
            }
            Selection::HashTable { vocabulary } => {
                if vocabulary == 0 || vocabulary > MAX_SIZE {
                    return Err(format!(
                        "the hash table has {vocabulary} rows; there must be 1 to {MAX_SIZE}"
                    ));
                }
                if self.correction != Correction::None || self.groups.is_some() {
                    return Err("a hash table leaves no choice to a bias or to groups".into());
                }
            }
        }
        let (what, number, allowed) = match self.renormalise {
            Renormalise::None => ("", 0.0, true),
            Renormalise::Sum { eps } => ("added to the weights' sum", eps, eps >= 0.0),
            Renormalise::SumFloor { floor } => ("least sum of the weights", floor, floor >= 0.0),
            Renormalise::PNorm { p } => ("order of the weights' norm", p, p > 0.0),
        };
        if !(allowed && number.is_finite()) {
            return Err(format!("{what}: {number}"));
        }
        if self.weight_on == WeightOn::Input && self.idle.is_some() {
            return Err("weights on the input and identity experts exclude each other".into());
        }
        Ok(())
    }
}
