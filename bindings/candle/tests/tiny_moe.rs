//! A language model in candle, its experts in candle's own operations or ours: the tokens that
//! transformers gave, either way.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{D, DType, Device, IndexOp, Module, Result, Tensor};
use candle_nn::ops::{rms_norm, softmax_last_dim};
use candle_nn::rotary_emb::rope;
use moe_runner::checkpoint::Checkpoint;
use moe_runner::hidden::ActivationDtype;
use moe_runner::runner::Options;
use moe_runner_candle::MoeLayer;

const LAYERS: usize = 4;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD: usize = 64;
const EXPERTS: usize = 16;
const TOP_K: usize = 4;
const EPS: f32 = 1e-6;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny-moe")
}

/// What follows attention in a layer.
enum Moe {
    /// Of candle's operations.
    Plain {
        gate: Tensor,
        experts: Vec<[Tensor; 3]>,
    },
    Ours(MoeLayer),
}

impl Moe {
    /// `[T, H]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (gate, experts) = match self {
            Self::Ours(layer) => return layer.forward(x),
            Self::Plain { gate, experts } => (gate, experts),
        };
        let scores = softmax_last_dim(&linear(x, gate)?)?.to_vec2::<f32>()?;
        // rows and weights of each expert
        let mut chosen = vec![(Vec::new(), Vec::new()); EXPERTS];
        for (token, scores) in (0u32..).zip(&scores) {
            let mut order: Vec<usize> = (0..EXPERTS).collect();
            order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
            let sum: f32 = order[..TOP_K].iter().map(|e| scores[*e]).sum();
            for e in &order[..TOP_K] {
                chosen[*e].0.push(token);
                chosen[*e].1.push(scores[*e] / sum);
            }
        }
        let mut out = x.zeros_like()?;
        for ([gate, up, down], (rows, weights)) in experts.iter().zip(chosen) {
            if rows.is_empty() {
                continue;
            }
            let rows = Tensor::new(rows, x.device())?;
            let weights = Tensor::new(weights, x.device())?.unsqueeze(1)?;
            let x = x.index_select(&rows, 0)?;
            let between = (linear(&x, gate)?.silu()? * linear(&x, up)?)?;
            let y = linear(&between, down)?.broadcast_mul(&weights)?;
            out = out.index_add(&rows, &y, 0)?;
        }
        Ok(out)
    }
}

struct Layer {
    norms: [Tensor; 2],
    attention: HashMap<&'static str, Tensor>,
    moe: Moe,
}

struct Model {
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
}

impl Model {
    /// With our experts, those of the file never become tensors of candle.
    fn load(ours: bool) -> std::result::Result<Self, Box<dyn std::error::Error>> {
        let file = folder().join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(file, &Device::Cpu)?;
        if ours {
            tensors.retain(|name, _| !name.contains(".mlp."));
        }
        let get = |name: String| {
            let tensor = tensors.get(&name).unwrap_or_else(|| panic!("no tensor '{name}'"));
            tensor.to_dtype(DType::F32)
        };
        let checkpoint = Checkpoint::open(folder())?;
        let options = Options::new(ActivationDtype::F32, 1)?;
        let mut layers = Vec::new();
        for index in 0..LAYERS {
            let at = |name: &str| get(format!("model.layers.{index}.{name}.weight"));
            let expert = |e: usize, name: &str| at(&format!("mlp.experts.{e}.{name}_proj"));
            let experts = |e| Ok([expert(e, "gate")?, expert(e, "up")?, expert(e, "down")?]);
            let moe = match ours {
                true => Moe::Ours(MoeLayer::open(&checkpoint, index, &options)?),
                false => Moe::Plain {
                    gate: at("mlp.gate")?,
                    experts: (0..EXPERTS).map(experts).collect::<Result<_>>()?,
                },
            };
            let attention = ["q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"];
            let attention = attention.map(|name| Ok((name, at(&format!("self_attn.{name}"))?)));
            layers.push(Layer {
                norms: [at("input_layernorm")?, at("post_attention_layernorm")?],
                attention: attention.into_iter().collect::<Result<_>>()?,
                moe,
            });
        }
        let embedding = get("model.embed_tokens.weight".into())?;
        Ok(Self { embedding, layers, norm: get("model.norm.weight".into())? })
    }

    /// Logits of the token after `ids`.
    fn next(&self, ids: &[u32]) -> Result<Tensor> {
        let device = &Device::Cpu;
        let mut x = self.embedding.index_select(&Tensor::new(ids, device)?, 0)?;
        for layer in &self.layers {
            x = (&x + layer.attend(&rms_norm(&x, &layer.norms[0], EPS)?)?)?;
            x = (&x + layer.moe.forward(&rms_norm(&x, &layer.norms[1], EPS)?)?)?;
        }
        let last = rms_norm(&x.narrow(0, ids.len() - 1, 1)?, &self.norm, EPS)?;
        linear(&last, &self.embedding)?.i(0)
    }
}

impl Layer {
    fn attend(&self, x: &Tensor) -> Result<Tensor> {
        let weight = |name: &str| &self.attention[name];
        let tokens = x.dim(0)?;
        let heads = |name: &str, count: usize| {
            linear(x, weight(name))?
                .reshape((1, tokens, count, HEAD))?
                .transpose(1, 2)?
                .contiguous()
        };
        let (cos, sin) = angles(tokens, x.device())?;
        let turned = |name: &str, norm: &str, count| {
            rope(&rms_norm(&heads(name, count)?, weight(norm), EPS)?, &cos, &sin)
        };
        // keys and values of a head serve several of queries
        let shared = |t: Tensor| {
            let shape = (1, KV_HEADS, HEADS / KV_HEADS, tokens, HEAD);
            t.unsqueeze(2)?.broadcast_as(shape)?.reshape((1, HEADS, tokens, HEAD))
        };
        let q = turned("q_proj", "q_norm", HEADS)?;
        let k = shared(turned("k_proj", "k_norm", KV_HEADS)?)?;
        let v = shared(heads("v_proj", KV_HEADS)?)?;
        let scores = (q.matmul(&k.t()?.contiguous()?)? / (HEAD as f64).sqrt())?;
        let later = (0..tokens).flat_map(|i| (0..tokens).map(move |j| j > i));
        let mask: Vec<f32> =
            later.map(|later| if later { f32::NEG_INFINITY } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (tokens, tokens), x.device())?;
        let out = softmax_last_dim(&scores.broadcast_add(&mask)?)?.matmul(&v.contiguous()?)?;
        let out = out.transpose(1, 2)?.reshape((tokens, HEADS * HEAD))?;
        linear(&out, weight("o_proj"))
    }
}

fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)
}

/// Cosines and sines of the rotation at each position.
fn angles(tokens: usize, device: &Device) -> Result<(Tensor, Tensor)> {
    let turn = |i: usize| 10000f32.powf(-2.0 * i as f32 / HEAD as f32);
    let angles = (0..tokens).flat_map(|t| (0..HEAD / 2).map(move |i| t as f32 * turn(i)));
    let angles = Tensor::from_vec(angles.collect::<Vec<f32>>(), (tokens, HEAD / 2), device)?;
    Ok((angles.cos()?, angles.sin()?))
}

#[test]
fn tokens_are_those_of_transformers() -> std::result::Result<(), Box<dyn std::error::Error>> {
    const NEW: usize = 12;
    let recorded = std::fs::read_to_string(folder().join("eval.json"))?;
    let recorded: serde_json::Value = serde_json::from_str(&recorded)?;
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let [plain, ours] = [Model::load(false)?, Model::load(true)?];
    for case in &recorded["greedy"].as_array().unwrap()[..3] {
        let (mut tokens, greedy) = (ids(&case["prompt_ids"]), ids(&case["greedy_ids"]));
        for want in &greedy[..NEW] {
            let [a, b] = [plain.next(&tokens)?, ours.next(&tokens)?];
            for logits in [&a, &b] {
                let token = logits.argmax(D::Minus1)?.to_scalar::<u32>()?;
                assert_eq!(token, *want, "after {tokens:?}");
            }
            let (a, b) = (a.to_dtype(DType::F64)?, b.to_dtype(DType::F64)?);
            let error = (&a - &b)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
            let error = error / a.sqr()?.sum_all()?.to_scalar::<f64>()?;
            assert!(error < 1e-9, "NMSE {error:e} after {tokens:?}");
            tokens.push(*want);
        }
    }
    Ok(())
}
