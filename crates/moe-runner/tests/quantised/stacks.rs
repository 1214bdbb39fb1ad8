//! Stacks of all experts: `[E, 2I, H]`, and transposed `[E, H, 2I]`, with scales, zero points and all
//! else stacked and transposed alike.

use crate::formats::{FORMATS, Format, Part};
use crate::models::Files;
use moe_kernels::numerics::e4m3;
use moe_runner::checkpoint::Dtype;
use moe_runner::random::Random;
use moe_runner::weights::LoadedLayer;
use serde_json::json;
use std::collections::BTreeMap;

const EXPERTS: usize = 3;
const HIDDEN: usize = 32;
const INTERMEDIATE: usize = 16;

/// FP8 as Llama-4's names have it: `[E, 1, 2I]` scales, one for each output feature.
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

/// A way of storing all experts' matrices as one array.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    Stack,
    Transposed,
}

/// The parts of all experts as one: each one behind the other, turned where the stack is.
fn stacked(parts: &[Vec<Part>], layout: Layout) -> Vec<Part> {
    let count = parts.len();
    (0..parts[0].len())
        .map(|i| {
            let (ending, dtype, shape, _) = &parts[0][i];
            let mut bytes = Vec::new();
            for (_, _, _, part) in parts.iter().map(|parts| &parts[i]) {
                match (layout, shape.as_slice()) {
                    (Layout::Transposed, [rows, cols]) => {
                        let size = part.len() / (rows * cols);
                        for (col, row) in (0..*cols).flat_map(|c| (0..*rows).map(move |r| (c, r))) {
                            bytes.extend(&part[(row * cols + col) * size..][..size]);
                        }
                    }
                    _ => bytes.extend(part),
                }
            }
            let inner = match (layout, shape.as_slice()) {
                (Layout::Transposed, [rows, cols]) => vec![*cols, *rows],
                _ => shape.clone(),
            };
            (*ending, *dtype, [vec![count], inner].concat(), bytes)
        })
        .collect()
}

/// Of each expert, the values of a matrix.
type Values = Vec<Vec<f64>>;

/// The layer of a format with all experts in stacks, and what its matrices are; or why not.
fn load(format: &Format, layout: Layout) -> Result<(LoadedLayer, [Values; 2]), String> {
    let random = &mut Random::new(3);
    let mut config = json!({"model_type": "mixtral", "hidden_size": 128, "hidden_act": "silu",
        "intermediate_size": 96, "num_hidden_layers": 1, "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2});
    config["quantization_config"] = (format.config)();
    let mut files = Files { config, tensors: BTreeMap::new(), values: BTreeMap::new() };
    let gate = random.values(EXPERTS * 128, 0.1).iter().flat_map(|v| v.to_le_bytes()).collect();
    let block = "model.layers.0.block_sparse_moe";
    files.put(&format!("{block}.gate"), (".weight", Dtype::F32, vec![EXPERTS, 128], gate));
    let values = [("gate_up_proj", 192, 128), ("down_proj", 128, 96)].map(|(name, rows, cols)| {
        let stored: Vec<_> = (0..EXPERTS).map(|_| (format.store)(random, rows, cols)).collect();
        let (parts, values): (Vec<_>, Vec<_>) =
            stored.into_iter().map(|stored| (stored.parts, stored.values)).unzip();
        for part in stacked(&parts, layout) {
            files.put(&format!("{block}.experts.{name}"), part);
        }
        values
    });
    files.load().map(|layer| (layer, values)).map_err(|error| error.to_string())
}

/// Checks every value of a layer with all experts in stacks; or why it is not read.
fn read(format: &Format, layout: Layout) -> Result<(), String> {
    let (layer, [gate_up, down]) = load(format, layout)?;
    for (e, expert) in layer.experts.iter().enumerate() {
        let gate = expert.gate.as_ref().unwrap();
        let halves = [(gate, &gate_up[e][..96 * 128]), (&expert.up, &gate_up[e][96 * 128..])];
        for (matrix, values) in halves.into_iter().chain([(&expert.down, &down[e][..])]) {
            let mut row = vec![0.0; matrix.cols()];
            for (n, values) in values.chunks(matrix.cols()).enumerate() {
                matrix.decode_row(n, &mut row);
                let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
                assert_eq!(row, values, "{}, {layout:?}: expert {e}, row {n}", format.name);
            }
        }
    }
    Ok(())
}

/// Every format in stacks of all experts, as they are and transposed: every value is exact. The table
/// of the docs says where that is so, and why not elsewhere.
#[test]
fn every_format_in_stacks() {
    let mut table = String::from("| scheme | module | stack | transposed |\n");
    table += "|---|---|---|---|\n| floats (F32, F16, BF16) | yes | yes | yes |\n";
    for format in FORMATS {
        read(format, Layout::Stack).unwrap();
        let transposed = match read(format, Layout::Transposed) {
            Ok(()) => "yes",
            Err(error) if error.contains("codes of 6 bits") => "no: six bits do not fill bytes",
            Err(error) if error.contains("Quark's W4A8") => "no: Quark's layout has rows",
            Err(error) if error.contains("has shape") => "no: input features come first as it is",
            Err(error) => panic!("{}: {error}", format.name),
        };
        table += &format!("| {} | yes | yes | {transposed} |\n", format.name);
    }
    table += "| GGUF: all block types, NVFP4 with `.scale` | yes | yes | no: GGUF has none |\n";
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/checkpoints.md");
    let page = std::fs::read_to_string(path).unwrap();
    let (before, rest) = page.split_once("<!-- schemes, made by a test -->\n").unwrap();
    let (_, after) = rest.split_once("<!-- end of schemes -->\n").unwrap();
    let (start, end) = ("<!-- schemes, made by a test -->", "<!-- end of schemes -->");
    let wanted = format!("{before}{start}\n{table}{end}\n{after}");
    if page != wanted && std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, &wanted).unwrap();
        return;
    }
    assert_eq!(page, wanted, "set UPDATE_DOCS=1 to write the table anew");
}
