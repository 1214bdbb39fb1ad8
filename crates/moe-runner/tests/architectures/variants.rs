//! Every architecture reads every way of storing experts; `docs/checkpoints.md` holds the table that
//! this test makes.

use std::collections::BTreeMap;

use moe_runner::checkpoint::Checkpoint;
use moe_runner::checkpoint::architecture::{self, Form, LayerEntry};
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
    Variant {
        bias: ".bias",
        ..stack(
            "experts.switch_glu (MLX)",
            Gate::Apart,
            [
                "experts.switch_glu.gate_proj.weight",
                "experts.switch_glu.up_proj.weight",
                "experts.switch_glu.down_proj.weight",
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

/// How the experts are read, by the name of the column of the table of schemes.
fn is_read(checkpoint: &Checkpoint, layer: usize) -> Result<&'static str, String> {
    let layers = architecture::layers(checkpoint).map_err(|error| error.to_string())?;
    let entry = layers.iter().find(|entry| entry.spec.index == layer).ok_or("no layer")?;
    let account = account(checkpoint, entry);
    match entry.tensors.experts.form {
        _ if !account.is_complete() => Err(format!("{account:?}")),
        Form::Each => Ok("module"),
        Form::Stacked => Ok("stack"),
        Form::StackedTransposed => Ok("transposed"),
        other => Err(format!("{other:?}")),
    }
}

#[test]
fn every_architecture_reads_every_variant() {
    let mut rows: BTreeMap<Vec<&str>, Vec<&str>> = BTreeMap::new();
    for family in FAMILIES {
        let model = family.model(family.types[0]);
        let folder = tempfile::tempdir().unwrap();
        let layers = architecture::layers(&model.open(folder.path())).unwrap();
        let entry = layers.iter().find(|entry| entry.spec.index == family.layer).unwrap();
        let cells = VARIANTS.iter().map(|variant| {
            let Some(model) = stored(&model, entry, variant) else { return "no gate" };
            let folder = tempfile::tempdir().unwrap();
            let kind = match (variant.stacked, variant.transposed) {
                (false, _) => "module",
                (true, false) => "stack",
                (true, true) => "transposed",
            };
            let read = is_read(&model.open(folder.path()), family.layer);
            assert_eq!(read.as_deref(), Ok(kind), "{} as {}", family.types[0], variant.title);
            kind
        });
        rows.entry(cells.collect()).or_default().extend(family.types);
    }
    let mut groups: Vec<(Vec<&str>, Vec<&str>)> = rows.into_iter().collect();
    groups.sort_by_key(|(_, types)| std::cmp::Reverse(types.len()));
    let (mut table, mut lists) = (String::from("| stored as |"), String::new());
    for (letter, (_, types)) in ('A'..).zip(&mut groups) {
        types.sort_unstable();
        table += &format!(" {letter} |");
        lists += &format!("\n{letter}: {}.\n", types.join(", "));
    }
    table += &format!("\n|---|{}\n", "---|".repeat(groups.len()));
    for (index, variant) in VARIANTS.iter().enumerate() {
        let cells: Vec<&str> = groups.iter().map(|(cells, _)| cells[index]).collect();
        table += &format!("| {} | {} |\n", variant.title, cells.join(" | "));
    }
    crate::docs::expect("ways of storing experts", &(table + &lists));
}
