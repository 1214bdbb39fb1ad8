//! `run`: layers on given hidden states, to a file.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Result, anyhow};
use half::{bf16, f16};
use moe_runner::Error;
use moe_runner::checkpoint::architecture::LayerEntry;
use moe_runner::checkpoint::{Checkpoint, Dtype, NewTensor, Writer};
use moe_runner::comm::{At, Step};
use moe_runner::doctor::{self, Finding};
use moe_runner::hidden::ActivationDtype;
use moe_runner::parallel::Parallel;
use moe_runner::router::{self, LogicalId, Routing};
use moe_runner::runner::{BatchOutput, Timeline};
use moe_runner::spec::LayerSpec;
use moe_runner::weights::LoadedLayer;
use serde::Serialize;

use crate::args::{Common, RunArgs};
use crate::checkpoints::{Opened, ranges};
use crate::failure::unusable;
use crate::input::{Input, LayerInput};
use crate::outputs::ensure_apart;
use crate::report::progress::Progress;
use crate::report::table::Columns;
use crate::report::trace::{self, RankSpan, Trace};
use crate::report::units::plural;
use crate::report::{Report, units};
use crate::routing::weight_factor;
use crate::splitting::Ranks;
use crate::{interrupt, memory, nonfinite};

/// Up to so many layers have a line each.
const IN_FULL: usize = 8;

#[derive(Serialize)]
struct RunJson {
    checkpoint: String,
    layers: Vec<LayerJson>,
    output: String,
}

#[derive(Serialize)]
struct LayerJson {
    layer: usize,
    name: String,
    kernel: &'static str,
    dtype: &'static str,
    seconds: f64,
    tokens: usize,
    bytes_weights_read: usize,
    flops: f64,
}

/// A layer that is about to run, with what it will write.
struct Job<'a> {
    entry: &'a LayerEntry,
    layer: LoadedLayer,
    dtype: ActivationDtype,
    output_dtype: ActivationDtype,
    input: LayerInput,
    /// Before the names of its tensors.
    prefix: String,
}

/// Runs the command.
pub(crate) fn run(args: &RunArgs, common: &Common) -> Result<Report> {
    let parallel = args.splitting.parallel()?;
    let ranks = args.splitting.ranks(common.gpu)?;
    let opened = Opened::open(&args.checkpoint)?;
    let common = &common.caching(Some(&opened.checkpoint))?;
    let entries = opened.select(&args.layers)?;
    let single = args.layers.is_single();
    if args.input == Path::new("-") && ranks.are_processes() {
        return Err(unusable("--input -: only one process has the standard input; name a file"));
    }
    let input = Input::open(&args.input, &args.input_name, !single)?;
    let mut outputs = vec![("--output", args.output.as_path())];
    outputs.extend(args.trace.as_deref().map(|path| ("--trace", path)));
    outputs.extend(args.save_routing.as_deref().map(|path| ("--save-routing", path)));
    let mut inputs = vec![("--input", args.input.as_path())];
    inputs.extend(args.splitting.placement_file().map(|path| ("--placement", path)));
    ensure_apart(&outputs, &inputs, Some(&opened.checkpoint))?;

    // Everything that can be wrong with files is found before the first product.
    let mut jobs = Vec::with_capacity(entries.len());
    let mut tensors = Vec::new();
    for entry in entries {
        let layer = common.quantising(opened.load(entry)?)?;
        let dtype = opened.dtype(common.dtype, &layer);
        let input = input.layer(&layer.spec, dtype)?;
        let prefix = if single { String::new() } else { format!("layers.{}.", entry.spec.index) };
        let output_dtype = args.output_dtype.unwrap_or(dtype);
        let job = Job { entry, layer, dtype, output_dtype, input, prefix };
        tensors.extend(job.tensors());
        jobs.push(job);
    }
    let producer = concat!("moe-runner ", env!("CARGO_PKG_VERSION"));
    let writer = match ranks.reports() {
        true => Some(Writer::create(&args.output, &[("producer", producer)], &tensors)?),
        false => None,
    };
    // half a file is not left behind
    let writer = Arc::new(Mutex::new(writer));
    let unfinished = writer.clone();
    interrupt::before_the_end(move || drop(held(&unfinished).take()));

    let progress = Progress::new(jobs.len());
    let mut done = Vec::with_capacity(jobs.len());
    let mut trace = Trace::default();
    let mut routing = router::Trace::new();
    for job in jobs {
        progress.doing(job.layer.spec.name.clone());
        let source = args.input.display().to_string();
        let (output, spans) =
            job.run(common, &opened.checkpoint, &source, &ranks, &parallel, args.trace.is_some())?;
        trace.add(&job.layer.spec.name, &spans);
        if !args.allow_non_finite
            && let Some(at) = job.first_non_finite(&output)
        {
            // every rank has all outputs, and one of them speaks
            return match ranks.reports() {
                true => Err(job.non_finite(common, &opened.checkpoint, &output, at)),
                false => Ok(Report::silent(true)),
            };
        }
        if args.save_routing.is_some() {
            job.record(&output, &mut routing)?;
        }
        if let Some(writer) = held(&writer).as_mut() {
            done.push(job.write(&output, writer)?);
        }
        progress.step();
    }
    drop(progress);
    if ranks.reports() {
        common.tell_of_cache();
    }
    let Some(writer) = held(&writer).take() else { return Ok(Report::silent(true)) };
    writer.finish()?;
    if let Some(path) = &args.save_routing {
        routing.save(path)?;
    }
    if let Some(path) = &args.trace {
        trace.write(path)?;
    }
    let json = RunJson {
        checkpoint: args.checkpoint.display().to_string(),
        layers: done,
        output: args.output.display().to_string(),
    };
    Report::new(true, text(&json, tensors.len()), &json)
}

impl Job<'_> {
    fn spec(&self) -> &LayerSpec {
        &self.layer.spec
    }

    /// The tensors that the layer writes.
    fn tensors(&self) -> Vec<NewTensor> {
        let (tokens, hidden) = (self.input.tokens, self.spec().dims.hidden);
        let router = &self.spec().router;
        let stored = stored(self.output_dtype);
        let mut tensors = vec![
            ("output", stored, hidden),
            ("router_logits", Dtype::F32, router.logits()),
            ("topk_ids", Dtype::I32, router.top_k),
            ("topk_weights", Dtype::F32, router.top_k),
        ];
        if self.spec().shared.is_some() {
            tensors.push(("shared_output", stored, hidden));
        }
        let tensors = tensors.into_iter().map(|(name, dtype, width)| NewTensor {
            name: format!("{}{name}", self.prefix),
            dtype,
            shape: vec![tokens, width],
        });
        tensors.collect()
    }

    /// Runs the layer on all ranks; the spans are those of every rank, on a common timeline.
    fn run(
        &self,
        common: &Common,
        checkpoint: &Checkpoint,
        source: &str,
        ranks: &Ranks,
        parallel: &Parallel,
        traced: bool,
    ) -> Result<(BatchOutput, Vec<RankSpan>)> {
        let at = At::new(&self.spec().name, Step::Finish);
        let result = ranks.run(|groups| {
            let options = ranks.options(common, self.dtype, groups)?;
            let mut runner = ranks.runner(&self.layer, &options, groups, parallel)?;
            memory::ensure(
                ranks.in_this_process() * runner.workspace_bytes(self.input.tokens),
                &plural(self.input.tokens, "token"),
                "give fewer rows",
            )?;
            if !traced {
                return Ok((runner.forward(&self.input.batch())?, vec![]));
            }
            groups.world.barrier(at)?;
            let mut runner = runner.with_timeline(Timeline::since(Instant::now()));
            let output = runner.forward(&self.input.batch())?;
            let spans = trace::gather(groups, at, &output.spans)?;
            Ok((output, spans))
        });
        result.map_err(|error| match &error {
            Error::Input { what, .. } => {
                let about = format!("layer {}: {error}", self.spec().index);
                let own_logits = *what == "router logits" && self.input.router_logits.is_none();
                match own_logits.then(|| self.non_finite_weights(common, checkpoint)).flatten() {
                    Some(weights) => anyhow!(weights.to_string()).context(about),
                    // of the input, which does not know its file
                    None => anyhow!("{source}: {about}"),
                }
            }
            _ => error.into(),
        })
    }

    /// Weights of the router that are no numbers.
    fn non_finite_weights(&self, common: &Common, checkpoint: &Checkpoint) -> Option<Finding> {
        doctor::non_finite(checkpoint, self.entry, &self.layer, &[], &*common.pool)
    }

    /// Adds the experts that the tokens chose to `trace`, as one call.
    fn record(&self, done: &BatchOutput, trace: &mut router::Trace) -> Result<()> {
        let router = &self.spec().router;
        let ids = done.topk_ids.iter().map(|id| LogicalId(*id)).collect();
        let routing = Routing::from_parts(router.top_k, ids, done.topk_weights.clone())?;
        Ok(trace.record(&self.spec().name, router, &routing)?)
    }

    /// The first element of the output that is NaN or infinite as it would be written.
    fn first_non_finite(&self, done: &BatchOutput) -> Option<usize> {
        done.output.iter().position(|v| !self.output_dtype.round(*v).is_finite())
    }

    /// That element of the output, and where it comes from.
    fn non_finite(
        &self,
        common: &Common,
        checkpoint: &Checkpoint,
        done: &BatchOutput,
        at: usize,
    ) -> anyhow::Error {
        let (width, value) = (self.spec().dims.hidden, done.output[at]);
        let (token, column) = (at / width, at % width);
        let place = format!("layer {}: output[{token}, {column}]", self.spec().index);
        if value.is_finite() {
            let dtype = self.output_dtype.name();
            return anyhow!(
                "{place} is {value:e}, which {dtype} cannot hold: nothing is written; \
                 --output-dtype f32 holds it, --allow-non-finite writes infinity"
            );
        }
        let k = self.spec().router.top_k;
        let cause = nonfinite::cause(
            checkpoint,
            &self.layer,
            self.entry,
            &*common.pool,
            &self.input.hidden[token * width..][..width],
            &done.topk_ids[token * k..][..k],
        );
        anyhow!("token {token}, {cause}").context(format!(
            "{place} is {value}: nothing is written; --allow-non-finite writes it all the same"
        ))
    }

    fn write(&self, done: &BatchOutput, writer: &mut Writer) -> Result<LayerJson> {
        let spec = self.spec();
        let factor = weight_factor(spec);
        let ids: Vec<u8> = done.topk_ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let weights: Vec<f32> = done.topk_weights.iter().map(|w| w * factor).collect();
        let mut write =
            |name: &str, bytes: &[u8]| writer.write(&format!("{}{name}", self.prefix), bytes);
        write("router_logits", &to_bytes(&done.router_logits, ActivationDtype::F32))?;
        write("topk_ids", &ids)?;
        write("topk_weights", &to_bytes(&weights, ActivationDtype::F32))?;
        if let Some(shared) = &done.shared {
            write("shared_output", &to_bytes(shared, self.output_dtype))?;
        }
        write("output", &to_bytes(&done.output, self.output_dtype))?;
        Ok(LayerJson {
            layer: spec.index,
            name: spec.name.clone(),
            kernel: done.kernel,
            dtype: self.dtype.name(),
            seconds: done.time.as_secs_f64(),
            tokens: self.input.tokens,
            bytes_weights_read: done.weight_bytes,
            flops: done.flops,
        })
    }
}

/// What is behind the lock. A panic elsewhere, which has been reported, does not keep half a file.
fn held(writer: &Mutex<Option<Writer>>) -> std::sync::MutexGuard<'_, Option<Writer>> {
    writer.lock().unwrap_or_else(PoisonError::into_inner)
}

fn stored(dtype: ActivationDtype) -> Dtype {
    match dtype {
        ActivationDtype::F32 => Dtype::F32,
        ActivationDtype::Bf16 => Dtype::Bf16,
        ActivationDtype::F16 => Dtype::F16,
    }
}

/// `values` as stored in `dtype`: rounded, little-endian.
fn to_bytes(values: &[f32], dtype: ActivationDtype) -> Vec<u8> {
    match dtype {
        ActivationDtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        ActivationDtype::Bf16 => {
            values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()
        }
        ActivationDtype::F16 => {
            values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()
        }
    }
}

fn text(json: &RunJson, tensors: usize) -> String {
    let mut table = Columns::new(&[
        ">layer",
        "kernel",
        "dtype",
        ">tokens",
        ">time",
        ">weights read",
        ">GB/s",
        ">GFLOP/s",
    ]);
    // many layers that ran alike stand together
    let alike = |a: &LayerJson, b: &LayerJson| {
        json.layers.len() > IN_FULL
            && (a.kernel, a.dtype, a.tokens) == (b.kernel, b.dtype, b.tokens)
    };
    for group in json.layers.chunk_by(alike) {
        let layer = &group[0];
        let indices: Vec<usize> = group.iter().map(|layer| layer.layer).collect();
        let seconds: f64 = group.iter().map(|layer| layer.seconds).sum();
        let bytes: usize = group.iter().map(|layer| layer.bytes_weights_read).sum();
        let rate = |amount: f64| match layer.tokens {
            0 => "-".to_owned(),
            _ => format!("{:.2}", amount / seconds.max(1e-9) / 1e9),
        };
        table.row([
            ranges(&indices),
            layer.kernel.to_owned(),
            layer.dtype.to_owned(),
            layer.tokens.to_string(),
            units::seconds(seconds),
            units::bytes(bytes),
            rate(bytes as f64),
            rate(group.iter().map(|layer| layer.flops).sum()),
        ]);
    }
    format!("{table}\nwrote {}: {}", json.output, units::plural(tensors, "tensor"))
}
