"""Asks vLLM without a server: the log-probabilities of every probe, as `moe-runner acid read` takes them.

    moe-runner acid write acid
    python ask_vllm.py acid/mixtral-bf16 > mixtral.json
    moe-runner acid read mixtral.json
"""

import argparse
import contextlib
import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# the engine as it is; what it compiles on its way takes minutes, for one pass
os.environ.setdefault("VLLM_PLUGINS", "")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("checkpoint", help="a folder that `moe-runner acid write` wrote")
    arguments.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    arguments = arguments.parse_args()
    with open(f"{arguments.checkpoint}/probes.json") as file:
        probes = json.load(file)
    # vLLM writes its log to where the answer goes
    with contextlib.redirect_stdout(sys.stderr):
        import vllm

        llm = vllm.LLM(
            model=arguments.checkpoint, skip_tokenizer_init=True, dtype=arguments.dtype, enforce_eager=True,
            max_model_len=64, max_num_seqs=2, max_logprobs=-1, block_size=32,
        )
        prompt, tokens = probes["prompt"], probes["tokens"]
        # what is said at a token is what the position before it predicts
        said = llm.generate(
            [{"prompt_token_ids": prompt + prompt[:1]}],
            vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=tokens, detokenize=False),
        )[0].prompt_logprobs[1:]
    rows = [[row[token].logprob if token in row else None for token in range(tokens)] for row in said]
    engine = f"vllm {vllm.__version__}, {arguments.dtype}, {probes['form']}"
    print(json.dumps({"family": probes["family"], "engine": engine, "log_probabilities": rows[: len(prompt)]}))


if __name__ == "__main__":
    main()
