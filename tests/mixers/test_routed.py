"""The layer of BiFormer against both releases, and its options."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from golden_files import parts, settings
from regard.core.budgets import relative_error
from regard.mixers import BiLevelRoutingAttention


def layer_of(dtype=torch.float64, **options) -> BiLevelRoutingAttention:
    torch.manual_seed(0)
    return BiLevelRoutingAttention(16, 2, **{"n_win": 2, "topk": 2, **options}).to(dtype)


@pytest.mark.parametrize(("name", "layout"), [("bra_legacy", "nhwc"), ("bra_nchw", "nchw")])
def test_published_layers(name, layout):
    data, config = parts(f"biformer/{name}"), settings(f"biformer/{name}")
    config["heads"] = config.pop("num_heads")
    layer = BiLevelRoutingAttention(**config, layout=layout)
    layer.load_state_dict(data["state"])
    x = data["in"]["x"].requires_grad_()
    y = layer(x)
    assert (y - data["out"]["y"]).abs().max() < 2e-5
    (y * data["in"]["grad_out"]).sum().backward()
    assert relative_error(x.grad, data["grad"]["x"]) < 1e-4
    if "route_idx" in data["out"]:
        assert torch.equal(layer.routes(x).sort(-1).values, data["out"]["route_idx"])


def test_all_regions_are_full_attention_of_the_full_width_scale():
    layer = layer_of(topk=4)
    x = torch.randn(2, 6, 8, 16).double()
    q, k, v = (
        y.unflatten(3, (2, 8)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        for y in layer.qkv(x).chunk(3, 3)
    )
    y = scaled_dot_product_attention(q, k, v, scale=16**-0.5)
    y = y.transpose(1, 2).flatten(2).view(x.shape)
    image = layer.qkv(x)[..., 32:].permute(0, 3, 1, 2)
    y = layer.wo(y + layer.lepe(image).permute(0, 2, 3, 1))
    assert relative_error(layer(x), y) < 1e-12


def test_borders():
    x = torch.randn(2, 7, 9, 16).double()
    legacy = layer_of()
    filled = pad(x, (0, 0, 0, 1, 0, 1))
    assert relative_error(legacy(x), legacy(filled)[:, :7, :9]) < 1e-12
    with pytest.raises(ValueError, match="n_win, 2, divides, with auto_pad=False"):
        layer_of(auto_pad=False)(x)
    # Regions of 3 x 4 tokens: 3 x 3 of them; with all of them seen, "masked" is full attention.
    masked = layer_of(padding="masked", topk=9)
    whole = layer_of(n_win=1, topk=1)
    assert relative_error(masked(x), whole(x)) < 1e-12
    assert relative_error(layer_of(padding="nchw", topk=9)(x), whole(x)) > 1e-3
    first = layer_of(layout="nchw", padding="masked", topk=9)
    same = {"qkv_linear": whole.qkv.qkv, "output_linear": whole.wo}
    with torch.no_grad():
        for name, linear in same.items():
            getattr(first, name).weight.copy_(linear.weight[..., None, None])
            getattr(first, name).bias.copy_(linear.bias)
        first.lepe.load_state_dict(whole.lepe.state_dict())
    y = first(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert relative_error(y, whole(x)) < 1e-12


def test_soft_routing_weighs_keys_and_values():
    x = torch.randn(1, 4, 4, 16).double()
    soft = layer_of(soft_routing=True, side_dwconv=0)
    q, k, v = soft.qkv(x).chunk(3, 3)
    regions = [(slice(a, a + 2), slice(b, b + 2)) for a in (0, 2) for b in (0, 2)]
    mean = lambda y: torch.stack([y[0][r].mean((0, 1)) for r in regions])  # noqa: E731
    scores = mean(q) @ mean(k).T / 4
    expected = torch.zeros_like(x)
    for r, region in enumerate(regions):
        best = scores[r].topk(2)
        weight = best.values.softmax(0)
        keys, values = (
            torch.cat(
                [
                    w * y[0][regions[j]].flatten(0, 1)
                    for w, j in zip(weight, best.indices, strict=True)
                ]
            )
            for y in (k, v)
        )
        heads = (
            y.unflatten(-1, (2, 8)).transpose(0, 1)
            for y in (q[0][region].flatten(0, 1), keys, values)
        )
        y = scaled_dot_product_attention(*heads, scale=0.25)
        expected[0][region] = y.transpose(0, 1).reshape(2, 2, 16)
    assert relative_error(soft(x), soft.wo(expected)) < 1e-12


def test_the_choice_has_a_gradient_only_if_asked():
    x = torch.randn(1, 4, 4, 16).double()
    options = {"soft_routing": True, "diff_routing": True, "param_routing": True}
    layer = layer_of(**options)
    layer(x).square().sum().backward()
    assert layer.router.emb.weight.grad.any()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("kind", ["ada_avgpool", "ada_maxpool", "avgpool", "maxpool"])
def test_pooled_keys(kind):
    name = "kv_per_win" if kind.startswith("ada") else "kv_downsample_ratio"
    layer = layer_of(kv_downsample=kind, **{name: 2})
    whole = layer_of()
    x = torch.randn(1, 8, 8, 16).double()
    assert relative_error(layer(x), whole(x)) > 1e-3
    # Where the pixels of a pooled cell are alike, pooling keeps the means and the weights.
    coarse = torch.randn(1, 4, 4, 16).double().repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert relative_error(layer(coarse), whole(coarse)) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "nchw", "padding": "legacy"}, "padding must be 'nchw' or 'masked'"),
        ({"layout": "nchw", "soft_routing": True}, "padding must be 'legacy' with soft"),
        ({"diff_routing": True}, "diff_routing must be False without soft_routing"),
        ({"kv_downsample": "avgpool"}, "kv_downsample_ratio must be an int"),
        ({"kv_per_win": 2}, "kv_per_win must be None with kv_downsample='identity'"),
        ({"qk_dim": 15}, "heads must be a divisor of dim and qk_dim"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        layer_of(**options)
    assert f"BiLevelRoutingAttention: {message}" in str(caught.value)
