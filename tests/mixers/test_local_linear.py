"""The layer of local linear attention."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import softplus

import regard
from mixers.subjects import DIM, check_close, jolt, tokens
from regard.mixers import Attention, LocalLinear

CARD = regard.mechanisms["local_linear"]
ALL = {"kv_heads": 2, "rope": True, "short_conv": 4, "forget_gate": True, "output_gate": True}


def layer_of(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    return jolt(LocalLinear(DIM, 4, **settings)).to(dtype)


def test_state_dict_keys(tmp_path):
    keys = {f"{n}_proj.weight" for n in "qkvo"}
    keys |= {"q_norm.weight", "k_norm.weight", "log_ridge", "log_scale"}
    plain = LocalLinear(DIM, 4)
    assert set(plain.state_dict()) == keys
    assert plain.log_ridge.shape == (4,)
    assert plain.q_norm.weight.shape == (4,)
    keys |= {"g_proj.weight", "short_conv.weight"}
    keys |= {"operands.log_decay.weight", "operands.log_decay.bias"}
    layer = layer_of(causal=True, **ALL)
    assert set(layer.state_dict()) == keys
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = LocalLinear(DIM, 4, causal=True, **ALL).double()
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = tokens(1, 5)
    assert torch.equal(other(x), layer(x))


def test_starts_as_the_op_with_its_defaults():
    torch.manual_seed(0)
    layer = LocalLinear(DIM, 4, causal=True).double()
    same = Attention(DIM, 4, mechanism="local_linear", causal=True, qk_norm=True).double()
    same.load_state_dict(layer.state_dict(), strict=False)
    x = tokens(2, 6)
    assert softplus(layer.log_ridge).tolist() == pytest.approx([0.99] * 4)
    check_close(CARD, layer(x), same(x), dtype=torch.float32)  # parameters began in float32


@pytest.mark.parametrize("causal", [False, True])
def test_learned_ridge_bandwidth_and_forgetting_reach_the_op(causal):
    layer = layer_of(causal=causal, forget_gate=True)
    x = tokens(2, 6)
    ridge, scale = softplus(layer.log_ridge) + 1e-2, layer.log_scale.exp()
    gate = layer.operands["log_decay"]
    decay = torch.nn.functional.logsigmoid(x @ gate.weight.mT + gate.bias).transpose(1, 2)
    q, k, v = (p(x).view(2, 6, 4, 4).transpose(1, 2) for p in _projections(layer))
    q, k = layer.q_norm(q), layer.k_norm(k)
    out = regard.ops.local_linear_attention(
        q, k, v, causal=causal, ridge=ridge, scale=scale, log_decay=decay
    )
    expected = layer.o_proj(out.transpose(1, 2).reshape(2, 6, DIM))
    check_close(CARD, layer(x), expected, "same")


def _projections(layer):
    return layer.q_proj, layer.k_proj, layer.v_proj


def test_every_parameter_learns():
    layer = layer_of(causal=True, **ALL)
    (layer(tokens(2, 6)) * tokens(2, 6, seed=3)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_decoding_a_ragged_batch():
    layer = layer_of(causal=True, **ALL)
    rows = [tokens(1, 6, seed=1), tokens(1, 4, seed=2)]
    x = torch.full((2, 6, DIM), torch.nan, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1]]).bool()
    for row, real in enumerate(rows):
        x[row, mask[row]] = real[0]
    with torch.no_grad():
        state, outputs = None, []
        for t in range(6):
            here = slice(t, t + 1)
            y, state = layer(x[:, here], key_mask=mask[:, here], state=state, return_state=True)
            outputs.append(y)
        y = torch.cat(outputs, 1)
        for row, real in enumerate(rows):
            check_close(CARD, y[row, mask[row]], layer(real)[0])


def test_cross_attention_with_a_forget_gate():
    layer = layer_of(causal=True, forget_gate=True)
    x, memory = tokens(2, 3), tokens(2, 5, seed=2)
    with torch.no_grad():
        whole = layer(x, memory)
        first, state = layer(x[:, :2], memory, return_state=True)
        check_close(CARD, torch.cat([first, layer(x[:, 2:], state=state)], 1), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    layer = layer_of(dtype, causal=True, **ALL)
    x = tokens(2, 9, dtype=dtype)
    assert layer.learned()["ridge"].dtype == torch.float32
    check_close(CARD, layer(x), copy.deepcopy(layer).double()(x.double()), dtype=dtype)


def test_compiles_whole_and_trains():
    """Fits values that are affine in the keys better than it began."""
    torch._dynamo.reset()
    layer = layer_of(torch.float32, causal=True, **ALL)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = tokens(2, 8, dtype=torch.float32)
    target = x.cumsum(1) / 4
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        loss = (compiled(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    torch._dynamo.reset()


def test_on_the_meta_device():
    with torch.device("meta"):
        layer = LocalLinear(DIM, 4, causal=True, **ALL)
    layer = layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert layer.learned()["ridge"].tolist() == pytest.approx([1.0] * 4)
    assert layer.learned()["scale"].tolist() == pytest.approx([0.5] * 4)
    assert layer.operands["log_decay"].bias.tolist() == [3.0] * 4
    assert layer(torch.randn(1, 3, DIM)).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {"ridge": 0.1}}, "LocalLinear: options must be without 'ridge'"),
        (
            {"forget_gate": True, "options": {"log_decay": None}},
            "LocalLinear: options must be without 'log_decay'",
        ),
        ({"forget_gate": 1}, "LocalLinear: forget_gate must be True or False, got 1"),
        ({"kv_heads": 3}, "LocalLinear: heads must be a multiple of kv_heads, 3, got 4"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        LocalLinear(DIM, 4, **settings)
    assert message in str(caught.value)
