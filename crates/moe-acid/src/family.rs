//! The architectures that checkpoints are written for, as options.

/// One architecture: what its block does, in the smallest shape that shows it.
#[derive(Debug)]
pub struct Family {
    /// The checkpoint's name.
    pub name: &'static str,
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// Routed experts.
    pub experts: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Width of hidden states.
    pub hidden: usize,
    /// Width between an expert's two products.
    pub intermediate: usize,
    /// What router logits become.
    pub score: Score,
    /// Weights are divided by their sum.
    pub renormalise: bool,
    /// Multiplies the weights.
    pub factor: f64,
    /// Groups of experts, and how many of them a token may use.
    pub groups: Option<(usize, usize)>,
    /// A bias that chooses, and does not weigh.
    pub correction: Option<Correction>,
    /// Weights multiply the experts' input, not their output.
    pub weight_on_input: bool,
    /// The dense branch.
    pub shared: Shared,
    /// What stands between the two products.
    pub act: Act,
    /// Both products have biases.
    pub biases: bool,
}

/// From logits to scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// Sigmoid of each.
    Sigmoid,
    /// Softmax over all experts.
    Softmax,
    /// Softmax over the chosen ones.
    SoftmaxOfChosen,
}

/// The correction bias of all experts: an offset with small differences, as published ones are.
#[derive(Clone, Copy, Debug)]
pub struct Correction {
    /// What all experts have.
    pub offset: f64,
    /// What these have more.
    pub more: &'static [(usize, f64)],
}

/// The dense branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shared {
    /// None.
    None,
    /// An expert that every token takes.
    Plain,
    /// The same, multiplied by the sigmoid of a scalar gate.
    Gated,
}

/// The activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// `silu(gate) · up`.
    Silu,
    /// gpt-oss: `min(gate, 7) · sigmoid(1.702 · min(gate, 7)) · (clamp(up, ±7) + 1)`, gate and up
    /// interleaved.
    GptOss,
}

const PLAIN: Family = Family {
    name: "",
    model_type: "",
    experts: 8,
    top_k: 2,
    hidden: 128,
    intermediate: 32,
    score: Score::Softmax,
    renormalise: false,
    factor: 1.0,
    groups: None,
    correction: None,
    weight_on_input: false,
    shared: Shared::None,
    act: Act::Silu,
    biases: false,
};

/// Biases that differ by 1/128 are equal in bfloat16.
const SMALL: f64 = 1.0 / 128.0;

const DEEPSEEK_V3: Family = Family {
    name: "deepseek_v3",
    model_type: "deepseek_v3",
    experts: 16,
    top_k: 4,
    score: Score::Sigmoid,
    renormalise: true,
    factor: 2.5,
    groups: Some((4, 2)),
    correction: Some(Correction { offset: 7.0, more: &[(1, SMALL), (4, SMALL), (11, 0.25)] }),
    shared: Shared::Plain,
    ..PLAIN
};

/// All of them. The twin of `deepseek_v3` has choices below zero: there it matters what stands for
/// an expert of a shut group, or for an empty place.
pub const FAMILIES: &[Family] = &[
    DEEPSEEK_V3,
    Family {
        name: "deepseek_v3_negative",
        correction: Some(Correction { offset: -7.0, more: &[(1, SMALL), (4, SMALL), (11, 0.25)] }),
        ..DEEPSEEK_V3
    },
    Family {
        name: "gpt_oss",
        model_type: "gpt_oss",
        // square, so that a transposed down projection fits, as in the published model
        intermediate: 128,
        score: Score::SoftmaxOfChosen,
        act: Act::GptOss,
        biases: true,
        ..PLAIN
    },
    Family { name: "qwen2_moe", model_type: "qwen2_moe", shared: Shared::Gated, ..PLAIN },
    Family { name: "mixtral", model_type: "mixtral", renormalise: true, ..PLAIN },
    Family {
        name: "llama4",
        model_type: "llama4_text",
        top_k: 1,
        score: Score::Sigmoid,
        weight_on_input: true,
        shared: Shared::Plain,
        ..PLAIN
    },
    Family {
        name: "ernie4_5_moe",
        model_type: "ernie4_5_moe",
        experts: 16,
        renormalise: true,
        correction: Some(Correction {
            offset: 7.0,
            more: &[(9, SMALL), (10, SMALL), (12, 1.0 / 32.0)],
        }),
        shared: Shared::Plain,
        ..PLAIN
    },
];

impl Family {
    /// The family of that name.
    pub fn named(name: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| family.name == name)
    }

    /// Whether choices are below zero.
    pub fn is_negative(&self) -> bool {
        self.correction.is_some_and(|correction| correction.offset < 0.0)
    }

    /// The correction bias of each expert.
    pub fn bias(&self) -> Option<Vec<f64>> {
        let correction = self.correction?;
        let mut bias = vec![correction.offset; self.experts];
        correction.more.iter().for_each(|(expert, more)| bias[*expert] += more);
        Some(bias)
    }

    /// Experts whose logits are 2⁻⁹ higher than their probes say: the gate reads that from the
    /// coordinate that is always one, so that hidden state, weight and product are exact in 16 bits
    /// and only the sum is not.
    pub fn favoured(&self) -> [usize; 2] {
        if self.groups.is_some() { [13, 14] } else { [5, 6] }
    }
}
