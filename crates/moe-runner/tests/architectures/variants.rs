//! Every architecture reads every way of storing experts; `docs/checkpoints.md` holds the table that
//! this test makes.

use std::collections::BTreeMap;

use moe_runner::checkpoint::Checkpoint;
use moe_runner::checkpoint::architecture::{self, LayerEntry};
use moe_runner::weights::account;

use crate::families::FAMILIES;
use crate::synthetic::Model;

/// How gate and up projections stand in arrays.
#[derive(Clone, Copy, PartialEq)]
enum Gate {
    Apart,
    Fused,
}

/// A way of storing experts: its title, and names below the block.
struct Variant {
    title: &'static str,
    gate: Gate,
    /// Gate (or gate and up), up, down.
    names: [&'static str; 3],
    stacked: bool,
    transposed: bool,
    bias: &'static str,
}

const fn each(title: &'static str, gate: Gate, names: [&'static str; 3]) -> Variant {
    Variant { title, gate, names, stacked: false, transposed: false, bias: ".bias" }
}

const fn stack(title: &'static str, gate: Gate, names: [&'static str; 3]) -> Variant {
    Variant { title, gate, names, stacked: true, transposed: false, bias: "_bias" }
}

const VARIANTS: &[Variant] = &[
    each(
        "experts.E.gate_proj",
        Gate::Apart,
        [
            "experts.{e}.gate_proj.weight",
            "experts.{e}.up_proj.weight",
            "experts.{e}.down_proj.weight",
        ],
    ),
    each(
        "experts.E.w1, w3, w2",
        Gate::Apart,
        ["experts.{e}.w1.weight", "experts.{e}.w3.weight", "experts.{e}.w2.weight"],
    ),
    each(
        "experts.E.gate_up_proj",
        Gate::Fused,
        ["experts.{e}.gate_up_proj.weight", "", "experts.{e}.down_proj.weight"],
    ),
    stack("experts.gate_up_proj", Gate::Fused, ["experts.gate_up_proj", "", "experts.down_proj"]),
    Variant {
        transposed: true,
        ..stack(
            "the same, transposed",
            Gate::Fused,
            ["experts.gate_up_proj", "", "experts.down_proj"],
        )
    },
    stack(
        "experts.gate_proj, stacked",
        Gate::Apart,
        ["experts.gate_proj", "experts.up_proj", "experts.down_proj"],
    ),
    Variant {
        bias: ".bias",
        ..stack(
            "switch_mlp (MLX)",
            Gate::Apart,
            [
                "switch_mlp.gate_proj.weight",
                "switch_mlp.up_proj.weight",
                "switch_mlp.down_proj.weight",
            ],
        )
    },
];

/// The layer's checkpoint with its routed experts in another way. `None` where experts have no gate
/// and the way is one of gate and up together.
fn stored(model: &Model, entry: &LayerEntry, variant: &Variant) -> Option<Model> {
    let experts = &entry.tensors.experts;
    let gated = experts.gate.is_some();
    if !gated && (variant.gate == Gate::Fused || variant.names[0].contains("w1")) {
        return None;
    }
    let block = &entry.spec.name;
    let mut model = model.clone();
    for index in 0..experts.count {
        let expert = experts.get(index);
        for projection in expert.gate.iter().chain([&expert.up, &expert.down]) {
            model.tensors.retain(|name, _| !name.starts_with(&projection.module));
        }
    }
    let (inner, hidden) = (experts.intermediate, experts.hidden);
    let fused = variant.gate == Gate::Fused;
    let rows = if fused { 2 * inner } else { inner };
    let mut projections = vec![(variant.names[2], [hidden, inner], hidden)];
    if gated {
        projections.push((variant.names[0], [rows, hidden], rows));
    }
    if !fused {
        projections.push((variant.names[1], [rows, hidden], rows));
    }
    for (name, [rows, cols], bias) in projections {
        let dims = if variant.transposed { [cols, rows] } else { [rows, cols] };
        let bias_name = format!("{}{}", name.trim_end_matches(".weight"), variant.bias);
        match variant.stacked {
            true => {
                model.add(&format!("{block}.{name}"), &[experts.count, dims[0], dims[1]]);
                if entry.spec.expert.bias {
                    model.add(&format!("{block}.{bias_name}"), &[experts.count, bias]);
                }
            }
            false => {
                for e in 0..experts.count {
                    let of =
                        |name: &str| format!("{block}.{}", name.replace("{e}", &e.to_string()));
                    model.add(&of(name), &dims);
                    if entry.spec.expert.bias {
                        model.add(&of(&bias_name), &[bias]);
                    }
                }
            }
        }
    }
    Some(model)
}

fn is_read(checkpoint: &Checkpoint, layer: usize) -> Result<(), String> {
    let layers = architecture::layers(checkpoint).map_err(|error| error.to_string())?;
    let entry = layers.iter().find(|entry| entry.spec.index == layer).ok_or("no layer")?;
    let account = account(checkpoint, entry);
    if account.is_complete() { Ok(()) } else { Err(format!("{account:?}")) }
}

#[test]
fn every_architecture_reads_every_variant() {
    let mut rows: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for family in FAMILIES {
        let model = family.model(family.types[0]);
        let folder = tempfile::tempdir().unwrap();
        let layers = architecture::layers(&model.open(folder.path())).unwrap();
        let entry = layers.iter().find(|entry| entry.spec.index == family.layer).unwrap();
        let cells = VARIANTS.iter().map(|variant| {
            let Some(model) = stored(&model, entry, variant) else { return "no gate" };
            let folder = tempfile::tempdir().unwrap();
            if let Err(problem) = is_read(&model.open(folder.path()), family.layer) {
                panic!("{} as {}: {problem}", family.types[0], variant.title);
            }
            "yes"
        });
        let cells: Vec<&str> = cells.collect();
        for model_type in family.types {
            rows.insert(model_type, cells.clone());
        }
    }
    let titles: Vec<&str> = VARIANTS.iter().map(|variant| variant.title).collect();
    let mut table = format!("| model type | {} |\n", titles.join(" | "));
    table += &format!("|---|{}\n", "---|".repeat(titles.len()));
    for (model_type, cells) in rows {
        table += &format!("| {model_type} | {} |\n", cells.join(" | "));
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/checkpoints.md");
    let page = std::fs::read_to_string(path).unwrap();
    let (before, rest) = page.split_once("<!-- made by a test -->\n").unwrap();
    let (_, after) = rest.split_once("<!-- end -->\n").unwrap();
    let wanted = format!("{before}<!-- made by a test -->\n{table}<!-- end -->\n{after}");
    if page != wanted && std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, &wanted).unwrap();
        return;
    }
    assert_eq!(page, wanted, "set UPDATE_DOCS=1 to write the table anew");
}
