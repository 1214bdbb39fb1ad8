//! The layer as a module of candle against recorded layers of transformers.

use std::path::PathBuf;

use candle_core::{D, DType, Device, Module, Tensor, Var};
use moe_runner::checkpoint::Checkpoint;
use moe_runner::hidden::ActivationDtype;
use moe_runner::runner::Options;
use moe_runner::spec::Activation;
use moe_runner::weights::GateUp;
use moe_runner_candle::{MoeExperts, MoeLayer, Stacks};

type Anything = Result<(), Box<dyn std::error::Error>>;

/// Experts for rows, ids and weights.
type Forward<'a> = &'a dyn Fn(&Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor>;

fn case(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../crates/moe-runner/tests/golden")
        .join(name)
}

/// A recorded case: its checkpoint, and tensors of a layer for seven tokens.
struct Case {
    checkpoint: Checkpoint,
    recorded: std::collections::HashMap<String, Tensor>,
    layer: usize,
}

impl Case {
    fn open(name: &str, layer: usize) -> Result<Self, Box<dyn std::error::Error>> {
        let folder = case(name);
        let recorded = folder.join("golden.safetensors");
        let recorded = candle_core::safetensors::load(recorded, &Device::Cpu)?;
        Ok(Self { checkpoint: Checkpoint::open(&folder)?, recorded, layer })
    }

    fn get(&self, what: &str) -> Tensor {
        self.recorded[&format!("layers.{}.t7.{what}", self.layer)].clone()
    }

    fn module(&self, dtype: ActivationDtype) -> Result<MoeLayer, Box<dyn std::error::Error>> {
        Ok(MoeLayer::open(&self.checkpoint, self.layer, &Options::new(dtype, 1)?)?)
    }
}

fn nmse(got: &Tensor, want: &Tensor) -> candle_core::Result<f64> {
    let (got, want) = (got.to_dtype(DType::F64)?, want.to_dtype(DType::F64)?);
    Ok((&got - &want)?.sqr()?.sum_all()?.to_scalar::<f64>()?
        / want.sqr()?.sum_all()?.to_scalar::<f64>()?)
}

#[test]
fn a_layer_gives_what_was_recorded() -> Anything {
    for (name, layer) in [
        ("qwen3_moe_bf16", 1),
        ("mixtral_bf16", 0),
        ("deepseek_v3_bf16", 1),
        ("quant_qwen3_moe_w4a16_g128", 0),
    ] {
        let case = Case::open(name, layer)?;
        let (x, want) = (case.get("x"), case.get("out"));
        for (dtype, native, bound) in [
            (DType::F32, ActivationDtype::F32, 1e-10),
            (DType::BF16, ActivationDtype::Bf16, 1e-4),
            (DType::F16, ActivationDtype::F16, 1e-5),
        ] {
            let moe = case.module(native)?;
            // a batch of one, and rows that a model cut out of more
            let x = x.to_dtype(dtype)?.unsqueeze(0)?;
            let more =
                Tensor::cat(&[&x, &x], D::Minus1)?.narrow(D::Minus1, x.dim(2)?, x.dim(2)?)?;
            for x in [&x, &more] {
                let out = moe.forward(x)?;
                assert_eq!((out.dims(), out.dtype()), (x.dims(), dtype));
                let error = nmse(&out.squeeze(0)?, &want)?;
                assert!(error < bound, "{name} {dtype:?}: {error:e}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_routing_of_the_model_is_taken() -> Anything {
    let case = Case::open("mixtral_bf16", 0)?;
    let (x, want) = (case.get("x"), case.get("out"));
    let (ids, weights) = (case.get("topk_ids"), case.get("topk_weights").to_dtype(DType::F32)?);
    let moe = case.module(ActivationDtype::F32)?;
    let experts = experts(&case, DType::BF16)?;
    let forward: [Forward<'_>; 2] =
        [&|x, ids, weights| moe.forward_routed(x, ids, weights), &|x, ids, weights| {
            experts.forward(x, ids, weights)
        }];
    for forward in forward {
        for ids in [ids.to_dtype(DType::U32)?, ids.to_dtype(DType::I64)?] {
            assert!(nmse(&forward(&x, &ids, &weights)?, &want)? < 1e-10);
            let doubled = forward(&x, &ids, &(&weights * 2.0)?)?;
            assert!(nmse(&doubled, &(&want * 2.0)?)? < 1e-10);
            // slots that stand column by column
            let turned = |t: &Tensor| t.t()?.contiguous()?.t();
            assert!(nmse(&forward(&x, &turned(&ids)?, &turned(&weights)?)?, &want)? < 1e-10);
        }
        let nobody = Tensor::full(u32::MAX, ids.dims(), &Device::Cpu)?;
        let nothing = forward(&x, &nobody, &weights)?.abs()?.sum_all()?.to_scalar::<f32>()?;
        assert_eq!(nothing, 0.0);
        for (ids, weights, says) in [
            (&ids, &weights.narrow(1, 0, 1)?, "ids [7, 2] and weights [7, 1] for rows [7, "),
            (&ids.narrow(0, 0, 6)?, &weights.narrow(0, 0, 6)?, "ids [6, 2] and weights [6, 2]"),
            (&ids.to_dtype(DType::F32)?, &weights, "ids of F32; U32 or I64"),
            (&ids, &weights.to_dtype(DType::F64)?, "weights of F64; F32"),
        ] {
            let error = forward(&x, ids, weights).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
    Ok(())
}

/// The experts of the case, stacked in candle.
fn experts(case: &Case, dtype: DType) -> Result<MoeExperts, Box<dyn std::error::Error>> {
    let [gate_up, down] = stacks(case, dtype)?;
    let stacks = Stacks {
        gate_up: &gate_up,
        layout: GateUp::Halves,
        down: &down,
        gate_up_bias: None,
        down_bias: None,
    };
    Ok(MoeExperts::new(stacks, Activation::Silu, &Options::new(ActivationDtype::F32, 1)?)?)
}

fn stacks(case: &Case, dtype: DType) -> Result<[Tensor; 2], Box<dyn std::error::Error>> {
    let file = self::case("mixtral_bf16").join("model.safetensors");
    let tensors = candle_core::safetensors::load(file, &Device::Cpu)?;
    let of = |e: usize, w: &str| {
        tensors.get(&format!("model.layers.{}.block_sparse_moe.experts.{e}.{w}.weight", case.layer))
    };
    let (mut gate_up, mut down) = (Vec::new(), Vec::new());
    for e in 0.. {
        let (Some(w1), Some(w2), Some(w3)) = (of(e, "w1"), of(e, "w2"), of(e, "w3")) else { break };
        gate_up.push(Tensor::cat(&[w1, w3], 0)?);
        down.push(w2.clone());
    }
    Ok([Tensor::stack(&gate_up, 0)?.to_dtype(dtype)?, Tensor::stack(&down, 0)?.to_dtype(dtype)?])
}

#[test]
fn what_does_not_fit_is_said() -> Anything {
    let case = Case::open("mixtral_bf16", 0)?;
    let options = Options::new(ActivationDtype::F32, 1)?;
    let error = MoeLayer::open(&case.checkpoint, 99, &options).unwrap_err();
    assert!(error.to_string().contains("99 is no MoE layer"), "{error}");
    let moe = case.module(ActivationDtype::F32)?;
    let rows = Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?;
    let error = moe.forward(&rows).unwrap_err().to_string();
    assert!(error.contains("hidden"), "{error}");
    let rows = Tensor::zeros((2, 64), DType::I64, &Device::Cpu)?;
    let error = moe.forward(&rows).unwrap_err().to_string();
    assert!(error.contains("rows of I64; F32, BF16 or F16 is needed"), "{error}");
    // rows of another dtype than the layer was made for
    let rows = case.get("x").to_dtype(DType::BF16)?;
    assert!(moe.forward(&rows).is_err());

    let [gate_up, down] = stacks(&case, DType::F32)?;
    let fits = Stacks {
        gate_up: &gate_up,
        layout: GateUp::Halves,
        down: &down,
        gate_up_bias: None,
        down_bias: None,
    };
    for (stacks, says) in [
        (Stacks { down: &gate_up, ..fits }, "down: its shape is"),
        (Stacks { down: &down.get(0)?, ..fits }, "down of shape"),
        (Stacks { down: &down.to_dtype(DType::I64)?, ..fits }, "down of I64"),
        (Stacks { down_bias: Some(&rows), ..fits }, "down_bias"),
    ] {
        let error = MoeExperts::new(stacks, Activation::Silu, &options).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    Ok(())
}

#[test]
fn a_backward_pass_is_refused() -> Anything {
    let case = Case::open("mixtral_bf16", 0)?;
    let moe = case.module(ActivationDtype::F32)?;
    let x = Var::from_tensor(&case.get("x"))?;
    let out = moe.forward(x.as_tensor())?;
    assert!(nmse(&out.detach(), &case.get("out"))? < 1e-10);
    let (ids, weights) = (case.get("topk_ids"), case.get("topk_weights").to_dtype(DType::F32)?);
    let routed = moe.forward_routed(x.as_tensor(), &ids, &weights)?;
    for out in [out, routed] {
        let error = out.sum_all()?.backward().unwrap_err().to_string();
        assert!(error.contains("backward is not supported for moe-runner"), "{error}");
    }
    Ok(())
}
