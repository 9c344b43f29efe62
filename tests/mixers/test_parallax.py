"""The layer of Parallax."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import regard
from mixers.subjects import DIM, check_close, jolt, tokens
from regard.core.budgets import budget, relative_error
from regard.mixers import Attention, Parallax, rotate
from regard.models.decoder.official import LAYER_KEYS

CARD = regard.mechanisms["parallax"]
GOLDEN = Path(__file__).parents[1] / "golden/parallax/layer_qknorm_gqa.safetensors"
ALL = {"kv_heads": 2, "rope": True, "bias": True, "options": {"window": (3, 0)}}


def layer_of(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    return jolt(Parallax(DIM, 4, causal=True, **settings)).to(dtype)


def golden(part: str) -> dict[str, torch.Tensor]:
    found = load_file(GOLDEN)
    return {n.removeprefix(part): t for n, t in found.items() if n.startswith(part)}


def test_is_the_layer_of_the_authors():
    layer = Parallax(48, 4, kv_heads=2, causal=True, rope=True)
    shapes = {name: tensor.shape for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(LAYER_KEYS.to_ours("test", golden("state."), shapes))
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


def test_the_probe_is_normalised_and_turned_like_the_query():
    layer, x = layer_of(rope=True), tokens(1, 5)
    at = torch.arange(5)[None]
    r = layer.operands["r"]
    q, probe, k, v = (
        (x @ weight.mT).view(1, 5, 4, 4).transpose(1, 2)
        for weight in (
            layer.q_proj.weight, r.weight, layer.k_proj.weight, layer.v_proj.weight
        )
    )  # fmt: skip
    q, probe, k = (
        rotate(norm(vector), at)
        for norm, vector in ((layer.q_norm, q), (r.norm, probe), (layer.k_norm, k))
    )
    out = regard.ops.parallax_attention(q, probe, k, v, causal=True)
    check_close(CARD, layer(x), layer.o_proj(out.transpose(1, 2).reshape(1, 5, DIM)), "same")


@pytest.mark.parametrize("make", [Parallax, Attention])
def test_with_positions_only_differences_count(make):
    """The same tokens later in the sequence give the same outputs."""
    torch.manual_seed(0)
    settings = {"options": {"window": (2, 0)}, "qk_norm": True, "rope": True}
    settings |= {"mechanism": "parallax"} if make is Attention else {}
    layer = make(DIM, 4, causal=True, **settings).double()
    x = tokens(1, 6)
    check_close(CARD, layer(torch.cat([x, x], 1))[:, 8:], layer(x)[:, 2:])


def test_a_probe_of_zero_is_softmax_attention():
    layer = layer_of(kv_heads=2, rope=True, probe_start=0.0)
    with torch.no_grad():
        layer.operands["r"].norm.weight.zero_()  # where it starts; `layer_of` has moved it
    same = Attention(DIM, 4, kv_heads=2, causal=True, qk_norm=True, rope=True).double()
    same.load_state_dict({n: t for n, t in layer.state_dict().items() if "operands" not in n})
    same.q_norm.eps = same.k_norm.eps = 1e-5
    x = tokens(2, 7)
    check_close(CARD, layer(x), same(x))
    assert not Parallax(DIM, 4, probe_start=0.0).operands["r"].norm.weight.any()


def test_state_dict():
    keys = {f"{n}_proj.weight" for n in "qkvo"} | {"operands.r.weight"}
    assert set(Parallax(DIM, 4, qk_norm=False).state_dict()) == keys
    keys |= {"q_norm.weight", "k_norm.weight", "operands.r.norm.weight"}
    assert set(Parallax(DIM, 4).state_dict()) == keys
    keys |= {f"{n}_proj.bias" for n in "qkv"} | {"operands.r.bias"}
    assert set(Parallax(DIM, 4, bias=True).state_dict()) == keys


def test_every_parameter_learns():
    layer = layer_of(**ALL)
    (layer(tokens(2, 6)) * tokens(2, 6, seed=3)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_decoding_a_ragged_batch_with_a_window():
    layer = layer_of(**ALL)
    rows = [tokens(1, 7, seed=1), tokens(1, 5, seed=2)]
    x = torch.full((2, 7, DIM), torch.nan, dtype=torch.float64)
    for row, real in enumerate(rows):
        x[row, -real.shape[1] :] = real[0]
    mask = ~x.isnan().any(-1)
    with torch.no_grad():
        state, outputs = None, []
        for piece, known in zip(x.split([4, 1, 2], 1), mask.split([4, 1, 2], 1), strict=True):
            y, state = layer(piece, key_mask=known, state=state, return_state=True)
            outputs.append(y)
        y = torch.cat(outputs, 1)
        for row, real in enumerate(rows):
            check_close(CARD, y[row, mask[row]], layer(real)[0])


def share_of_the_correction(dim: int, heads: int, **settings) -> float:
    """|Cov r| / |vbar| of a new layer with matrices N(0, 0.02) on white tokens."""
    torch.manual_seed(0)
    layer = Parallax(dim, heads, causal=True, rope=True, **settings)
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.02)
    seen = {}

    def watched(**arguments):
        seen.update(arguments)
        return CARD.op(**arguments)

    layer.card = dataclasses.replace(CARD, op=watched)
    with torch.no_grad():
        layer(torch.nn.functional.rms_norm(torch.randn(2, 256, dim), (dim,)))
        out = CARD.op(**seen)
        plain = CARD.op(**{**seen, "r": torch.zeros_like(seen["r"])})
    return float((out - plain).norm() / plain.norm())


def test_how_large_the_correction_is_at_the_start():
    # r and k of RMS 1 have products of standard deviation sqrt(D), which nothing divides: with
    # the norm the correction is 0.8 sqrt(D) times the attention, not less than half of it.
    for dim, heads in ((256, 4), (256, 16)):  # measured 6.3, 3.2
        share = share_of_the_correction(dim, heads)
        assert share == pytest.approx(0.79 * math.sqrt(dim // heads), rel=0.1)
    # Without it the products are of size 256 * 0.02 ** 2 * sqrt(D): 0.72, 0.36 measured.
    assert share_of_the_correction(256, 4, qk_norm=False) < 0.8
    assert share_of_the_correction(256, 16, qk_norm=False) < 0.5
    assert share_of_the_correction(256, 4, probe_start=0.5 / 8) < 0.5  # 0.40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": 1}, "Parallax: bias must be True or False, got 1"),
        ({"qk_norm": False, "probe_start": 0.5}, "probe_start must be 1 without qk_norm, got 0.5"),
        ({"probe_start": -1.0}, "Parallax: probe_start must be a finite number of at least 0"),
        ({"options": {"r": None}}, "Parallax: options must be without 'r', which the layer gives"),
        ({"heads": 3}, "Parallax: dim must be a multiple of heads, 3"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        Parallax(**{"dim": DIM, "heads": 4, **settings})
    assert message in str(caught.value)
