//! The arguments, as written.

pub(crate) mod common;
mod help;

pub(crate) use common::{
    Common, DeviceChoice, DtypeArg, HostArgs, KernelArgs, SeedArg, ThreadArgs,
};

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use moe_runner::hidden::ActivationDtype;
use moe_runner::parallel::links::LinkSpeed;

use crate::choice::{LayerChoice, size};
use crate::failure;
use crate::splitting::{Meeting, Splitting};

/// The whole command line.
#[derive(Parser, Debug)]
#[command(name = "moe-runner", version, about = help::ABOUT, after_help = help::STATUS)]
#[command(max_term_width = 80, arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Print one JSON object on standard output, and nothing else there.
    #[arg(long, global = true, help_heading = "Common options")]
    pub(crate) json: bool,
}

/// The modes.
#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Is every layer right, and what does it do on this machine?
    #[command(after_help = help::CHECK)]
    Check(CheckArgs),
    /// Run layers on given hidden states, and write their outputs.
    #[command(after_help = help::RUN)]
    #[command(override_usage = "moe-runner run CHECKPOINT --layers LAYERS --input IN --output OUT")]
    Run(RunArgs),
    /// Show what a checkpoint holds: layers, routing, formats, bytes, completeness.
    #[command(after_help = help::INSPECT)]
    Inspect(InspectArgs),
    /// Show which kernel runs each layer, why, and why not the others.
    #[command(after_help = help::EXPLAIN)]
    Explain(ExplainArgs),
    /// Time a layer against this machine's limits.
    #[command(after_help = help::BENCH)]
    Bench(BenchArgs),
    /// Show what splitting the layers over ranks would cost, before there are ranks.
    #[command(after_help = help::PLAN)]
    Plan(PlanArgs),
    /// Draw what is known of the layers: one page, for a browser or a printer.
    #[command(after_help = help::REPORT)]
    #[command(override_usage = "moe-runner report CHECKPOINT --output FILE.html")]
    Report(ReportArgs),
    /// Write a copy of a checkpoint with quantised experts.
    #[command(after_help = help::QUANTIZE)]
    #[command(override_usage = "moe-runner quantize CHECKPOINT --format FORMAT --output FOLDER")]
    Quantize(QuantizeArgs),
    /// Test what any engine's MoE block computes, from log-probabilities alone.
    #[command(after_help = help::ACID)]
    Acid(crate::commands::acid::AcidArgs),
}

/// `check`
#[derive(clap::Args, Debug)]
pub(crate) struct CheckArgs {
    /// Folder with config.json and *.safetensors, or a .gguf file [default: a small checkpoint that
    /// is part of this program].
    pub(crate) checkpoint: Option<PathBuf>,
    /// Layers: 3, or 3,5-9, or all MoE layers.
    #[arg(long, visible_alias = "layer", value_name = "LAYERS", default_value = "all")]
    #[arg(allow_hyphen_values = true)]
    pub(crate) layers: LayerChoice,
    /// Tokens to compare the kernel with the reference on.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) tokens: usize,
    /// Only the verdict: leave out what measures the machine and the layers' speed.
    #[arg(long)]
    pub(crate) no_timing: bool,
    /// Let warnings of the doctor, too, make the exit status 1.
    #[arg(long)]
    pub(crate) strict: bool,
    /// Compare with the outputs recorded in this safetensors file, too; or with the layers of the
    /// checkpoint in this folder, such as the one that this was quantised from. May be given once for
    /// each.
    #[arg(long, value_name = "FILE|CHECKPOINT")]
    pub(crate) against: Vec<PathBuf>,
    /// Take the hidden states from this safetensors file (- is standard input) instead of recorded or
    /// random ones.
    #[arg(long, value_name = "FILE")]
    pub(crate) input: Option<PathBuf>,
    /// The tensor of the input file that holds the hidden states.
    #[arg(long, value_name = "NAME", default_value = "hidden_states")]
    pub(crate) input_name: String,
    #[command(flatten)]
    pub(crate) splitting: Splitting,
    #[command(flatten)]
    pub(crate) kernel: KernelArgs,
    #[command(flatten)]
    pub(crate) host: HostArgs,
    #[command(flatten)]
    pub(crate) seed: SeedArg,
}

/// `run`
#[derive(clap::Args, Debug)]
pub(crate) struct RunArgs {
    /// Folder with config.json and *.safetensors, or a .gguf file.
    pub(crate) checkpoint: PathBuf,
    /// Layers: 3, or 3,5-9, or all MoE layers.
    #[arg(long, visible_alias = "layer", value_name = "LAYERS")]
    #[arg(allow_hyphen_values = true)]
    pub(crate) layers: LayerChoice,
    /// Safetensors file with the hidden states; - is standard input.
    #[arg(long, value_name = "IN")]
    pub(crate) input: PathBuf,
    /// Safetensors file to write.
    #[arg(long, value_name = "OUT")]
    pub(crate) output: PathBuf,
    /// The tensor of the input file that holds the hidden states.
    #[arg(long, value_name = "NAME", default_value = "hidden_states")]
    pub(crate) input_name: String,
    /// Dtype of the written output [default: that of the activations].
    #[arg(long, value_name = "DTYPE", value_parser = common::dtype)]
    pub(crate) output_dtype: Option<ActivationDtype>,
    /// Write outputs that hold NaN or infinity, too; else they are an error that says where they come
    /// from.
    #[arg(long)]
    pub(crate) allow_non_finite: bool,
    /// Also write which experts the tokens chose, as a routing trace (docs/routing-traces.md) that `plan`
    /// and replay read.
    #[arg(long, value_name = "FILE")]
    pub(crate) save_routing: Option<PathBuf>,
    /// Also write a timeline of every rank, for chrome://tracing or ui.perfetto.dev.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) splitting: Splitting,
    #[command(flatten)]
    pub(crate) kernel: KernelArgs,
    #[command(flatten)]
    pub(crate) host: HostArgs,
}

/// Layers of a checkpoint, all if none are named.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct LayersOf {
    /// Folder with config.json and *.safetensors, or a .gguf file.
    pub(crate) checkpoint: PathBuf,
    /// Layers: 3, or 3,5-9, or all MoE layers.
    #[arg(long, visible_alias = "layer", value_name = "LAYERS", default_value = "all")]
    #[arg(allow_hyphen_values = true)]
    pub(crate) layers: LayerChoice,
}

/// `inspect`
#[derive(clap::Args, Debug)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    pub(crate) of: LayersOf,
    /// Also read every weight and scale, and say what is hardly meant: experts of zeros, copies, wrong
    /// scales, a router that does not route, files that end in zeros (docs/doctor.md).
    #[arg(long)]
    pub(crate) doctor: bool,
    /// Let warnings of the doctor, too, make the exit status 1.
    #[arg(long)]
    pub(crate) strict: bool,
    #[command(flatten)]
    pub(crate) threads: ThreadArgs,
}

/// `explain`
#[derive(clap::Args, Debug)]
pub(crate) struct ExplainArgs {
    #[command(flatten)]
    pub(crate) of: LayersOf,
    /// Choose for another machine: portable, avx2, avx512, avx512_vnni, avx512_bf16, amx_bf16, or smNN,
    /// such as sm90, for a host with an NVIDIA GPU.
    #[arg(long, value_name = "NAME")]
    pub(crate) machine: Option<String>,
    #[command(flatten)]
    pub(crate) kernel: KernelArgs,
}

/// `bench`
#[derive(clap::Args, Debug)]
pub(crate) struct BenchArgs {
    /// Folder with config.json and *.safetensors, or a .gguf file.
    #[arg(conflicts_with = "preset")]
    pub(crate) checkpoint: Option<PathBuf>,
    /// The layer of the checkpoint [default: its first MoE layer].
    #[arg(long, visible_alias = "layer", value_name = "N", allow_hyphen_values = true)]
    pub(crate) layers: Option<LayerChoice>,
    /// Instead of a checkpoint: the shapes of a well-known model, with random weights.
    #[arg(long, value_name = "NAME")]
    pub(crate) preset: Option<String>,
    /// Number format of a preset's weights [default: the one that the model is published in].
    #[arg(long, value_name = "FMT")]
    pub(crate) format: Option<String>,
    /// Tokens of the batches, one row of the report each.
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "1,4,16,64,256")]
    pub(crate) tokens: Vec<usize>,
    /// Show the times beside earlier ones of the same layer: a file that `bench --json` wrote.
    #[arg(long, value_name = "FILE")]
    pub(crate) compare: Option<PathBuf>,
    /// Also draw the times over the tokens, with what memory and arithmetic allow, as a picture.
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) svg: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) splitting: Splitting,
    #[command(flatten)]
    pub(crate) kernel: KernelArgs,
    #[command(flatten)]
    pub(crate) host: HostArgs,
    #[command(flatten)]
    pub(crate) seed: SeedArg,
}

/// `plan`
#[derive(clap::Args, Debug)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) of: LayersOf,
    /// Ranks to split over.
    #[arg(long, value_name = "N")]
    pub(crate) ranks: usize,
    /// Copies of experts beyond one each [default: as few as make them divide over the ranks].
    #[arg(long, value_name = "R")]
    pub(crate) redundant: Option<usize>,
    /// Machines that the ranks are on, equally many on each.
    #[arg(long, value_name = "M", default_value_t = 1)]
    pub(crate) nodes: usize,
    /// A recorded routing, to take the load of the experts from: a routing trace, or what `run` wrote.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Measure how fast the ranks of --comm reach each other, on this machine, and say how long the collectives of
    /// each split take.
    #[arg(long, conflicts_with = "link")]
    pub(crate) measure: bool,
    /// How fast ranks reach each other, where they cannot be had: 10⁹ bytes a second that one sends, and microseconds
    /// of an exchange without content.
    #[arg(long, value_name = "GBPS,US", value_parser = link)]
    pub(crate) link: Option<LinkSpeed>,
    #[command(flatten)]
    pub(crate) meeting: Meeting,
    /// Tokens to count [default: all of a trace; 1024 random ones].
    #[arg(long, value_name = "N")]
    pub(crate) tokens: Option<usize>,
    /// What a rank computes on: auto, cpu, or cuda: an NVIDIA GPU like this machine's, or like cuda:N. auto is the
    /// processor.
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = common::device)]
    pub(crate) device: DeviceChoice,
    /// With --device cuda: the GPUs' architecture, where there is none here, such as sm90.
    #[arg(long, value_name = "NAME")]
    pub(crate) machine: Option<String>,
    #[command(flatten)]
    pub(crate) dtype: DtypeArg,
    #[command(flatten)]
    pub(crate) seed: SeedArg,
}

/// A link as people write it: rate and latency.
fn link(text: &str) -> Result<LinkSpeed, String> {
    let number = |text: &str| text.parse().ok().filter(|v: &f64| v.is_finite() && *v >= 0.0);
    let both = text.split_once(',').and_then(|(rate, time)| Some((number(rate)?, number(time)?)));
    match both {
        Some((gbps, latency_us)) if gbps > 0.0 => Ok(LinkSpeed { latency_us, gbps }),
        _ => Err("is no rate and latency, such as 350,12".into()),
    }
}

/// `report`
#[derive(clap::Args, Debug)]
pub(crate) struct ReportArgs {
    #[command(flatten)]
    pub(crate) of: LayersOf,
    /// The page to write.
    #[arg(long, value_name = "FILE.html")]
    pub(crate) output: PathBuf,
    /// A recorded routing, for the load of the experts and its balance: a routing trace, or what `run`
    /// wrote.
    #[arg(long, value_name = "ROUTING")]
    pub(crate) trace: Option<PathBuf>,
    /// What `bench --json` wrote, for the roofline. May be given several times: each is a series of
    /// points.
    #[arg(long, value_name = "FILE")]
    pub(crate) bench: Vec<PathBuf>,
    /// As of `check`: recorded outputs, or the checkpoint that this was quantised from.
    #[arg(long, value_name = "FILE|CHECKPOINT")]
    pub(crate) against: Vec<PathBuf>,
    /// Take the hidden states from this safetensors file instead of recorded or random ones.
    #[arg(long, value_name = "FILE")]
    pub(crate) input: Option<PathBuf>,
    /// Tokens to compare the kernel with the reference on.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) tokens: usize,
    /// Leave out what measures the machine and the layers' speed.
    #[arg(long)]
    pub(crate) no_timing: bool,
    /// Ranks that the load is balanced over.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(crate) ranks: usize,
    /// Copies of experts beyond one each [default: as few as make them divide over the ranks].
    #[arg(long, value_name = "R")]
    pub(crate) redundant: Option<usize>,
    #[command(flatten)]
    pub(crate) kernel: KernelArgs,
    #[command(flatten)]
    pub(crate) threads: ThreadArgs,
    #[command(flatten)]
    pub(crate) seed: SeedArg,
}

impl ReportArgs {
    /// What `check` is asked.
    pub(crate) fn check(&self) -> CheckArgs {
        CheckArgs {
            checkpoint: Some(self.of.checkpoint.clone()),
            layers: self.of.layers.clone(),
            tokens: self.tokens,
            no_timing: self.no_timing,
            strict: false,
            against: self.against.clone(),
            input: self.input.clone(),
            input_name: "hidden_states".into(),
            splitting: Splitting::none(),
            kernel: self.kernel.clone(),
            host: self.threads.clone().into(),
            seed: self.seed,
        }
    }

    /// What `plan` is asked.
    pub(crate) fn plan(&self) -> PlanArgs {
        PlanArgs {
            of: self.of.clone(),
            ranks: self.ranks,
            redundant: self.redundant,
            measure: false,
            link: None,
            meeting: Splitting::none().meeting(),
            nodes: 1,
            trace: self.trace.clone(),
            tokens: None,
            device: DeviceChoice::AUTO,
            machine: None,
            dtype: self.kernel.dtype.clone(),
            seed: self.seed,
        }
    }

    /// What `explain` is asked.
    pub(crate) fn explain(&self) -> ExplainArgs {
        ExplainArgs { of: self.of.clone(), machine: None, kernel: self.kernel.clone() }
    }
}

/// `quantize`
#[derive(clap::Args, Debug)]
pub(crate) struct QuantizeArgs {
    /// Folder with config.json and *.safetensors, in F32, F16 or BF16.
    pub(crate) checkpoint: PathBuf,
    /// Number format of the experts: fp8, fp8-block, int8, w4a16, nvfp4a16 or mxfp4.
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: String,
    /// Weights that share a scale, for w4a16 [default: 128].
    #[arg(long, value_name = "N")]
    pub(crate) group_size: Option<usize>,
    /// The folder to write.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) output: PathBuf,
    /// Most bytes of tensors in a file.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size)]
    pub(crate) max_shard_size: u64,
    /// Experts to leave as they are: the full names of their modules, or re: and an expression.
    #[arg(long, value_name = "PATTERN")]
    pub(crate) ignore: Vec<String>,
    /// Replace the checkpoint in the output folder: its weights, index and config.json, and what the
    /// copy has too. Other files stay.
    #[arg(long)]
    pub(crate) overwrite: bool,
    #[command(flatten)]
    pub(crate) threads: ThreadArgs,
}

impl Args {
    /// Parses the command line, the program's name first.
    pub(crate) fn parse(
        args: impl IntoIterator<Item = OsString>,
    ) -> Result<Self, clap::error::Error> {
        // a number below zero is an argument's value, not a flag that nobody knows
        let mut command = Self::command();
        command = command.mut_subcommands(|command| command.allow_negative_numbers(true));
        let matches = command.try_get_matches_from_mut(args)?;
        Self::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
    }

    /// Parses the command line; otherwise the exit status, after help or one line of what is wrong.
    pub(crate) fn read(args: impl IntoIterator<Item = OsString>) -> Result<Self, u8> {
        let args: Vec<OsString> = args.into_iter().collect();
        let json = args.iter().any(|arg| arg == "--json");
        Self::parse(args).map_err(|error| {
            if !error.use_stderr() {
                // a closed pipe is no failure
                let _ = error.print();
                return failure::SUCCESS;
            }
            // nothing at all was asked for: what can be
            if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
                let _ = error.print();
                return failure::UNUSABLE;
            }
            let message = format!("{} (moe-runner --help tells more)", message(&error));
            failure::print(&failure::unusable(message), json)
        })
    }
}

/// What is wrong with the arguments, in one line.
pub(crate) fn message(error: &clap::error::Error) -> String {
    let text = error.render().to_string();
    let message = text.split("\n\nUsage").next().unwrap_or_default();
    let message = message.split("\n\nFor more").next().unwrap_or_default();
    let message = message.strip_prefix("error: ").unwrap_or(message);
    // a suggestion stands in a paragraph of its own
    let parts = message.split("\n\n").map(|part| {
        let part = part.trim().strip_prefix("tip: ").unwrap_or(part);
        part.split_whitespace().collect::<Vec<&str>>().join(" ")
    });
    let message = parts.collect::<Vec<_>>().join("; ");
    // what the standard library says of a text that is no number
    message.replace("invalid digit found in string", "is no whole number")
}
