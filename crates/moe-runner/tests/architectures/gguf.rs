//! GGUF files: what each architecture fixes, and what the file's keys say.

use std::path::Path;

use moe_runner::checkpoint::Checkpoint;
use moe_runner::checkpoint::architecture;
use moe_runner::spec::{
    Activation, Correction, GroupFill, GroupScore, Groups, LayerSpec, Renormalise, RmsNorm, Score,
    Selection, SharedCombine, TransformStep, WeightFrom, WeightOn,
};
use moe_runner::weights::account;

pub(super) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
}

pub(super) use Value::{Bool, F32, U32};

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Writes a file of version 3 with zeros for tensors; `tensors` are "name shape", outermost first.
fn write(path: &Path, architecture: &str, keys: &[(&str, Value)], tensors: &[&str]) {
    write_data(path, architecture, keys, tensors, |_, count| (0, vec![0; 4 * count]));
}

/// As [`write`], with the tensors that `data` makes from a name and a number of values: their type in
/// GGUF, and their bytes.
pub(super) fn write_data(
    path: &Path,
    architecture: &str,
    keys: &[(&str, Value)],
    tensors: &[&str],
    data: impl Fn(&str, usize) -> (u32, Vec<u8>),
) {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((keys.len() as u64 + 1).to_le_bytes());
    string(&mut out, "general.architecture");
    out.extend(8u32.to_le_bytes());
    string(&mut out, architecture);
    for (key, value) in keys {
        string(&mut out, &format!("{architecture}.{key}"));
        match value {
            U32(value) => {
                out.extend(4u32.to_le_bytes());
                out.extend(value.to_le_bytes());
            }
            F32(value) => {
                out.extend(6u32.to_le_bytes());
                out.extend(value.to_le_bytes());
            }
            Bool(value) => {
                out.extend(7u32.to_le_bytes());
                out.push(u8::from(*value));
            }
        }
    }
    let mut all = Vec::new();
    for tensor in tensors {
        let (name, shape) = tensor.split_once(' ').unwrap();
        let shape: Vec<u64> = shape.split(' ').map(|n| n.parse().unwrap()).collect();
        let (kind, bytes) = data(name, shape.iter().product::<u64>() as usize);
        string(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|size| out.extend(size.to_le_bytes()));
        out.extend(kind.to_le_bytes());
        out.extend((all.len() as u64).to_le_bytes());
        all.extend(bytes);
        all.resize(all.len().next_multiple_of(32), 0);
    }
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend(all);
    std::fs::write(path, out).unwrap();
}

/// The specs of a file of two layers with H = 8, I = 4, E = 4, k = 2, after `keys`.
fn specs(name: &str, keys: Vec<(&str, Value)>, tensors: &[&str]) -> Vec<LayerSpec> {
    let mut all = vec![
        ("block_count", U32(2)),
        ("embedding_length", U32(8)),
        ("feed_forward_length", U32(4)),
        ("expert_count", U32(4)),
        ("expert_used_count", U32(2)),
    ];
    all.extend(keys);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    write(&path, name, &all, tensors);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let described = architecture::describe(&checkpoint).unwrap();
    assert_eq!((described.architecture.as_str(), described.decoder_layers), (name, 2));
    let layers = architecture::layers(&checkpoint).unwrap();
    for entry in &layers {
        let accounting = account(&checkpoint, entry);
        assert!(accounting.is_complete(), "{name}: {accounting:?}");
        assert!(accounting.unexpected.is_empty(), "{name}: {accounting:?}");
    }
    layers.into_iter().map(|entry| entry.spec).collect()
}

const EXPERTS: [&str; 4] = [
    "blk.1.ffn_gate_inp.weight 4 8",
    "blk.1.ffn_gate_exps.weight 4 4 8",
    "blk.1.ffn_up_exps.weight 4 4 8",
    "blk.1.ffn_down_exps.weight 4 8 4",
];

fn with(more: &[&'static str]) -> Vec<&'static str> {
    EXPERTS.iter().chain(more).copied().collect()
}

#[test]
fn deepseek2() {
    let tensors = with(&[
        "blk.0.ffn_up.weight 4 8",
        "blk.1.exp_probs_b.bias 4",
        "blk.1.ffn_gate_shexp.weight 8 8",
        "blk.1.ffn_up_shexp.weight 8 8",
        "blk.1.ffn_down_shexp.weight 8 8",
        "blk.1.attn_q.weight 8 8",
    ]);
    let keys = vec![
        ("expert_gating_func", U32(2)),
        ("expert_weights_norm", Bool(true)),
        ("expert_weights_scale", F32(2.5)),
        ("expert_shared_count", U32(2)),
        ("expert_group_count", U32(2)),
        ("expert_group_used_count", U32(1)),
        ("leading_dense_block_count", U32(1)),
    ];
    let specs = specs("deepseek2", keys, &tensors);
    let [spec] = specs.as_slice() else { panic!("{} layers", specs.len()) };
    assert_eq!((spec.index, spec.name.as_str()), (1, "blk.1"));
    let router = &spec.router;
    assert_eq!(router.score, Score::Sigmoid);
    assert_eq!(router.correction, Correction::OnScore);
    assert_eq!(router.renormalise, Renormalise::Sum { eps: 1e-20 });
    let (score, fill) = (GroupScore::TopTwoSum, GroupFill::NegativeInfinity);
    assert_eq!(router.groups, Some(Groups { count: 2, keep: 1, score, fill }));
    assert_eq!(spec.routed_scale.factor, 2.5);
    let shared = spec.shared.as_ref().unwrap();
    assert_eq!((shared.intermediate, shared.sigmoid_gate), (8, false));
}

#[test]
fn deepseek2_without_keys_is_version_two() {
    let specs = specs("deepseek2", vec![("expert_weights_scale", F32(16.0))], &EXPERTS);
    assert_eq!(specs[0].router.score, Score::Softmax);
    assert_eq!(specs[0].router.renormalise, Renormalise::None);
    assert_eq!(specs[0].routed_scale.factor, 16.0);
    assert_eq!(specs[0].shared, None);
}

#[test]
fn gpt_oss() {
    let tensors = with(&[
        "blk.1.ffn_gate_inp.bias 4",
        "blk.1.ffn_gate_exps.bias 4 4",
        "blk.1.ffn_up_exps.bias 4 4",
        "blk.1.ffn_down_exps.bias 4 8",
    ]);
    let spec = &specs("gpt-oss", vec![("expert_feed_forward_length", U32(4))], &tensors)[0];
    assert!(spec.gate.bias && spec.expert.bias);
    assert_eq!(spec.router.weight_from, WeightFrom::SoftmaxChosen);
    let activation = Activation::ClampedSwiglu { alpha: 1.702, beta: 1.0, limit: 7.0 };
    assert_eq!(spec.expert.activation, activation);
}

#[test]
fn llama4() {
    let tensors = with(&[
        "blk.1.ffn_gate_shexp.weight 4 8",
        "blk.1.ffn_up_shexp.weight 4 8",
        "blk.1.ffn_down_shexp.weight 8 4",
    ]);
    let keys = vec![("expert_gating_func", U32(2)), ("expert_feed_forward_length", U32(4))];
    let spec = &specs("llama4", keys, &tensors)[0];
    assert_eq!(spec.router.weight_on, WeightOn::Input);
    assert_eq!(spec.router.weight_from, WeightFrom::SigmoidChosen);
    assert_eq!(spec.router.score, Score::Logits);
}

#[test]
fn qwen2moe() {
    let tensors = with(&[
        "blk.1.ffn_gate_inp_shexp.weight 8",
        "blk.1.ffn_gate_shexp.weight 6 8",
        "blk.1.ffn_up_shexp.weight 6 8",
        "blk.1.ffn_down_shexp.weight 8 6",
    ]);
    let keys = vec![("expert_shared_feed_forward_length", U32(6))];
    let spec = &specs("qwen2moe", keys, &tensors)[0];
    assert_eq!(spec.router.renormalise, Renormalise::None);
    let shared = spec.shared.as_ref().unwrap();
    assert_eq!((shared.intermediate, shared.sigmoid_gate), (6, true));
}

/// From before experts were stacked.
#[test]
fn one_tensor_for_each_expert() {
    let mut tensors = vec!["blk.0.ffn_gate_inp.weight 4 8".to_string()];
    for e in 0..4 {
        tensors.push(format!("blk.0.ffn_gate.{e}.weight 4 8"));
        tensors.push(format!("blk.0.ffn_up.{e}.weight 4 8"));
        tensors.push(format!("blk.0.ffn_down.{e}.weight 8 4"));
    }
    let tensors: Vec<&str> = tensors.iter().map(String::as_str).collect();
    let spec = &specs("llama", vec![], &tensors)[0];
    assert_eq!(spec.router.renormalise, Renormalise::Sum { eps: 0.0 });
}

#[test]
fn unknown_architectures_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for name in ["grovemoe", "smallthinker", "no-such-moe"] {
        write(&path, name, &[("block_count", U32(1))], &EXPERTS);
        let checkpoint = Checkpoint::open(&path).unwrap();
        let error = architecture::layers(&checkpoint).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("qwen3moe"), "{error}");
    }
}

/// A bias that only chooses comes with sigmoids, whether the file says so or not.
#[test]
fn a_bias_without_a_gating_function() {
    let tensors = with(&["blk.1.exp_probs_b.bias 4"]);
    let spec = &specs("deepseek2", vec![], &tensors)[0];
    assert_eq!(spec.router.score, Score::Sigmoid);
    assert_eq!(spec.router.correction, Correction::OnScore);
    let keys = || vec![("vocab_size", U32(154_880))];
    let mut tensors = EXPERTS.to_vec();
    assert_eq!(specs("deepseek2", keys(), &tensors)[0].router.score, Score::Softmax);
    tensors.push("blk.0.ffn_up.weight 4 8");
    assert_eq!(specs("glm-dsa", keys(), &tensors)[0].router.score, Score::Sigmoid);
}

/// Gate and up in one array, gate first.
#[test]
fn merged_gate_and_up() {
    let tensors = [
        "blk.1.ffn_gate_inp.weight 4 8",
        "blk.1.ffn_gate_up_exps.weight 4 8 8",
        "blk.1.ffn_down_exps.weight 4 8 4",
    ];
    for name in ["qwen3moe", "qwen35moe", "lfm2moe", "mimo2", "bailingmoe2", "exaone-moe"] {
        assert_eq!(specs(name, vec![], &tensors)[0].dims.intermediate, 4, "{name}");
    }
}

#[test]
fn deepseek4() {
    let tensors = [
        "blk.0.ffn_gate_inp.weight 4 8",
        "blk.0.ffn_gate_exps.weight 4 4 8",
        "blk.0.ffn_up_exps.weight 4 4 8",
        "blk.0.ffn_down_exps.weight 4 8 4",
        "blk.0.exp_probs_b.bias 4",
        "blk.0.ffn_gate_shexp.weight 4 8",
        "blk.0.ffn_up_shexp.weight 4 8",
        "blk.0.ffn_down_shexp.weight 8 4",
    ];
    let spec = &specs("deepseek4", vec![("swiglu_clamp_exp", F32(10.0))], &tensors)[0];
    assert_eq!(spec.router.score, Score::SqrtSoftplus);
    assert_eq!(spec.router.renormalise, Renormalise::Sum { eps: 1e-20 });
    let clamped = Activation::ClampedSwiglu { alpha: 1.0, beta: 0.0, limit: 10.0 };
    assert_eq!(spec.expert.activation, clamped);
    assert_eq!(spec.shared.as_ref().unwrap().activation, clamped);
}

#[test]
fn nemotron_h_moe() {
    let tensors = [
        "blk.1.ffn_gate_inp.weight 4 8",
        "blk.1.ffn_up_exps.weight 4 4 6",
        "blk.1.ffn_down_exps.weight 4 6 4",
        "blk.1.exp_probs_b.bias 4",
        "blk.1.ffn_latent_down.weight 6 8",
        "blk.1.ffn_latent_up.weight 8 6",
        "blk.1.ffn_up_shexp.weight 5 8",
        "blk.1.ffn_down_shexp.weight 8 5",
    ];
    let spec = &specs("nemotron_h_moe", vec![("expert_weights_scale", F32(2.5))], &tensors)[0];
    assert!(!spec.expert.gated && !spec.shared.as_ref().unwrap().gated);
    assert_eq!(spec.expert.activation, Activation::Relu2);
    assert_eq!((spec.dims.routed_hidden, spec.shared.as_ref().unwrap().intermediate), (6, 5));
}

#[test]
fn gemma4() {
    let mut tensors = vec![
        "blk.0.ffn_gate_inp.weight 4 8",
        "blk.0.ffn_gate_inp.scale 8",
        "blk.0.ffn_gate_up_exps.weight 4 8 8",
        "blk.0.ffn_down_exps.weight 4 8 4",
        "blk.0.ffn_down_exps.scale 4",
        "blk.0.ffn_gate.weight 6 8",
        "blk.0.ffn_up.weight 6 8",
        "blk.0.ffn_down.weight 8 6",
    ];
    tensors.extend(["blk.0.ffn_norm.weight 8", "blk.0.post_ffw_norm.weight 8"]);
    tensors.extend(["blk.0.pre_ffw_norm_2.weight 8", "blk.0.post_ffw_norm_1.weight 8"]);
    tensors.push("blk.0.post_ffw_norm_2.weight 8");
    let spec = &specs("gemma4", vec![], &tensors)[0];
    assert!(spec.router.per_expert_scale && spec.gate.scaled_rms_eps.is_some());
    assert_eq!(spec.shared.as_ref().unwrap().intermediate, 6);
    assert_eq!(spec.expert.activation, Activation::GeluTanh);
}

/// Scales of whole matrices stand beside them, and multiply.
#[test]
fn scales_of_matrices() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let keys = [
        ("block_count", U32(2)),
        ("embedding_length", U32(8)),
        ("feed_forward_length", U32(4)),
        ("expert_count", U32(4)),
        ("expert_used_count", U32(2)),
    ];
    let plain = with(&[]);
    let scaled = with(&["blk.1.ffn_up_exps.scale 4", "blk.1.ffn_gate_exps.bias 4 4"]);
    for (tensors, unexpected) in [(plain, 0), (scaled, 1)] {
        write(&path, "qwen3moe", &keys, &tensors);
        let checkpoint = Checkpoint::open(&path).unwrap();
        let layers = architecture::layers(&checkpoint).unwrap();
        let accounting = account(&checkpoint, &layers[0]);
        // one bias alone makes the layer one with biases, of which others are missing
        assert_eq!(accounting.missing.len(), 2 * unexpected, "{accounting:?}");
    }
}

/// Layers that have nothing to do with experts, and should.
#[test]
fn layers_that_nobody_looks_at() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let write = |tensors: &[&str]| {
        write(&path, "qwen3moe", &[("block_count", U32(2))], tensors);
        let found = architecture::overlooked(&Checkpoint::open(&path).unwrap()).unwrap();
        found.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert!(write(&with(&["blk.0.ffn_up.weight 4 8"])).is_empty());
    let found = write(&with(&["blk.0.attn_q.weight 8 8"]));
    assert!(
        matches!(&found[..], [one] if one.contains("layer 0 has no feed-forward")),
        "{found:?}"
    );
}

/// The experts' branch; the dense one beside attention is another module, with an input of its own.
#[test]
fn arctic() {
    let tensors = with(&["blk.1.ffn_up.weight 4 8", "blk.1.ffn_norm_exps.weight 8"]);
    let spec = &specs("arctic", vec![], &tensors)[0];
    assert_eq!(spec.router.renormalise, Renormalise::Sum { eps: 0.0 });
    assert_eq!(spec.shared, None);
}

#[test]
fn nomic_bert_moe() {
    let tensors = [
        "blk.1.ffn_gate_inp.weight 4 8",
        "blk.1.ffn_up_exps.weight 4 4 8",
        "blk.1.ffn_down_exps.weight 4 8 4",
        "blk.0.ffn_up.weight 4 8",
    ];
    let spec = &specs("nomic-bert-moe", vec![("moe_every_n_layers", U32(2))], &tensors)[0];
    assert!(!spec.expert.gated && !spec.expert.bias);
    assert_eq!(spec.expert.activation, Activation::Gelu);
    assert_eq!(spec.router.renormalise, Renormalise::None);
}

#[test]
fn phimoe_is_the_model_s_own_sparsemixer() {
    let spec = &specs("phimoe", vec![], &EXPERTS)[0];
    assert_eq!(spec.router.selection, Selection::SparseMixer { eps: 0.01 });
    assert_eq!(spec.router.renormalise, Renormalise::None);
}

/// Both, with the dense branch and without; the cap where the file states one, and where not.
#[test]
fn grok() {
    let spec = &specs("grok", vec![], &EXPERTS)[0];
    assert_eq!((spec.router.soft_cap, spec.output.multiplier), (Some(30.0), 1.0));
    assert_eq!((spec.expert.activation, &spec.shared), (Activation::GeluTanh, &None));
    let tensors = with(&[
        "blk.1.ffn_gate.weight 6 8",
        "blk.1.ffn_up.weight 6 8",
        "blk.1.ffn_down.weight 8 6",
        "blk.1.post_ffw_norm.weight 8",
    ]);
    let spec = &specs("grok", vec![("router_logit_softcapping", F32(20.0))], &tensors)[0];
    assert_eq!(spec.router.soft_cap, Some(20.0));
    assert_eq!(spec.output.multiplier, std::f32::consts::FRAC_1_SQRT_2);
    let shared = spec.shared.as_ref().unwrap();
    assert_eq!((shared.intermediate, shared.activation), (6, Activation::GeluTanh));
}

/// Hy3's first files have the bias without the ending that all others have.
#[test]
fn a_correction_bias_without_an_ending() {
    for name in ["blk.1.exp_probs_b 4", "blk.1.exp_probs_b.bias 4"] {
        let spec = &specs("hy_v3", vec![], &with(&[name]))[0];
        assert_eq!(spec.router.correction, Correction::OnScore, "{name}");
    }
}

#[test]
fn routers_with_sigmoids_that_files_need_not_state() {
    let shared = [
        "blk.1.ffn_gate_shexp.weight 4 8",
        "blk.1.ffn_up_shexp.weight 4 8",
        "blk.1.ffn_down_shexp.weight 8 4",
    ];
    for name in [
        "laguna",
        "hy_v3",
        "hy_v4",
        "deepseek32",
        "bailingmoe3",
        "cohere2moe",
        "axk2",
        "dots3note",
        "glm5next",
        "minimax-m3",
        // whose weights are renormalised where the file says so
        "glm4moe",
        "dots1",
        "step35",
    ] {
        let spec = &specs(name, vec![], &with(&shared))[0];
        assert_eq!(spec.router.score, Score::Sigmoid, "{name}");
        assert_eq!(spec.router.renormalise, Renormalise::None, "{name}");
        let combine = match name {
            "cohere2moe" => SharedCombine::Average,
            _ => SharedCombine::Add,
        };
        assert_eq!(spec.shared.as_ref().unwrap().combine, combine, "{name}");
    }
    assert_eq!(specs("mellum", vec![], &EXPERTS)[0].router.score, Score::Softmax);
}

/// Clamped before the SiLU; the shared experts by their own number.
#[test]
fn clamps_before_the_activation() {
    let tensors = with(&SHARED);
    for name in ["hy_v4", "glm5next"] {
        let spec = &specs(name, vec![("swiglu_clamp_exp", F32(10.0))], &tensors)[0];
        let clamped = Activation::ClampedSwiglu { alpha: 1.0, beta: 0.0, limit: 10.0 };
        assert_eq!(spec.expert.activation, clamped, "{name}");
        assert_eq!(spec.shared.as_ref().unwrap().activation, Activation::Silu, "{name}");
        let spec = &specs(name, vec![("swiglu_clamp_shexp", F32(10.0))], &tensors)[0];
        assert_eq!(spec.shared.as_ref().unwrap().activation, clamped, "{name}");
    }
    let spec = &specs("minimax-m3", vec![], &tensors)[0];
    let clamped = Activation::ClampedSwiglu { alpha: 1.702, beta: 1.0, limit: 7.0 };
    assert_eq!(spec.expert.activation, clamped);
    assert_eq!(spec.shared.as_ref().unwrap().activation, clamped);
}

const SHARED: [&str; 3] = [
    "blk.1.ffn_gate_shexp.weight 4 8",
    "blk.1.ffn_up_shexp.weight 4 8",
    "blk.1.ffn_down_shexp.weight 8 4",
];

/// Granite keeps both projections of the shared experts in one tensor.
#[test]
fn merged_gate_and_up_of_shared_experts() {
    let fused = ["blk.1.ffn_up_shexp.weight 6 8", "blk.1.ffn_down_shexp.weight 8 3"];
    let spec = &specs("granite_swa", vec![], &with(&fused))[0];
    let shared = spec.shared.as_ref().unwrap();
    assert_eq!((shared.intermediate, shared.gated), (3, true));
}

#[test]
fn kimi_k3() {
    let tensors = [
        "blk.1.ffn_gate_inp.weight 4 8",
        "blk.1.exp_probs_b.bias 4",
        "blk.1.ffn_gate_exps.weight 4 4 6",
        "blk.1.ffn_up_exps.weight 4 4 6",
        "blk.1.ffn_down_exps.weight 4 6 4",
        "blk.1.ffn_routed_down.weight 6 8",
        "blk.1.ffn_routed_norm.weight 6",
        "blk.1.ffn_routed_up.weight 8 6",
        "blk.1.ffn_gate_shexp.weight 4 8",
        "blk.1.ffn_up_shexp.weight 4 8",
        "blk.1.ffn_down_shexp.weight 8 4",
    ];
    let keys = |linear| {
        vec![
            ("activation.situ_beta", F32(4.0)),
            ("activation.situ_linear_beta", F32(linear)),
            ("attention.layer_norm_rms_epsilon", F32(1e-5)),
            ("expert_weights_norm", Bool(true)),
            ("expert_gating_func", U32(2)),
        ]
    };
    let spec = &specs("kimi-k3", keys(25.0), &tensors)[0];
    let situ = Activation::Situ { beta: 4.0, lambda: Some(25.0) };
    assert_eq!((spec.expert.activation, spec.dims.routed_hidden), (situ, 6));
    assert_eq!(spec.shared.as_ref().unwrap().activation, situ);
    let norm = RmsNorm { eps: 1e-5, unit_offset: false, scale_first: false };
    let steps = vec![TransformStep::RmsNorm(norm), TransformStep::Linear { width: 8 }];
    assert_eq!(spec.output_transform.steps, steps);
    assert_eq!(spec.router.renormalise, Renormalise::Sum { eps: 1e-20 });
    let without: Vec<&str> = tensors.into_iter().filter(|t| !t.contains("norm")).collect();
    let spec = &specs("kimi-k3", keys(0.0), &without)[0];
    assert_eq!(spec.expert.activation, Activation::Situ { beta: 4.0, lambda: None });
    assert_eq!(spec.output_transform.steps, [TransformStep::Linear { width: 8 }]);
}

/// Clamped after the SiLU, in every architecture but those above and DeepSeek-V4.
#[test]
fn clamps_that_the_file_states() {
    let tensors = with(&[
        "blk.1.ffn_gate_shexp.weight 4 8",
        "blk.1.ffn_up_shexp.weight 4 8",
        "blk.1.ffn_down_shexp.weight 8 4",
    ]);
    for name in ["step35", "bailingmoe3"] {
        let keys = vec![("swiglu_clamp_exp", F32(7.0)), ("swiglu_clamp_shexp", F32(16.0))];
        let spec = &specs(name, keys, &tensors)[0];
        assert_eq!(spec.expert.activation, Activation::SwigluStep { limit: 7.0 }, "{name}");
        let shared = spec.shared.as_ref().unwrap().activation;
        assert_eq!(shared, Activation::SwigluStep { limit: 16.0 }, "{name}");
        let none = vec![("swiglu_clamp_exp", F32(0.0))];
        assert_eq!(specs(name, none, &tensors)[0].expert.activation, Activation::Silu, "{name}");
    }
}

/// `docs/checkpoints.md` lists what is read and what is not, with the reason.
#[test]
fn the_docs_list_all_architectures() {
    let mut known: Vec<&str> = architecture::known_in_gguf().collect();
    known.sort_unstable();
    let mut list = format!("{}.\n\n", known.join(", "));
    for (name, reason) in architecture::refused_in_gguf() {
        list += &format!("* {name}: no, {reason}.\n");
    }
    crate::docs::expect("architectures in GGUF", &list);
}
