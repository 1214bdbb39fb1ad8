//! `bench`: the time of a layer, as a share of what this machine allows.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use moe_runner::hidden::{ActivationDtype, Rows, RowsMut};
use moe_runner::random::Random;
use moe_runner::router::{Simulator, Strategy};
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface};
use moe_runner::spec::{Correction, LayerSpec, RouterSpec};
use moe_runner::weights::{FloatType, GateWeights, LoadedLayer, random_layer, random_matrix};
use serde::Serialize;

use crate::args::{BenchArgs, Common};
use crate::checkpoints::Opened;
use crate::failure::{one_line, unusable};
use crate::measure::{MachineLimits, times};
use crate::report::Report;
use crate::report::progress::Progress;
use crate::report::table::{Columns, Facts};
use crate::report::units::{self, plural};
use crate::{formats, memory, presets};

/// Distinct weights that are touched in turn: far more than caches hold.
const DISTINCT_BYTES: usize = 1 << 30;

/// How long a row is measured, if its runs are short.
const ROW_BUDGET: Duration = Duration::from_secs(1);

/// Runs of a row, at least.
const ROW_RUNS: usize = 5;

/// No batch has more tokens.
const MAX_TOKENS: usize = 1 << 20;

#[derive(Serialize)]
struct BenchJson {
    layer: String,
    kernel: &'static str,
    format: String,
    dtype: &'static str,
    seed: u64,
    /// Bytes of weights that differ from each other; other experts share them.
    distinct_bytes: usize,
    limits: LimitsJson,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct LimitsJson {
    read_gbps: f64,
    /// By arithmetic: every kernel of this build computes in f32.
    gflops: BTreeMap<&'static str, f64>,
    threads: usize,
    isa: &'static str,
}

#[derive(Serialize)]
struct Row {
    tokens: usize,
    median_s: f64,
    min_s: f64,
    max_s: f64,
    runs: usize,
    tokens_per_s: f64,
    /// The mean of all runs: which experts are active differs from run to run.
    bytes_weights_read: f64,
    flops: f64,
    gbps: f64,
    gflops: f64,
    limit_share: f64,
    bound_by: &'static str,
}

/// What is measured.
struct Subject {
    /// Run in turn.
    layers: Vec<LoadedLayer>,
    title: String,
    format: String,
    dtype: ActivationDtype,
    distinct_bytes: usize,
}

/// Runs the command.
pub(crate) fn run(args: &BenchArgs, common: &Common) -> Result<Report> {
    if let Some(bad) = args.tokens.iter().find(|tokens| !(1..=MAX_TOKENS).contains(*tokens)) {
        return Err(unusable(format!("--tokens {bad}: must be 1 to {MAX_TOKENS}")));
    }
    let progress = Progress::new(args.tokens.len() + 2);
    progress.doing("making the weights");
    let subject = subject(args, common)?;
    progress.step();
    progress.doing("measuring the machine");
    let machine = MachineLimits::measure(&common.pool);
    progress.step();

    let options = common.options(subject.dtype);
    let mut runners = Vec::with_capacity(subject.layers.len());
    for (layer, seed) in subject.layers.iter().zip(common.seed..) {
        let simulator = Simulator::new(Strategy::UniformRandom, seed);
        runners.push(MoeRunner::new(layer.ready(&options)?).with_simulator(Some(simulator)));
    }
    let mut rows = Vec::with_capacity(args.tokens.len());
    for &tokens in &args.tokens {
        progress.doing(plural(tokens, "token"));
        rows.push(row(&mut runners, tokens, &machine, common.seed)?);
        progress.step();
    }
    drop(progress);
    let choice = runners[0].choice();
    let json = BenchJson {
        layer: subject.title,
        kernel: choice.kernel.name,
        format: subject.format,
        dtype: subject.dtype.name(),
        seed: common.seed,
        distinct_bytes: subject.distinct_bytes,
        limits: LimitsJson {
            read_gbps: machine.read_gbps,
            gflops: BTreeMap::from([("f32", machine.f32_gflops)]),
            threads: machine.threads,
            isa: machine.isa,
        },
        rows,
    };
    Report::new(true, text(&json, &choice.why, &machine), &json)
}

fn subject(args: &BenchArgs, common: &Common) -> Result<Subject> {
    match (&args.checkpoint, &args.preset) {
        (Some(_), None) if args.format.is_some() => {
            Err(unusable("--format is for presets; a checkpoint has its own"))
        }
        (None, Some(_)) if args.layer.is_some() => {
            Err(unusable("--layer is for checkpoints; a preset is one layer"))
        }
        (Some(path), None) => {
            let opened = Opened::open(path)?;
            let entry = match &args.layer {
                None => &opened.layers[0],
                Some(layer) => match opened.select(layer)?[..] {
                    [entry] => entry,
                    _ => return Err(unusable("--layer: bench takes one layer")),
                },
            };
            let layer = opened.load(entry)?;
            let mut formats: Vec<String> =
                layer.experts.iter().map(|expert| expert.up.format().to_string()).collect();
            formats.dedup();
            let experts = layer.experts.iter();
            let matrices = experts.flat_map(|e| e.gate.iter().chain([&e.up, &e.down]));
            Ok(Subject {
                title: title(&format!("{}, {}", path.display(), entry.spec.name), &entry.spec),
                format: formats.join(" and "),
                dtype: opened.dtype(common, &layer),
                distinct_bytes: matrices.map(|matrix| matrix.stored_bytes()).sum(),
                layers: vec![layer],
            })
        }
        (None, Some(name)) => {
            let preset = presets::find(name)?;
            let (format, whose) = match &args.format {
                Some(format) => (format.as_str(), None),
                None => (preset.format, Some(preset.name)),
            };
            let float = formats::find(format, whose)?;
            let spec = preset.spec();
            let (layers, distinct_bytes) = synthetic(&spec, float, common.seed)?;
            Ok(Subject {
                title: title(preset.name, &spec),
                format: format.to_owned(),
                dtype: common.dtype.unwrap_or(formats::activations(float)),
                layers,
                distinct_bytes,
            })
        }
        _ => Err(unusable(format!(
            "bench needs a checkpoint or a preset; presets are {}",
            presets::names()
        ))),
    }
}

fn title(name: &str, spec: &LayerSpec) -> String {
    format!(
        "{name}: {}, top-{}, hidden {}, intermediate {}",
        plural(spec.router.experts, "expert"),
        spec.router.top_k,
        spec.dims.hidden,
        spec.dims.intermediate
    )
}

/// Layers with random weights, and the bytes of them that differ. All experts of a large model
/// would not fit into memory, and would say nothing more: distinct weights beyond what caches hold
/// are made once, and the experts take them in turn.
fn synthetic(spec: &LayerSpec, float: FloatType, seed: u64) -> Result<(Vec<LoadedLayer>, usize)> {
    let matrices = if spec.expert.gated { 3 } else { 2 };
    let weights = matrices * spec.dims.routed_hidden * spec.dims.intermediate;
    let expert_bytes = weights * formats::bytes_per_weight(float);
    let wanted = memory::available().map_or(DISTINCT_BYTES, |free| DISTINCT_BYTES.min(free / 4));
    let distinct = wanted.div_ceil(expert_bytes).clamp(1, spec.router.experts);
    memory::ensure(
        distinct * expert_bytes,
        "a layer of this shape",
        "choose a smaller preset or format",
    )?;
    let layers = wanted.div_ceil(spec.router.experts * expert_bytes).max(1);
    let made = (0..layers as u64).map(|i| layer_of(spec, distinct, float, seed.wrapping_add(i)));
    let made = made.collect::<Result<Vec<_>>>()?;
    Ok((made, layers * distinct * expert_bytes))
}

/// A layer whose experts share the weights of `distinct` ones.
fn layer_of(spec: &LayerSpec, distinct: usize, float: FloatType, seed: u64) -> Result<LoadedLayer> {
    let few = LayerSpec {
        router: RouterSpec::softmax(distinct, spec.router.top_k.min(distinct), true),
        ..spec.clone()
    };
    let layer = random_layer(&few, float, seed)?;
    let mut random = Random::new(seed);
    let router = &spec.router;
    let gate = GateWeights {
        weight: random_matrix(&mut random, float, router.logits(), spec.dims.hidden),
        bias: spec.gate.bias.then(|| random.values(router.logits(), 0.5)),
        correction: (router.correction != Correction::None)
            .then(|| random.values(router.choices(), 0.5)),
        per_expert_scale: None,
        input_scale: None,
        hash_table: None,
    };
    let experts = (0..router.experts).map(|e| layer.experts[e % distinct].clone()).collect();
    Ok(LoadedLayer { spec: spec.clone(), gate: Some(gate), experts, ..layer })
}

fn row(
    runners: &mut [MoeRunner],
    tokens: usize,
    machine: &MachineLimits,
    seed: u64,
) -> Result<Row> {
    let (hidden, dtype) = (runners[0].spec().dims.hidden, runners[0].dtype());
    memory::ensure(
        runners.len() * runners[0].workspace_bytes(tokens) + 2 * tokens * hidden * 4,
        &plural(tokens, "token"),
        "give --tokens fewer",
    )?;
    let mut random = Random::new(seed ^ tokens as u64);
    let input: Vec<f32> =
        (0..tokens * hidden).map(|_| dtype.round(random.normal() as f32)).collect();
    let mut output = vec![0.0f32; tokens * hidden];
    let (mut bytes, mut flops, mut calls) = (0.0, 0.0, 0);
    let times = times(ROW_BUDGET, ROW_RUNS, || {
        let runner = calls % runners.len();
        let done = runners[runner]
            .forward(&ForwardInput::new(Rows::F32(&input)), RowsMut::F32(&mut output))?;
        bytes += done.weight_bytes as f64;
        flops += done.flops;
        calls += 1;
        Ok::<(), moe_runner::Error>(())
    })?;
    let (bytes, flops) = (bytes / calls as f64, flops / calls as f64);
    let least = machine.least_seconds(bytes, flops);
    Ok(Row {
        tokens,
        median_s: times.median,
        min_s: times.min,
        max_s: times.max,
        runs: times.runs,
        tokens_per_s: tokens as f64 / times.median,
        bytes_weights_read: bytes,
        flops,
        gbps: bytes / times.median / 1e9,
        gflops: flops / times.median / 1e9,
        limit_share: least / times.median,
        bound_by: match machine.least_seconds(bytes, 0.0) < least {
            true => "arithmetic",
            false => "memory",
        },
    })
}

fn text(json: &BenchJson, why: &str, machine: &MachineLimits) -> String {
    let mut facts = Facts::new();
    facts.add("layer", one_line(&json.layer));
    facts.add(
        "weights",
        format!(
            "{}, {} of them distinct; {} activations",
            json.format,
            units::bytes(json.distinct_bytes),
            json.dtype
        ),
    );
    facts.add("kernel", format!("{} ({why})", json.kernel));
    facts.add("machine", machine.to_string());
    let mut table = Columns::new(&[
        ">tokens",
        ">median",
        ">min",
        ">max",
        ">tokens/s",
        ">GB/s",
        ">GFLOP/s",
        ">limit",
        "bound by",
    ]);
    for row in &json.rows {
        table.row([
            row.tokens.to_string(),
            units::seconds(row.median_s),
            units::seconds(row.min_s),
            units::seconds(row.max_s),
            format!("{:.0}", row.tokens_per_s),
            format!("{:.1}", row.gbps),
            format!("{:.1}", row.gflops),
            format!("{:.0} %", 100.0 * row.limit_share),
            row.bound_by.to_owned(),
        ]);
    }
    let cached = match json.distinct_bytes < DISTINCT_BYTES / 8 {
        true => {
            "\nThese weights may stay in the caches: few tokens then measure those, not memory."
        }
        false => "",
    };
    format!("{facts}\n{table}{cached}")
}
