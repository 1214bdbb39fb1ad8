//! Stacks of all experts: `[E, 2I, H]`, and transposed `[E, H, 2I]`, with scales, zero points and all
//! else stacked and transposed alike.

use crate::formats::{FORMATS, Format, Part};
use crate::models::Files;
use moe_kernels::numerics::e4m3;
use moe_runner::checkpoint::Dtype;
use moe_runner::random::Random;
use moe_runner::weights::LoadedLayer;
use serde_json::{Value, json};
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

/// A way of storing the experts of a layer: modules below the block, `{e}` for the expert.
struct Way {
    /// Gate, up, down; the first two are the same where they are one array.
    names: [&'static str; 3],
    /// All experts in one array; `None`: an array for each.
    layout: Option<Layout>,
    /// Ending of the biases' names.
    bias: &'static str,
}

const GATE_UP: [&str; 3] = ["experts.gate_up_proj", "experts.gate_up_proj", "experts.down_proj"];
const APART: [&str; 3] = ["experts.gate_proj", "experts.up_proj", "experts.down_proj"];

const WAYS: [Way; 8] = [
    Way {
        names: ["experts.{e}.gate_proj", "experts.{e}.up_proj", "experts.{e}.down_proj"],
        layout: None,
        bias: ".bias",
    },
    Way {
        names: ["experts.{e}.w1", "experts.{e}.w3", "experts.{e}.w2"],
        layout: None,
        bias: ".bias",
    },
    Way {
        names: ["experts.{e}.gate_up_proj", "experts.{e}.gate_up_proj", "experts.{e}.down_proj"],
        layout: None,
        bias: ".bias",
    },
    Way { names: GATE_UP, layout: Some(Layout::Stack), bias: "_bias" },
    Way { names: GATE_UP, layout: Some(Layout::Transposed), bias: "_bias" },
    Way { names: APART, layout: Some(Layout::Stack), bias: "_bias" },
    Way {
        names: ["switch_mlp.gate_proj", "switch_mlp.up_proj", "switch_mlp.down_proj"],
        layout: Some(Layout::Stack),
        bias: ".bias",
    },
    Way {
        names: [
            "experts.switch_glu.gate_proj",
            "experts.switch_glu.up_proj",
            "experts.switch_glu.down_proj",
        ],
        layout: Some(Layout::Stack),
        bias: ".bias",
    },
];

/// What of an architecture touches how experts are read.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    config: fn() -> Value,
    block: &'static str,
    gate: &'static str,
    gated: bool,
    biased: bool,
    /// Rows of gate and up in one array alternate.
    interleaved: bool,
}

/// One architecture of each kind.
const KINDS: [Kind; 3] = [
    Kind {
        name: "mixtral",
        config: || {
            json!({"model_type": "mixtral", "hidden_size": 128, "hidden_act": "silu",
            "intermediate_size": 96, "num_hidden_layers": 1, "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2})
        },
        block: "model.layers.0.block_sparse_moe",
        gate: "gate",
        gated: true,
        biased: false,
        interleaved: false,
    },
    Kind {
        name: "gpt_oss",
        config: || {
            json!({"model_type": "gpt_oss", "hidden_size": 128, "intermediate_size": 96,
            "num_hidden_layers": 1, "num_local_experts": EXPERTS, "num_experts_per_tok": 2})
        },
        block: "model.layers.0.mlp",
        gate: "router",
        gated: true,
        biased: true,
        interleaved: true,
    },
    Kind {
        name: "nemotron_h",
        config: || {
            json!({"model_type": "nemotron_h", "hidden_size": 128, "moe_intermediate_size": 96,
            "layers_block_type": ["moe"], "n_routed_experts": EXPERTS, "num_experts_per_tok": 2,
            "moe_shared_expert_intermediate_size": 96, "n_group": 1, "topk_group": 1})
        },
        block: "backbone.layers.0.mixer",
        gate: "gate",
        gated: false,
        biased: false,
        interleaved: false,
    },
];

/// Values of gate, up and down of an expert, row after row.
type Values = [Vec<f64>; 3];

/// The rows of gate and up as one array, and the two of them taken apart again.
fn halves(both: &[f64], cols: usize, interleaved: bool) -> [Vec<f64>; 2] {
    let rows: Vec<&[f64]> = both.chunks(cols).collect();
    let (gate, up): (Vec<_>, Vec<_>) = match interleaved {
        true => rows.chunks(2).map(|two| (two[0], two[1])).unzip(),
        false => rows[..rows.len() / 2]
            .iter()
            .copied()
            .zip(rows[rows.len() / 2..].iter().copied())
            .unzip(),
    };
    [gate.concat(), up.concat()]
}

/// A layer with its experts in a format, stored in a way, and what its matrices are; or why not.
fn load(format: &Format, way: &Way, kind: &Kind) -> Result<(LoadedLayer, Vec<Values>), String> {
    load_as(format, way, kind, |ending| ending)
}

/// The same, with other endings of names.
fn load_as(
    format: &Format,
    way: &Way,
    kind: &Kind,
    renamed: impl Fn(&'static str) -> &'static str,
) -> Result<(LoadedLayer, Vec<Values>), String> {
    const SIZES: [usize; 2] = [96, 128];
    let random = &mut Random::new(3);
    let mut config = (kind.config)();
    config["quantization_config"] = (format.config)();
    let mut files = Files { config, tensors: BTreeMap::new(), values: BTreeMap::new() };
    let mut float = |files: &mut Files, name: &str, ending, shape: &[usize]| {
        let values = random.values(shape.iter().product(), 0.1);
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        files.put(&format!("{}.{name}", kind.block), (ending, Dtype::F32, shape.to_vec(), bytes));
    };
    float(&mut files, kind.gate, ".weight", &[EXPERTS, SIZES[1]]);
    if kind.biased {
        float(&mut files, kind.gate, ".bias", &[EXPERTS]);
    } else if !kind.gated {
        float(&mut files, "gate.e_score_correction_bias", "", &[EXPERTS]);
        let random = &mut Random::new(2);
        for (name, [rows, cols]) in [("up_proj", SIZES), ("down_proj", [SIZES[1], SIZES[0]])] {
            for part in (format.store)(random, rows, cols).parts {
                files.put(&format!("{}.shared_experts.{name}", kind.block), part);
            }
        }
    }
    let mut values = vec![Values::default(); EXPERTS];
    let fused = way.names[0] == way.names[1];
    for (projection, name) in way.names.into_iter().enumerate() {
        let [rows, cols] = if projection == 2 { [SIZES[1], SIZES[0]] } else { SIZES };
        let both = projection == 0 && fused;
        if projection == 1 && fused || projection == 0 && !kind.gated {
            continue;
        }
        let rows = if both { 2 * rows } else { rows };
        let random = &mut Random::new(4 + projection as u64);
        let mut all = Vec::new();
        for (e, values) in values.iter_mut().enumerate() {
            let mut stored = (format.store)(random, rows, cols);
            if kind.biased {
                // GPTQ's own, of zeros
                stored.parts.retain(|part| part.0 != ".bias");
            }
            match both {
                true => {
                    let [gate, up] = halves(&stored.values, cols, kind.interleaved);
                    (values[0], values[1]) = (gate, up);
                }
                false => values[projection] = stored.values,
            }
            if way.layout.is_none() {
                let name = name.replace("{e}", &e.to_string());
                for part in stored.parts {
                    files.put(&format!("{}.{name}", kind.block), part);
                }
                if kind.biased {
                    float(&mut files, &name, way.bias, &[rows]);
                }
                continue;
            }
            all.push(stored.parts);
        }
        if let Some(layout) = way.layout {
            for (ending, dtype, shape, bytes) in stacked(&all, layout) {
                let part = (renamed(ending), dtype, shape, bytes);
                files.put(&format!("{}.{name}", kind.block), part);
            }
            if kind.biased {
                float(&mut files, name, way.bias, &[EXPERTS, rows]);
            }
        }
    }
    files.load().map(|layer| (layer, values)).map_err(|error| error.to_string())
}

/// Checks every value of a layer that is stored so; or why it is not read.
fn read(format: &Format, way: &Way, kind: &Kind) -> Result<(), String> {
    let (layer, values) = load(format, way, kind)?;
    check(&layer, values, &format!("{}, {}, {}", kind.name, format.name, way.names[0]));
    Ok(())
}

/// Checks every value of every expert.
fn check(layer: &LoadedLayer, values: Vec<Values>, what: &str) {
    for (e, (expert, values)) in layer.experts.iter().zip(values).enumerate() {
        assert_eq!(expert.gate.is_none(), values[0].is_empty(), "{what}");
        let matrices = [expert.gate.as_ref(), Some(&expert.up), Some(&expert.down)];
        for ((matrix, values), which) in
            matrices.into_iter().zip(values).zip(["gate", "up", "down"])
        {
            let Some(matrix) = matrix else { continue };
            let mut row = vec![0.0; matrix.cols()];
            for (n, values) in values.chunks(matrix.cols()).enumerate() {
                matrix.decode_row(n, &mut row);
                let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
                assert_eq!(row, values, "{what}: {which} of expert {e}, row {n}");
            }
        }
    }
}

/// Why a format is not read from transposed stacks, in the words of the docs; the message itself says
/// what was found.
fn refused(error: &str) -> Option<&'static str> {
    match error {
        _ if error.contains("codes of 6 bits") => Some("six bits do not fill bytes"),
        _ if error.contains("MLX's words") => Some("MLX's layout has rows"),
        _ if error.contains("Quark's W4A8") => Some("Quark's layout has rows"),
        _ if error.contains("has shape") => Some("input features come first as it is"),
        _ => None,
    }
}

/// Every format in every way of storing experts, in one architecture of each kind: every value is
/// exact, or the layer is refused as the table says. That every architecture reads every way is tried
/// apart (`architectures/variants.rs`); a projection is then read by its own tensors, and what the
/// architecture adds is in `KINDS`: biases, gate and up that alternate, or no gate.
#[test]
fn every_format_in_every_way_of_storing_experts() {
    let mut tried = 0;
    for kind in &KINDS {
        for way in &WAYS {
            let ways_of_gates = way.names[0] == way.names[1] || way.names[0].contains("w1");
            if !kind.gated && ways_of_gates {
                continue;
            }
            for format in FORMATS {
                let transposed = way.layout == Some(Layout::Transposed);
                match read(format, way, kind) {
                    Ok(()) => tried += 1,
                    Err(error) if transposed && refused(&error).is_some() => {}
                    Err(error) => {
                        panic!("{}, {}, {}: {error}", kind.name, format.name, way.names[0])
                    }
                }
            }
        }
    }
    assert!(tried > 500, "{tried}");
}

/// Every format in stacks of all experts, as they are and transposed: every value is exact. The table
/// of the docs says where that is so, and why not elsewhere.
#[test]
fn every_format_in_stacks() {
    let mut table = String::from("| scheme | module | stack | transposed |\n");
    table += "|---|---|---|---|\n| floats (F32, F16, BF16) | yes | yes | yes |\n";
    for format in FORMATS {
        let read = |layout| {
            let way = Way { names: GATE_UP, layout: Some(layout), bias: "_bias" };
            read(format, &way, &KINDS[0])
        };
        read(Layout::Stack).unwrap();
        let transposed = match read(Layout::Transposed) {
            Ok(()) => "yes".into(),
            Err(error) => match refused(&error) {
                Some(why) => format!("no: {why}"),
                None => panic!("{}: {error}", format.name),
            },
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

/// Gate and up in one array with a tensor's scale each, `[E, 2]` or `[2]`, under every name that was
/// published; a scale of activations that has no dimension is everybody's.
#[test]
fn gate_and_up_in_one_array_may_have_a_scale_each() {
    let format = FORMATS.iter().find(|format| format.name == "nvfp4 a16").unwrap();
    let endings = [
        [".weight", ".weight_scale", ".weight_scale_2", ".input_scale"],
        ["", "_weight_scale", "_weight_scale_2", "_input_scale"],
        ["", "_scale", "_scale_2", ".input_scale"],
    ];
    for (names, stack) in
        endings.into_iter().map(|names| (names, true)).chain([(endings[0], false)])
    {
        let random = &mut Random::new(8);
        let kind = &KINDS[0];
        let mut config = (kind.config)();
        config["quantization_config"] = (format.config)();
        let mut files = Files { config, tensors: BTreeMap::new(), values: BTreeMap::new() };
        let gate = random.values(EXPERTS * 128, 0.1).iter().flat_map(|v| v.to_le_bytes()).collect();
        files.put(
            &format!("{}.gate", kind.block),
            (".weight", Dtype::F32, vec![EXPERTS, 128], gate),
        );
        let (mut values, mut both, mut down) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..EXPERTS {
            let [gate, up] = [(); 2].map(|()| (format.store)(random, 96, 128));
            let last = (format.store)(random, 128, 96);
            let halves = gate.parts.into_iter().zip(up.parts).map(|(gate, up)| {
                let shape = match gate.2.as_slice() {
                    [rows, cols] => vec![2 * rows, *cols],
                    _ => vec![2],
                };
                (gate.0, gate.1, shape, [gate.3, up.3].concat())
            });
            both.push(halves.collect::<Vec<Part>>());
            down.push(last.parts);
            values.push([gate.values, up.values, last.values]);
        }
        for (name, parts) in [("gate_up_proj", both), ("down_proj", down)] {
            let name_of = |ending| {
                let usual = [".weight", ".weight_scale", ".weight_scale_2", ".input_scale"];
                names[usual.iter().position(|usual| *usual == ending).unwrap()]
            };
            match stack {
                true => {
                    for (ending, dtype, shape, bytes) in stacked(&parts, Layout::Stack) {
                        let module = format!("{}.experts.{name}", kind.block);
                        let part = match ending {
                            ".input_scale" => (dtype, vec![], bytes[..4].to_vec()),
                            _ => (dtype, shape, bytes),
                        };
                        files.put(&module, (name_of(ending), part.0, part.1, part.2));
                    }
                }
                false => {
                    for (e, parts) in parts.into_iter().enumerate() {
                        for part in parts {
                            files.put(&format!("{}.experts.{e}.{name}", kind.block), part);
                        }
                    }
                }
            }
        }
        let layer = files.load().unwrap_or_else(|error| panic!("{names:?}: {error}"));
        check(&layer, values, &format!("{names:?}"));
    }
}

/// Parts of a stack are named as those of a module: with the dot, with `_` in its place, or without
/// `weight` before them.
#[test]
fn endings_of_stacks() {
    for format in FORMATS {
        for short in [false, true] {
            let renamed = |ending: &'static str| -> &'static str {
                let of_weights = match ending.strip_prefix(".weight_") {
                    Some(rest) if short => format!("_{rest}"),
                    Some(rest) => format!("_weight_{rest}"),
                    None if ending == ".weight" => String::new(),
                    // MLX's
                    None if matches!(ending, ".bias" | ".global_scale") => ending.into(),
                    None => ending.replacen('.', "_", 1),
                };
                of_weights.leak()
            };
            let way = Way { names: GATE_UP, layout: Some(Layout::Stack), bias: "_bias" };
            let stored = load_as(format, &way, &KINDS[0], renamed);
            let (layer, values) = stored.unwrap_or_else(|error| panic!("{}: {error}", format.name));
            check(&layer, values, &format!("{} {short}", format.name));
        }
    }
}

/// A stored scale of activations has two published names.
#[test]
fn scales_of_activations() {
    let format = FORMATS.iter().find(|format| format.name == "fp8 tensor, static").unwrap();
    let [usual, other] = [".input_scale", ".act_scale"].map(|name| {
        let renamed = |ending| if ending == ".input_scale" { name } else { ending };
        let way = Way { names: GATE_UP, layout: Some(Layout::Stack), bias: "_bias" };
        let (layer, values) = load_as(format, &way, &KINDS[0], renamed).unwrap();
        check(&layer, values, name);
        format!("{:?}", layer.experts.iter().map(|expert| &expert.up.input).collect::<Vec<_>>())
    });
    assert_eq!(other, usual);
    assert!(usual.contains("0.02"), "{usual}");
}
