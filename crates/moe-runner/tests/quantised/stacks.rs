//! FP8 in a stack of all experts, stored transposed with gate and up as one array: `[E, H, 2I]`
//! codes, `[E, 1, 2I]` scales, a scale for each output feature.

use crate::models::Files;
use moe_kernels::numerics::e4m3;
use moe_runner::checkpoint::Dtype;
use moe_runner::random::Random;
use serde_json::json;
use std::collections::BTreeMap;

const EXPERTS: usize = 3;
const HIDDEN: usize = 32;
const INTERMEDIATE: usize = 16;

#[test]
fn transposed_stacks_of_codes_and_scales_are_taken_apart() {
    let random = &mut Random::new(9);
    let config = json!({"model_type": "llama4_text", "hidden_size": HIDDEN, "hidden_act": "silu",
        "intermediate_size": INTERMEDIATE, "intermediate_size_mlp": INTERMEDIATE,
        "num_hidden_layers": 1, "num_local_experts": EXPERTS, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic",
            "modules_to_not_convert": ["router", "shared_expert"]}});
    let mut files = Files { config, tensors: BTreeMap::new(), values: BTreeMap::new() };
    let block = "model.layers.0.feed_forward";
    let mut float = |files: &mut Files, name: &str, shape: [usize; 2]| {
        let values = random.values(shape[0] * shape[1], 0.1);
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        files.put(&format!("{block}.{name}"), (".weight", Dtype::F32, shape.to_vec(), bytes));
    };
    float(&mut files, "router", [EXPERTS, HIDDEN]);
    float(&mut files, "shared_expert.gate_proj", [INTERMEDIATE, HIDDEN]);
    float(&mut files, "shared_expert.up_proj", [INTERMEDIATE, HIDDEN]);
    float(&mut files, "shared_expert.down_proj", [HIDDEN, INTERMEDIATE]);
    let mut stacks = Vec::new();
    for (name, rows, cols) in
        [("gate_up_proj", 2 * INTERMEDIATE, HIDDEN), ("down_proj", HIDDEN, INTERMEDIATE)]
    {
        let codes: Vec<u8> =
            (0..EXPERTS * rows * cols).map(|_| (random.bits() % 0x78) as u8).collect();
        let scales: Vec<f32> =
            (0..EXPERTS * rows).map(|_| random.symmetric(0.01).abs() + 0.001).collect();
        let bytes = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        let module = format!("{block}.experts.{name}");
        files.put(&module, ("", Dtype::F8E4M3, vec![EXPERTS, cols, rows], codes.clone()));
        files.put(&module, ("_scale", Dtype::F32, vec![EXPERTS, 1, rows], bytes));
        stacks.push((codes, scales, rows, cols));
    }
    let layer = files.load().unwrap();
    for (e, expert) in layer.experts.iter().enumerate() {
        let gate = expert.gate.as_ref().unwrap();
        for (matrix, stack, first) in
            [(gate, 0, 0), (&expert.up, 0, INTERMEDIATE), (&expert.down, 1, 0)]
        {
            let (codes, scales, rows, cols) = &stacks[stack];
            let mut row = vec![f32::NAN; *cols];
            for n in 0..matrix.rows() {
                matrix.decode_row(n, &mut row);
                for (k, value) in row.iter().enumerate() {
                    let code = codes[(e * cols + k) * rows + first + n];
                    let expected = e4m3::decode(code) * scales[e * rows + first + n];
                    assert_eq!(*value, expected, "expert {e}, [{n}, {k}]");
                }
            }
        }
    }
}
