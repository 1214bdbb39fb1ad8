//! `inspect`: what a checkpoint holds, from headers alone; with `--doctor`, from everything.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use moe_kernels::pool::Pool;
use moe_runner::checkpoint::Container;
use moe_runner::checkpoint::architecture::{LayerEntry, overlooked};
use moe_runner::doctor;
use moe_runner::spec::LayerSpec;
use moe_runner::weights::{Accounting, Expert, LoadedLayer, Matrix, survey};
use serde::Serialize;

use crate::args::InspectArgs;
use crate::checkpoints::{Opened, ranges};
use crate::failure::{one_line, unusable};
use crate::interrupt::Asked;
use crate::report::findings::{self, FindingJson};
use crate::report::progress::Progress;
use crate::report::table::{Columns, Facts, Tone, toned};
use crate::report::{Report, formula, units};

#[derive(Serialize)]
struct InspectJson {
    ok: bool,
    checkpoint: String,
    container: &'static str,
    architecture: String,
    decoder_layers: usize,
    moe_layers: Vec<usize>,
    /// What was not there to look at.
    unseen: Option<&'static str>,
    /// What is wrong with layers that are no MoE layers.
    overlooked: Vec<String>,
    /// What the doctor found in files.
    findings: Vec<FindingJson>,
    tensors: usize,
    bytes: Bytes,
    layers: Vec<LayerJson>,
}

/// Bytes in the checkpoint's files, by what they are for.
#[derive(Clone, Default, Serialize)]
struct Bytes {
    experts: usize,
    shared_experts: usize,
    gate: usize,
    rest: usize,
    total: usize,
}

#[derive(Serialize)]
struct LayerJson {
    layer: usize,
    name: String,
    hidden: usize,
    intermediate: usize,
    experts: usize,
    top_k: usize,
    shared_experts: usize,
    routing: Vec<String>,
    output: String,
    expert: String,
    formats: BTreeMap<&'static str, Vec<String>>,
    bytes: Bytes,
    missing: Vec<String>,
    wrong: Vec<String>,
    /// What the doctor found: from headers, or from everything.
    findings: Vec<FindingJson>,
    unexpected: Vec<String>,
    duplicate: Vec<String>,
    spec: LayerSpec,
}

/// Runs the command.
pub(crate) fn run(args: &InspectArgs, threads: usize) -> Result<Report> {
    if args.threads.is_given() && !args.doctor {
        return Err(unusable("--threads: reading headers takes one; it acts with --doctor"));
    }
    let opened = match args.doctor {
        true => Opened::open(&args.of.checkpoint)?,
        false => Opened::open_outline(&args.of.checkpoint)?,
    };
    let pool = args.doctor.then(|| Pool::new(threads)).transpose();
    let pool = pool.context("cannot start threads; try --threads 1")?;
    let checkpoint = &opened.checkpoint;
    let chosen = opened.select(&args.of.layers)?;
    let progress = Progress::new(chosen.len());
    let asked = Asked::here();
    let inspected = chosen.iter().map(|entry| {
        asked.go_on()?;
        progress.doing(entry.spec.name.clone());
        let layer = layer(&opened, entry, pool.as_ref());
        progress.step();
        Ok(layer)
    });
    let layers = inspected.collect::<Result<Vec<_>>>()?;
    drop(progress);
    let total = checkpoint.names().filter_map(|name| checkpoint.info(name)).map(|i| i.bytes).sum();
    let sum = |of: fn(&Bytes) -> usize| layers.iter().map(|layer| of(&layer.bytes)).sum::<usize>();
    let (experts, shared_experts, gate) =
        (sum(|b| b.experts), sum(|b| b.shared_experts), sum(|b| b.gate));
    let rest = usize::saturating_sub(total, experts + shared_experts + gate);
    let overlooked = overlooked(checkpoint)?;
    let overlooked: Vec<String> = overlooked.iter().map(ToString::to_string).collect();
    let json = InspectJson {
        ok: true,
        unseen: opened.unseen(),
        overlooked,
        findings: findings::all(if args.doctor { doctor::files(checkpoint) } else { Vec::new() }),
        checkpoint: checkpoint.path().display().to_string(),
        container: match checkpoint.container() {
            Container::Safetensors => "safetensors",
            Container::Gguf => "gguf",
        },
        architecture: opened.description.architecture.clone(),
        decoder_layers: opened.description.decoder_layers,
        moe_layers: opened.layers.iter().map(|entry| entry.spec.index).collect(),
        tensors: checkpoint.names().count(),
        bytes: Bytes { experts, shared_experts, gate, rest, total },
        layers,
    };
    let json = InspectJson { ok: json.is_complete() && json.counting(args.strict) == 0, ..json };
    Report::new(json.ok, text(&json, args.strict), &json)
}

impl InspectJson {
    fn is_complete(&self) -> bool {
        self.layers.iter().all(LayerJson::is_complete) && self.overlooked.is_empty()
    }

    /// Findings that make the exit status 1.
    fn counting(&self, strict: bool) -> usize {
        let all = self.layers.iter().flat_map(|layer| &layer.findings).chain(&self.findings);
        all.filter(|finding| finding.counts(strict)).count()
    }
}

impl LayerJson {
    fn is_complete(&self) -> bool {
        self.lacks().is_empty()
    }

    /// Names of tensors that are not as they should be, by what they are.
    fn lacks(&self) -> Vec<(&'static str, &[String])> {
        let all = [
            ("missing", &*self.missing),
            ("wrong", &*self.wrong),
            ("duplicate", &*self.duplicate),
            ("unexpected", &*self.unexpected),
        ];
        all.into_iter().filter(|(_, names)| !names.is_empty()).collect()
    }
}

fn layer(opened: &Opened, entry: &LayerEntry, pool: Option<&Pool>) -> LayerJson {
    let spec = &entry.spec;
    let (loaded, accounting) = survey(&opened.checkpoint, entry);
    let mut wrong: Vec<String> = accounting.wrong.iter().map(ToString::to_string).collect();
    let (formats, bytes) = match &loaded {
        Some(loaded) => (formats(loaded), layer_bytes(loaded, &accounting)),
        None => (
            BTreeMap::new(),
            Bytes { rest: accounting.bytes, total: accounting.bytes, ..Bytes::default() },
        ),
    };
    let mut unexpected = accounting.unexpected;
    let mut wrong_experts: Vec<String> = accounting
        .unexpected_experts
        .iter()
        .map(|name| format!("'{name}' belongs to the experts, but has no use there"))
        .collect();
    wrong.append(&mut wrong_experts);
    unexpected.sort();
    let found = match (pool, &loaded) {
        (Some(pool), Some(layer)) => doctor::examine(&opened.checkpoint, entry, layer, pool),
        _ => doctor::formats(&opened.checkpoint, entry),
    };
    LayerJson {
        layer: spec.index,
        name: spec.name.clone(),
        hidden: spec.dims.hidden,
        intermediate: spec.dims.intermediate,
        experts: spec.router.experts,
        top_k: spec.router.top_k,
        shared_experts: spec.shared.as_ref().map_or(0, |shared| shared.count),
        routing: formula::routing(spec),
        output: formula::output(spec),
        expert: formula::expert(
            spec.expert.gated,
            spec.expert.activation,
            spec.expert.bias,
            spec.expert.norm.is_some(),
        ),
        formats,
        bytes,
        missing: accounting.missing,
        wrong,
        findings: findings::all(found),
        unexpected,
        duplicate: accounting.duplicates.into_iter().map(|(name, _)| name).collect(),
        spec: spec.clone(),
    }
}

/// The number formats of every projection; more than one where experts differ.
fn formats(layer: &LoadedLayer) -> BTreeMap<&'static str, Vec<String>> {
    let mut formats: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
    let mut add = |what, matrix: &Matrix| {
        let input = matrix.input.format();
        let mut name = matrix.describe();
        if input != moe_runner::spec::ActivationFormat::Unquantised {
            name += &format!(" × {input}");
        }
        let seen = formats.entry(what).or_default();
        if !seen.contains(&name) {
            seen.push(name);
        }
    };
    if let Some(gate) = &layer.gate {
        add("router", &gate.weight);
    }
    for expert in &layer.experts {
        expert.gate.iter().for_each(|gate| add("gate", gate));
        add("up", &expert.up);
        add("down", &expert.down);
    }
    for expert in layer.shared.iter().flat_map(|shared| &shared.experts) {
        expert.gate.iter().for_each(|gate| add("shared gate", gate));
        add("shared up", &expert.up);
        add("shared down", &expert.down);
    }
    formats
}

fn layer_bytes(layer: &LoadedLayer, accounting: &Accounting) -> Bytes {
    let of = |experts: &[Expert]| -> usize {
        let matrices = experts.iter().flat_map(|e| e.gate.iter().chain([&e.up, &e.down]));
        matrices.map(Matrix::stored_bytes).sum()
    };
    let experts = of(&layer.experts);
    let shared_experts = layer.shared.as_ref().map_or(0, |shared| of(&shared.experts));
    let gate = layer.gate.as_ref().map_or(0, |gate| gate.weight.stored_bytes());
    let total = accounting.bytes;
    let rest = total.saturating_sub(experts + shared_experts + gate);
    Bytes { experts, shared_experts, gate, rest, total }
}

fn text(json: &InspectJson, strict: bool) -> String {
    let mut out = format!("{}\n\n", toned(Tone::Title, &one_line(&json.checkpoint)));
    let mut facts = Facts::new();
    facts.add("architecture", format!("{} ({})", one_line(&json.architecture), json.container));
    facts.add(
        "MoE layers",
        format!(
            "{} of {} decoder layers: {}",
            json.moe_layers.len(),
            json.decoder_layers,
            ranges(&json.moe_layers)
        ),
    );
    facts.add("tensors", format!("{}, {}", json.tensors, units::bytes(json.bytes.total)));
    out += &facts.to_string();

    for group in groups(&json.layers) {
        out += &layer_text(&group);
    }
    out += "\n";
    let mut table = Columns::new(&["bytes", ">size", ">share"]);
    let bytes = &json.bytes;
    for (what, size) in [
        ("experts", bytes.experts),
        ("shared experts", bytes.shared_experts),
        ("router gate", bytes.gate),
        ("rest of the model", bytes.rest),
        ("total", bytes.total),
    ] {
        let share = 100.0 * size as f64 / bytes.total.max(1) as f64;
        table.row([what.to_owned(), units::bytes(size), format!("{share:.1} %")]);
    }
    out += &table.to_string();
    out + "\n" + &completeness(json, strict)
}

/// Layers that differ in nothing but their index stand together.
fn groups(layers: &[LayerJson]) -> Vec<Vec<&LayerJson>> {
    let alike = |a: &LayerJson, b: &LayerJson| {
        let anonymous =
            LayerSpec { name: a.spec.name.clone(), index: a.spec.index, ..b.spec.clone() };
        anonymous == a.spec && a.formats == b.formats
    };
    let mut groups: Vec<Vec<&LayerJson>> = Vec::new();
    for layer in layers {
        match groups.iter_mut().find(|group| alike(group[0], layer)) {
            Some(group) => group.push(layer),
            None => groups.push(vec![layer]),
        }
    }
    groups
}

fn layer_text(group: &[&LayerJson]) -> String {
    let layer = group[0];
    let indices: Vec<usize> = group.iter().map(|layer| layer.layer).collect();
    let noun = if group.len() == 1 { "layer" } else { "layers" };
    let title = format!("{noun} {}", ranges(&indices));
    let mut facts = Facts::new();
    facts.add(
        "experts",
        format!(
            "{}, top-{}, hidden {}, intermediate {}",
            layer.experts, layer.top_k, layer.hidden, layer.intermediate
        ),
    );
    if let Some(shared) = &layer.spec.shared {
        let each = if shared.count == 1 { "" } else { " each" };
        facts.add(
            "shared experts",
            format!("{}, intermediate {}{each}", shared.count, shared.intermediate),
        );
    }
    facts.add("routing", layer.routing.join("\n"));
    facts.add("output", layer.output.clone());
    facts.add("expert", layer.expert.clone());
    let mut formats: Vec<(String, Vec<&str>)> = Vec::new();
    for (what, names) in &layer.formats {
        let names = names.join(" and ");
        match formats.iter_mut().find(|(format, _)| *format == names) {
            Some((_, users)) => users.push(what),
            None => formats.push((names, vec![what])),
        }
    }
    let formats: Vec<String> = formats
        .into_iter()
        .map(|(format, users)| format!("{format}: {}", users.join(", ")))
        .collect();
    facts.add("formats", if formats.is_empty() { "unknown".into() } else { formats.join("\n") });
    facts.add("bytes a layer", units::bytes(layer.bytes.total));
    format!("\n{}\n{facts}", toned(Tone::Title, &title))
}

/// How many names of a kind are shown.
const SHOWN: usize = 5;

/// How many layers that lack something have names shown.
const IN_FULL: usize = 3;

/// What a layer lacks, name by name.
fn lacks_in_full(layer: &LayerJson) -> String {
    let mut out = String::new();
    for (what, names) in layer.lacks() {
        for name in names.iter().take(SHOWN) {
            out += &format!("layer {}: {what}: {}\n", layer.layer, one_line(name));
        }
        if names.len() > SHOWN {
            let more = names.len() - SHOWN;
            out += &format!("layer {}: {what}: {more} more (--json lists all)\n", layer.layer);
        }
    }
    out
}

/// What layers lack, in one line: "layers 3-93: 2184 missing, 91 unexpected (--json lists all)".
fn lacks_in_short(layers: &[&LayerJson]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (what, names) in layers.iter().flat_map(|layer| layer.lacks()) {
        *counts.entry(what).or_default() += names.len();
    }
    let indices: Vec<usize> = layers.iter().map(|layer| layer.layer).collect();
    let counts: Vec<String> =
        counts.iter().map(|(what, count)| format!("{count} {what}")).collect();
    match layers {
        [] => String::new(),
        _ => format!("layers {}: {} (--json lists all)\n", ranges(&indices), counts.join(", ")),
    }
}

fn completeness(json: &InspectJson, strict: bool) -> String {
    let mut out = String::new();
    let (mut in_full, mut in_short) = (0, Vec::new());
    for layer in &json.layers {
        match layer.is_complete() {
            true => {}
            false if in_full == IN_FULL => in_short.push(layer),
            false => {
                in_full += 1;
                out += &lacks_in_full(layer);
            }
        }
        for finding in &layer.findings {
            out += &format!("layer {}: {}\n", layer.layer, finding.line());
        }
    }
    out += &lacks_in_short(&in_short);
    for finding in &json.findings {
        out += &format!("{}\n", finding.line());
    }
    for problem in &json.overlooked {
        out += &format!("overlooked: {}\n", one_line(problem));
    }
    if let Some(unseen) = json.unseen {
        return out + &toned(Tone::Title, unseen);
    }
    let broken = json.layers.iter().filter(|layer| !layer.is_complete()).count();
    let counting = json.counting(strict);
    out + &match broken {
        0 if counting > 0 => toned(
            Tone::Bad,
            &format!(
                "UNSOUND: every tensor is there, but {}; docs/doctor.md says what to do",
                units::plural(counting, "finding")
            ),
        ),
        0 if !json.overlooked.is_empty() => {
            toned(Tone::Bad, "INCOMPLETE: layers are not what the configuration says")
        }
        0 => toned(Tone::Good, "complete: every tensor of every MoE layer is there, once"),
        _ => toned(
            Tone::Bad,
            &format!(
                "INCOMPLETE: {broken} of {} cannot be loaded",
                units::plural(json.layers.len(), "MoE layer")
            ),
        ),
    }
}
