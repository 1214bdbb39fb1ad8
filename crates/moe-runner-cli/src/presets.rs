//! Shapes of well-known models' layers, from their published configs.

use anyhow::Result;
use moe_runner::spec::{
    Activation, Correction, Dims, ExpertSpec, GateSpec, GroupFill, GroupScore, Groups, LayerSpec,
    OutputSpec, Renormalise, RoutedScale, RouterSpec, ScaleOn, Score, SharedCombine, SharedSpec,
    Transform, WeightFrom,
};

use crate::failure::unusable;

/// A model's layer.
pub(crate) struct Preset {
    /// The name that users write.
    pub(crate) name: &'static str,
    /// The format that the model is published in.
    pub(crate) format: &'static str,
    /// Hidden size, intermediate size, experts, experts per token.
    shape: (usize, usize, usize, usize),
    /// Width of the shared experts together; 0: none.
    shared: usize,
    /// What differs from softmax routing of plain SwiGLU experts.
    adjust: fn(&mut LayerSpec),
}

/// All presets.
pub(crate) const PRESETS: &[Preset] = &[
    Preset {
        name: "qwen3-30b-a3b",
        format: "bf16",
        shape: (2048, 768, 128, 8),
        shared: 0,
        adjust: |_| {},
    },
    Preset {
        name: "qwen3-235b-a22b",
        format: "bf16",
        shape: (4096, 1536, 128, 8),
        shared: 0,
        adjust: |_| {},
    },
    Preset {
        name: "mixtral-8x7b",
        format: "bf16",
        shape: (4096, 14336, 8, 2),
        shared: 0,
        adjust: |_| {},
    },
    Preset {
        name: "olmoe-1b-7b",
        format: "bf16",
        shape: (2048, 1024, 64, 8),
        shared: 0,
        adjust: not_renormalised,
    },
    Preset {
        name: "deepseek-v2-lite",
        format: "bf16",
        shape: (2048, 1408, 64, 6),
        shared: 2 * 1408,
        adjust: not_renormalised,
    },
    Preset {
        name: "deepseek-v3",
        format: "fp8-block",
        shape: (7168, 2048, 256, 8),
        shared: 2048,
        adjust: deepseek_v3,
    },
    Preset {
        name: "gpt-oss-20b",
        format: "mxfp4",
        shape: (2880, 2880, 32, 4),
        shared: 0,
        adjust: gpt_oss,
    },
    Preset {
        name: "gpt-oss-120b",
        format: "mxfp4",
        shape: (2880, 2880, 128, 4),
        shared: 0,
        adjust: gpt_oss,
    },
];

fn not_renormalised(spec: &mut LayerSpec) {
    spec.router.renormalise = Renormalise::None;
}

fn deepseek_v3(spec: &mut LayerSpec) {
    spec.router.score = Score::Sigmoid;
    spec.router.correction = Correction::OnScore;
    spec.router.groups = Some(Groups {
        count: 8,
        keep: 4,
        score: GroupScore::TopTwoSum,
        fill: GroupFill::NegativeInfinity,
    });
    spec.router.renormalise = Renormalise::Sum { eps: 1e-20 };
    spec.routed_scale = RoutedScale { factor: 2.5, on: ScaleOn::Output };
}

fn gpt_oss(spec: &mut LayerSpec) {
    spec.gate.bias = true;
    spec.router.score = Score::Logits;
    spec.router.weight_from = WeightFrom::SoftmaxChosen;
    spec.router.renormalise = Renormalise::None;
    spec.expert.bias = true;
    spec.expert.activation = Activation::ClampedSwiglu { alpha: 1.702, beta: 1.0, limit: 7.0 };
}

/// The preset of that name.
pub(crate) fn find(name: &str) -> Result<&'static Preset> {
    PRESETS
        .iter()
        .find(|preset| preset.name == name)
        .ok_or_else(|| unusable(format!("--preset {name}: no such preset; there are {}", names())))
}

/// All names, for messages.
pub(crate) fn names() -> String {
    PRESETS.iter().map(|preset| preset.name).collect::<Vec<_>>().join(", ")
}

impl Preset {
    /// The layer.
    pub(crate) fn spec(&self) -> LayerSpec {
        let (hidden, intermediate, experts, top_k) = self.shape;
        let mut spec = LayerSpec {
            name: self.name.into(),
            index: 0,
            dims: Dims { hidden, routed_hidden: hidden, intermediate },
            gate: GateSpec::default(),
            router: RouterSpec::softmax(experts, top_k, true),
            expert: ExpertSpec {
                gated: true,
                activation: Activation::Silu,
                bias: false,
                norm: None,
            },
            input_transform: Transform::default(),
            output_transform: Transform::default(),
            routed_scale: RoutedScale { factor: 1.0, on: ScaleOn::Weights },
            shared: (self.shared > 0).then_some(SharedSpec {
                count: 1,
                intermediate: self.shared,
                gated: true,
                activation: Activation::Silu,
                bias: false,
                sigmoid_gate: false,
                combine: SharedCombine::Add,
                input_norm: None,
                output_norm: None,
            }),
            output: OutputSpec::default(),
        };
        (self.adjust)(&mut spec);
        spec
    }
}

#[cfg(test)]
mod tests {
    use super::PRESETS;

    #[test]
    fn every_preset_is_consistent() {
        for preset in PRESETS {
            preset.spec().validate().unwrap();
        }
    }

    /// Published sizes of the routed experts, all layers together, in 10⁹ weights.
    #[test]
    fn shapes_add_up_to_the_models_size() {
        for (name, layers, billions) in [
            ("qwen3-30b-a3b", 48, 28.99),
            ("qwen3-235b-a22b", 94, 227.1),
            ("mixtral-8x7b", 32, 45.10),
            ("olmoe-1b-7b", 16, 6.44),
            ("deepseek-v2-lite", 26, 14.40),
            ("deepseek-v3", 58, 653.9),
            ("gpt-oss-20b", 24, 19.11),
            ("gpt-oss-120b", 36, 114.7),
        ] {
            let spec = super::find(name).unwrap().spec();
            let expert = 3 * spec.dims.hidden * spec.dims.intermediate;
            let weights = (layers * spec.router.experts * expert) as f64 / 1e9;
            assert!((weights / billions - 1.0).abs() < 2e-3, "{name}: {weights}");
        }
    }
}
