//! A block as one GGUF file, with the names and keys that llama.cpp's converter writes.

use half::f16;
use moe_kernels::numerics::e8m0;
use moe_kernels::numerics::ggml::BlockType;

use super::form::{Form, four_bits, power_below};
use super::names::{HEAD, HEADS, LATENT, LATENT_HEAD, attention};
use crate::Block;
use crate::Family;
use crate::block::Sparse;

/// How experts' weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ggml {
    F32,
    F16,
    Block(BlockType),
}

impl Ggml {
    /// Of a form that is a GGUF file.
    pub(super) fn of(form: Form) -> Option<Self> {
        Some(match form {
            Form::GgufF32 => Self::F32,
            Form::GgufF16 => Self::F16,
            Form::GgufQ8_0 => Self::Block(BlockType::Q8_0),
            Form::GgufQ4_0 => Self::Block(BlockType::Q4_0),
            Form::GgufMxfp4 => Self::Block(BlockType::Mxfp4),
            _ => return None,
        })
    }

    fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Block(block) => block.ggml(),
        }
    }

    /// The rows of a matrix. A block has one weight that is not zero at most, so all are exact.
    fn encode(self, matrix: &Sparse) -> Vec<u8> {
        let values = matrix.dense();
        match self {
            Self::F32 => values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|v| f16::from_f64(*v).to_le_bytes()).collect(),
            Self::Block(block) => {
                values.chunks_exact(block.block_len()).flat_map(|v| encode(block, v)).collect()
            }
        }
    }
}

/// One block of 32 values.
fn encode(block: BlockType, values: &[f64]) -> Vec<u8> {
    let largest = values.iter().copied().find(|v| *v != 0.0).unwrap_or(1.0);
    // codes of four bits: element i below element i + 16
    let halves = |code: &dyn Fn(f64) -> u8| -> Vec<u8> {
        values[..16].iter().zip(&values[16..]).map(|(a, b)| code(*a) | code(*b) << 4).collect()
    };
    // the code of the one weight is 4, 5 or 6
    let scale = power_below(largest) / 4.0;
    let half = f16::from_f64(scale).to_le_bytes();
    match block {
        BlockType::Mxfp4 => {
            let (_, scale) = four_bits(largest);
            let code = |v: f64| if v == 0.0 { 0 } else { four_bits(v).0 };
            [vec![e8m0::from_exponent(scale.log2() as i32)], halves(&code)].concat()
        }
        BlockType::Q4_0 => [half.to_vec(), halves(&|v| (v / scale + 8.0) as u8)].concat(),
        _ => half.into_iter().chain(values.iter().map(|v| (v / scale) as i8 as u8)).collect(),
    }
}

/// The bytes of a GGUF file of version 3.
#[derive(Default)]
struct File {
    architecture: &'static str,
    keys: Vec<u8>,
    key_count: u64,
    infos: Vec<u8>,
    tensor_count: u64,
    data: Vec<u8>,
}

const ALIGNMENT: usize = 32;

impl File {
    fn key(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.keys.extend(string(key));
        self.keys.extend(kind.to_le_bytes());
        self.keys.extend(value);
        self.key_count += 1;
    }

    fn text(&mut self, key: &str, value: &str) {
        self.key(key, 8, &string(value));
    }

    fn list(&mut self, key: &str, kind: u32, count: usize, items: &[u8]) {
        let head = [&kind.to_le_bytes()[..], &(count as u64).to_le_bytes()].concat();
        self.key(key, 9, &[&head, items].concat());
    }

    /// A key of the architecture.
    fn size(&mut self, key: &str, value: usize) {
        self.key(&format!("{}.{key}", self.architecture), 4, &(value as u32).to_le_bytes());
    }

    fn number(&mut self, key: &str, value: f64) {
        self.key(&format!("{}.{key}", self.architecture), 6, &(value as f32).to_le_bytes());
    }

    fn flag(&mut self, key: &str, value: bool) {
        self.key(key, 7, &[u8::from(value)]);
    }

    /// A tensor; `shape` outermost first.
    fn tensor(&mut self, name: &str, kind: Ggml, shape: &[usize], bytes: &[u8]) {
        self.infos.extend(string(name));
        self.infos.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|size| self.infos.extend((*size as u64).to_le_bytes()));
        self.infos.extend(kind.number().to_le_bytes());
        self.infos.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(bytes);
        self.data.resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
        self.tensor_count += 1;
    }

    fn floats(&mut self, name: &str, shape: &[usize], values: &[f64]) {
        let bytes: Vec<u8> = values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect();
        self.tensor(name, Ggml::F32, shape, &bytes);
    }

    fn bytes(self) -> Vec<u8> {
        let head = [&b"GGUF\x03\0\0\0"[..], &self.tensor_count.to_le_bytes()].concat();
        let mut all = [head, self.key_count.to_le_bytes().to_vec(), self.keys, self.infos].concat();
        all.resize(all.len().next_multiple_of(ALIGNMENT), 0);
        all.extend(self.data);
        all
    }
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn architecture(family: &Family) -> &'static str {
    match family.model_type {
        "deepseek_v3" => "deepseek2",
        "gpt_oss" => "gpt-oss",
        "qwen2_moe" => "qwen2moe",
        "mixtral" => "llama",
        "llama4_text" => "llama4",
        _ => "ernie4_5-moe",
    }
}

/// The file.
pub(super) fn file(block: &Block, experts: Ggml) -> Vec<u8> {
    let mut file = File { architecture: architecture(block.family), ..File::default() };
    file.text("general.architecture", file.architecture);
    file.text("general.name", block.family.name);
    keys(block, &mut file);
    vocabulary(block, &mut file);
    dense(block, &mut file);
    layer(block, experts, &mut file);
    file.bytes()
}

fn keys(block: &Block, file: &mut File) {
    let family = block.family;
    let own_width = family.model_type == "mixtral" || family.model_type == "gpt_oss";
    let latent = family.model_type == "deepseek_v3";
    let (key, value) = if latent { (2 * LATENT_HEAD, LATENT_HEAD) } else { (HEAD, HEAD) };
    for (key, value) in [
        ("block_count", 1),
        ("context_length", 512),
        ("embedding_length", family.hidden),
        ("feed_forward_length", if own_width { family.intermediate } else { 64 }),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", HEADS),
        ("attention.key_length", key),
        ("attention.value_length", value),
        ("rope.dimension_count", value),
        ("vocab_size", block.vocabulary()),
        ("expert_count", family.experts),
        ("expert_used_count", family.top_k),
        ("expert_feed_forward_length", family.intermediate),
    ] {
        file.size(key, value);
    }
    file.number("attention.layer_norm_rms_epsilon", 1e-6);
    file.number("rope.freq_base", 10000.0);
    match family.model_type {
        "deepseek_v3" => {
            file.size("leading_dense_block_count", 0);
            file.size("attention.q_lora_rank", 0);
            file.size("attention.kv_lora_rank", LATENT);
            file.size("expert_shared_count", 1);
            file.size("expert_gating_func", 2);
            file.flag("deepseek2.expert_weights_norm", family.renormalise);
            file.number("expert_weights_scale", family.factor);
            if let Some((groups, keep)) = family.groups {
                file.size("expert_group_count", groups);
                file.size("expert_group_used_count", keep);
            }
        }
        "gpt_oss" => file.size("attention.sliding_window", 128),
        "qwen2_moe" => file.size("expert_shared_feed_forward_length", family.intermediate),
        "llama4_text" => file.size("interleave_moe_layer_step", 1),
        "ernie4_5_moe" => {
            file.size("interleave_moe_layer_step", 1);
            file.size("leading_dense_block_count", 0);
            file.size("expert_shared_feed_forward_length", family.intermediate);
        }
        _ => {}
    }
}

/// A word for each token: llama.cpp loads no model without.
fn vocabulary(block: &Block, file: &mut File) {
    let count = block.vocabulary();
    let (normal, words): (u32, Vec<u8>) =
        (1, (0..count).flat_map(|token| string(&format!("t{token}"))).collect());
    file.text("tokenizer.ggml.model", "llama");
    file.list("tokenizer.ggml.tokens", 8, count, &words);
    file.list("tokenizer.ggml.scores", 6, count, &0f32.to_le_bytes().repeat(count));
    file.list("tokenizer.ggml.token_type", 5, count, &normal.to_le_bytes().repeat(count));
    file.flag("tokenizer.ggml.add_bos_token", false);
}

/// Everything that has no experts.
fn dense(block: &Block, file: &mut File) {
    let family = block.family;
    let (hidden, vocabulary) = (family.hidden, block.vocabulary());
    let mut table = block.embeddings();
    table.resize(vocabulary, vec![0.0; hidden]);
    file.floats("token_embd.weight", &[vocabulary, hidden], &table.concat());
    file.floats("output.weight", &[vocabulary, hidden], &block.head().concat());
    let second = match family.model_type {
        "gpt_oss" => "blk.0.post_attention_norm.weight",
        _ => "blk.0.ffn_norm.weight",
    };
    for name in ["output_norm.weight", "blk.0.attn_norm.weight", second] {
        file.floats(name, &[hidden], &vec![1.0; hidden]);
    }
    for (name, shape, value) in attention(family.model_type, hidden) {
        let name = [
            ("sinks", "sinks.weight"),
            ("q_proj", "q"),
            ("k_proj", "k"),
            ("v_proj", "v"),
            ("o_proj", "output"),
            ("kv_a_proj_with_mqa", "kv_a_mqa"),
            ("kv_a_layernorm", "kv_a_norm"),
            ("kv_b_proj", "kv_b"),
        ]
        .into_iter()
        .find_map(|(published, short)| Some(format!("{short}{}", name.strip_prefix(published)?)))
        .expect("every tensor of attention has a name here");
        let len = shape.iter().product();
        file.floats(&format!("blk.0.attn_{name}"), &shape, &vec![value; len]);
    }
}

fn layer(block: &Block, form: Ggml, file: &mut File) {
    let family = block.family;
    let (count, hidden, inner) = (family.experts, family.hidden, family.intermediate);
    file.floats("blk.0.ffn_gate_inp.weight", &[count, hidden], &block.gate.dense());
    if family.model_type == "gpt_oss" {
        file.floats("blk.0.ffn_gate_inp.bias", &[count], &vec![0.0; count]);
    }
    if let Some(gate) = block.shared_gate() {
        file.floats("blk.0.ffn_gate_inp_shexp.weight", &[hidden], &gate.dense());
    }
    if let Some(bias) = &block.correction {
        file.floats("blk.0.exp_probs_b.bias", &[count], bias);
    }
    let experts = &block.experts;
    for (at, (name, shape)) in
        [("gate", [inner, hidden]), ("up", [inner, hidden]), ("down", [hidden, inner])]
            .into_iter()
            .enumerate()
    {
        let of = |expert: &crate::block::ExpertWeights| {
            form.encode([&expert.gate, &expert.up, &expert.down][at])
        };
        let stack: Vec<u8> = experts.iter().flat_map(of).collect();
        let [rows, cols] = shape;
        file.tensor(&format!("blk.0.ffn_{name}_exps.weight"), form, &[count, rows, cols], &stack);
        let biases = experts.iter().filter_map(|expert| expert.biases.as_ref());
        let biases: Vec<f64> = biases.flat_map(|biases| biases[at].iter().copied()).collect();
        if !biases.is_empty() {
            file.floats(&format!("blk.0.ffn_{name}_exps.bias"), &[count, rows], &biases);
        }
        if let Some(expert) = &block.shared {
            file.tensor(&format!("blk.0.ffn_{name}_shexp.weight"), form, &shape, &of(expert));
        }
    }
}
