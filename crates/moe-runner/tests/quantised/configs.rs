//! `quantization_config` as published: which module gets which scheme, and what is refused.

use moe_runner::checkpoint::Config;
use moe_runner::checkpoint::quantization::{
    InputScheme, MlxMode, MxElement, Number, Quantization, ScaleShape, Scheme, WeightScheme,
};
use serde_json::{Value, json};

const EXPERT: &str = "model.layers.3.mlp.experts.17.down_proj";

fn read(config: Value) -> moe_runner::Result<Quantization> {
    Quantization::read(&Config::new("config.json".as_ref(), config))
}

fn scheme(config: Value, module: &str) -> Scheme {
    read(config).unwrap().scheme(module).unwrap()
}

/// The error that reading gives, or asking for an expert's scheme.
fn refused(config: Value) -> String {
    match read(config) {
        Ok(quantization) => quantization.scheme(EXPERT).unwrap_err().to_string(),
        Err(error) => error.to_string(),
    }
}

const FP8_BLOCK: Scheme = Scheme {
    weights: WeightScheme::Codes { number: Number::Fp8, scales: ScaleShape::Block([128, 128]) },
    input: InputScheme::Fp8Group { size: 128, power_of_two: false },
};

fn int4(group: usize) -> WeightScheme {
    WeightScheme::Packed { bits: 4, scales: ScaleShape::Group(group), symmetric: true }
}

#[test]
fn deepseek_v3() {
    let config = json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128]});
    assert_eq!(scheme(config.clone(), EXPERT), FP8_BLOCK);
    let mut rounded = config;
    rounded["scale_fmt"] = json!("ue8m0");
    let input = InputScheme::Fp8Group { size: 128, power_of_two: true };
    assert_eq!(scheme(rounded, EXPERT), Scheme { input, ..FP8_BLOCK });
}

#[test]
fn qwen3_fp8_leaves_gates_alone_but_not_gate_projections() {
    let config = json!({"quant_method": "fp8", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "mlp.gate", "model.layers.0.mlp.shared_expert"]});
    let quantization = read(config).unwrap();
    for (module, expected) in [
        ("model.layers.3.mlp.gate", Scheme::FLOAT),
        ("model.layers.3.mlp.gate_proj", FP8_BLOCK),
        ("model.layers.3.mlp.experts.0.gate_proj", FP8_BLOCK),
        ("model.layers.0.mlp.shared_expert.up_proj", Scheme::FLOAT),
        ("model.layers.0.mlp.shared_expert_gate", FP8_BLOCK),
    ] {
        assert_eq!(quantization.scheme(module).unwrap(), expected, "{module}");
    }
}

/// A group for experts and another for the rest; names count before classes.
#[test]
fn compressed_tensors_groups_by_name_and_by_class() {
    let weights = json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32});
    let fp8 = json!({"num_bits": 8, "type": "float", "strategy": "channel"});
    let token = json!({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": true});
    let config = json!({"quant_method": "compressed-tensors", "format": "mixed-precision",
    "ignore": ["lm_head", "re:.*mlp\\.gate$", "model.layers.9.mlp.experts.0.up_proj"],
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": fp8, "input_activations": token,
            "format": "float-quantized"},
        "group_1": {"targets": ["re:.*mlp\\.experts\\..*"], "weights": weights,
            "format": "pack-quantized"},
    }});
    let quantization = read(config).unwrap();
    let channel = Scheme {
        weights: WeightScheme::Codes { number: Number::Fp8, scales: ScaleShape::Channel },
        input: InputScheme::Fp8Token,
    };
    assert_eq!(quantization.scheme(EXPERT).unwrap(), Scheme::weights_only(int4(32)));
    let shared = "model.layers.3.mlp.shared_experts.up_proj";
    assert_eq!(quantization.scheme(shared).unwrap(), channel);
    assert!(quantization.ignores("model.layers.3.mlp.gate"));
    assert!(quantization.ignores("model.layers.9.mlp.experts.0.up_proj"));
    let error = quantization
        .common_scheme(&[
            "model.layers.9.mlp.experts.0.gate_proj",
            "model.layers.9.mlp.experts.0.up_proj",
        ])
        .unwrap_err()
        .to_string();
    assert!(error.contains("different schemes") && error.contains("up_proj' is float"), "{error}");
}

#[test]
fn gptq_overrides_by_expression() {
    let config = json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": true,
    "desc_act": false, "dynamic": {
        "-:.*shared_expert.*": {},
        "+:.*\\.experts\\.1[0-9]\\..*": {"bits": 8, "group_size": -1},
    }});
    let quantization = read(config).unwrap();
    let gptq = |bits, group| {
        Scheme::weights_only(WeightScheme::Gptq {
            bits,
            group,
            symmetric: true,
            zeros_less_one: true,
        })
    };
    for (module, expected) in [
        ("model.layers.3.mlp.experts.7.down_proj", gptq(4, Some(128))),
        (EXPERT, gptq(8, None)),
        ("model.layers.3.mlp.shared_expert.up_proj", Scheme::FLOAT),
    ] {
        assert_eq!(quantization.scheme(module).unwrap(), expected, "{module}");
    }
}

/// MLX writes one scheme for all, and what modules of other schemes have under their names.
#[test]
fn mlx_names_modules_that_are_stored_otherwise() {
    let config = json!({"group_size": 64, "bits": 4,
        "model.layers.3.mlp.gate": {"group_size": 32, "bits": 8},
        "model.layers.3.mlp.experts.17.down_proj": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "language_model.model.layers.3.mlp.shared_expert.up_proj": {"bits": 6},
        "model.layers.4.mlp.switch_mlp.up_proj": false,
        "lm_head": true});
    let affine = |bits, group| WeightScheme::Mlx(MlxMode::Affine { bits, group });
    let quantization = read(config).unwrap();
    assert_eq!(quantization.method(), "mlx");
    for (module, weights) in [
        ("model.layers.3.mlp.experts.16.down_proj", affine(4, 64)),
        (EXPERT, WeightScheme::Mlx(MlxMode::Mxfp4)),
        ("model.layers.3.mlp.gate", affine(8, 32)),
        ("model.layers.3.mlp.shared_expert.up_proj", affine(6, 64)),
        ("model.layers.4.mlp.switch_mlp.up_proj", WeightScheme::Float),
        ("lm_head", affine(4, 64)),
    ] {
        assert_eq!(quantization.scheme(module).unwrap(), Scheme::weights_only(weights), "{module}");
    }
}

#[test]
fn modelopt_with_one_algorithm_and_with_many() {
    let nvfp4 = Scheme { weights: WeightScheme::Nvfp4, input: InputScheme::Nvfp4 };
    let nested = json!({"quant_method": "modelopt", "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "NVFP4", "group_size": 16,
            "exclude_modules": ["model.layers.0*", "*.mlp.gate", "lm_head"]}});
    assert_eq!(scheme(nested.clone(), EXPERT), nvfp4);
    assert_eq!(scheme(nested.clone(), "model.layers.0.mlp.experts.1.up_proj"), Scheme::FLOAT);
    assert_eq!(scheme(nested, "model.layers.3.mlp.gate"), Scheme::FLOAT);
    let fp8 = WeightScheme::Codes { number: Number::Fp8, scales: ScaleShape::Tensor };
    let mixed = json!({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {
        "model.layers.3.mlp.experts": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "model.layers.4.mlp.experts.0.up_proj": {"quant_algo": "FP8"},
        "model.layers.5.mlp.experts": {"quant_algo": "FP8_BLOCK_SCALES", "group_size": 128},
    }});
    let quantization = read(mixed).unwrap();
    let weights_only = Scheme::weights_only(WeightScheme::Nvfp4);
    assert_eq!(quantization.scheme(EXPERT).unwrap(), weights_only);
    let fp8 = Scheme { weights: fp8, input: InputScheme::Fp8Static };
    assert_eq!(quantization.scheme("model.layers.4.mlp.experts.0.up_proj").unwrap(), fp8);
    let block = quantization.scheme("model.layers.5.mlp.experts.0.up_proj").unwrap();
    assert_eq!(block, FP8_BLOCK);
    assert_eq!(quantization.scheme("model.layers.4.mlp.experts.1.up_proj").unwrap(), Scheme::FLOAT);
}

#[test]
fn quark_mixes_of_ocp_mx() {
    let mx = |dtype: &str, dynamic: bool| {
        json!({"dtype": dtype, "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0",
            "is_dynamic": dynamic, "ch_axis": -1, "symmetric": null, "round_method": "half_even"})
    };
    let fp8 = json!({"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": false});
    let config = json!({"quant_method": "quark", "exclude": ["*.mlp.gate", "re:lm_.*"],
        "export": {"kv_cache_group": [], "pack_method": "reorder"},
        "layer_quant_config": {
            "*.experts.17.*": {"weight": mx("fp4", false), "input_tensors": fp8},
        },
        "global_quant_config": {"weight": mx("fp4", false), "input_tensors": mx("fp6_e3m2", true),
            "output_tensors": null, "bias": null}});
    let quantization = read(config).unwrap();
    let fp4 = WeightScheme::Mx(MxElement::Fp4);
    let other = "model.layers.3.mlp.experts.1.down_proj";
    let scheme = |input| Scheme { weights: fp4, input };
    let fp6 = scheme(InputScheme::Mx(MxElement::Fp6E3m2));
    assert_eq!(quantization.scheme(other).unwrap(), fp6);
    assert_eq!(quantization.scheme(EXPERT).unwrap(), scheme(InputScheme::Fp8Static));
    assert_eq!(quantization.scheme("model.layers.3.mlp.gate").unwrap(), Scheme::FLOAT);
}

/// What cannot be loaded is refused where it is asked for, with key and alternatives.
#[test]
fn what_is_not_supported_is_refused_by_its_key() {
    let group = |weights: Value, input: Value| {
        json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups":
            {"g": {"targets": ["Linear"], "weights": weights, "input_activations": input}}})
    };
    let int = |bits| json!({"num_bits": bits, "type": "int", "strategy": "channel"});
    let marlin = json!({"quant_method": "compressed-tensors", "format": "marlin-24",
        "config_groups": {"g": {"targets": ["Linear"], "weights": int(4)}}});
    let global = json!({"weight": {"dtype": "int8", "qscheme": "per_tensor"},
        "output_tensors": {"dtype": "int8"}});
    let cases = [
        (json!({"quant_method": "bitsandbytes"}), "'quant_method': is 'bitsandbytes'; supported"),
        (json!({}), "'quant_method': is missing"),
        (json!({"group_size": 64, "bits": 7}), "'bits': is 7; supported are [1, 2, 3, 4, 5, 6, 8]"),
        (json!({"group_size": 0, "bits": 4}), "'group_size': is 0"),
        (json!({"group_size": 64, "bits": 4, "mode": "af"}), "'mode': is 'af'; supported are"),
        (json!({"group_size": 64, "bits": 4, "mode": "mxfp4"}), "'mode': is 'mxfp4', which has 4"),
        (
            json!({"quant_method": "fp8", "activation_scheme": "static",
            "weight_block_size": [128, 128]}),
            "'activation_scheme': is 'static'",
        ),
        (
            json!({"quant_method": "fp8", "weight_block_size": [128]}),
            "'weight_block_size': is [128]",
        ),
        (json!({"quant_method": "fp8", "weight_block_size": [0, 128]}), "'weight_block_size'"),
        (group(int(3), Value::Null), "int3 per channel"),
        (
            group(
                int(4),
                json!({"num_bits": 4, "type": "int", "strategy": "token", "dynamic": true}),
            ),
            "input_activations': are dynamic symmetric int4 per token",
        ),
        (marlin, "marlin-24"),
        (
            json!({"quant_method": "compressed-tensors", "config_groups": {},
            "sparsity_config": {"format": "sparse-24-bitmask"}}),
            "'sparsity_config.format'",
        ),
        (json!({"quant_method": "compressed-tensors"}), "'config_groups': is missing"),
        (json!({"quant_method": "gptq", "bits": 3, "group_size": 128}), "'bits': is 3"),
        (json!({"quant_method": "gptq", "bits": 4, "group_size": 0}), "'group_size': is 0"),
        (
            json!({"quant_method": "gptq", "bits": 4, "group_size": 128,
            "checkpoint_format": "marlin"}),
            "'checkpoint_format': is 'marlin'",
        ),
        (
            json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:(": {}}}),
            "'dynamic': has '('",
        ),
        (
            json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}),
            "'version': is 'gemv'",
        ),
        (
            json!({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}),
            "'quant_algo': is 'W4A8_AWQ'",
        ),
        (
            json!({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}),
            "'quantized_layers': is missing",
        ),
        (json!({"quant_method": "quark", "global_quant_config": global}), "'output_tensors'"),
        (
            json!({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int2"}}}),
            "'weight': is static int2",
        ),
    ];
    for (config, expected) in cases {
        let error = refused(config.clone());
        assert!(error.contains(expected), "{config}: {error}");
        assert!(error.starts_with("config.json: '"), "{error}");
    }
}

/// An attention format that is unknown keeps no expert from being loaded.
#[test]
fn what_is_not_supported_elsewhere_is_no_matter() {
    let config = json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {
        "a": {"targets": ["re:.*self_attn.*"],
            "weights": {"num_bits": 3, "type": "int", "strategy": "channel"}},
        "b": {"targets": ["re:.*experts.*"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}},
    }});
    let quantization = read(config).unwrap();
    assert_eq!(quantization.scheme(EXPERT).unwrap(), Scheme::weights_only(int4(128)));
    assert!(quantization.scheme("model.layers.0.self_attn.q_proj").is_err());
}
