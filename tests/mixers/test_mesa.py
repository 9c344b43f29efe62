"""The layer of MesaNet."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid, normalize, silu, softplus

import regard
from mixers.subjects import DIM, check_close, jolt, tokens
from regard.core.budgets import budget, relative_error
from regard.mixers import Mesa
from regard.models.decoder.official import LAYER_KEYS

CARD = regard.mechanisms["mesa"]
GOLDEN = Path(__file__).parents[1] / "golden/mesanet/layer_default.safetensors"
ALL = {"kv_heads": 2, "short_conv": 3, "conv_bias": True, "output_gate": True}


def layer_of(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    return jolt(Mesa(DIM, 4, causal=True, **settings)).to(dtype)


def golden(part: str) -> dict[str, torch.Tensor]:
    found = load_file(GOLDEN)
    return {n.removeprefix(part): t for n, t in found.items() if n.startswith(part)}


def shapes(layer):
    return {name: tensor.shape for name, tensor in layer.state_dict().items()}


def test_is_the_layer_of_the_authors():
    layer = Mesa(32, 2, causal=True, head_dim=12)
    layer.load_state_dict(LAYER_KEYS.to_ours("test", golden("state."), shapes(layer)))
    x = golden("in.")["hidden_states"].requires_grad_()
    y = layer(x)
    y.backward(golden("in.")["grad_o"])
    assert relative_error(y, golden("out.")["o"]) < budget(torch.float32)
    expected = golden("grad.")
    assert relative_error(x.grad, expected.pop("hidden_states")) < budget(torch.float32, "gradient")
    found = LAYER_KEYS.to_theirs({name: p.grad for name, p in layer.named_parameters()})
    assert set(found) == set(expected)
    for name, gradient in found.items():
        error = relative_error(gradient, expected[name])
        assert error < budget(torch.float32, "gradient"), f"{name} {error:.2g}"


def test_is_the_op_on_what_the_formula_says():
    layer = layer_of(short_conv=0, output_gate=True, least_ridge=0.1)
    x = tokens(2, 6)
    q, k, v = (
        projection(x).view(2, 6, 4, 4).transpose(1, 2)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    decay, strength = layer.operands["log_decay"], layer.operands["beta"]
    out = regard.ops.mesa_attention(
        q, k, v, causal=True, ridge=softplus(layer.log_ridge) + 0.1,
        log_decay=logsigmoid(x @ decay.weight.mT + decay.bias).transpose(1, 2),
        beta=torch.sigmoid(x @ strength.weight.mT + strength.bias).transpose(1, 2),
    )  # fmt: skip
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + 1e-5) * layer.o_norm.weight
    out = out.transpose(1, 2).reshape(2, 6, DIM) * silu(layer.g_proj(x))
    error = relative_error(layer(x), layer.o_proj(out))
    assert error < 1e-4  # lengths are not exactly 1: the eps of 1e-6 inside the root


def test_the_convolution_is_over_queries_and_keys_only():
    layer = layer_of(**ALL)
    assert layer.short_conv.weight.shape == (16 + 8, 3)
    assert layer.short_conv.bias.shape == (24,)
    with torch.no_grad():
        layer.short_conv.weight.zero_()
        layer.short_conv.bias.fill_(1.0)  # all queries and keys are alike: only values differ
        x = tokens(1, 5)
        y = layer(x)
        layer.v_proj.weight.zero_()
        assert y.abs().max() > 1e-2
        assert not layer(x).any()


def test_state_dict_and_start():
    layer = Mesa(DIM, 4, causal=True, least_ridge=0.3)
    keys = {f"{n}_proj.weight" for n in "qkvo"} | {"o_norm.weight", "short_conv.weight"}
    keys |= {f"operands.{n}.{leaf}" for n in ("log_decay", "beta") for leaf in ("weight", "bias")}
    assert set(layer.state_dict()) == keys | {"log_ridge"}
    torch.testing.assert_close(layer.learned()["ridge"], torch.ones(4, 4))
    assert not layer.operands["log_decay"].bias.any()
    assert set(Mesa(DIM, 4, **ALL).state_dict()) == {
        *keys, "log_ridge", "g_proj.weight", "short_conv.bias"
    }  # fmt: skip


def test_every_parameter_learns():
    layer = layer_of(**ALL)
    (layer(tokens(2, 6)) * tokens(2, 6, seed=3)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_decoding_a_ragged_batch():
    layer = layer_of(**ALL)
    rows = [tokens(1, 6, seed=1), tokens(1, 4, seed=2)]
    x = torch.full((2, 6, DIM), torch.nan, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1]]).bool()
    for row, real in enumerate(rows):
        x[row, mask[row]] = real[0]
    with torch.no_grad():
        whole = layer(x, key_mask=mask)
        state, outputs = None, []
        for piece, known in zip(x.split([3, 1, 2], 1), mask.split([3, 1, 2], 1), strict=True):
            y, state = layer(piece, key_mask=known, state=state, return_state=True)
            outputs.append(y)
        y = torch.cat(outputs, 1)
        for row, real in enumerate(rows):
            alone = layer(real)[0]
            check_close(CARD, y[row, mask[row]], alone)
            check_close(CARD, whole[row, mask[row]], alone)


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_without_a_convolution(causal):
    torch.manual_seed(0)
    layer = jolt(Mesa(DIM, 4, causal=causal, short_conv=0)).double()
    x, memory = tokens(2, 3), tokens(2, 5, seed=2)
    with torch.no_grad():
        whole = layer(x, memory)
        first, state = layer(x[:, :2], memory, return_state=True)
        check_close(CARD, torch.cat([first, layer(x[:, 2:], state=state)], 1), whole)


def test_bfloat16():
    layer = layer_of(torch.bfloat16, **ALL)
    x = tokens(2, 9, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert layer.learned()["ridge"].dtype == torch.float32
    check_close(CARD, y, copy.deepcopy(layer).double()(x.double()), dtype=torch.bfloat16)


def test_compiles_whole():
    torch._dynamo.reset()
    layer, x = layer_of(torch.float32, **ALL), tokens(2, 6, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    check_close(CARD, compiled(x), layer(x), "same")
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"least_ridge": 1.0}, "Mesa: least_ridge must be below 1, where the ridge starts"),
        ({"least_ridge": -0.1}, "Mesa: least_ridge must be a finite number of at least 0.0"),
        ({"short_conv": 0, "conv_bias": True}, "Mesa: conv_bias must be False without short_conv"),
        ({"conv_bias": 1}, "Mesa: conv_bias must be True or False, got 1"),
        ({"norm_eps": 0.0}, "Mesa: norm_eps must be a finite number above 0"),
        ({"options": {"beta": None}}, "Mesa: options must be without 'beta'"),
        ({"options": {"ridge": 1.0}}, "Mesa: options must be without 'ridge'"),
        ({"options": {"windw": 1}}, "Mesa: options must be arguments of mesa_attention"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        Mesa(DIM, 4, **settings)
    assert message in str(caught.value)
