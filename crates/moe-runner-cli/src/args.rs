//! The arguments: as written, and resolved.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use moe_kernels::isa::physical_cores;
use moe_kernels::pool::Pool;
use moe_runner::experts::{Device, KERNELS};
use moe_runner::hidden::ActivationDtype;
use moe_runner::oracle::Machine;
use moe_runner::runner::Options;

use crate::checkpoints::LayerChoice;
use crate::commands::quantize::size;
use crate::failure::{UNUSABLE, one_line, unusable};
use crate::splitting::Splitting;

/// More threads than any machine has.
const MAX_THREADS: usize = 4096;

const ABOUT: &str =
    "Runs, checks, explains and times the mixture-of-experts layers of a checkpoint.

CHECKPOINT is a folder with config.json and *.safetensors, or a .gguf file.";

const STATUS: &str = "Exit status: 0 done (and, for check, everything within bounds); 1 it ran and \
something is wrong (a failed check, a bad checkpoint, bad input, a kernel that cannot run the \
layer); 2 unusable arguments (an unknown flag, layer, kernel or preset); 130 interrupted.";

/// The whole command line.
#[derive(Parser, Debug)]
#[command(name = "moe-runner", version, about = ABOUT, after_help = STATUS, max_term_width = 100)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

/// The modes.
#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Is every layer right, and what does it do on this machine?
    #[command(after_help = CHECK_EXAMPLES)]
    Check(CheckArgs),
    /// Run layers on given hidden states, and write their outputs.
    #[command(after_help = RUN_EXAMPLES)]
    Run(RunArgs),
    /// Show what a checkpoint holds: layers, routing, formats, bytes, completeness.
    #[command(after_help = INSPECT_EXAMPLES)]
    Inspect(InspectArgs),
    /// Show which kernel runs each layer, why, and why not the others.
    #[command(after_help = EXPLAIN_EXAMPLES)]
    Explain(ExplainArgs),
    /// Time a layer against this machine's limits.
    #[command(after_help = BENCH_EXAMPLES)]
    Bench(BenchArgs),
    /// Show what splitting the layers over ranks would cost, before there are ranks.
    #[command(after_help = PLAN_EXAMPLES)]
    Plan(PlanArgs),
    /// Write a copy of a checkpoint with quantised experts.
    #[command(after_help = QUANTIZE_EXAMPLES)]
    Quantize(QuantizeArgs),
}

/// Flags that every command has.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Common options")]
pub(crate) struct CommonArgs {
    /// Print one JSON object on standard output, and nothing else there.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Threads to compute on [default: the physical cores that this process may use].
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
    /// Seed of everything random.
    #[arg(long, global = true, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// The kernel: auto, or a name that `explain` lists. A named kernel is used or refused, never
    /// replaced.
    #[arg(long, global = true, value_name = "NAME", default_value = "auto")]
    kernel: String,
    /// Where to compute: auto, cpu, cuda or cuda:N.
    #[arg(long, global = true, value_name = "DEVICE", default_value = "auto", value_parser = device)]
    device: DeviceChoice,
    /// Dtype of the activations: auto, f32, bf16 or f16. auto: f32 for a GGUF file; else that of the
    /// experts' weights where they are stored in one of these, else bf16.
    #[arg(long, global = true, value_name = "DTYPE", default_value = "auto", value_parser = dtype_or_auto)]
    dtype: DtypeChoice,
}

const CHECK_EXAMPLES: &str = "Each MoE layer: every expert present and finite; the chosen kernel's output and routing against the
float64 reference on the same inputs; time, share of this machine's measured limits, and load of the
experts. NMSE is |y - r|^2 / |r|^2; its bound is 1e-11 for f32 activations, 1e-6 for f16, 1e-5 for
bf16, and 1e-4 where activations are quantised; emulation, which rounds all intermediate results to
16 bits, has its own (docs/numerics.md).
--against takes a file with layers.N.TAG.x and layers.N.TAG.out, or one that `run` wrote; of another
checkpoint, it tells how far this one's outputs are from its outputs, without judging it.

Examples:
  moe-runner check
  moe-runner check ./Qwen3-30B-A3B --layers 0,12
  moe-runner check model.gguf --tokens 64 --json
  moe-runner check ./model --layers 3 --against out.safetensors --input in.safetensors
  moe-runner check ./model --dp 2 --tp 2 --ep";

const RUN_EXAMPLES: &str = "IN.safetensors holds hidden_states [T, H] (F32, F16 or BF16); optionally router_logits [T, E], used
in place of the gate, and input_ids [T], for layers that route by token id. With --layer all,
layers.N.NAME is taken where present, else NAME. Hidden states are rounded to the dtype of the
activations, and the output is rounded once, to its own.
OUT.safetensors gets output [T, H], router_logits [T, E] F32, topk_ids [T, K] I32, topk_weights
[T, K] F32, and shared_output [T, H] where there are shared experts; with --layer all, each under
layers.N. The file appears when it is complete, or not at all; it is none of those that are read.

Examples:
  moe-runner run ./Qwen3-30B-A3B --layer 3 --input in.safetensors --output out.safetensors
  moe-runner run model.gguf --layer all --input in.safetensors --output out.safetensors --json
  moe-runner run ./model --layer 0 --input in.safetensors --output out.safetensors --dtype f32
  moe-runner run ./model --layer 0 --input in.safetensors --output out.safetensors --dp 4 --ep
  mpirun -n 4 moe-runner run ./model --layer 0 --input in.safetensors --output out.safetensors \\
    --comm mpi --dp 2 --tp 2 --ep";

const INSPECT_EXAMPLES: &str = "Reads headers only; weights are not loaded. Exit status 1 if tensors are missing, wrong or duplicate.

Examples:
  moe-runner inspect ./Mixtral-8x7B-v0.1
  moe-runner inspect model.gguf --json";

const EXPLAIN_EXAMPLES: &str = "Examples:
  moe-runner explain ./OLMoE-1B-7B
  moe-runner explain ./OLMoE-1B-7B --layer 3 --device cuda
  moe-runner explain ./OLMoE-1B-7B --machine avx2";

const BENCH_EXAMPLES: &str = "Routing is random: each token goes to k experts, every set equally likely. Weights of a preset are
random too. A run that is not counted precedes those of a row; then at least 5 runs, for a second.
limit is the least time in which this machine could read the weights or do the arithmetic, over the
median. GB/s are 10^9 bytes of weights read; GFLOP/s 10^9 operations, a multiply-add being two.
Split over ranks, a time is that of the slowest rank from a common start, all else is over all ranks,
and moved/token are the bytes that they send to each other.
Formats: f32, f16, bf16; with activations quantised: fp8 (a scale for each channel; activations per
token), fp8-tensor, fp8-block (128x128), int8 (as fp8), mxfp4-w4a4, mxfp6-w6a6, mxfp8-w8a8,
nvfp4-w4a4; weights only: int8-weight, int4 (groups of 128), int4-g32, mxfp4, mxfp6, mxfp8, nvfp4;
and GGUF's types: q8_0, q5_0, q4_0, q6_k, q5_k, q4_k, q3_k, q2_k, iq4_nl, iq4_xs, tq2_0, ...
Presets: qwen3-30b-a3b, mixtral-8x7b, olmoe-1b-7b, deepseek-v2-lite, deepseek-v3, gpt-oss-20b,
gpt-oss-120b.

Examples:
  moe-runner bench --preset qwen3-30b-a3b
  moe-runner bench --preset deepseek-v3 --format int4 --tokens 1,8,64 --threads 8
  moe-runner bench --preset olmoe-1b-7b --format q4_k --dp 2 --ep
  moe-runner bench ./OLMoE-1B-7B --layer 3 --kernel cpu_avx2 --json";

const PLAN_EXAMPLES: &str = "Where the experts go when their load is balanced over the ranks, with copies of the busiest ones;
balance before (experts in order, copies of the first ones) and after, as mean load of the ranks
over the largest; bytes of weights on a rank; bytes that collectives send for a token, for each way
of splitting. Counted byte by byte for one batch: of the trace, or of random tokens with a load as
uneven as measured ones. Nothing is run, and weights are not read.
--trace takes a routing trace: a safetensors file with NAME.topk_ids for each layer.

Examples:
  moe-runner plan ./DeepSeek-V3 --ranks 32 --redundant 32 --nodes 4
  moe-runner plan ./Qwen3-30B-A3B --ranks 8 --layer 3
  moe-runner plan model.gguf --ranks 4 --trace routing.safetensors --json";

const QUANTIZE_EXAMPLES: &str = "Formats: fp8 (a scale for each channel; activations FP8 per token), fp8-block (128x128; activations
FP8 per 128 channels), int8 (as fp8, in INT8), w4a16 (INT4 in groups), nvfp4a16, mxfp4 (activations
as they are). The copy has the layout of compressed-tensors. Tensors that are no expert's are copied
as they are, and so are the files that a model needs (tokenizer, chat template, generation config,
code, licence). The folder appears when it is complete, or not at all, and in the place of nothing;
--overwrite replaces a checkpoint's files in a folder, and leaves all others.

Examples:
  moe-runner quantize ./Qwen3-30B-A3B --format w4a16 --output ./Qwen3-30B-A3B-w4a16
  moe-runner quantize ./OLMoE-1B-7B --format fp8-block --output ./out --max-shard-size 2GB
  moe-runner quantize ./model --format mxfp4 --output ./out --ignore 're:.*shared_expert.*'
  moe-runner check ./out --against ./model";

/// `check`
#[derive(clap::Args, Debug)]
pub(crate) struct CheckArgs {
    /// Folder with config.json and *.safetensors, or a .gguf file [default: a small checkpoint that
    /// is part of this program].
    pub(crate) checkpoint: Option<PathBuf>,
    /// Decoder layers by their index in the model, or `all` MoE layers.
    #[arg(long, value_name = "all|N,N", default_value = "all", allow_hyphen_values = true)]
    pub(crate) layers: LayerChoice,
    /// Tokens to compare the kernel with the reference on.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) tokens: usize,
    /// Only the verdict: leave out what measures the machine and the layers' speed.
    #[arg(long)]
    pub(crate) no_timing: bool,
    /// Compare with the outputs recorded in this safetensors file, too; or with the layers of the
    /// checkpoint in this folder, such as the one that this was quantised from.
    #[arg(long, value_name = "FILE|CHECKPOINT")]
    pub(crate) against: Option<PathBuf>,
    /// Take the hidden states from this safetensors file instead of random ones.
    #[arg(long, value_name = "FILE")]
    pub(crate) input: Option<PathBuf>,
    /// The tensor of the input file that holds the hidden states.
    #[arg(long, value_name = "NAME", default_value = "hidden_states")]
    pub(crate) input_name: String,
    #[command(flatten)]
    pub(crate) splitting: Splitting,
}

/// `run`
#[derive(clap::Args, Debug)]
pub(crate) struct RunArgs {
    /// Folder with config.json and *.safetensors, or a .gguf file.
    pub(crate) checkpoint: PathBuf,
    /// Index of the decoder layer in the model, or `all` MoE layers.
    #[arg(long, value_name = "N|all", allow_hyphen_values = true)]
    pub(crate) layer: LayerChoice,
    /// Safetensors file with the hidden states.
    #[arg(long, value_name = "FILE")]
    pub(crate) input: PathBuf,
    /// Safetensors file to write.
    #[arg(long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// The tensor of the input file that holds the hidden states.
    #[arg(long, value_name = "NAME", default_value = "hidden_states")]
    pub(crate) input_name: String,
    /// Dtype of the written output [default: that of the activations].
    #[arg(long, value_name = "DTYPE", value_parser = dtype)]
    pub(crate) output_dtype: Option<ActivationDtype>,
    /// Write outputs that hold NaN or infinity, too; else they are an error that says where they come
    /// from.
    #[arg(long)]
    pub(crate) allow_non_finite: bool,
    /// Also write a timeline of every rank, for chrome://tracing or ui.perfetto.dev.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) splitting: Splitting,
}

/// `inspect`
#[derive(clap::Args, Debug)]
pub(crate) struct InspectArgs {
    /// Folder with config.json and *.safetensors, or a .gguf file.
    pub(crate) checkpoint: PathBuf,
}

/// `explain`
#[derive(clap::Args, Debug)]
pub(crate) struct ExplainArgs {
    /// Folder with config.json and *.safetensors, or a .gguf file.
    pub(crate) checkpoint: PathBuf,
    /// Index of the decoder layer in the model, or `all` MoE layers.
    #[arg(long, value_name = "N|all", default_value = "all", allow_hyphen_values = true)]
    pub(crate) layer: LayerChoice,
    /// Choose for another machine: portable, avx2, avx512, or smNN, such as sm90, for a host with
    /// an NVIDIA GPU.
    #[arg(long, value_name = "NAME")]
    pub(crate) machine: Option<String>,
}

/// `bench`
#[derive(clap::Args, Debug)]
pub(crate) struct BenchArgs {
    /// Folder with config.json and *.safetensors, or a .gguf file.
    #[arg(conflicts_with = "preset")]
    pub(crate) checkpoint: Option<PathBuf>,
    /// Index of the decoder layer in the checkpoint [default: its first MoE layer].
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) layer: Option<LayerChoice>,
    /// Instead of a checkpoint: the shapes of a well-known model, with random weights.
    #[arg(long, value_name = "NAME")]
    pub(crate) preset: Option<String>,
    /// Number format of a preset's weights [default: the one that the model is published in].
    #[arg(long, value_name = "FMT")]
    pub(crate) format: Option<String>,
    /// Tokens of the batches, one row of the report each.
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "1,4,16,64,256")]
    pub(crate) tokens: Vec<usize>,
    #[command(flatten)]
    pub(crate) splitting: Splitting,
}

/// `plan`
#[derive(clap::Args, Debug)]
pub(crate) struct PlanArgs {
    /// Folder with config.json and *.safetensors, or a .gguf file.
    pub(crate) checkpoint: PathBuf,
    /// Ranks to split over.
    #[arg(long, value_name = "N")]
    pub(crate) ranks: usize,
    /// Copies of experts beyond one each [default: as few as make them divide over the ranks].
    #[arg(long, value_name = "R")]
    pub(crate) redundant: Option<usize>,
    /// Machines that the ranks are on, equally many on each.
    #[arg(long, value_name = "M", default_value_t = 1)]
    pub(crate) nodes: usize,
    /// A recorded routing, to take the load of the experts from.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Tokens of the batch whose traffic is counted.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub(crate) tokens: usize,
    /// Index of the decoder layer in the model, or `all` MoE layers.
    #[arg(long, value_name = "N|all", default_value = "all", allow_hyphen_values = true)]
    pub(crate) layer: LayerChoice,
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
}

/// A device as the user names it.
#[derive(Clone, Copy, Debug)]
struct DeviceChoice(Option<Device>);

/// A dtype as the user names it; `None` is auto.
#[derive(Clone, Copy, Debug)]
struct DtypeChoice(Option<ActivationDtype>);

fn device(text: &str) -> Result<DeviceChoice, String> {
    let known = match text.split_once(':') {
        None => match text {
            "auto" => Some(None),
            "cpu" => Some(Some(Device::Cpu)),
            "cuda" => Some(Some(Device::Cuda)),
            _ => None,
        },
        // Which of several GPUs: no kernel of this build runs on any.
        Some(("cuda", number)) => number.parse::<u32>().ok().map(|_| Some(Device::Cuda)),
        Some(_) => None,
    };
    known.map(DeviceChoice).ok_or_else(|| "devices are auto, cpu, cuda and cuda:N".into())
}

fn dtype(text: &str) -> Result<ActivationDtype, String> {
    [ActivationDtype::F32, ActivationDtype::Bf16, ActivationDtype::F16]
        .into_iter()
        .find(|dtype| dtype.name() == text)
        .ok_or_else(|| "dtypes are f32, bf16 and f16".into())
}

fn dtype_or_auto(text: &str) -> Result<DtypeChoice, String> {
    match text {
        "auto" => Ok(DtypeChoice(None)),
        _ => dtype(text)
            .map(|dtype| DtypeChoice(Some(dtype)))
            .map_err(|_| "dtypes are auto, f32, bf16 and f16".into()),
    }
}

impl Args {
    /// Parses the command line; otherwise the exit status, after help or one line of what is wrong.
    pub(crate) fn read() -> Result<Self, ExitCode> {
        Self::try_parse().map_err(|error| {
            if !error.use_stderr() {
                // a closed pipe is no failure
                let _ = error.print();
                return ExitCode::SUCCESS;
            }
            let text = error.render().to_string();
            let message = text.split("\n\nUsage").next().unwrap_or_default();
            let message = message.split("\n\nFor more").next().unwrap_or_default();
            let words: Vec<&str> = message.split_whitespace().collect();
            eprintln!("{} (moe-runner --help tells more)", one_line(&words.join(" ")));
            ExitCode::from(UNUSABLE)
        })
    }
}

/// The flags that every command has, checked and turned into what they stand for.
pub(crate) struct Common {
    /// Seed of everything random.
    pub(crate) seed: u64,
    /// `None`: auto.
    pub(crate) kernel: Option<String>,
    /// `None`: auto.
    pub(crate) device: Option<Device>,
    /// `None`: auto.
    pub(crate) dtype: Option<ActivationDtype>,
    /// The threads to compute on.
    pub(crate) pool: Arc<Pool>,
}

impl Common {
    /// Checks the flags, and starts the threads.
    pub(crate) fn resolve(args: &CommonArgs) -> Result<Self> {
        let threads = args.threads.unwrap_or_else(physical_cores);
        if !(1..=MAX_THREADS).contains(&threads) {
            return Err(unusable(format!("--threads {threads}: must be 1 to {MAX_THREADS}")));
        }
        let kernel = (args.kernel != "auto").then(|| args.kernel.clone());
        if let Some(name) = &kernel
            && !KERNELS.iter().any(|kernel| kernel.name == name)
        {
            let names: Vec<&str> = KERNELS.iter().map(|kernel| kernel.name).collect();
            return Err(unusable(format!(
                "--kernel {name}: no such kernel; there are {}",
                names.join(", ")
            )));
        }
        Ok(Self {
            seed: args.seed,
            kernel,
            device: args.device.0,
            dtype: args.dtype.0,
            pool: Arc::new(Pool::new(threads).context("cannot start threads; try --threads 1")?),
        })
    }

    /// The library's options, for activations in `dtype`.
    pub(crate) fn options(&self, dtype: ActivationDtype) -> Options {
        Options {
            dtype,
            kernel: self.kernel.clone(),
            device: self.device,
            pool: self.pool.clone(),
            machine: Machine::detect(),
        }
    }
}
