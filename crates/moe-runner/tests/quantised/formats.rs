//! Random matrices in every stored format: codes and scales are drawn, packed here by the tables of
//! the formats' origins, and their values computed here in float64. Nothing is shared with the
//! library but the dtypes' names.

use moe_runner::checkpoint::Dtype;
use moe_runner::random::Random;
use serde_json::{Value, json};

/// A tensor of one module: ending of its name, dtype, shape, bytes.
pub(crate) type Part = (&'static str, Dtype, Vec<usize>, Vec<u8>);

/// A stored matrix and its true values.
pub(crate) struct Stored {
    pub(crate) parts: Vec<Part>,
    pub(crate) values: Vec<f64>,
}

/// Draws an `[N, K]` matrix and stores it.
pub(crate) type Store = fn(&mut Random, usize, usize) -> Stored;

/// One way of storing a matrix.
pub(crate) struct Format {
    pub(crate) name: &'static str,
    pub(crate) config: fn() -> Value,
    pub(crate) store: Store,
    /// Rows are quantised.
    pub(crate) activations: bool,
}

pub(crate) const FORMATS: &[Format] = &[
    Format { name: "fp8 tensor, static", config: fp8_static, store: fp8_tensor, activations: true },
    Format { name: "fp8 tensor", config: fp8_dynamic, store: fp8_tensor, activations: true },
    Format {
        name: "fp8 channel",
        config: fp8_channel_config,
        store: fp8_channel,
        activations: true,
    },
    Format { name: "fp8 e5m2", config: fp8_a16, store: fp8_e5m2, activations: false },
    Format { name: "fp8 block", config: fp8_block_config, store: fp8_block, activations: true },
    Format { name: "fp8 block e8m0", config: fp8_ue8m0, store: fp8_block_e8m0, activations: true },
    Format { name: "int8 channel", config: int8_config, store: int8_channel, activations: true },
    Format { name: "int8 a16 zeros", config: int8_a16, store: int8_zeros, activations: false },
    Format { name: "int4 g32", config: w4a16, store: int4_symmetric, activations: false },
    Format { name: "int4 channel", config: w4_channel, store: int4_channel, activations: false },
    Format { name: "int4 zeros", config: w4a16_asym, store: int4_zeros, activations: false },
    Format { name: "int4 act-order", config: w4a16, store: int4_ordered, activations: false },
    Format {
        name: "int8 packed zeros",
        config: w8a16_asym,
        store: int8_packed,
        activations: false,
    },
    Format { name: "w4a8 int8", config: w4a8_int8, store: int4_in_bytes, activations: true },
    Format { name: "w4a8 fp8", config: w4a8_fp8, store: int4_symmetric, activations: true },
    Format { name: "gptq v1", config: gptq_v1, store: gptq4_v1, activations: false },
    Format { name: "gptq v2 8 bit", config: gptq_v2, store: gptq8_v2, activations: false },
    Format { name: "awq", config: awq_config, store: awq, activations: false },
    Format { name: "quark int4", config: quark_int4_config, store: quark_int4, activations: false },
    Format { name: "quark w4a8", config: quark_w4a8_config, store: quark_w4a8, activations: true },
    Format { name: "nvfp4", config: nvfp4_config, store: nvfp4, activations: true },
    Format {
        name: "nvfp4 modelopt",
        config: modelopt_nvfp4,
        store: nvfp4_modelopt,
        activations: true,
    },
    Format {
        name: "nvfp4 a16",
        config: modelopt_nvfp4_a16,
        store: nvfp4_modelopt,
        activations: false,
    },
    Format { name: "mxfp4", config: mxfp4_config, store: mxfp4, activations: false },
    Format { name: "mxfp4 a mxfp4", config: mxfp4_a4, store: mxfp4, activations: true },
    Format { name: "mxfp4 a fp8", config: mxfp4_a8, store: mxfp4, activations: true },
    Format { name: "mxfp6 e2m3", config: mxfp6_e2m3_config, store: mxfp6_e2m3, activations: true },
    Format { name: "mxfp6 e3m2", config: mxfp6_e3m2_config, store: mxfp6_e3m2, activations: false },
    Format { name: "mxfp8", config: mxfp8_config, store: mxfp8, activations: true },
    Format { name: "mlx 1 bit", config: || mlx_affine(1), store: mlx1, activations: false },
    Format { name: "mlx 2 bit", config: || mlx_affine(2), store: mlx2, activations: false },
    Format { name: "mlx 3 bit", config: || mlx_affine(3), store: mlx3, activations: false },
    Format { name: "mlx 4 bit", config: || mlx_affine(4), store: mlx4, activations: false },
    Format { name: "mlx 5 bit", config: || mlx_affine(5), store: mlx5, activations: false },
    Format { name: "mlx 6 bit", config: || mlx_affine(6), store: mlx6, activations: false },
    Format { name: "mlx 8 bit", config: || mlx_affine(8), store: mlx8, activations: false },
    Format { name: "mlx mxfp4", config: mlx_mxfp4_config, store: mlx_mxfp4, activations: false },
    Format { name: "mlx mxfp8", config: mlx_mxfp8_config, store: mlx_mxfp8, activations: false },
    Format { name: "mlx nvfp4", config: mlx_nvfp4_config, store: mlx_nvfp4, activations: false },
    Format {
        name: "mlx nvfp4, scaled",
        config: mlx_nvfp4_config,
        store: mlx_nvfp4_scaled,
        activations: false,
    },
];

// ---- configurations ----

fn ct(format: &str, weights: Value, input: Value) -> Value {
    json!({
        "quant_method": "compressed-tensors", "format": format,
        "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": weights, "input_activations": input,
        }},
    })
}

fn args(kind: &str, bits: usize, strategy: &str, group: Option<usize>) -> Value {
    json!({"type": kind, "num_bits": bits, "strategy": strategy, "group_size": group,
        "symmetric": true, "dynamic": false})
}

fn dynamic(kind: &str, bits: usize, strategy: &str, group: Option<usize>) -> Value {
    let mut args = args(kind, bits, strategy, group);
    args["dynamic"] = json!(true);
    args
}

fn asymmetric(mut args: Value) -> Value {
    args["symmetric"] = json!(false);
    args
}

fn fp8_static() -> Value {
    json!({"quant_method": "fp8", "activation_scheme": "static"})
}

fn fp8_dynamic() -> Value {
    json!({"quant_method": "fp8", "activation_scheme": "dynamic"})
}

fn fp8_channel_config() -> Value {
    let weights = args("float", 8, "channel", None);
    ct("float-quantized", weights, dynamic("float", 8, "token", None))
}

fn fp8_a16() -> Value {
    ct("float-quantized", args("float", 8, "channel", None), Value::Null)
}

fn fp8_block_config() -> Value {
    json!({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 64]})
}

fn fp8_ue8m0() -> Value {
    json!({"quant_method": "fp8", "weight_block_size": [32, 64], "scale_fmt": "ue8m0"})
}

fn int8_config() -> Value {
    ct("int-quantized", args("int", 8, "channel", None), dynamic("int", 8, "token", None))
}

fn int8_a16() -> Value {
    ct("int-quantized", asymmetric(args("int", 8, "channel", None)), Value::Null)
}

fn w4a16() -> Value {
    ct("pack-quantized", args("int", 4, "group", Some(32)), Value::Null)
}

fn w4_channel() -> Value {
    ct("pack-quantized", args("int", 4, "channel", None), Value::Null)
}

fn w4a16_asym() -> Value {
    ct("pack-quantized", asymmetric(args("int", 4, "group", Some(32))), Value::Null)
}

fn w8a16_asym() -> Value {
    ct("pack-quantized", asymmetric(args("int", 8, "group", Some(32))), Value::Null)
}

fn w4a8_int8() -> Value {
    ct("int-quantized", args("int", 4, "group", Some(32)), dynamic("int", 8, "token", None))
}

fn w4a8_fp8() -> Value {
    ct("pack-quantized", args("int", 4, "group", Some(32)), dynamic("float", 8, "token", None))
}

fn mlx_affine(bits: usize) -> Value {
    json!({"bits": bits, "group_size": 32, "mode": "affine"})
}

fn mlx_mxfp4_config() -> Value {
    json!({"bits": 4, "group_size": 32, "mode": "mxfp4"})
}

fn mlx_mxfp8_config() -> Value {
    json!({"bits": 8, "group_size": 32, "mode": "mxfp8"})
}

fn mlx_nvfp4_config() -> Value {
    json!({"bits": 4, "group_size": 16, "mode": "nvfp4"})
}

fn gptq_v1() -> Value {
    json!({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": true, "sym": false})
}

fn gptq_v2() -> Value {
    json!({"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": false,
        "checkpoint_format": "gptq_v2"})
}

fn awq_config() -> Value {
    json!({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": true,
        "version": "gemm", "modules_to_not_convert": ["gate"]})
}

fn quark(weight: Value, input: Value) -> Value {
    json!({"quant_method": "quark", "export": {"pack_method": "order"}, "exclude": ["lm_head"],
        "global_quant_config": {"weight": weight, "input_tensors": input, "output_tensors": null}})
}

fn quark_int4_config() -> Value {
    let weight = json!({"dtype": "int4", "qscheme": "per_group", "group_size": 32,
        "symmetric": true, "is_dynamic": false});
    quark(weight, Value::Null)
}

fn quark_w4a8_config() -> Value {
    let weight = json!([
        {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": false},
        {"dtype": "int4", "qscheme": "per_channel", "is_dynamic": false},
    ]);
    quark(weight, json!({"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": true}))
}

fn nvfp4_config() -> Value {
    let weights = args("float", 4, "tensor_group", Some(16));
    let mut input = args("float", 4, "tensor_group", Some(16));
    input["dynamic"] = json!("local");
    ct("nvfp4-pack-quantized", weights, input)
}

fn modelopt_nvfp4() -> Value {
    json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*.gate"]})
}

fn modelopt_nvfp4_a16() -> Value {
    json!({"quant_method": "modelopt", "quantization": {"quant_algo": "W4A16_NVFP4"}})
}

fn mxfp4_config() -> Value {
    ct("mxfp4-pack-quantized", args("float", 4, "group", Some(32)), Value::Null)
}

fn mxfp4_a4() -> Value {
    let weights = args("float", 4, "group", Some(32));
    ct("mxfp4-pack-quantized", weights, dynamic("float", 4, "group", Some(32)))
}

fn mxfp4_a8() -> Value {
    let weights = args("float", 4, "group", Some(32));
    ct("mxfp4-pack-quantized", weights, dynamic("float", 8, "token", None))
}

fn mx(dtype: &str, dynamic: bool) -> Value {
    json!({"dtype": dtype, "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0",
        "is_dynamic": dynamic})
}

fn mxfp6_e2m3_config() -> Value {
    quark(mx("fp6_e2m3", false), mx("fp6_e2m3", true))
}

fn mxfp6_e3m2_config() -> Value {
    quark(mx("fp6_e3m2", false), Value::Null)
}

fn mxfp8_config() -> Value {
    json!({"quant_method": "modelopt", "quant_algo": "MXFP8"})
}

// ---- numbers ----

/// A small float with the given bits; no infinities or NaN.
fn small_float(code: u8, exponent: u32, mantissa: u32) -> f64 {
    let bias = (1i32 << (exponent - 1)) - 1;
    let fraction = f64::from(u32::from(code) & ((1 << mantissa) - 1)) / f64::from(1u32 << mantissa);
    let biased = (u32::from(code) >> mantissa) & ((1 << exponent) - 1);
    let magnitude = match biased {
        0 => fraction * 2f64.powi(1 - bias),
        biased => (1.0 + fraction) * 2f64.powi(biased as i32 - bias),
    };
    if u32::from(code) >> (exponent + mantissa) & 1 == 1 { -magnitude } else { magnitude }
}

fn draw(random: &mut Random, bound: u64) -> u8 {
    (random.bits() % bound) as u8
}

/// Codes of `N · K` numbers below `bound`, none of them `not`.
fn codes(random: &mut Random, count: usize, bound: u64, not: &[u8]) -> Vec<u8> {
    let next = |_| loop {
        let code = draw(random, bound);
        if !not.contains(&code) {
            return code;
        }
    };
    (0..count).map(next).collect()
}

/// Scales that are exact in 16 bits of both kinds.
fn scales(random: &mut Random, count: usize) -> Vec<f32> {
    (0..count).map(|_| (64.0 + f32::from(draw(random, 64))) / 4096.0).collect()
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
}

fn f16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// `w[n, k] = number(code) · scale(n, k)`, for the codes of a matrix with `k` columns.
fn values(codes: &[u8], k: usize, value: impl Fn(u8, usize, usize) -> f64) -> Vec<f64> {
    codes.iter().enumerate().map(|(i, code)| value(*code, i / k, i % k)).collect()
}

/// Packs `[rows, cols]` codes of `bits` into words along the columns.
fn pack_cols(codes: &[u8], cols: usize, bits: usize) -> Vec<u32> {
    let per = 32 / bits;
    let pack = |row: &[u8]| -> Vec<u32> {
        row.chunks(per)
            .map(|eight| {
                eight.iter().enumerate().fold(0, |w, (i, c)| w | u32::from(*c) << (bits * i))
            })
            .collect()
    };
    codes.chunks(cols).flat_map(pack).collect()
}

fn transposed<T: Copy>(values: &[T], cols: usize) -> Vec<T> {
    let rows = values.len() / cols;
    (0..cols).flat_map(|c| (0..rows).map(move |r| values[r * cols + c])).collect()
}

// ---- formats ----

fn fp8_codes(random: &mut Random, n: usize, k: usize) -> Vec<u8> {
    codes(random, n * k, 256, &[0x7F, 0xFF])
}

fn e4m3(code: u8) -> f64 {
    small_float(code, 4, 3)
}

fn input_scale(value: f32) -> Part {
    (".input_scale", Dtype::F32, vec![], f32_bytes(&[value]))
}

fn fp8_tensor(random: &mut Random, n: usize, k: usize) -> Stored {
    let codes = fp8_codes(random, n, k);
    let scale = random.symmetric(0.001).abs() + 1e-4;
    Stored {
        values: values(&codes, k, |c, _, _| e4m3(c) * f64::from(scale)),
        parts: vec![
            (".weight", Dtype::F8E4M3, vec![n, k], codes),
            (".weight_scale", Dtype::F32, vec![], f32_bytes(&[scale])),
            input_scale(0.02),
        ],
    }
}

pub(crate) fn fp8_channel(random: &mut Random, n: usize, k: usize) -> Stored {
    let (codes, s) = (fp8_codes(random, n, k), scales(random, n));
    Stored {
        values: values(&codes, k, |c, n, _| e4m3(c) * f64::from(s[n])),
        parts: vec![
            (".weight", Dtype::F8E4M3, vec![n, k], codes),
            (".weight_scale", Dtype::Bf16, vec![n, 1], bf16_bytes(&s)),
        ],
    }
}

fn fp8_e5m2(random: &mut Random, n: usize, k: usize) -> Stored {
    // magnitudes below 2^8, so that products stay moderate
    let codes: Vec<u8> =
        fp8_codes(random, n, k).into_iter().map(|c| c & 0x80 | c & 0x7F & 0x5B).collect();
    let s = scales(random, n);
    Stored {
        values: values(&codes, k, |c, n, _| small_float(c, 5, 2) * f64::from(s[n])),
        parts: vec![
            (".weight", Dtype::F8E5M2, vec![n, k], codes),
            (".weight_scale", Dtype::F16, vec![n, 1], f16_bytes(&s)),
        ],
    }
}

/// Blocks of 32 × 64, cut at the edges.
fn fp8_block(random: &mut Random, n: usize, k: usize) -> Stored {
    let codes = fp8_codes(random, n, k);
    let grid = [n.div_ceil(32), k.div_ceil(64)];
    let s = scales(random, grid[0] * grid[1]);
    Stored {
        values: values(&codes, k, |c, n, k| e4m3(c) * f64::from(s[n / 32 * grid[1] + k / 64])),
        parts: vec![
            (".weight", Dtype::F8E4M3, vec![n, k], codes),
            (".weight_scale_inv", Dtype::F32, grid.to_vec(), f32_bytes(&s)),
        ],
    }
}

fn powers(random: &mut Random, count: usize) -> Vec<u8> {
    (0..count).map(|_| 118 + draw(random, 6)).collect()
}

fn power(code: u8) -> f64 {
    2f64.powi(i32::from(code) - 127)
}

fn fp8_block_e8m0(random: &mut Random, n: usize, k: usize) -> Stored {
    let codes = fp8_codes(random, n, k);
    let grid = [n.div_ceil(32), k.div_ceil(64)];
    let s = powers(random, grid[0] * grid[1]);
    Stored {
        values: values(&codes, k, |c, n, k| e4m3(c) * power(s[n / 32 * grid[1] + k / 64])),
        parts: vec![
            (".weight", Dtype::F8E4M3, vec![n, k], codes),
            (".weight_scale_inv", Dtype::F8E8M0, grid.to_vec(), s),
        ],
    }
}

fn int8_channel(random: &mut Random, n: usize, k: usize) -> Stored {
    let (codes, s) = (codes(random, n * k, 256, &[]), scales(random, n));
    Stored {
        values: values(&codes, k, |c, n, _| f64::from(c as i8) * f64::from(s[n])),
        parts: vec![
            (".weight", Dtype::I8, vec![n, k], codes),
            (".weight_scale", Dtype::F32, vec![n, 1], f32_bytes(&s)),
        ],
    }
}

fn int8_zeros(random: &mut Random, n: usize, k: usize) -> Stored {
    let (c, s, z) = (codes(random, n * k, 256, &[]), scales(random, n), codes(random, n, 256, &[]));
    let value = |c: u8, n: usize, _| (f64::from(c as i8) - f64::from(z[n] as i8)) * f64::from(s[n]);
    Stored {
        values: values(&c, k, value),
        parts: vec![
            (".weight", Dtype::I8, vec![n, k], c),
            (".weight_scale", Dtype::F32, vec![n, 1], f32_bytes(&s)),
            (".weight_zero_point", Dtype::I8, vec![n, 1], z),
        ],
    }
}

/// compressed-tensors' packed integers; `zeros` packed along N, `order` the group of each column.
fn packed(
    random: &mut Random,
    [n, k]: [usize; 2],
    bits: usize,
    group: usize,
    zeros: bool,
    order: bool,
) -> Stored {
    let groups = k / group;
    let c = codes(random, n * k, 1 << bits, &[]);
    let s = scales(random, n * groups);
    let middle = 1u8 << (bits - 1);
    let z = match zeros {
        true => codes(random, n * groups, 1 << bits, &[]),
        false => vec![middle; n * groups],
    };
    let of = |k: usize| if order { (k * 7 + k / 5) % groups } else { k / group };
    let value = |c: u8, n: usize, k: usize| {
        (f64::from(c) - f64::from(z[n * groups + of(k)])) * f64::from(s[n * groups + of(k)])
    };
    let shape = [n as i64, k as i64].iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut parts = vec![
        (".weight_packed", Dtype::I32, vec![n, k * bits / 32], words(&pack_cols(&c, k, bits))),
        (".weight_scale", Dtype::Bf16, vec![n, groups], bf16_bytes(&s)),
        (".weight_shape", Dtype::I64, vec![2], shape),
    ];
    if zeros {
        let along_n = pack_cols(&transposed(&z, groups), n, bits);
        let packed = transposed(&along_n, (n * bits).div_ceil(32));
        let shape = vec![(n * bits).div_ceil(32), groups];
        parts.push((".weight_zero_point", Dtype::I32, shape, words(&packed)));
    }
    if order {
        let groups: Vec<u32> = (0..k).map(|k| of(k) as u32).collect();
        parts.push((".weight_g_idx", Dtype::I32, vec![k], words(&groups)));
    }
    Stored { values: values(&c, k, value), parts }
}

fn int4_symmetric(random: &mut Random, n: usize, k: usize) -> Stored {
    packed(random, [n, k], 4, 32, false, false)
}

fn int4_channel(random: &mut Random, n: usize, k: usize) -> Stored {
    packed(random, [n, k], 4, k, false, false)
}

fn int4_zeros(random: &mut Random, n: usize, k: usize) -> Stored {
    packed(random, [n, k], 4, 32, true, false)
}

fn int4_ordered(random: &mut Random, n: usize, k: usize) -> Stored {
    packed(random, [n, k], 4, 32, false, true)
}

pub(crate) fn int8_packed(random: &mut Random, n: usize, k: usize) -> Stored {
    packed(random, [n, k], 8, 32, true, false)
}

fn int4_in_bytes(random: &mut Random, n: usize, k: usize) -> Stored {
    let groups = k / 32;
    let c: Vec<u8> =
        codes(random, n * k, 16, &[]).into_iter().map(|c| (c as i8 - 8) as u8).collect();
    let s = scales(random, n * groups);
    Stored {
        values: values(&c, k, |c, n, k| f64::from(c as i8) * f64::from(s[n * groups + k / 32])),
        parts: vec![
            (".weight", Dtype::I8, vec![n, k], c),
            (".weight_scale", Dtype::Bf16, vec![n, groups], bf16_bytes(&s)),
        ],
    }
}

/// GPTQ: everything K first. Codes are drawn as `[N, K]`, groups of 32 in a scrambled order.
fn gptq(random: &mut Random, [n, k]: [usize; 2], bits: usize, less_one: bool) -> Stored {
    let groups = k / 32;
    let c = codes(random, n * k, 1 << bits, &[]);
    let (s, z) = (scales(random, groups * n), codes(random, groups * n, 1 << bits, &[]));
    let of = |k: usize| if less_one { (k * 5 + k / 3) % groups } else { k / 32 };
    let value = |c: u8, row: usize, k: usize| {
        let at = of(k) * n + row;
        // stored zero points of the first version are one less than meant: 15 means 16
        (f64::from(c) - f64::from(z[at]) - f64::from(u8::from(less_one))) * f64::from(s[at])
    };
    let along_k = transposed(&pack_cols(&c, k, bits), k * bits / 32);
    let order: Vec<u32> = (0..k).map(|k| of(k) as u32).collect();
    Stored {
        values: values(&c, k, value),
        parts: vec![
            (".qweight", Dtype::I32, vec![k * bits / 32, n], words(&along_k)),
            (".scales", Dtype::F16, vec![groups, n], f16_bytes(&s)),
            (".qzeros", Dtype::I32, vec![groups, n * bits / 32], words(&pack_cols(&z, n, bits))),
            (".g_idx", Dtype::I32, vec![k], words(&order)),
            (".bias", Dtype::F16, vec![n], vec![0; 2 * n]),
        ],
    }
}

pub(crate) fn gptq4_v1(random: &mut Random, n: usize, k: usize) -> Stored {
    gptq(random, [n, k], 4, true)
}

pub(crate) fn gptq8_v1(random: &mut Random, n: usize, k: usize) -> Stored {
    gptq(random, [n, k], 8, true)
}

fn gptq8_v2(random: &mut Random, n: usize, k: usize) -> Stored {
    gptq(random, [n, k], 8, false)
}

/// `[rows, cols]` nibbles, eight columns in a word, column `i` at nibble `order[i]`.
fn pack_ordered(codes: &[u8], order: [usize; 8]) -> Vec<u32> {
    let pack = |eight: &[u8]| {
        eight.iter().zip(order).fold(0u32, |w, (code, i)| w | u32::from(*code & 15) << (4 * i))
    };
    codes.chunks(8).map(pack).collect()
}

fn awq(random: &mut Random, n: usize, k: usize) -> Stored {
    const ORDER: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
    let groups = k / 32;
    let c = codes(random, n * k, 16, &[]);
    let (s, z) = (scales(random, groups * n), codes(random, groups * n, 16, &[]));
    let value = |c: u8, row: usize, k: usize| {
        let at = k / 32 * n + row;
        (f64::from(c) - f64::from(z[at])) * f64::from(s[at])
    };
    let packed = pack_ordered(&transposed(&c, k), ORDER);
    Stored {
        values: values(&c, k, value),
        parts: vec![
            (".qweight", Dtype::I32, vec![k, n / 8], words(&packed)),
            (".scales", Dtype::F16, vec![groups, n], f16_bytes(&s)),
            (".qzeros", Dtype::I32, vec![groups, n / 8], words(&pack_ordered(&z, ORDER))),
        ],
    }
}

fn quark_int4(random: &mut Random, n: usize, k: usize) -> Stored {
    let groups = k / 32;
    let c: Vec<u8> =
        codes(random, n * k, 16, &[]).into_iter().map(|c| (c as i8 - 8) as u8).collect();
    let s = scales(random, groups * n);
    let value = |c: u8, row: usize, k: usize| f64::from(c as i8) * f64::from(s[k / 32 * n + row]);
    let packed = pack_ordered(&transposed(&c, k), [0, 1, 2, 3, 4, 5, 6, 7]);
    Stored {
        values: values(&c, k, value),
        parts: vec![
            (".weight", Dtype::I32, vec![k, n / 8], words(&packed)),
            (".weight_scale", Dtype::Bf16, vec![groups, n], bf16_bytes(&s)),
        ],
    }
}

fn quark_w4a8(random: &mut Random, n: usize, k: usize) -> Stored {
    let c: Vec<u8> =
        codes(random, n * k, 16, &[]).into_iter().map(|c| (c as i8 - 8) as u8).collect();
    let s: Vec<f32> = random.values(n, 1.0).into_iter().map(|v| v.abs() + 0.1).collect();
    let all = random.symmetric(0.01).abs() + 0.001;
    let nibbles: Vec<u8> = c.iter().map(|c| c & 15).collect();
    let value = |c: u8, n: usize, _| f64::from(c as i8) * f64::from(s[n]) * f64::from(all);
    Stored {
        values: values(&c, k, value),
        parts: vec![
            (".weight", Dtype::U32, vec![n, k / 8], words(&pack_cols(&nibbles, k, 4))),
            (".weight_scale", Dtype::F32, vec![], f32_bytes(&[all])),
            (".weight_scale_2", Dtype::F32, vec![n], f32_bytes(&s)),
        ],
    }
}

fn two_in_a_byte(codes: &[u8]) -> Vec<u8> {
    codes.chunks(2).map(|pair| pair[0] | pair[1] << 4).collect()
}

/// Block scales as E4M3 codes of positive numbers.
fn nvfp4_codes(random: &mut Random, n: usize, k: usize) -> (Vec<u8>, Vec<u8>) {
    let c = codes(random, n * k, 16, &[]);
    let s = codes(random, n * k / 16, 0x7F, &[]);
    (c, s)
}

fn nvfp4(random: &mut Random, n: usize, k: usize) -> Stored {
    let (c, s) = nvfp4_codes(random, n, k);
    let global = 1000.0 + random.symmetric(500.0);
    let value = |c: u8, n: usize, col: usize| {
        small_float(c, 2, 1) * e4m3(s[n * (k / 16) + col / 16]) / f64::from(global)
    };
    Stored {
        values: values(&c, k, value),
        parts: vec![
            (".weight_packed", Dtype::U8, vec![n, k / 2], two_in_a_byte(&c)),
            (".weight_scale", Dtype::F8E4M3, vec![n, k / 16], s),
            (".weight_global_scale", Dtype::F32, vec![1], f32_bytes(&[global])),
            (".input_global_scale", Dtype::F32, vec![1], f32_bytes(&[700.0])),
        ],
    }
}

fn nvfp4_modelopt(random: &mut Random, n: usize, k: usize) -> Stored {
    let (c, s) = nvfp4_codes(random, n, k);
    let global = 0.001 + random.symmetric(0.0005);
    let value = |c: u8, n: usize, col: usize| {
        small_float(c, 2, 1) * e4m3(s[n * (k / 16) + col / 16]) * f64::from(global)
    };
    Stored {
        values: values(&c, k, value),
        parts: vec![
            (".weight", Dtype::U8, vec![n, k / 2], two_in_a_byte(&c)),
            (".weight_scale", Dtype::F8E4M3, vec![n, k / 16], s),
            (".weight_scale_2", Dtype::F32, vec![], f32_bytes(&[global])),
            input_scale(1.0 / 700.0),
        ],
    }
}

fn mxfp4(random: &mut Random, n: usize, k: usize) -> Stored {
    let (c, s) = (codes(random, n * k, 16, &[]), powers(random, n * k / 32));
    let value =
        |c: u8, n: usize, col: usize| small_float(c, 2, 1) * power(s[n * (k / 32) + col / 32]);
    Stored {
        values: values(&c, k, value),
        parts: vec![
            (".weight_packed", Dtype::U8, vec![n, k / 2], two_in_a_byte(&c)),
            (".weight_scale", Dtype::U8, vec![n, k / 32], s),
        ],
    }
}

fn mxfp6(random: &mut Random, [n, k]: [usize; 2], exponent: u32) -> Stored {
    let (c, s) = (codes(random, n * k, 64, &[]), powers(random, n * k / 32));
    let value = |c: u8, n: usize, col: usize| {
        small_float(c, exponent, 5 - exponent) * power(s[n * (k / 32) + col / 32])
    };
    let pack = |four: &[u8]| {
        let word = four.iter().rev().fold(0u32, |w, c| w << 6 | u32::from(*c));
        [word as u8, (word >> 8) as u8, (word >> 16) as u8]
    };
    Stored {
        values: values(&c, k, value),
        parts: vec![
            (".weight", Dtype::U8, vec![n, 3 * k / 4], c.chunks(4).flat_map(pack).collect()),
            (".weight_scale", Dtype::U8, vec![n, k / 32], s),
        ],
    }
}

fn mxfp6_e2m3(random: &mut Random, n: usize, k: usize) -> Stored {
    mxfp6(random, [n, k], 2)
}

fn mxfp6_e3m2(random: &mut Random, n: usize, k: usize) -> Stored {
    mxfp6(random, [n, k], 3)
}

fn mxfp8(random: &mut Random, n: usize, k: usize) -> Stored {
    let (c, s) = (fp8_codes(random, n, k), powers(random, n * k / 32));
    let value = |c: u8, n: usize, col: usize| e4m3(c) * power(s[n * (k / 32) + col / 32]);
    Stored {
        values: values(&c, k, value),
        parts: vec![
            (".weight", Dtype::F8E4M3, vec![n, k], c),
            (".weight_scale", Dtype::U8, vec![n, k / 32], s),
        ],
    }
}

// ---- MLX: codes one after the other from the lowest bit of the first word on ----

/// Codes of `bits` as words.
fn stream(codes: &[u8], bits: usize) -> Vec<u8> {
    let mut bytes = vec![0; codes.len() * bits / 8];
    for (at, bit) in codes.iter().flat_map(|code| (0..bits).map(move |b| code >> b & 1)).enumerate()
    {
        bytes[at / 8] |= bit << (at % 8);
    }
    bytes
}

fn mlx(random: &mut Random, [n, k]: [usize; 2], bits: usize, dtype: Dtype) -> Stored {
    let groups = k / 32;
    let c = codes(random, n * k, 1 << bits, &[]);
    let s = scales(random, n * groups);
    // as exact in 16 bits as the scales
    let b: Vec<f32> = scales(random, n * groups).iter().map(|b| 3.0 * (0.02 - b)).collect();
    let b: Vec<f32> = b.iter().map(|b| half::bf16::from_f32(*b).to_f32()).collect();
    let value = |c: u8, n: usize, k: usize| {
        let at = n * groups + k / 32;
        f64::from(c) * f64::from(s[at]) + f64::from(b[at])
    };
    let floats = match dtype {
        Dtype::F16 => f16_bytes,
        Dtype::Bf16 => bf16_bytes,
        _ => f32_bytes,
    };
    Stored {
        values: values(&c, k, value),
        parts: vec![
            (".weight", Dtype::U32, vec![n, k * bits / 32], stream(&c, bits)),
            (".scales", dtype, vec![n, groups], floats(&s)),
            (".biases", dtype, vec![n, groups], floats(&b)),
        ],
    }
}

fn mlx1(random: &mut Random, n: usize, k: usize) -> Stored {
    mlx(random, [n, k], 1, Dtype::F32)
}

fn mlx2(random: &mut Random, n: usize, k: usize) -> Stored {
    mlx(random, [n, k], 2, Dtype::Bf16)
}

fn mlx3(random: &mut Random, n: usize, k: usize) -> Stored {
    mlx(random, [n, k], 3, Dtype::F16)
}

fn mlx4(random: &mut Random, n: usize, k: usize) -> Stored {
    mlx(random, [n, k], 4, Dtype::Bf16)
}

fn mlx5(random: &mut Random, n: usize, k: usize) -> Stored {
    mlx(random, [n, k], 5, Dtype::F32)
}

fn mlx6(random: &mut Random, n: usize, k: usize) -> Stored {
    mlx(random, [n, k], 6, Dtype::F16)
}

fn mlx8(random: &mut Random, n: usize, k: usize) -> Stored {
    mlx(random, [n, k], 8, Dtype::Bf16)
}

/// The same codes and scales as elsewhere, codes in words and scales of bytes.
fn as_mlx(stored: Stored, [n, k]: [usize; 2], bits: usize) -> Stored {
    let [codes, scales] = [0, 1].map(|i| stored.parts[i].3.clone());
    let shape = vec![n, scales.len() / n];
    let parts = vec![
        (".weight", Dtype::U32, vec![n, k * bits / 32], codes),
        (".scales", Dtype::U8, shape, scales),
    ];
    Stored { parts, ..stored }
}

fn mlx_mxfp4(random: &mut Random, n: usize, k: usize) -> Stored {
    as_mlx(mxfp4(random, n, k), [n, k], 4)
}

fn mlx_mxfp8(random: &mut Random, n: usize, k: usize) -> Stored {
    as_mlx(mxfp8(random, n, k), [n, k], 8)
}

fn mlx_nvfp4_scaled(random: &mut Random, n: usize, k: usize) -> Stored {
    let mut stored = mlx_nvfp4(random, n, k);
    // the largest weight, where the largest product of a code and a scale is 6 · 448
    let max = 0.5 + random.symmetric(0.25);
    stored.values.iter_mut().for_each(|v| *v *= f64::from(max / 2688.0));
    stored.parts.push((".global_scale", Dtype::F32, vec![], f32_bytes(&[max])));
    stored
}

fn mlx_nvfp4(random: &mut Random, n: usize, k: usize) -> Stored {
    let (c, s) = nvfp4_codes(random, n, k);
    let value =
        |c: u8, n: usize, col: usize| small_float(c, 2, 1) * e4m3(s[n * (k / 16) + col / 16]);
    Stored {
        values: values(&c, k, value),
        parts: vec![
            (".weight", Dtype::U32, vec![n, k / 8], two_in_a_byte(&c)),
            (".scales", Dtype::U8, vec![n, k / 16], s),
        ],
    }
}
