"""The native classes, with numpy alone."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from inspect import signature

import numpy as np
import pytest

import moe_runner
from recorded import nmse, tensors, widen

# architecture by architecture, as far as layers are routed by their hidden states alone
CASES = ["deepseek_v3_bf16", "gpt_oss", "qwen3_moe_bf16", "llama4_published", "nemotron_h_latent"]
QUANTISED = ["gpt_oss_mxfp4", "quant_qwen3_moe_w4a16_asym", "quant_qwen3_moe_nvfp4a16"]


def call(golden, case, tokens=7):
    """The first recorded layer's number, and its tensors by name."""
    recorded = tensors(golden / case / "golden.safetensors")
    layer = min(int(name.split(".")[1]) for name in recorded if name.endswith(f".t{tokens}.x"))
    prefix = f"layers.{layer}.t{tokens}."
    return layer, {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}


@pytest.mark.parametrize("case", CASES + QUANTISED)
def test_a_layer_is_as_recorded(golden, case):
    index, want = call(golden, case)
    layer = moe_runner.Layer(golden / case, index, dtype="f32", threads=2)
    got = layer.forward(want["x"])
    assert nmse(got, want["out"]) < 1e-10
    assert (layer.layer, layer.hidden_size) == (index, want["x"].shape[1])
    # into memory of the caller's, with leading dimensions
    out = np.full((1, *want["x"].shape), np.nan, np.float32)
    assert layer.forward(want["x"][None], out) is out
    np.testing.assert_array_equal(out[0], got)


@pytest.mark.parametrize("case", ["qwen3_moe_bf16", "gpt_oss", *QUANTISED])
def test_experts_of_a_checkpoint_with_finished_routing(golden, case):
    index, want = call(golden, case)
    checkpoint = moe_runner.Checkpoint(golden / case)
    assert index in checkpoint.layers
    experts = moe_runner.Experts.open(checkpoint, index, dtype="f32", threads=2)
    ids, weights = want["topk_ids"], want["topk_weights"]
    got = experts.forward(want["x"], ids, weights)
    assert nmse(got, want["out"]) < 1e-10
    np.testing.assert_array_equal(experts.forward(want["x"], ids.astype(np.int32), weights), got)
    # slots that are not here: negative, one too many, far too many; whatever their weight
    for absent in (-1, experts.num_experts, 2**40):
        more = np.concatenate([ids, np.full((7, 1), absent)], axis=1)
        heavy = np.concatenate([weights, np.full((7, 1), 3, np.float32)], axis=1)
        np.testing.assert_array_equal(experts.forward(want["x"], more, heavy), got)
    layer = moe_runner.Layer(checkpoint, index, dtype="f32", threads=2)
    np.testing.assert_array_equal(layer.forward(want["x"], ids=ids, weights=weights), got)


def test_stacks_where_they_lie(golden):
    index, want = call(golden, "gpt_oss")
    stored = tensors(golden / "gpt_oss/model.safetensors")
    name = f"model.layers.{index}.mlp.experts."
    experts = moe_runner.Experts(
        widen(stored[name + "gate_up_proj"]),
        widen(stored[name + "down_proj"]),
        transposed=True,
        layout="interleaved",
        activation="clamped_swiglu",
        alpha=1.702,
        beta=1.0,
        limit=7.0,
        gate_up_bias=widen(stored[name + "gate_up_proj_bias"]),
        down_bias=widen(stored[name + "down_proj_bias"]),
        threads=2,
    )
    assert experts.dtype == "f32"
    assert nmse(experts.forward(want["x"], want["topk_ids"], want["topk_weights"]), want["out"]) < 1e-10
    assert "E=8" in repr(experts) or "8 of" in repr(experts)


def test_sixteen_bits(golden):
    index, want = call(golden, "qwen3_moe_bf16")
    layer = moe_runner.Layer(golden / "qwen3_moe_bf16", index, threads=2)
    assert layer.dtype == "bf16"
    # numpy has no bf16: its bits
    bits = (want["x"].view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(widen(bits), want["x"])
    got = layer.forward(bits)
    assert got.dtype == np.uint16
    assert nmse(widen(got), want["out"]) < 1e-5
    half = moe_runner.Layer(golden / "olmoe_f16", 0, threads=2)
    x = np.ones((3, half.hidden_size), np.float16)
    assert half.forward(x).dtype == np.float16


def test_what_is_wrong_is_said(golden):
    index, want = call(golden, "qwen3_moe_bf16")
    path = golden / "qwen3_moe_bf16"
    experts = moe_runner.Experts.open(path, index, dtype="f32", threads=1)
    x, ids, weights = want["x"], want["topk_ids"], want["topk_weights"]
    run = experts.forward

    def refused(words, function, *arguments, error=moe_runner.InputError, **keywords):
        with pytest.raises(error, match=words):
            function(*arguments, **keywords)

    refused("hidden: rows of 63", run, np.ascontiguousarray(x[:, :63]), ids, weights)
    refused("hidden: its elements do not lie", run, x[:, ::2], ids, weights)
    refused("hidden: float64; f32", run, x.astype(np.float64), ids, weights)
    refused("hidden: a list; a tensor", run, x.tolist(), ids, weights)
    refused("ids: float32; int64", run, x, weights, weights)
    refused("ids: 6 rows for 7 tokens", run, x, ids[:6], weights)
    refused("weights: of shape", run, x, ids, np.ascontiguousarray(weights[:, :2]))
    refused("out: of shape", run, x, ids, weights, x[:3].copy())
    shared = x.copy()
    refused("overlaps", run, shared, ids, weights, shared)
    frozen = np.zeros_like(x)
    frozen.flags.writeable = False
    refused("out: is read-only", run, x, ids, weights, frozen)
    bad = x.copy()
    bad[2, 5] = np.nan
    refused("row 2, column 5", run, bad, ids, weights)
    refused("99 is no MoE layer", moe_runner.Layer, path, 99)
    refused("-1 is no MoE layer", moe_runner.Layer, path, -1)
    refused("threads: -1; at least 1", moe_runner.Layer, path, index, threads=-1)
    refused("'f8'; there are f32", moe_runner.Layer, path, index, dtype="f8")
    refused("fastest", moe_runner.Layer, path, index, kernel="fastest", error=moe_runner.NoKernelError)
    refused("nowhere", moe_runner.Checkpoint, "/nowhere", error=moe_runner.CheckpointError)
    refused("down: its shape", moe_runner.Experts, np.ones((2, 4, 8), "f4"), np.ones((2, 8, 3), "f4"))
    assert issubclass(moe_runner.InputError, (moe_runner.Error, ValueError))
    # and it still runs
    assert nmse(run(x, ids, weights), want["out"]) < 1e-10


def test_a_bad_row_that_may_pass_spoils_no_other(golden):
    index, want = call(golden, "qwen3_moe_bf16")
    experts = moe_runner.Experts.open(
        golden / "qwen3_moe_bf16", index, dtype="f32", threads=2, non_finite="pass"
    )
    x, ids, weights = want["x"].copy(), want["topk_ids"], want["topk_weights"]
    clean = experts.forward(x, ids, weights)
    x[3] = np.nan
    got = experts.forward(x, ids, weights)
    np.testing.assert_array_equal(np.delete(got, 3, 0), np.delete(clean, 3, 0))


def test_other_threads_run_meanwhile():
    rng = np.random.default_rng(0)
    gate_up = rng.standard_normal((8, 1024, 512), np.float32)
    down = rng.standard_normal((8, 512, 512), np.float32)
    experts = moe_runner.Experts(gate_up, down, threads=1)
    x = rng.standard_normal((512, 512), np.float32)
    ids = rng.integers(0, 8, (512, 8))
    weights = np.full((512, 8), 0.125, np.float32)
    counted, inside = [0], threading.Event()

    def count():
        while not inside.is_set():
            counted[0] += 1
            time.sleep(0)

    other = threading.Thread(target=count)
    other.start()
    before = counted[0]
    out = np.empty_like(x)
    experts.forward(x, ids, weights, out)
    during = counted[0] - before
    inside.set()
    other.join()
    assert during > 0
    # several threads on one handle take turns, and get the same bits
    outs = [np.empty_like(x) for _ in range(4)]
    threads = [
        threading.Thread(target=experts.forward, args=(x, ids, weights, one)) for one in outs
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for one in outs:
        np.testing.assert_array_equal(one, out)


def test_weights_are_kept_by_nobody():
    import gc
    import weakref

    class Owned(np.ndarray):
        pass

    gate_up = np.ones((2, 8, 16), np.float32).view(Owned)
    down = np.ones((2, 16, 4), np.float32).view(Owned)
    gone = weakref.ref(gate_up)
    experts = moe_runner.Experts(gate_up, down, threads=1)
    del gate_up
    experts.forward(*[np.ones((1, 16), "f4"), np.zeros((1, 1), "i8"), np.ones((1, 1), "f4")])
    gc.collect()
    assert gone() is None


def test_commands_as_functions(golden, tmp_path):
    path = golden / "qwen3_moe_bf16"
    inspected = moe_runner.inspect(path)
    assert inspected["ok"] is False or inspected["moe_layers"] == [1, 3]
    explained = moe_runner.explain(path, layers=1, dtype="f32")
    layer = moe_runner.Layer(path, 1, dtype="f32")
    assert explained["layers"][0]["chosen"] == layer.kernel == layer.explain()["chosen"]
    checked = moe_runner.check(path, layers=[1, 3], timing=False, against=path / "golden.safetensors")
    assert checked["ok"], checked["verdict"]
    assert [one["layer"] for one in checked["layers"]] == [1, 3]
    # integers of any kind
    for layers in (np.int64(3), "3", [np.int32(3)], range(3, 4)):
        assert moe_runner.explain(path, layers=layers)["layers"][0]["layer"] == 3
    planned = moe_runner.plan(path, 4)
    assert planned["ranks"] == 4
    with pytest.raises(moe_runner.InputError, match="no such kernel"):
        moe_runner.check(path, kernel="fastest")
    with pytest.raises(moe_runner.CheckpointError):
        moe_runner.inspect("--nowhere")
    with pytest.raises(moe_runner.InputError):
        moe_runner.plan(path, 0)


def flags(command):
    """The long options of a command, as its help shows them."""
    asked = [sys.executable, "-m", "moe_runner", command, "--help"]
    text = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^ +(?:-\w, )?--([a-z0-9-]+)", text, re.MULTILINE)) - {"help", "json"}


def test_functions_have_the_options_of_the_commands():
    # ranks are the command's: as processes they are no function of one, as threads they only show
    ranks = (
        "tp dp ep pcp sequence-parallel dbo comm exchange row-format placement rank world rendezvous "
        "capacity through-host two-sided"
    ).split()
    for command in ("check", "inspect", "explain", "bench", "plan", "report", "quantize"):
        named = {
            name.replace("_", "-") for name in signature(getattr(moe_runner, command)).parameters
        } - {"checkpoint"}
        named = {{"timing": "no-timing", "layer": "layers"}.get(name, name) for name in named}
        assert named == flags(command) - set(ranks), command


def test_options_reach_the_commands(golden, tmp_path):
    path = golden / "qwen3_moe_bf16"
    ranked = moe_runner.plan(path, 4, device="cuda", machine="sm90", link=(350, 12), seed=3)
    assert ranked["gpus"]["machine"].startswith("sm90") and ranked["layers"][0]["kernel"]
    assert (ranked["link"]["gbps"], ranked["link"]["latency_us"]) == (350.0, 12.0)
    assert moe_runner.plan(path, 2, measure=True)["link"]["measured"] == 2
    examined = moe_runner.inspect(path, doctor=True, strict=True, threads=1)
    assert examined["findings"] == []
    elsewhere = moe_runner.explain(path, layers=1, machine="sm90", device="cuda")
    assert elsewhere["layers"][0]["chosen"].startswith("cuda_")
    timed = moe_runner.bench(path, layer=3, tokens=[1, 2], threads=1, kernel="cpu_portable")
    assert [row["tokens"] for row in timed["rows"]] == [1, 2]
    assert timed["kernel"] == "cpu_portable"
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(timed))
    page = tmp_path / "page.html"
    report = moe_runner.report(path, page, bench=file, timing=False, tokens=2, threads=1)
    assert page.read_text().startswith("<!") and report["check"]["ok"]
    cache = tmp_path / "packed"
    moe_runner.check(path, layers=1, timing=False, pack_cache=cache)
    assert list(cache.iterdir())


def test_a_function_can_be_interrupted(tiny_moe):
    def interrupt():
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    other = threading.Thread(target=interrupt)
    other.start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        moe_runner.bench(tiny_moe, tokens=[1] * 5000)
    assert time.monotonic() - begun < 30
    other.join()
    # and the next one is not
    assert moe_runner.inspect(tiny_moe)["ok"]


def test_a_device_is_had_or_refused(golden):
    path = golden / "qwen3_moe_bf16"
    assert moe_runner.Layer(path, 1, device="cpu").kernel.startswith("cpu_")
    with pytest.raises(moe_runner.InputError, match="'gpu'; there are auto, cpu, cuda"):
        moe_runner.Layer(path, 1, device="gpu")
    try:
        layer = moe_runner.Layer(path, 1, device="cuda", dtype="f32")
    except moe_runner.Error as error:
        # no driver, no GPU, or no compiler for it, in one line
        assert "NVIDIA" in str(error) or "GPU" in str(error), error
    else:
        index, want = call(golden, "qwen3_moe_bf16")
        assert layer.kernel.startswith("cuda_") and index == 1
        assert nmse(layer.forward(want["x"]), want["out"]) < 1e-10


def test_a_copy_with_four_bits(tiny_moe, tmp_path):
    written = moe_runner.quantize(tiny_moe, tmp_path / "copy", "w4a16", group_size=32)
    assert written
    experts = moe_runner.Experts.open(tmp_path / "copy", 0)
    assert any("int4" in text.lower() or "4" in text for text in experts.formats)
    assert experts.nbytes < moe_runner.Experts.open(tiny_moe, 0).nbytes / 3


def test_the_command_is_in_the_package(golden):
    def run(*arguments):
        command = [sys.executable, "-m", "moe_runner", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    asked = run("inspect", str(golden / "gpt_oss"), "--json")
    assert json.loads(asked.stdout) == moe_runner.inspect(golden / "gpt_oss")
    assert run("--version").stdout == f"moe-runner {moe_runner.__version__}\n"
    refused = run("check", "/nowhere")
    assert refused.returncode == 1 and refused.stderr.startswith("error: /nowhere")
    assert run("chek").returncode == 2
