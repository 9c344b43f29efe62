"""Attention to routed regions: the released operator, its equations, maps, memory and time."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from golden_files import parts, settings
from regard.core.budgets import relative_error
from regard.ops import region_route, region_topk_attention, routed_attention, softmax_attention
from regard.ops.routed.maps import map_of, regions_of, routed_attention_2d


def sample(R=6, m=4, Rk=5, w=3, H=4, Hk=2, D=5, Dv=3, B=2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, R, m, D), (B, Hk, Rk, w, D), (B, Hk, Rk, w, Dv))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return q, k, v


def names(*shape: int, count: int) -> Tensor:
    return torch.randint(-1, count, shape, generator=torch.Generator().manual_seed(1))


def test_the_released_operator():
    data, config = parts("biformer/op_routed"), settings("biformer/op_routed")
    q, k, v = (
        data["in"][name].unflatten(1, (config["num_heads"], -1)).permute(0, 1, 3, 4, 2)
        for name in ("query", "key", "value")
    )
    found = routed_attention_2d(
        q, k, v, data["in"]["region_graph"], region=tuple(config["region_size"]),
        kv_region=tuple(config["kv_region_size"]), scale=config["scale"],
    )  # fmt: skip
    found = found.permute(0, 1, 4, 2, 3).flatten(1, 2)
    assert (found - data["out"]["y"]).abs().max() < 1e-5


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("numbers", [1, 1 << 21])
def test_every_route(heads, masked, numbers, monkeypatch):
    monkeypatch.setattr("regard.ops.routed.registered.GATHERED", numbers)
    inputs = [x.requires_grad_() for x in sample()]
    route = names(2 if heads > 1 else 1, heads, 6, 3, count=5)  # -1, and some twice
    route[0, 0, 0] = -1
    mask = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(2)) > 0.3 if masked else None
    found, expected = (
        routed_attention(*inputs, route, key_mask=mask, impl=impl) for impl in ("auto", "reference")
    )
    assert relative_error(found, expected) < 1e-12
    assert not found[0, 0, 0].any()
    weight = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, inputs, weight), torch.autograd.grad(expected, inputs, weight),
        strict=True,
    ):  # fmt: skip
        assert relative_error(a, b) < 1e-10
    flat = routed_attention(
        *(x.flatten(2, 3) for x in inputs), route, q_regions=6, kv_regions=5,
        key_mask=None if mask is None else mask.flatten(1),
    )  # fmt: skip
    assert torch.equal(flat, found.flatten(2, 3))


def test_all_regions_are_full_attention():
    q, k, v = sample()
    route = region_route(q, k, 5)
    full = softmax_attention(*(x.flatten(2, 3) for x in (q, k, v)), scale=0.3)
    assert relative_error(routed_attention(q, k, v, route, scale=0.3).flatten(2, 3), full) < 1e-12


def test_the_order_of_regions_does_not_matter():
    q, k, v = sample()
    route, order = region_route(q, k, 2), torch.randperm(5)
    moved = order.argsort()[route]
    found = routed_attention(q, k[:, :, order], v[:, :, order], moved)
    assert relative_error(found, routed_attention(q, k, v, route)) < 1e-12


def test_routes_are_the_best_regions():
    q, k, _ = sample()
    scores = q.mean(3).unflatten(1, (2, 2)) @ k.mean(3)[:, :, None].mT  # [B, Hk, group, R, Rk]
    joint = scores.sum((1, 2)).argsort(-1, descending=True)[..., :2]
    assert torch.equal(region_route(q, k, 2)[:, 0], joint)
    own = scores.flatten(1, 2).argsort(-1, descending=True)[..., :2]
    assert torch.equal(region_route(q, k, 2, per_head=True), own)
    mask = torch.ones(1, 5, 3, dtype=torch.bool)
    mask[:, 1:] = False
    assert region_route(q, k, 2, k_mask=mask)[..., 0].eq(0).all()
    assert region_route(q, k, 2, k_mask=mask)[..., 1].eq(-1).all()


def test_no_gradient_goes_through_the_choice():
    q, k, v = (x.flatten(2, 3).requires_grad_() for x in sample(R=5, m=3))
    free = region_topk_attention(q, k, v, region=3, topk=2)
    with torch.no_grad():
        route = region_route(*(x.unflatten(2, (5, 3)) for x in (q, k)), 2)
    fixed = routed_attention(q, k, v, route, q_regions=5, kv_regions=5)
    assert torch.equal(free, fixed)
    weight = torch.randn_like(free)
    for a, b in zip(
        torch.autograd.grad(free, (q, k, v), weight),
        torch.autograd.grad(fixed, (q, k, v), weight), strict=True,
    ):  # fmt: skip
        assert torch.equal(a, b)


def test_right_padding_is_not_seen():
    q, k, v = (x.flatten(2, 3) for x in sample(R=7, m=3, Rk=7, w=3))
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[:, 16:] = False
    found = region_topk_attention(q, k, v, region=3, topk=2, key_mask=mask)
    alone = region_topk_attention(q, k[:, :, :16], v[:, :, :16], region=3, topk=2)
    assert relative_error(found, alone) < 1e-12


def test_maps_are_cut_and_joined():
    x = torch.arange(2 * 5 * 7 * 3.0).view(1, 2, 5, 7, 3)
    regions = regions_of(x, (2, 3))
    assert regions.shape == (1, 2, 9, 6, 3)
    assert torch.equal(regions[0, 0, 4].view(2, 3, 3), x[0, 0, 2:4, 3:6])
    assert torch.equal(map_of(regions, (2, 3), (5, 7)), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"route": torch.zeros(1, 1, 6, 2)}, "route must be a tensor of integers"),
        ({"route": torch.zeros(1, 3, 6, 2, dtype=torch.long)}, "route must be of shape"),
        ({"q_regions": 5}, "q_regions must be None or the 6 regions on their axis"),
        ({"route": torch.full((1, 1, 6, 2), 5)}, "route must be in [-1, 5)"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    given = dict(zip(("q", "k", "v"), sample(), strict=True))
    route = torch.zeros(1, 1, 6, 2, dtype=torch.long)
    with pytest.raises((ValueError, TypeError)) as caught:
        routed_attention(**{**given, "route": route, **options})
    assert f"routed_attention: {message}" in str(caught.value)
    with pytest.raises(ValueError, match="topk must be at most the 5 regions of keys"):
        region_route(given["q"], given["k"], 6)


@pytest.mark.slow
def test_faster_than_dense_attention_and_than_gathering_all():
    q, k, v = torch.randn(3, 1, 2, 49, 256, 32)  # 112 x 112 tokens, 64 channels
    route = region_route(q, k, 4)

    def gathered() -> Tensor:
        index = route[0, 0].flatten()
        keys, values = (x[:, :, index].view(1, 2, 49, 1024, 32) for x in (k, v))
        return scaled_dot_product_attention(q, keys, values)

    calls = {
        "routed": lambda: routed_attention(q, k, v, route),
        "gathered": gathered,
        "dense": lambda: scaled_dot_product_attention(*(x.flatten(2, 3) for x in (q, k, v))),
    }
    seconds = {}
    for name, call in calls.items():
        runs = []
        for _ in range(3):
            start = time.process_time()
            out = call()
            runs.append(time.process_time() - start)
            if name == "gathered":
                assert relative_error(calls["routed"](), out) < 1e-5
        seconds[name] = min(runs)
    assert seconds["routed"] < seconds["dense"] / 6, seconds
    assert seconds["routed"] < seconds["gathered"], seconds


PROGRAM = """
import resource, torch
from regard.ops import region_route, routed_attention
torch.set_num_threads(1)
def run(tokens):
    q, k, v = (torch.randn(1, 2, 49, tokens, 32) for _ in range(3))
    route = region_route(q, k, 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    routed_attention(q, k, v, route)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
run(4)
print(run(256))
"""


@pytest.mark.slow
def test_memory_is_less_than_a_third_of_gathering_all():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    gathered = 49 * 4 * 256 * 2 * 64 * 4 / 2**20  # [R, k, w, 2 C] in megabytes
    assert float(done.stdout) < gathered / 3
