"""The attention layer of TransNormerLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import layer_norm, silu

import regard
from mixers.subjects import DIM, jolt, tokens
from regard.core.budgets import budget, relative_error
from regard.mixers import TnlAttention
from regard.ops.lightning import tnl_layer_slopes

GOLDEN = Path(__file__).parents[1] / "golden/lightning_attention/tnl_attn_module"


def layer_of(**settings) -> TnlAttention:
    torch.manual_seed(0)
    return jolt(TnlAttention(DIM, 4, **{"layer": 1, "layers": 4} | settings)).double()


def test_is_the_module_of_the_authors():
    about = json.loads(GOLDEN.with_suffix(".json").read_text())
    data, config, tolerance = (
        load_file(f"{GOLDEN}.safetensors"),
        about["config"],
        about["tolerance"],
    )
    layer = TnlAttention(
        config["embed_dim"], config["num_heads"], config["layer_idx"], config["num_layers"],
        bias=config["bias"],
    )  # fmt: skip
    weights = {n.removeprefix("state."): x for n, x in data.items() if n.startswith("state.")}
    layer.load_state_dict(weights)  # strictly: their names, and no others
    x = data["in.x"].requires_grad_()
    y = layer(x)
    assert relative_error(y, data["out.y"]) < tolerance["out"]
    y.backward(data["in.grad_out"])
    found = {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    for name in ("x", "q_proj.weight", "output_gate.0.weight"):
        assert relative_error(found[name], data[f"grad.{name}"]) < tolerance["grad"]


@pytest.mark.parametrize("bias", [False, True])
def test_is_the_op_on_what_the_formula_says(bias):
    layer, x = layer_of(bias=bias), tokens(2, 6)
    q, k, v = (
        silu(torch.nn.functional.linear(x, p.weight, p.bias)).view(2, 6, 4, 4).transpose(1, 2)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    decay = -tnl_layer_slopes(4, 1, 4).float().double().view(1, 4, 1).expand(2, 4, 6)
    out = regard.ops.lightning_attention(q, k, v, causal=True, log_decay=decay)
    out = out.transpose(1, 2).reshape(2, 6, DIM)
    out = layer_norm(out, (DIM,), layer.norm.weight, layer.norm.bias, 1e-5)
    expected = layer.o_proj(out * torch.sigmoid(layer.output_gate(x)))
    assert relative_error(layer(x), expected) < budget(torch.float64)


@pytest.mark.parametrize("splits", [[1] * 7, [4, 3], [0, 7]])
def test_decoding_equals_one_call(splits):
    layer, x, state, outputs = layer_of(), tokens(2, 7), None, []
    for piece in x.split(splits, 1):
        y, state = layer(piece, state=state, return_state=True)
        outputs.append(y)
    assert relative_error(torch.cat(outputs, 1), layer(x)) < budget(torch.float64)


def test_padding_and_packing_change_nothing():
    layer, x = layer_of(), tokens(1, 7)
    padded = torch.cat([torch.full((1, 3, DIM), torch.nan).double(), x], 1)
    mask = torch.arange(10)[None] >= 3
    y = layer(padded, key_mask=mask)
    assert relative_error(y[:, 3:], layer(x)) < budget(torch.float64)
    assert not y[:, :3].any()
    packed = layer(x, cu_seqlens=torch.tensor([0, 3, 7], dtype=torch.int32))
    separate = torch.cat([layer(x[:, :3]), layer(x[:, 3:])], 1)
    assert relative_error(packed, separate) < budget(torch.float64)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="layer must be below layers, 4"):
        layer_of(layer=4)
    with pytest.raises(ValueError, match="log_decay"):
        layer_of(options={"log_decay": None})
    layer = layer_of(options={"scale": 0.5})
    assert set(layer.state_dict()) == set(layer_of().state_dict())
