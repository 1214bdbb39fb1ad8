//! What help pages say beside the flags; lines of at most 80 columns.

pub(super) const ABOUT: &str = "\
Runs, checks, explains and times the mixture-of-experts layers of a checkpoint.

CHECKPOINT is a folder with config.json and *.safetensors, a repository of a
Hugging Face cache (models--ORG--NAME), or a .gguf file.
LAYERS are decoder layers by their index in the model: 3, or 3,5-9, or all.";

pub(super) const STATUS: &str = "\
Exit status: 0 done (and, for check, everything within bounds); 1 it ran and
something is wrong (a failed check, a bad checkpoint, bad input, a kernel that
cannot run the layer); 2 unusable arguments (an unknown flag, layer, kernel or
preset); 130 interrupted; 141 nobody reads the rest. With --json, an error is
an object too:
{\"error\": {\"kind\", \"message\", \"causes\"}}.";

pub(super) const CHECK: &str = "\
Each MoE layer: every expert present and finite, and what the doctor finds in
weights, scales and routing (docs/doctor.md); the chosen kernel's output and
routing against the float64 reference on the same inputs; time, share of this
machine's measured limits, and load of the experts. Layers are shown as they
are done; Ctrl-C shows what is known by then.

NMSE is |y - r|^2 / |r|^2. Its bound is 1e-11 for f32 activations, 1e-6 for
f16, 1e-5 for bf16, and 1e-4 where activations are quantised, by the checkpoint
or with --int8-activations, which the reference then does, too; emulation, which
rounds all intermediate results to 16 bits, has its own (docs/numerics.md).

--against takes a file of recordings (layers.N.TAG.x and layers.N.TAG.out, or
what `run` wrote), or another checkpoint of the same model: how far this one's
outputs are from that one's is told, not judged. Given both, the recording
lends its hidden states: random ones overstate what quantisation loses.

Examples:
  moe-runner check
  moe-runner check ./Qwen3-30B-A3B --layers 0,12-14
  moe-runner check model.gguf --tokens 64 --json
  moe-runner check ./model --layers 3 --input in.safetensors \\
    --against out.safetensors
  moe-runner check ./model-w4a16 --against ./model --against rec.safetensors
  moe-runner check ./model --dp 2 --tp 2 --ep";

pub(super) const RUN: &str = "\
IN holds hidden_states [T, H] (F32, F16 or BF16); optionally router_logits
[T, E], used in place of the gate, and input_ids [T], for layers that route by
token id. For several layers, layers.N.NAME is taken where present, else NAME.
Hidden states are rounded to the dtype of the activations, and the output is
rounded once, to its own.

OUT gets output [T, H], router_logits [T, E] F32, topk_ids [T, K] I32,
topk_weights [T, K] F32, and shared_output [T, H] where there are shared
experts; for several layers, each under layers.N. The file appears when it is
complete, or not at all; it is none of those that are read.

Examples:
  moe-runner run ./Qwen3-30B-A3B --layers 3 \\
    --input in.safetensors --output out.safetensors
  moe-runner run model.gguf --layers all \\
    --input in.safetensors --output out.safetensors --json
  moe-runner run ./model --layers 0-3 --dp 4 --ep \\
    --input in.safetensors --output out.safetensors
  mpirun -n 4 moe-runner run ./model --layers 0 --comm mpi --dp 2 --tp 2 \\
    --ep --input in.safetensors --output out.safetensors
  moe-runner run ./model --layers 0 --comm tcp --rendezvous host-a:29400 \\
    --rank 1 --dp 2 --ep --input in.safetensors --output out.safetensors";

pub(super) const INSPECT: &str = "\
Reads headers only; weights are not loaded. With --doctor, all of them are read.
Exit status 1 if tensors are missing, wrong, duplicate or unexpected, or the
doctor finds an error; with --strict, a warning.

Examples:
  moe-runner inspect ./Mixtral-8x7B-v0.1
  moe-runner inspect ./model --doctor --strict
  moe-runner inspect model.gguf --layers 0-3 --json";

pub(super) const EXPLAIN: &str = "\
Examples:
  moe-runner explain ./OLMoE-1B-7B
  moe-runner explain ./OLMoE-1B-7B --layers 3 --device cuda
  moe-runner explain model.gguf --int8-activations
  moe-runner explain ./OLMoE-1B-7B --machine avx2";

pub(super) const BENCH: &str = "\
Routing is random: each token goes to k experts, every set equally likely.
Weights of a preset are random too. A run that is not counted precedes those of
a row; then at least 5 runs, for a second. limit is the least time in which
this machine could read the weights or do the arithmetic, over the median. GB/s
are 10^9 bytes of weights read; GFLOP/s 10^9 operations, a multiply-add being
two. Split over ranks, a time is that of the slowest rank from a common start,
all else is over all ranks, and moved/token are the bytes that they send to
each other. With --compare, speed is the earlier median over this one, and a
difference is one only where the quartiles of both are apart.

Formats: f32, f16, bf16; with activations quantised: fp8 (a scale for each
channel; activations per token), fp8-tensor, fp8-block (128x128), int8 (as
fp8), mxfp4-w4a4, mxfp6-w6a6, mxfp8-w8a8, nvfp4-w4a4; weights only:
int8-weight, int4 (groups of 128), int4-g32, mxfp4, mxfp6, mxfp8, nvfp4; and
GGUF's types: q8_0, q5_0, q4_0, q6_k, q5_k, q4_k, q3_k, q2_k, iq4_nl, iq4_xs,
tq2_0, ...
Presets: qwen3-30b-a3b, qwen3-235b-a22b, mixtral-8x7b, olmoe-1b-7b,
deepseek-v2-lite, deepseek-v3, gpt-oss-20b, gpt-oss-120b.

Examples:
  moe-runner bench --preset qwen3-30b-a3b
  moe-runner bench --preset deepseek-v3 --format int4 --tokens 1,8,64
  moe-runner bench ./model --json > before.json
  moe-runner bench ./model --compare before.json
  moe-runner bench --preset olmoe-1b-7b --format q4_k --dp 2 --ep
  moe-runner bench --preset olmoe-1b-7b --format q4_k --int8-activations
  moe-runner bench ./OLMoE-1B-7B --layers 3 --kernel cpu_avx2 --json";

pub(super) const PLAN: &str = "\
Where the experts go when their load is balanced over the ranks, with copies of
the busiest ones; balance before (experts in order, copies of the first ones)
and after, as mean load of the ranks over the largest; bytes of weights on a
rank; bytes that collectives send for a token, for each way of splitting.
Nothing is run, and weights are not read. With --device cuda, weights are as the
kernels of a GPU hold them, and splits that do not fit its memory are marked.

The load is that of a recorded routing, all of it: a routing trace (docs/
routing-traces.md; `run --save-routing` writes one), or the topk_ids that `run`
writes. Without --trace it is random, as uneven as measured ones.

Examples:
  moe-runner plan ./DeepSeek-V3 --ranks 32 --redundant 32 --nodes 4
  moe-runner plan ./Qwen3-30B-A3B --ranks 8 --layers 3
  moe-runner plan ./gpt-oss-120b --ranks 2 --device cuda --machine sm90
  moe-runner plan model.gguf --ranks 4 --trace routing.safetensors --json";

pub(super) const REPORT: &str = "\
One page that needs nothing else: pictures of the load of the experts by layer,
its balance over ranks before and after experts are moved, the error of every
layer and expert, this machine's limits with each kernel as a point below them;
which kernel runs and why; what the doctor finds. Light or dark as the reader
has it, and fit to print. The numbers are those that `check`, `plan`, `explain`
and `bench` give with --json; with --json, report prints them all.

Without --trace, the load is that of the tokens that the layers are checked
with, and the balance is of a made-up load, as uneven as measured ones. Without
--bench, the roofline has the layers' own times. Exit status 1 if a layer is
wrong: the page is written all the same.

Examples:
  moe-runner report ./Qwen3-30B-A3B --output report.html
  moe-runner report ./model --trace routing.safetensors --ranks 16 \\
    --output report.html
  moe-runner bench ./model --layers 3 --json > bench.json
  moe-runner report ./model --bench bench.json --output report.html
  moe-runner report ./model-w4a16 --against ./model --output report.html";

pub(super) const QUANTIZE: &str = "\
Formats: fp8 (a scale for each channel; activations FP8 per token), fp8-block
(128x128; activations FP8 per 128 channels), int8 (as fp8, in INT8), w4a16
(INT4 in groups), nvfp4a16, mxfp4 (activations as they are). The copy has the
layout of compressed-tensors.

Tensors that are no expert's are copied as they are, and so are the files that
a model needs (tokenizer, chat template, generation config, code, licence). The
folder appears when it is complete, or not at all, and in the place of nothing;
--overwrite replaces a checkpoint's files in a folder, and leaves all others.

Examples:
  moe-runner quantize ./Qwen3-30B-A3B --format w4a16 --output ./out
  moe-runner quantize ./OLMoE-1B-7B --format fp8-block --output ./out \\
    --max-shard-size 2GB
  moe-runner quantize ./model --format mxfp4 --output ./out \\
    --ignore 're:.*shared_expert.*'
  moe-runner check ./out --against ./model";

pub(super) const ACID: &str = "\
Seven tiny checkpoints (DeepSeek-V3 and a twin with negative choices, gpt-oss,
Qwen2-MoE, Mixtral, Llama-4, Ernie-4.5) are built so that the log-probabilities
of one forward pass spell out what the block computed: each expert's weight,
the activation, the multiplier of the shared expert. A model of the block in
which every known mistake is a switch then names the mistakes that explain
them. What engines may choose (ties, rounding of logits) is a note.

Examples:
  moe-runner acid run
  moe-runner acid write ./acid --family mixtral,gpt_oss --form bf16
  moe-runner acid read said.json
  moe-runner acid self";
