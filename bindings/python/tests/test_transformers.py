"""transformers alone, transformers with our experts, and what was recorded; and that ours ran."""

import copy
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, logging

import decoded
import families
import moe_runner
import moe_runner.transformers as moe
from recorded import nmse

logging.set_verbosity_error()
logging.disable_progress_bar()


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits[0].float().numpy()


def greedy(model, ids, count):
    with torch.no_grad():
        out = model.generate(
            ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def recorded(tiny_moe):
    return json.loads((tiny_moe / "eval.json").read_text())


@pytest.fixture(scope="module")
def alone(tiny_moe):
    return AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32).eval()


def by_attach(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, moe.attach(model)


def by_checkpoint(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, moe.attach(model, path)


def by_load(path):
    return moe.load(AutoModelForCausalLM, path, dtype=torch.float32)


def by_block(path):
    return moe.load(AutoModelForCausalLM, path, router=True, dtype=torch.float32)


@pytest.mark.parametrize("way", [by_attach, by_checkpoint, by_load, by_block])
def test_a_language_model_says_what_it_said(tiny_moe, recorded, alone, way):
    model, report = way(tiny_moe)
    assert [taken.name for taken in report.modules] == [
        f"model.layers.{n}.mlp" + ("" if way is by_block else ".experts") for n in range(4)
    ]
    for one in recorded["greedy"][:3]:
        ids = torch.tensor([one["prompt_ids"]])
        assert nmse(logits(model, ids), logits(alone, ids)) < 1e-10
        assert greedy(model, ids, len(one["greedy_ids"])) == one["greedy_ids"]
    assert report.calls == 4 * 3 * (1 + 48)
    # nothing of the experts is left in PyTorch
    assert not any(
        "experts" in name and parameter.device.type != "meta"
        for name, parameter in model.named_parameters()
    )
    assert "moe-runner runs 4 MoE modules" in str(report)


def test_the_setting_takes_experts_at_their_first_pass(tiny_moe, alone):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_moe, dtype=torch.float32, experts_implementation="moe_runner"
    ).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    want = logits(alone, ids)
    assert nmse(logits(model, ids), want) < 1e-10
    held = [layer.mlp.experts.__dict__["_moe_runner"] for layer in model.model.layers]
    assert [one.calls for one in held] == [1] * 4
    # a copy shares what was packed, and going back is a word
    twin = copy.deepcopy(model)
    assert nmse(logits(twin, ids), want) < 1e-10
    assert [one.calls for one in held] == [2] * 4
    model.set_experts_implementation("eager")
    assert nmse(logits(model, ids), want) < 1e-10
    assert [one.calls for one in held] == [2] * 4


def test_weights_that_are_kept_can_be_gone_back_to(tiny_moe, alone):
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32).eval()
    report = moe.attach(model, keep=True)
    assert report.released == 0
    ids = torch.tensor([[5, 6, 7, 8]])
    logits(model, ids)
    model.set_experts_implementation("eager")
    assert nmse(logits(model, ids), logits(alone, ids)) < 1e-12
    assert report.calls == 4


def test_four_bits_stay_four_bits(tiny_moe, tmp_path):
    """Against transformers with the same numbers, decoded here."""
    path = tmp_path / "w4a16"
    moe_runner.quantize(tiny_moe, path, "w4a16", group_size=32)
    model, report = by_load(path)
    assert all("experts" not in name for name, _ in model.named_parameters())
    whole = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32).eval()
    # what the whole experts take in bf16, over 4 bits and a scale of 16 for 32 weights
    ratio = sum(p.numel() * 2 for n, p in whole.named_parameters() if "experts" in n)
    ratio /= sum(taken.nbytes for taken in report.modules)
    assert 3.4 < ratio < 3.7
    decoded.fill(whole, path)
    ids = torch.tensor([list(range(20, 60))])
    assert nmse(logits(model, ids), logits(whole, ids)) < 1e-10
    assert greedy(model, ids, 16) == greedy(whole, ids, 16)


@pytest.mark.parametrize("family", families.names())
def test_every_family(family):
    """Our experts in place of the family's own, on a tiny random model."""
    if family in families.LEFT_OUT:
        pytest.skip(families.LEFT_OUT[family])
    if family in families.UNKNOWN_FUNCTION:
        pytest.skip("refused: test_every_class_of_experts")
    model = families.tiny(family)
    model.set_experts_implementation("eager")
    ids = torch.arange(3, 19)[None]
    want = logits(model, ids)
    assert np.isfinite(want).all()
    writes = model.can_generate()
    tokens = greedy(model, ids, 8) if writes else None
    report = moe.attach(model)
    assert nmse(logits(model, ids), want) < 1e-9
    assert not writes or greedy(model, ids, 8) == tokens
    assert all(taken.calls > 0 for taken in report.modules)


@pytest.mark.parametrize("router", [False, True], ids=["experts", "block"])
@pytest.mark.parametrize("family", families.names())
def test_every_family_from_its_checkpoint(family, router, tmp_path):
    """The experts, and the whole block, as transformers stores them; of two sentences at once, so that an
    output is not taken for two."""
    if family in families.LEFT_OUT or family in families.UNKNOWN_FUNCTION:
        pytest.skip("test_every_family says why")
    model = families.tiny(family)
    ids = torch.stack([torch.arange(3, 19), torch.arange(40, 56)])
    with torch.no_grad():
        want = model(ids).logits.double().numpy()
    model.save_pretrained(tmp_path)
    refused = families.REFUSED_CHECKPOINT.get(family) or router and families.OUTSIDE.get(family)
    if refused:
        with pytest.raises(moe_runner.Error, match=refused):
            moe.attach(model, tmp_path, router=router)
        return
    report = moe.attach(model, tmp_path, router=router)
    with torch.no_grad():
        got = model(ids).logits.double().numpy()
    assert nmse(got, want) < 1e-9
    assert all(taken.calls == 1 for taken in report.modules)


@pytest.mark.parametrize(
    "family, experts_class",
    [(family, one) for family in families.names() for one in families.experts_classes(family)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_class_of_experts(family, experts_class):
    """Every class behind the interface: its own forward pass, and ours in its place."""
    try:
        module = families.tiny_experts(family, experts_class)
    except LookupError as error:
        pytest.skip(str(error))
    count, width = module.num_experts, module.down_proj.shape[2 if module.is_transposed else 1]
    x = torch.randn(5, width)
    ids = torch.stack([torch.randperm(count)[:3] for _ in range(5)])
    weights = torch.rand(5, 3)
    with torch.no_grad():
        want = module(x, ids, weights)
        if module.has_post_expert_norm:
            with pytest.raises(moe_runner.InputError, match="end in a norm"):
                moe.attach(torch.nn.ModuleDict({"experts": module}))
            return
        if family in families.UNKNOWN_FUNCTION:
            with pytest.raises(moe_runner.InputError, match="the function between"):
                moe.attach(torch.nn.ModuleDict({"experts": module}))
            return
        report = moe.attach(torch.nn.ModuleDict({"experts": module}))
        assert nmse(module(x, ids, weights).numpy(), want.numpy()) < 1e-11
    assert report.calls == 1


def test_llama4_whose_block_is_replaced():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=32, intermediate_size_mlp=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_local_experts=8, num_experts_per_tok=2, interleave_moe_layer_step=1,
        max_position_embeddings=128, pad_token_id=0, attn_implementation="eager",
    )
    model = Llama4ForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    ids = torch.arange(3, 19)[None]
    want, tokens = logits(model, ids), greedy(model, ids, 8)
    report = moe.attach(model)
    assert nmse(logits(model, ids), want) < 1e-10
    assert greedy(model, ids, 8) == tokens
    assert [taken.calls for taken in report.modules] == [9, 9]


def test_a_model_without_experts_is_refused():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )
    with pytest.raises(moe_runner.Error, match="LlamaForCausalLM has no MoE layer"):
        moe.attach(LlamaForCausalLM(config))


def test_what_does_not_fit_is_said(tiny_moe, golden):
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32).eval()
    with pytest.raises(moe_runner.InputError, match="no MoE layer 0; it has"):
        moe.attach(model, golden / "qwen3_moe_bf16")
    with pytest.raises(moe_runner.InputError, match="comes from a checkpoint"):
        moe.attach(model, router=True)
    model.model.layers[0].mlp.experts._apply_gate = lambda x: x.chunk(2, -1)[0].tanh()
    with pytest.raises(moe_runner.InputError, match="layers.0.mlp.experts: the function between"):
        moe.attach(model)


def test_gradients_are_refused(tiny_moe):
    model, _ = by_attach(tiny_moe)
    ids = torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(moe_runner.Error, match="no gradients"):
        model(ids)
    with torch.inference_mode():
        model(ids)


def test_a_compiled_block_has_no_break(tiny_moe):
    model, report = by_attach(tiny_moe)
    block = model.model.layers[1].mlp
    rows = torch.randn(1, 6, 256)
    with torch.no_grad():
        want = block(rows)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert nmse(compiled(rows).numpy(), want.numpy()) < 1e-12
    assert report.modules[1].calls == 2
