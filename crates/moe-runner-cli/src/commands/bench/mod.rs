//! `bench`: the time of a layer, as a share of what this machine allows.

mod compare;
mod picture;
pub(super) mod result;
mod subject;
mod text;

use std::cell::RefCell;
use std::time::{Duration, Instant};

use anyhow::Result;
use moe_runner::comm::{At, Groups, Step};
use moe_runner::exchange::resident::Room;
use moe_runner::hidden::ActivationDtype;
use moe_runner::random::Random;
use moe_runner::router::{Simulator, Strategy};
use moe_runner::runner::{Batch, ForwardInput, MoeRunnerInterface, RankedRunner};
use serde::Serialize;

use crate::args::{BenchArgs, Common};
use crate::failure::unusable;
use crate::gpu;
use crate::interrupt::Asked;
use crate::measure::MachineLimits;
use crate::memory;
use crate::outputs::{self, ensure_apart};
use crate::report::Report;
use crate::report::progress::Progress;
use crate::report::units::plural;
use crate::splitting::Ranks;
use crate::times::{Times, times};
use compare::Comparison;
use result::{BenchJson, ExchangeJson, LimitsJson, Row};
use subject::Subject;

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

/// Runs the command.
pub(crate) fn run(args: &BenchArgs, common: &Common) -> Result<Report> {
    if let Some(bad) = args.tokens.iter().find(|tokens| !(1..=MAX_TOKENS).contains(*tokens)) {
        return Err(unusable(format!("--tokens {bad}: must be 1 to {MAX_TOKENS}")));
    }
    let earlier = args.compare.as_deref().map(BenchJson::read).transpose();
    let earlier = earlier.map_err(|error| unusable(format!("--compare {error:#}")))?;
    let mut parallel = args.splitting.parallel()?;
    if args.splitting.capacity().is_some() && args.tokens.len() > 1 {
        return Err(unusable("--capacity: room is made for one --tokens"));
    }
    let ranks = args.splitting.ranks(common.gpu)?;
    let inputs: Vec<_> = args.compare.iter().map(|path| ("--compare", path.as_path())).collect();
    let outputs: Vec<_> = args.svg.iter().map(|path| ("--svg", path.as_path())).collect();
    let progress = Progress::new(args.tokens.len() + 2);
    progress.doing("making the weights");
    let subject = Subject::of(args, common)?;
    ensure_apart(&outputs, &inputs, subject.checkpoint.as_ref())?;
    if let Some(factor) = args.splitting.capacity() {
        let (ranks, top_k) = (parallel.sizes.ranks(), subject.layers[0].spec.router.top_k);
        // of each micro-batch
        let most = args.tokens[0].div_ceil(ranks).div_ceil(parallel.micro_batches);
        parallel.room = Some(Room::for_share(most, top_k, ranks, factor));
    }
    let parallel = parallel;
    let common = &common.caching(subject.checkpoint.as_ref())?;
    progress.step();
    progress.doing("measuring the machine");
    let machine = ranks.measure(&common.pool, common.gpu_in_use())?;
    progress.step();
    let asked = Asked::here();
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
        let mut bench = Bench { runners, ranks: &ranks, groups, machine: &machine, seed, gpu };
        let mut rows = Vec::with_capacity(args.tokens.len());
        for &tokens in &args.tokens {
            asked.go_on()?;
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
    let cached = subject.is_cached(machine.gpu.is_some());
    let result = BenchJson {
        subject: subject.title,
        kernel: kernel.into(),
        format: subject.format,
        dtype: subject.dtype.name().into(),
        seed: common.seed,
        distinct_bytes: subject.distinct_bytes,
        cached,
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
    };
    if let Some(path) = &args.svg {
        outputs::write(path, picture::draw(&result).as_bytes())?;
    }
    let compared = earlier.map(|then| Comparison::of(then, &result)).transpose()?;
    let text = text::of(&result, compared.as_ref(), &why, &machine);
    Report::new(true, text, &Written { result: &result, compared })
}

/// What `--json` writes.
#[derive(Serialize)]
struct Written<'a> {
    #[serde(flatten)]
    result: &'a BenchJson,
    /// Beside an earlier measurement.
    #[serde(skip_serializing_if = "Option::is_none")]
    compared: Option<Comparison>,
}

/// The seed of a rank's simulated routing: the same for ranks that have the same rows.
fn seed_of(seed: u64, groups: &Groups) -> u64 {
    let (sizes, rank) = (groups.sizes, groups.world.rank());
    let rows = if sizes.sp() > 1 { rank } else { rank / sizes.tp };
    seed ^ (rows as u64) << 32
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
        let Some(runner) = self.runners.last_mut() else { return Ok(None) };
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
        let captured = self.runners[0].runner().can_be_captured();
        let batches = vec![rows; count.max(4)];
        let at = At::new("bench", Step::Finish);
        let (groups, runners) = (self.groups, RefCell::new(&mut self.runners));
        gpu::time_together(
            ((self.gpu, stream), captured),
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
