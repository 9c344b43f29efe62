"""The global layer of L2ViT and its local concentration."""

from __future__ import annotations

import pytest
import torch

from golden_files import parts, settings
from regard.core.budgets import budget, relative_error
from regard.mixers import LinearGlobalAttention, LocalConcentration2d


def test_is_the_layer_of_the_authors():
    data, config = parts("l2vit/linear_attention"), settings("l2vit/linear_attention")
    layer = LinearGlobalAttention(config["dim"], config["num_heads"], config["qkv_bias"])
    layer.load_state_dict(data["state"])
    x = data["in"]["x"].requires_grad_()
    y = layer(x)
    assert relative_error(y, data["out"]["y"]) < budget(torch.float32)
    y.backward(data["in"]["grad_out"])
    found = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    for name, expected in data["grad"].items():
        assert relative_error(found[name], expected) < budget(torch.float32, "gradient"), name


def test_the_golden_sums_lie_on_both_sides_of_the_clamp():
    data = parts("l2vit/linear_attention")
    state, x = data["state"], data["in"]["x"]
    q, k, _ = (x @ state["qkv.weight"].mT + state["qkv.bias"]).relu().chunk(3, 2)
    q, k = (t.unflatten(2, (4, 8)).transpose(1, 2) for t in (q, k))
    total = (q * k.sum(2, keepdim=True)).sum(3)
    assert total.min() < 100 < total.max()


def test_start_and_names():
    layer = LinearGlobalAttention(32, 4)
    keys = {f"{name}.{leaf}" for name in ("qkv", "proj") for leaf in ("weight", "bias")}
    assert set(layer.state_dict()) == keys | {"temperature"}
    assert layer.temperature.shape == (4, 1, 1)
    assert torch.equal(layer.temperature, torch.full((4, 1, 1), 8**-0.5))
    keys = {f"{name}.{leaf}" for name in ("conv1", "bn", "conv2") for leaf in ("weight", "bias")}
    keys |= {f"bn.{leaf}" for leaf in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(LocalConcentration2d(8).state_dict()) == keys


def test_a_response_is_gathered_around_its_token():
    """What one token sends reaches all alike; the convolutions add to its surroundings."""
    torch.manual_seed(0)
    layer, local = LinearGlobalAttention(16, 2, minimum=0.0), LocalConcentration2d(16).eval()
    x = torch.randn(1, 15 * 15, 16)
    moved = x.clone()
    moved[0, 112] += 1.0  # the middle
    with torch.no_grad():
        a, b = layer(x), layer(moved)

        def near(change: torch.Tensor) -> float:
            """The share of the change of other tokens that lies within 7 x 7 around the middle."""
            size = change.abs().sum(1).view(15, 15).clone()
            size[7, 7] = 0.0
            return float(size[4:11, 4:11].sum() / size.sum())

        image = lambda y: (x + y).transpose(1, 2).view(1, 16, 15, 15)  # noqa: E731
        other = (moved + b).transpose(1, 2).view(1, 16, 15, 15)
        spread = (b - a)[0]
        whole = spread + (local(other) - local(image(a))).flatten(2).transpose(1, 2)[0]
        assert near(spread) < 0.35  # 48 of 224 tokens are that near
        assert near(whole) > near(spread) + 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LinearGlobalAttention(30, 4), "LinearGlobalAttention: dim must be a multiple"),
        (lambda: LinearGlobalAttention(32, 4, minimum=-1), "LinearGlobalAttention: minimum must"),
        (lambda: LinearGlobalAttention(32, 4, qkv_bias=0), "qkv_bias must be True or False"),
        (lambda: LinearGlobalAttention(32, 4)(torch.zeros(2, 32)), "x must be of shape"),
        (lambda: LocalConcentration2d(8, side=4), "LocalConcentration2d: side must be odd"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
