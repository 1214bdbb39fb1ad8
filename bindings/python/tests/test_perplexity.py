"""What a language model loses in every format: ours as the copy is stored, against PyTorch with the same
numbers decoded, and against the recording."""

import json
import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, logging

import decoded
import moe_runner
import moe_runner.transformers as moe
from recorded import nmse

logging.set_verbosity_error()
logging.disable_progress_bar()

FORMATS = {
    "int8": {},
    "fp8": {},
    "fp8-block": {},
    "w4a16": {"group_size": 32},
    "nvfp4a16": {},
    "mxfp4": {},
}


def losses(model, passages):
    """The mean loss of each passage."""
    found = []
    with torch.inference_mode():
        for passage in passages:
            ids = torch.tensor([passage])
            logits = model(ids).logits[0, :-1].double()
            found.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item())
    return found


def deviation(got, want):
    """Of perplexities, relative, from mean losses."""
    return math.exp(sum(got) / len(got) - sum(want) / len(want)) - 1


@pytest.fixture(scope="module")
def domains(tiny_moe):
    return json.loads((tiny_moe / "eval.json").read_text())["domains"]


@pytest.fixture(scope="module")
def texts(domains):
    """A passage of each domain."""
    return [domain["passages"][0] for domain in domains.values()]


def load(path, **more):
    return moe.load(AutoModelForCausalLM, path, dtype=torch.float32, **more)


def truth(tiny_moe, path, rows=None):
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32).eval()
    decoded.fill(model, path, rows)
    return model


def test_f32_is_as_recorded(tiny_moe, domains):
    model, report = load(tiny_moe)
    for name, domain in domains.items():
        assert abs(deviation(losses(model, domain["passages"]), [domain["loss_f32"]])) < 1e-5, name
    assert report.calls == 4 * sum(len(domain["passages"]) for domain in domains.values())


def test_bf16_is_as_recorded(tiny_moe, domains):
    """In bf16 the rest of the model rounds as well, and a text of 2044 tokens feels it: transformers'
    own choices of attention and experts are up to 2.5e-3 from each other on one domain. All domains
    together are steadier."""
    model, _ = moe.load(
        AutoModelForCausalLM, tiny_moe, dtype=torch.bfloat16, attn_implementation="eager"
    )
    got = [sum(found) / 4 for found in (losses(model, d["passages"]) for d in domains.values())]
    want = [domain["loss_bf16"] for domain in domains.values()]
    assert all(abs(deviation([a], [b])) < 3e-3 for a, b in zip(got, want))
    assert abs(deviation(got, want)) < 1e-3


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_as_decoded(tiny_moe, tmp_path, texts, name):
    path = tmp_path / name
    moe_runner.quantize(tiny_moe, path, name, **FORMATS[name])
    if name in decoded.ROWS:
        rounded_rows(tiny_moe, path, texts, name)
        ask_for_no_rounding(path)
    model, report = load(path)
    got = losses(model, texts)
    assert report.calls == 4 * len(texts)
    assert abs(deviation(got, losses(truth(tiny_moe, path), texts))) < 1e-5
    # the formats lose something, so that a pass over other weights would be seen
    assert abs(deviation(got, losses(truth(tiny_moe, tiny_moe), texts))) > 2e-5


def rounded_rows(tiny_moe, path, texts, name):
    """Of a format that rounds the rows, too: a row whose rounding hangs by a hair goes the other way
    after other sums, and the next layers take it further. One layer is exact, the model is close."""
    want = truth(tiny_moe, path, rows=name)
    torch.manual_seed(0)
    x, experts = torch.randn(64, 256), want.model.layers[1].mlp.experts
    ids, weights = torch.rand(64, 16).topk(4).indices, torch.rand(64, 4)
    with torch.inference_mode():
        out = experts(x, ids, weights)
    got = moe_runner.Experts.open(path, 1, dtype="f32").forward(x, ids, weights)
    of_rows = sorted(nmse(a, b) for a, b in zip(got.numpy(), out.numpy()))
    assert of_rows[32] < 1e-11, "half of the rows are rounded the same"
    model, _ = load(path)
    assert abs(deviation(losses(model, texts), losses(want, texts))) < 1e-3


def ask_for_no_rounding(path):
    config = json.loads((path / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        assert group.pop("input_activations")["dynamic"]
    (path / "config.json").write_text(json.dumps(config))
