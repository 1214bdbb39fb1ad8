//! Names and shapes of tensors, as each architecture publishes them.

use super::form::{Form, mxfp4};
use super::{Tensor, Tensors};
use crate::Block;
use crate::block::ExpertWeights;

/// Attention heads, and their width: what every engine's attention has a kernel for.
pub(super) const HEADS: usize = 2;
pub(super) const HEAD: usize = 64;
/// Multi-head latent attention, of the published widths, which alone engines have kernels for.
pub(super) const LATENT: usize = 512;
pub(super) const LATENT_HEAD: usize = 64;

/// All tensors of the checkpoint.
pub(super) fn tensors(block: &Block, form: Form) -> Tensors {
    let family = block.family;
    let hidden = family.hidden;
    let prefix = "model.layers.0.";
    let mut all = Tensors::new();
    let mut add = |name: &str, shape: &[usize], values: Vec<f64>| {
        all.insert(name.to_string(), form.float(shape, values));
    };
    let mut table = block.embeddings();
    table.resize(block.vocabulary(), vec![0.0; hidden]);
    let vocabulary = [block.vocabulary(), hidden];
    add("model.embed_tokens.weight", &vocabulary, table.concat());
    add("lm_head.weight", &vocabulary, block.head().concat());
    let ones = || vec![1.0; hidden];
    for name in ["model.norm", "model.layers.0.input_layernorm"] {
        add(&format!("{name}.weight"), &[hidden], ones());
    }
    add("model.layers.0.post_attention_layernorm.weight", &[hidden], ones());
    for (name, shape, value) in attention(family.model_type, hidden) {
        let len = shape.iter().product();
        add(&format!("{prefix}self_attn.{name}"), &shape, vec![value; len]);
    }
    let gate = [family.experts, hidden];
    let router = match family.model_type {
        "gpt_oss" => "mlp.router.weight",
        "mixtral" => "block_sparse_moe.gate.weight",
        "llama4_text" => "feed_forward.router.weight",
        _ => "mlp.gate.weight",
    };
    add(&format!("{prefix}{router}"), &gate, block.gate.dense());
    if family.model_type == "gpt_oss" {
        add(&format!("{prefix}mlp.router.bias"), &[family.experts], vec![0.0; family.experts]);
    }
    if let Some(gate) = block.shared_gate() {
        add(&format!("{prefix}mlp.shared_expert_gate.weight"), &[1, hidden], gate.dense());
    }
    if let Some(bias) = &block.correction {
        // float32 in every checkpoint: in 16 bits its small differences are gone
        let (name, shape) = match family.model_type {
            "ernie4_5_moe" => ("mlp.moe_statics.e_score_correction_bias", vec![1, bias.len()]),
            _ => ("mlp.gate.e_score_correction_bias", vec![bias.len()]),
        };
        all.insert(format!("{prefix}{name}"), Tensor::f32(&shape, bias.iter().copied()));
    }
    match family.model_type {
        "gpt_oss" => gpt_oss(block, form, prefix, &mut all),
        "llama4_text" if form.is_float() => llama4(block, form, prefix, &mut all),
        _ => {
            let (experts, [gate, up, down]) = match family.model_type {
                "mixtral" => ("block_sparse_moe.experts", ["w1", "w3", "w2"]),
                "llama4_text" => ("feed_forward.experts", PROJECTIONS),
                _ => ("mlp.experts", PROJECTIONS),
            };
            for (e, expert) in block.experts.iter().enumerate() {
                let name = |projection: &str| format!("{prefix}{experts}.{e}.{projection}");
                form.add(&name(gate), &expert.gate, false, &mut all);
                form.add(&name(up), &expert.up, true, &mut all);
                form.add(&name(down), &expert.down, false, &mut all);
            }
        }
    }
    if let Some(expert) = &block.shared {
        let shared = match family.model_type {
            "qwen2_moe" => "mlp.shared_expert",
            "llama4_text" => "feed_forward.shared_expert",
            _ => "mlp.shared_experts",
        };
        let [gate, up, down] =
            PROJECTIONS.map(|projection| format!("{prefix}{shared}.{projection}"));
        form.add(&gate, &expert.gate, false, &mut all);
        form.add(&up, &expert.up, true, &mut all);
        form.add(&down, &expert.down, false, &mut all);
    }
    all
}

const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Attention's tensors, with the value of all their elements: finite, and an output projection of
/// zeros.
pub(super) fn attention(model_type: &str, hidden: usize) -> Vec<(&'static str, Vec<usize>, f64)> {
    let width = HEADS * HEAD;
    let mut all = match model_type {
        "deepseek_v3" => {
            let (latent, head) = (LATENT, LATENT_HEAD);
            return vec![
                ("q_proj.weight", vec![HEADS * 2 * head, hidden], 0.0),
                ("kv_a_proj_with_mqa.weight", vec![latent + head, hidden], 0.0),
                ("kv_a_layernorm.weight", vec![latent], 1.0),
                ("kv_b_proj.weight", vec![HEADS * 2 * head, latent], 0.0),
                ("o_proj.weight", vec![hidden, HEADS * head], 0.0),
            ];
        }
        _ => vec![
            ("q_proj.weight", vec![width, hidden], 0.0),
            ("k_proj.weight", vec![width, hidden], 0.0),
            ("v_proj.weight", vec![width, hidden], 0.0),
            ("o_proj.weight", vec![hidden, width], 0.0),
        ],
    };
    if matches!(model_type, "gpt_oss" | "qwen2_moe") {
        all.extend(
            ["q_proj.bias", "k_proj.bias", "v_proj.bias"].map(|name| (name, vec![width], 0.0)),
        );
    }
    if model_type == "gpt_oss" {
        all.extend([("o_proj.bias", vec![hidden], 0.0), ("sinks", vec![HEADS], 0.0)]);
    }
    all
}

/// Gate and up of an expert, row by row in turn, `[2I, H]`.
fn interleaved(expert: &ExpertWeights) -> crate::block::Sparse {
    let mut both = expert.gate.clone();
    both.rows *= 2;
    both.entries.iter_mut().for_each(|(row, _, _)| *row *= 2);
    let up = expert.up.entries.iter().map(|(row, col, value)| (row * 2 + 1, *col, *value));
    both.entries.extend(up);
    both
}

/// Stacks with interleaved columns, or blocks of MXFP4 by rows.
fn gpt_oss(block: &Block, form: Form, prefix: &str, all: &mut Tensors) {
    let (count, hidden) = (block.experts.len(), block.family.hidden);
    let intermediate = block.family.intermediate;
    let at = |name: &str| format!("{prefix}mlp.experts.{name}");
    let mut biases = (Vec::new(), Vec::new());
    for expert in &block.experts {
        if let Some([gate, up, down]) = &expert.biases {
            biases.0.extend(gate.iter().zip(up).flat_map(|(gate, up)| [*gate, *up]));
            biases.1.extend(down);
        }
    }
    let (first, second) = ([count, 2 * intermediate], [count, hidden]);
    all.insert(at("gate_up_proj_bias"), form.float(&first, biases.0));
    all.insert(at("down_proj_bias"), form.float(&second, biases.1));
    let gate_up: Vec<_> = block.experts.iter().map(interleaved).collect();
    let down: Vec<_> = block.experts.iter().map(|expert| expert.down.clone()).collect();
    for (name, stack) in [("gate_up_proj", gate_up), ("down_proj", down)] {
        let (rows, cols) = (stack[0].rows, stack[0].cols);
        if form == Form::Mxfp4 {
            let (codes, scales): (Vec<_>, Vec<_>) = stack.iter().map(mxfp4).unzip();
            let groups = cols / 32;
            let codes = Tensor::u8(&[count, rows, groups, 16], codes.concat());
            all.insert(at(&format!("{name}_blocks")), codes);
            let scales = Tensor::u8(&[count, rows, groups], scales.concat());
            all.insert(at(&format!("{name}_scales")), scales);
        } else {
            let values: Vec<f64> = stack.iter().flat_map(|m| m.transposed().dense()).collect();
            all.insert(at(name), form.float(&[count, cols, rows], values));
        }
    }
}

/// Transposed stacks, gate before up.
fn llama4(block: &Block, form: Form, prefix: &str, all: &mut Tensors) {
    let (count, hidden) = (block.experts.len(), block.family.hidden);
    let intermediate = block.family.intermediate;
    let gate_up = block.experts.iter().flat_map(|expert| {
        let (gate, up) = (expert.gate.transposed().dense(), expert.up.transposed().dense());
        let rows = gate.chunks(intermediate).zip(up.chunks(intermediate));
        rows.flat_map(|(gate, up)| [gate, up].concat()).collect::<Vec<f64>>()
    });
    let down = block.experts.iter().flat_map(|expert| expert.down.transposed().dense());
    let at = |name: &str| format!("{prefix}feed_forward.experts.{name}");
    let shape = [count, hidden, 2 * intermediate];
    all.insert(at("gate_up_proj"), form.float(&shape, gate_up));
    all.insert(at("down_proj"), form.float(&[count, intermediate, hidden], down));
}
