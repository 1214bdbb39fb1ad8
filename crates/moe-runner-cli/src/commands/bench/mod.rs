//! `bench`: the time of a layer, as a share of what this machine allows.

mod compare;
mod picture;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use moe_kernels::limits::last_level_cache;
use moe_runner::checkpoint::Checkpoint;
use moe_runner::comm::{At, Groups, Sizes, Step};
use moe_runner::exchange::resident::Room;
use moe_runner::hidden::ActivationDtype;
use moe_runner::random::Random;
use moe_runner::router::{Simulator, Strategy};
use moe_runner::runner::{Batch, ForwardInput, MoeRunnerInterface, RankedRunner};
use moe_runner::spec::{Correction, LayerSpec, RouterSpec};
use moe_runner::weights::{GateWeights, LoadedLayer, RandomFormat, random_layer, random_matrix};
use serde::{Deserialize, Serialize};

use crate::args::{BenchArgs, Common};
use crate::checkpoints::Opened;
use crate::failure::{one_line, unusable};
use crate::gpu::{self, GpuLimits};
use crate::measure::MachineLimits;
use crate::outputs::{self, ensure_apart};
use crate::report::Report;
use crate::report::progress::Progress;
use crate::report::table::{Columns, Facts};
use crate::report::units::{self, plural};
use crate::splitting::{self, Ranks};
use crate::times::{Times, times};
use crate::{formats, memory, presets};
use compare::Comparison;

/// Distinct weights of a preset that are touched in turn, at least: far more than caches hold.
const DISTINCT_BYTES: usize = 1 << 30;

/// What is this many times a cache's size does not stay there: hits are one in four at most.
const BEYOND_CACHE: usize = 4;

/// The last-level cache, where the machine does not tell: what large servers have a processor.
const USUAL_CACHE: usize = 64 << 20;

/// Tokens of the passes that are timed together on a GPU, where that is more than two passes.
const GPU_TOKENS: usize = 64;

/// How long a row is measured, if its runs are short.
const ROW_BUDGET: Duration = Duration::from_secs(1);

/// Runs of a row, at least.
const ROW_RUNS: usize = 5;

/// Runs of an exchange alone.
const EXCHANGE_RUNS: usize = 30;

/// No batch has more tokens.
const MAX_TOKENS: usize = 1 << 20;

/// What `bench --json` writes, and `report --bench` reads.
#[derive(Serialize, Deserialize)]
pub(super) struct BenchJson {
    pub(super) layer: String,
    pub(super) kernel: String,
    pub(super) format: String,
    pub(super) dtype: String,
    seed: u64,
    /// Bytes of weights that differ from each other; other experts share them.
    distinct_bytes: usize,
    /// Whether so few may stay in the last-level cache, so that rows measure that and not memory.
    cached: bool,
    /// The ranks, where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    split: Option<Sizes>,
    pub(super) limits: LimitsJson,
    /// From loaded weights to a layer that can run: the packing, or the mapping of what was packed.
    #[serde(default)]
    ready_s: f64,
    pub(super) rows: Vec<Row>,
    /// Beside an earlier measurement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    compared: Option<Comparison>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct LimitsJson {
    pub(super) read_gbps: f64,
    /// By arithmetic.
    pub(super) gflops: BTreeMap<String, f64>,
    pub(super) threads: usize,
    pub(super) isa: String,
    /// Of a GPU, where the kernel runs on one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) gpu: Option<GpuLimits>,
}

#[derive(Default, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) tokens: usize,
    pub(super) median_s: f64,
    min_s: f64,
    /// Between which half of the runs are.
    quartiles_s: [f64; 2],
    max_s: f64,
    runs: usize,
    tokens_per_s: f64,
    /// The mean of all runs: which experts are active differs from run to run.
    pub(super) bytes_weights_read: f64,
    pub(super) flops: f64,
    pub(super) gbps: f64,
    pub(super) gflops: f64,
    pub(super) limit_share: f64,
    bound_by: String,
    /// The least time for the bytes, and for the arithmetic.
    #[serde(default)]
    limits_s: [f64; 2],
    /// Payload that ranks sent to other ranks, over all ranks, where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bytes_moved_per_token: Option<f64>,
    /// Where rows go from GPU to GPU: the exchange alone, on the slowest rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    exchange: Option<ExchangeJson>,
}

/// Dispatch and combine without the experts.
#[derive(Clone, Serialize, Deserialize)]
struct ExchangeJson {
    seconds: f64,
    /// The same bytes to and from the same ranks, and nothing else.
    bare_seconds: f64,
    /// Bytes that the busiest rank sent, both ways.
    sent: u64,
}

/// What is measured.
struct Subject {
    /// Run in turn.
    layers: Vec<LoadedLayer>,
    title: String,
    format: String,
    dtype: ActivationDtype,
    distinct_bytes: usize,
    /// `None` for a preset.
    checkpoint: Option<Checkpoint>,
}

/// Runs the command.
pub(crate) fn run(args: &BenchArgs, common: &Common) -> Result<Report> {
    if let Some(bad) = args.tokens.iter().find(|tokens| !(1..=MAX_TOKENS).contains(*tokens)) {
        return Err(unusable(format!("--tokens {bad}: must be 1 to {MAX_TOKENS}")));
    }
    let earlier = args.compare.as_deref().map(BenchJson::read).transpose();
    let earlier = earlier.map_err(|error| unusable(format!("--compare {error:#}")))?;
    let mut parallel = args.splitting.parallel()?;
    let captured = args.splitting.capacity().is_some();
    if captured && args.tokens.len() > 1 {
        return Err(unusable("--capacity: room is made for one --tokens"));
    }
    let ranks = args.splitting.ranks(common.gpu)?;
    let inputs: Vec<_> = args.compare.iter().map(|path| ("--compare", path.as_path())).collect();
    let outputs: Vec<_> = args.svg.iter().map(|path| ("--svg", path.as_path())).collect();
    ensure_apart(&outputs, &inputs, None)?;
    let progress = Progress::new(args.tokens.len() + 2);
    progress.doing("making the weights");
    let subject = subject(args, common)?;
    if let Some(factor) = args.splitting.capacity() {
        let (ranks, top_k) = (parallel.sizes.ranks(), subject.layers[0].spec.router.top_k);
        let most = args.tokens[0].div_ceil(ranks);
        parallel.room = Some(Room::for_share(most, top_k, ranks, factor));
    }
    let parallel = parallel;
    let common = &common.caching(subject.checkpoint.as_ref())?;
    progress.step();
    progress.doing("measuring the machine");
    let machine = ranks.measure(&common.pool, common.gpu_in_use())?;
    progress.step();
    let measured = ranks.run(|groups| {
        let options = ranks.options(common, subject.dtype, groups)?;
        let start = Instant::now();
        let mut runners = Vec::with_capacity(subject.layers.len());
        for (layer, seed) in subject.layers.iter().zip(common.seed..) {
            let runner = ranks.runner(layer, &options, groups, &parallel)?;
            // on a GPU routing is the gate's, random too: nothing may come from the host meanwhile
            let simulator = (runner.runner().stream().is_none())
                .then(|| Simulator::new(Strategy::UniformRandom, seed_of(seed, groups)));
            runners.push(runner.with_simulator(simulator));
        }
        let ready_s = start.elapsed().as_secs_f64();
        let (seed, gpu) = (common.seed, options.gpu);
        let mut bench =
            Bench { runners, ranks: &ranks, groups, machine: &machine, seed, gpu, captured };
        let mut rows = Vec::with_capacity(args.tokens.len());
        for &tokens in &args.tokens {
            if groups.world.rank() == 0 {
                progress.doing(plural(tokens, "token"));
            }
            rows.push(bench.row(tokens)?);
            if groups.world.rank() == 0 {
                progress.step();
            }
        }
        let choice = bench.runners[0].runner().choice();
        Ok((rows, choice.kernel.name, choice.why.clone(), ready_s))
    });
    drop(progress);
    let (rows, kernel, why, ready_s) = measured?;
    if !ranks.reports() {
        return Ok(Report::silent(true));
    }
    common.tell_of_cache();
    let mut json = BenchJson {
        layer: subject.title,
        kernel: kernel.into(),
        format: subject.format,
        dtype: subject.dtype.name().into(),
        seed: common.seed,
        distinct_bytes: subject.distinct_bytes,
        cached: subject.distinct_bytes / BEYOND_CACHE
            < last_level_cache().filter(|_| machine.gpu.is_none()).unwrap_or(USUAL_CACHE),
        split: ranks.split(),
        limits: LimitsJson {
            read_gbps: machine.device_read_gbps(),
            gflops: machine.gflops(),
            gpu: machine.gpu.clone(),
            threads: machine.threads,
            isa: machine.isa.into(),
        },
        ready_s,
        rows,
        compared: None,
    };
    json.compared = earlier.map(|then| Comparison::of(then, &json)).transpose()?;
    if let Some(path) = &args.svg {
        outputs::write(path, picture::draw(&json).as_bytes())?;
    }
    Report::new(true, text(&json, &why, &machine), &json)
}

/// The seed of a rank's simulated routing: the same for ranks that have the same rows.
fn seed_of(seed: u64, groups: &Groups) -> u64 {
    let (sizes, rank) = (groups.sizes, groups.world.rank());
    let rows = if sizes.sp() > 1 { rank } else { rank / sizes.tp };
    seed ^ (rows as u64) << 32
}

fn subject(args: &BenchArgs, common: &Common) -> Result<Subject> {
    match (&args.checkpoint, &args.preset) {
        (Some(_), None) if args.format.is_some() => {
            Err(unusable("--format is for presets; a checkpoint has its own"))
        }
        (None, Some(_)) if args.layers.is_some() => {
            Err(unusable("--layer is for checkpoints; a preset is one layer"))
        }
        (Some(path), None) => {
            let opened = Opened::open(path)?;
            let entry = match &args.layers {
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
                dtype: opened.dtype(common.dtype, &layer),
                distinct_bytes: matrices.map(|matrix| matrix.stored_bytes()).sum(),
                layers: vec![layer],
                checkpoint: Some(opened.checkpoint),
            })
        }
        (None, Some(name)) => {
            let preset = presets::find(name)?;
            let name = args.format.as_deref().unwrap_or(preset.format);
            let format = formats::find(name)?;
            let spec = preset.spec();
            let (layers, distinct_bytes) = synthetic(&spec, format, name, common.seed)?;
            Ok(Subject {
                title: title(preset.name, &spec),
                format: name.to_ascii_lowercase(),
                dtype: common.dtype.unwrap_or(formats::activations(format)),
                layers,
                distinct_bytes,
                checkpoint: None,
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
fn synthetic(
    spec: &LayerSpec,
    format: RandomFormat,
    name: &str,
    seed: u64,
) -> Result<(Vec<LoadedLayer>, usize)> {
    let (hidden, intermediate) = (spec.dims.routed_hidden, spec.dims.intermediate);
    let in_bytes = format.bytes(intermediate, hidden);
    let (Some(in_bytes), Some(down_bytes)) = (in_bytes, format.bytes(hidden, intermediate)) else {
        return Err(unusable(format!(
            "--format {name}: its rows are whole blocks, and rows of {hidden} and {intermediate} \
             weights are not; choose another format"
        )));
    };
    let expert_bytes = down_bytes + in_bytes * if spec.expert.gated { 2 } else { 1 };
    let beyond = last_level_cache().unwrap_or(0).saturating_mul(BEYOND_CACHE).max(DISTINCT_BYTES);
    let wanted = memory::available().map_or(beyond, |free| beyond.min(free / 4));
    let distinct = wanted.div_ceil(expert_bytes).clamp(1, spec.router.experts);
    memory::ensure(
        distinct * expert_bytes,
        "a layer of this shape",
        "choose a smaller preset or format",
    )?;
    let layers = wanted.div_ceil(spec.router.experts * expert_bytes).max(1);
    let made = (0..layers as u64).map(|i| layer_of(spec, distinct, format, seed.wrapping_add(i)));
    let made = made.collect::<Result<Vec<_>>>()?;
    Ok((made, layers * distinct * expert_bytes))
}

/// A layer whose experts share the weights of `distinct` ones.
fn layer_of(
    spec: &LayerSpec,
    distinct: usize,
    format: RandomFormat,
    seed: u64,
) -> Result<LoadedLayer> {
    let few = LayerSpec {
        router: RouterSpec::softmax(distinct, spec.router.top_k.min(distinct), true),
        ..spec.clone()
    };
    let layer = random_layer(&few, format, seed)?;
    let mut random = Random::new(seed);
    let router = &spec.router;
    let gate = GateWeights {
        weight: random_matrix(&mut random, format.float(), router.logits(), spec.dims.hidden),
        bias: spec.gate.bias.then(|| random.values(router.logits(), 0.5)),
        // what balances the load of a trained layer would unbalance this one's
        correction: (router.correction != Correction::None)
            .then(|| random.values(router.choices(), 0.01)),
        per_expert_scale: None,
        input_scale: None,
        hash_table: None,
    };
    let experts = (0..router.experts).map(|e| layer.experts[e % distinct].clone()).collect();
    Ok(LoadedLayer { spec: spec.clone(), gate: Some(gate), experts, ..layer })
}

/// One rank's part of the measurement.
struct Bench<'a> {
    /// Run in turn.
    runners: Vec<RankedRunner<'a>>,
    ranks: &'a Ranks,
    groups: &'a Groups,
    machine: &'a MachineLimits,
    seed: u64,
    gpu: usize,
    /// Passes over ranks run as a graph.
    captured: bool,
}

impl Bench<'_> {
    /// The time of batches of `tokens`, the same on every rank.
    fn row(&mut self, tokens: usize) -> moe_runner::Result<Row> {
        let runner = &self.runners[0];
        let (hidden, dtype) = (runner.runner().spec().dims.hidden, runner.runner().dtype());
        let working = self.runners.len() * runner.workspace_bytes(tokens);
        memory::ensure(
            self.ranks.in_this_process() * (working + 2 * tokens * hidden * 4),
            &plural(tokens, "token"),
            "give --tokens fewer",
        )?;
        let mut random = Random::new(self.seed ^ tokens as u64);
        let input: Vec<f32> =
            (0..tokens * hidden).map(|_| dtype.round(random.normal() as f32)).collect();
        let (mut bytes, mut flops, mut moved, mut calls) = (0.0, 0.0, 0.0, 0);
        let count = self.runners.len();
        let mut pass = |runners: &mut [RankedRunner<'_>], rows: &[f32]| {
            let batch = Batch { hidden: rows, router_logits: None, input_ids: None };
            let pass = runners[calls % count].pass(&batch)?;
            bytes += pass.weight_bytes as f64;
            flops += pass.flops;
            moved += pass.moved as f64;
            calls += 1;
            Ok::<_, moe_runner::Error>(pass.time)
        };
        let mut exchange = None;
        let times = match self.runners[0].runner().stream() {
            Some(stream) if self.runners[0].runner().is_spread() => {
                for _ in 0..count {
                    pass(&mut self.runners, &input)?;
                }
                exchange = self.exchange(tokens)?;
                let own = self.runners[0].rows(tokens);
                let rows = &input[own.start * hidden..own.end * hidden];
                self.together(stream, (dtype, hidden), rows)?
            }
            None => times(ROW_BUDGET, ROW_RUNS, || pass(&mut self.runners, &input))?,
            Some(stream) => {
                // passes with rows of their own, so that few tokens meet more than caches hold
                let together = (GPU_TOKENS / tokens).clamp(2, 16);
                let mut batches = vec![input.clone()];
                for _ in 1..together {
                    let row = |_| dtype.round(random.normal() as f32);
                    batches.push((0..tokens * hidden).map(row).collect());
                }
                for rows in &batches {
                    pass(&mut self.runners, rows)?;
                }
                let batches: Vec<&[f32]> = batches.iter().map(Vec::as_slice).collect();
                gpu::time((self.gpu, stream), (dtype, hidden), &batches, |call, rows, out| {
                    let runner = self.runners[call % count].runner_mut();
                    runner.forward(&ForwardInput::new(rows), out).map(drop)
                })?
            }
        };
        let calls = calls as f64;
        let (bytes, flops, moved) = (bytes / calls, flops / calls, moved / calls);
        let kernel = self.runners[0].runner().choice().kernel;
        // what was measured of one GPU, all have
        let gpus = match self.runners[0].runner().is_spread() {
            true => self.groups.world.size() as f64,
            false => 1.0,
        };
        let limits = |bytes, flops| self.machine.least_seconds(kernel, bytes / gpus, flops / gpus);
        let limits_s = [limits(bytes, 0.0), limits(0.0, flops)];
        let least = limits_s[0].max(limits_s[1]);
        Ok(Row {
            tokens,
            median_s: times.median,
            min_s: times.min,
            quartiles_s: times.quartiles,
            max_s: times.max,
            runs: times.runs,
            tokens_per_s: tokens as f64 / times.median,
            bytes_weights_read: bytes,
            flops,
            gbps: bytes / times.median / 1e9,
            gflops: flops / times.median / 1e9,
            limit_share: least / times.median,
            bound_by: if limits_s[1] > limits_s[0] { "arithmetic" } else { "memory" }.into(),
            limits_s,
            bytes_moved_per_token: self.ranks.split().map(|_| moved / tokens as f64),
            exchange,
        })
    }

    /// The exchange of the pass before alone, on the slowest rank.
    fn exchange(&mut self, tokens: usize) -> moe_runner::Result<Option<ExchangeJson>> {
        let runner = &mut self.runners[0];
        let own = runner.rows(tokens).len();
        let Some(mine) = runner.runner_mut().exchange_time(own, EXCHANGE_RUNS)? else {
            return Ok(None);
        };
        let nanos = |seconds: f64| (seconds * 1e9) as u64;
        let mine = vec![nanos(mine.seconds), nanos(mine.bare_seconds), mine.sent as u64];
        let all = self.groups.world.all_gather(At::new("bench", Step::Finish), mine)?;
        let most = |i: usize| all.chunks_exact(3).map(|rank| rank[i]).max().unwrap_or(0);
        let seconds = |i: usize| most(i) as f64 * 1e-9;
        Ok(Some(ExchangeJson { seconds: seconds(0), bare_seconds: seconds(1), sent: most(2) }))
    }

    /// The time of passes with rows of each rank's GPU, on the slowest one.
    fn together(
        &mut self,
        stream: usize,
        rows_of: (ActivationDtype, usize),
        rows: &[f32],
    ) -> moe_runner::Result<Times> {
        let count = self.runners.len();
        let batches = vec![rows; count.max(4)];
        let at = At::new("bench", Step::Finish);
        let (groups, runners) = (self.groups, RefCell::new(&mut self.runners));
        gpu::time_together(
            ((self.gpu, stream), self.captured),
            rows_of,
            &batches,
            |call, rows, out| {
                let runner = &mut runners.borrow_mut()[call % count];
                runner.runner_mut().forward(&ForwardInput::new(rows), out).map(drop)
            },
            || runners.borrow_mut()[0].runner_mut().synchronize(),
            |mine| match mine {
                None => groups.world.barrier(at).map(|()| Duration::ZERO),
                Some(mine) => {
                    let all = groups.world.all_gather(at, vec![mine.as_nanos() as u64])?;
                    Ok(Duration::from_nanos(all.into_iter().max().unwrap_or(0)))
                }
            },
        )
    }
}

impl BenchJson {
    /// What an earlier run wrote.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read(path).with_context(|| format!("{}: cannot read", path.display()))?;
        let json: Self = serde_json::from_slice(&text)
            .with_context(|| format!("{}: is not what `bench --json` writes", path.display()))?;
        let numbers =
            json.rows.iter().flat_map(|row| [row.bytes_weights_read, row.flops, row.gflops]);
        let limits = json.limits.gflops.values().chain([&json.limits.read_gbps]);
        if let Some(bad) = numbers.chain(limits.copied()).find(|v| !(v.is_finite() && *v > 0.0)) {
            bail!("{}: {bad} is no rate or amount that a run has", path.display());
        }
        Ok(json)
    }
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
    facts.add("ready", format!("after {}", units::seconds(json.ready_s)));
    facts.add("machine", machine.to_string());
    if let Some(sizes) = &json.split {
        facts.add("split", splitting::describe(sizes));
    }
    let mut columns = vec![
        ">tokens",
        ">median",
        ">min",
        ">quartiles",
        ">max",
        ">tokens/s",
        ">GB/s",
        ">GFLOP/s",
        ">limit",
        "bound by",
    ];
    if json.split.is_some() {
        columns.push(">moved/token");
    }
    let mut table = Columns::new(&columns);
    for row in &json.rows {
        let moved = row.bytes_moved_per_token.map(|bytes| units::bytes(bytes.round() as usize));
        let cells = [
            row.tokens.to_string(),
            units::seconds(row.median_s),
            units::seconds(row.min_s),
            row.quartiles_s.map(units::seconds).join(" - "),
            units::seconds(row.max_s),
            format!("{:.0}", row.tokens_per_s),
            format!("{:.1}", row.gbps),
            format!("{:.1}", row.gflops),
            format!("{:.0} %", 100.0 * row.limit_share),
            row.bound_by.clone(),
        ];
        table.row(cells.into_iter().chain(moved));
    }
    let cached = match json.cached {
        true => {
            "\nThese weights may stay in the caches: few tokens then measure those, not memory."
        }
        false => "",
    };
    let mut exchanges = String::new();
    for (row, exchange) in json.rows.iter().filter_map(|row| Some((row, row.exchange.as_ref()?))) {
        exchanges += &format!(
            "\n{}: dispatch and combine {}, the same bytes alone {} ({} from the busiest rank)",
            units::plural(row.tokens, "token"),
            units::seconds(exchange.seconds),
            units::seconds(exchange.bare_seconds),
            units::bytes(exchange.sent as usize),
        );
    }
    let compared = json.compared.as_ref().map(|compared| compared.text(json.limits.read_gbps));
    format!("{facts}\n{table}{exchanges}{cached}{}", compared.unwrap_or_default())
}
