"""Tensors of PyTorch: lent, not copied; and the operators that compiled graphs hold."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import moe_runner
from recorded import nmse, tensors

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.fixture
def case(golden):
    want = tensors(golden / "qwen3_moe_bf16/golden.safetensors")
    names = ("x", "topk_ids", "topk_weights", "out")
    # copies: the file's are read-only
    return [torch.from_numpy(want[f"layers.1.t33.{name}"].copy()) for name in names]


@pytest.mark.parametrize("dtype, bound", [("f32", 1e-10), ("bf16", 1e-5), ("f16", 1e-6)])
def test_every_dtype(golden, case, dtype, bound):
    x, ids, weights, want = case
    experts = moe_runner.Experts.open(golden / "qwen3_moe_bf16", 1, dtype=dtype, threads=2)
    rows = x.to(DTYPES[dtype])
    got = experts.forward(rows, ids, weights)
    assert got.dtype == rows.dtype and got.shape == rows.shape
    assert nmse(got.float().numpy(), want.numpy()) < bound
    out = torch.empty_like(rows)
    assert experts.forward(rows, ids.int(), weights, out) is out
    assert torch.equal(out, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stacks_of_every_dtype_and_layout(dtype):
    torch.manual_seed(0)
    e, h, i = 4, 96, 40
    gate_up = torch.randn(e, 2 * i, h).mul(0.2).to(dtype)
    down = torch.randn(e, h, i).mul(0.2).to(dtype)
    x = torch.randn(5, h)
    ids = torch.tensor([[0, 1], [2, 3], [3, 3], [1, 0], [2, 0]])
    weights = torch.rand(5, 2)
    want = torch.zeros(5, h, dtype=torch.float64)
    for t in range(5):
        for slot in range(2):
            g, u = (gate_up[ids[t, slot]].double() @ x[t].double()).chunk(2)
            act = torch.nn.functional.silu(g) * u
            want[t] += weights[t, slot].double() * (down[ids[t, slot]].double() @ act)
    interleaved = torch.stack(gate_up.chunk(2, dim=1), dim=2).reshape(e, 2 * i, h)
    swapped = torch.cat(list(reversed(gate_up.chunk(2, dim=1))), dim=1)
    for stack, options in [
        (gate_up, {}),
        (interleaved, {"layout": "interleaved"}),
        (swapped, {"layout": "up_first"}),
    ]:
        for transposed in (False, True):
            both = (stack, down)
            if transposed:
                both = tuple(tensor.transpose(1, 2).contiguous() for tensor in both)
            experts = moe_runner.Experts(
                *both, transposed=transposed, dtype="f32", threads=2, **options
            )
            got = experts.forward(x, ids, weights)
            assert nmse(got.numpy(), want.numpy()) < 1e-11


def test_gradients_are_refused(golden, case):
    x, ids, weights, _ = case
    experts = moe_runner.Experts.open(golden / "qwen3_moe_bf16", 1, dtype="f32", threads=1)
    with pytest.raises(moe_runner.InputError, match="requires gradients"):
        experts.forward(x.requires_grad_(), ids, weights)
    import moe_runner.torch as ops

    held = ops.Held(experts)
    with pytest.raises(moe_runner.Error, match="no gradients"):
        ops.experts(held, x, ids, weights)
    with torch.no_grad():
        ops.experts(held, x, ids, weights)
    assert held.calls == 1


def test_parameters_are_read_where_they_lie():
    parameter = torch.nn.Parameter(torch.randn(2, 8, 16))
    down = torch.nn.Parameter(torch.randn(2, 16, 4))
    moe_runner.Experts(parameter.detach(), down.detach(), threads=1)
    with pytest.raises(moe_runner.InputError, match="gate_up: requires gradients"):
        moe_runner.Experts(parameter, down, threads=1)
    with pytest.raises(moe_runner.InputError, match="gate_up: .*meta"):
        moe_runner.Experts(parameter.detach().to("meta"), down.detach(), threads=1)


def test_the_operators_keep_the_rules_of_operators(golden, case):
    import moe_runner.torch as ops

    x, ids, weights, want = case
    held = ops.Held(moe_runner.Experts.open(golden / "qwen3_moe_bf16", 1, dtype="f32", threads=2))
    whole = ops.Held(moe_runner.Layer(golden / "qwen3_moe_bf16", 1, dtype="f32", threads=2))
    names = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.moe_runner.experts.default, (x, ids, weights, held.key), test_utils=names
    )
    torch.library.opcheck(torch.ops.moe_runner.layer.default, (x, whole.key), test_utils=names)
    # views are made whole
    wide = torch.cat([x, x], dim=1)[:, : x.shape[1]]
    assert nmse(ops.experts(held, wide, ids, weights).numpy(), want.numpy()) < 1e-10
    assert nmse(ops.layer(whole, wide[None])[0].numpy(), want.numpy()) < 1e-10


def test_copies_share_and_files_refuse(golden):
    import moe_runner.torch as ops

    held = ops.Held(moe_runner.Experts.open(golden / "qwen3_moe_bf16", 1, threads=1))
    assert copy.deepcopy(held) is held
    with pytest.raises(moe_runner.Error, match="pickled"):
        pickle.dumps(held)
    key = held.key
    assert ops._HELD[key] is held
    del held
    assert key not in ops._HELD


def test_a_compiled_graph_has_no_break(golden, case):
    import moe_runner.torch as ops

    x, ids, weights, want = case
    held = ops.Held(moe_runner.Experts.open(golden / "qwen3_moe_bf16", 1, dtype="f32", threads=2))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def block(x, ids, weights):
        return ops.experts(held, x * 1.0, ids, weights) + 0.0

    with torch.no_grad():
        assert nmse(block(x, ids, weights).numpy(), want.numpy()) < 1e-10
    assert held.calls == 1
    np.testing.assert_array_equal(x.shape, want.shape)
