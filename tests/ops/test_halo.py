"""Halo attention: its equations, its limits, what it does not see, and what it needs."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.core.budgets import relative_error
from regard.ops import halo_attention, softmax_attention
from regard.ops.block_sparse import native


def sample(H=12, W=18, stride=1, D=4, Dv=3, heads=2, window=10, B=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (B, heads, -(-H // stride), -(-W // stride), D), (B, heads, H, W, D), (B, heads, H, W, Dv),
        (2 * window - 1, D), (2 * window - 1, D),
    )  # fmt: skip
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def one_by_one(
    q, k, v, rel_h, rel_w, *, block, halo, stride=1, mask_padding=False, scale_rel=False,
    rel_index="timm",
) -> Tensor:  # fmt: skip
    """From query to query and key to key."""
    D = k.shape[4]
    window = block + 2 * halo
    out = q.new_zeros(*q.shape[:4], v.shape[4])
    step = stride if rel_index == "exact" else 1
    keys, values, real = (
        pad(x, (0, 0, halo, window, halo, window)) for x in (k, v, torch.ones_like(k[..., :1]))
    )
    place = torch.arange(window)
    for y in range(q.shape[2]):
        for x in range(q.shape[3]):
            top, left = (stride * i // block * block for i in (y, x))
            box = (slice(None), slice(None), slice(top, top + window), slice(left, left + window))
            query = q[:, :, y, x]
            iy, ix = y % (block // stride), x % (block // stride)
            by_row = rel_h[place - step * iy + window - 1]
            by_column = rel_w[place - step * ix + window - 1]
            rel = query @ (by_row[:, None] + by_column).flatten(0, 1).T
            content = torch.einsum("bnd,bnijd->bnij", query, keys[box]).flatten(2)
            scores = content * D**-0.5 + rel * (D**-0.5 if scale_rel else 1)
            if mask_padding:
                scores = scores.masked_fill(real[box].flatten(2) == 0, -torch.inf)
            weights = scores.softmax(2)[..., None]
            out[:, :, y, x] = (weights * values[box].flatten(2, 3)).sum(2)
    return out


@pytest.mark.parametrize("sides", [(12, 18), (7, 5)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"stride": 2, "rel_index": "exact", "scale_rel": True},
        {"mask_padding": True, "scale_rel": True},
        {"mask_padding": True, "stride": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "room"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_the_equations_and_their_gradients(options, sides, dtype, room):
    """In float64 by gathered windows, in float32 (where there are kernels for it) by boxes."""
    stride = options.get("stride", 1)
    exact = [x.requires_grad_() for x in sample(*sides, stride=stride, B=2)]
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = halo_attention(*inputs, block=6, halo=2, **options)
    expected = one_by_one(*exact, block=6, halo=2, **options)
    assert found.dtype == dtype
    assert relative_error(found, expected) < room
    weight = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(found, inputs, weight.to(dtype)),
        torch.autograd.grad(expected, exact, weight),
        strict=True,
    )
    for ours, theirs in pairs:
        assert relative_error(ours, theirs) < 100 * room


@pytest.mark.parametrize(
    ("block", "halo", "size"), [(1, 2, (7, 9)), (5, 0, (10, 15)), (3, 4, (6, 9))]
)
@pytest.mark.parametrize("mask_padding", [False, True])
def test_boxes_are_gathered_windows(block, halo, size, mask_padding, monkeypatch):
    """Both forms, on blocks smaller and larger than the halo, without relative terms and with."""
    if native.unavailable(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)) is not None:
        pytest.skip("no kernels here")
    inputs = sample(*size, window=block + 2 * halo, dtype=torch.float32, B=2)
    for tables in (inputs[3:], [None, None]):
        results = []
        for reason in (None, "not now"):
            monkeypatch.setattr(native, "unavailable", lambda q, k, reason=reason: reason)
            results.append(
                halo_attention(
                    *inputs[:3], *tables, block=block, halo=halo, mask_padding=mask_padding
                )
            )
        assert relative_error(*results) < 1e-6


def test_pieces_change_nothing(monkeypatch):
    inputs = [x.requires_grad_() for x in sample(B=2)]
    results = []
    for numbers in (1, 5000, 20000, 1 << 21):
        monkeypatch.setattr("regard.ops.window.blocks.GATHERED", numbers)
        out = halo_attention(*inputs, block=6, halo=2, mask_padding=True)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for other in results[:-1]:
        for a, b in zip(other, results[-1], strict=True):
            assert relative_error(a, b) < 1e-12


def test_a_block_as_large_as_the_map_is_dense_attention():
    q, k, v, rel_h, rel_w = sample(6, 6, window=6)
    found = halo_attention(q, k, v, rel_h, rel_w, block=6, halo=0)
    place = torch.arange(6)
    index = place - place[:, None] + 5
    by_row = torch.einsum("bnyxd,yjd->bnyxj", q, rel_h[index])
    by_column = torch.einsum("bnyxd,xjd->bnyxj", q, rel_w[index])
    bias = (by_row[..., None] + by_column[..., None, :]).reshape(1, 2, 36, 36)
    dense = softmax_attention(*(x.flatten(2, 3) for x in (q, k, v)), bias=bias)
    assert relative_error(found.flatten(2, 3), dense) < 1e-12


def test_a_block_of_one_pixel_is_a_sliding_window():
    q, k, v, rel_h, rel_w = sample(5, 6, window=5)
    found = halo_attention(q, k, v, rel_h, rel_w, block=1, halo=2)
    keys, values = (pad(x, (0, 0, 2, 2, 2, 2)) for x in (k, v))
    for y in range(5):
        for x in range(6):
            query = q[:, :, y, x]
            near = keys[:, :, y : y + 5, x : x + 5]
            scores = torch.einsum("bnd,bnijd->bnij", query, near) * 4**-0.5
            scores = scores + (query @ rel_h[4:].T)[..., None] + (query @ rel_w[4:].T)[..., None, :]
            weights = scores.flatten(2).softmax(2)
            seen = values[:, :, y : y + 5, x : x + 5].flatten(2, 3)
            out = (weights[..., None] * seen).sum(2)
            assert relative_error(found[:, :, y, x], out) < 1e-12


def test_a_block_sees_its_window_and_nothing_else():
    inputs = sample(24, 24)
    v = inputs[2].requires_grad_()
    out = halo_attention(*inputs, block=6, halo=2)
    (seen,) = torch.autograd.grad(out[:, :, 6:12, 6:12].sum(), v)
    seen = seen.abs().sum((0, 1, 4))
    assert (seen[4:14, 4:14] > 0).all()
    seen[4:14, 4:14] = 0
    assert not seen.any()


def test_it_moves_with_the_blocks():
    q, k, v, rel_h, rel_w = sample(36, 36)
    options = {"block": 6, "halo": 2}
    out = halo_attention(q, k, v, rel_h, rel_w, **options)

    def moved(by: int) -> Tensor:
        rolled = (x.roll((by, by), (2, 3)) for x in (q, k, v))
        return halo_attention(*rolled, rel_h, rel_w, **options).roll((-by, -by), (2, 3))

    inner = slice(6, 24)
    assert relative_error(moved(6)[:, :, inner, inner], out[:, :, inner, inner]) < 1e-12
    assert relative_error(moved(1)[:, :, inner, inner], out[:, :, inner, inner]) > 1e-2


def test_half_precision_and_keys_of_another_map():
    q, k, v, rel_h, rel_w = sample(16, 24, D=16, Dv=16, dtype=torch.float32)
    out = halo_attention(q, k, v, rel_h * 0.2, rel_w * 0.2, block=6, halo=2)
    low = [x.bfloat16() for x in (q, k, v, rel_h * 0.2, rel_w * 0.2)]
    half = halo_attention(*low, block=6, halo=2)
    assert half.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(half.float().flatten(), out.flatten(), dim=0)
    assert cosine > 0.999
    plain = halo_attention(q, k, v, None, None, block=6, halo=2)
    zero = halo_attention(q, k, v, 0 * rel_h, 0 * rel_w, block=6, halo=2)
    assert relative_error(plain, zero) < 1e-6


@pytest.mark.slow
def test_it_compiles_and_exports_for_other_sizes():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, rel_h, rel_w):
            return halo_attention(q, k, v, rel_h, rel_w, block=6, halo=2)

    small, large = sample(12, 18), sample(24, 30)
    torch._dynamo.reset()
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager", dynamic=True)
    for inputs in (small, large):
        assert relative_error(compiled(*inputs), Layer()(*inputs)) < 1e-12
    torch._dynamo.reset()
    rows, columns = (torch.export.Dim(name, min=2, max=20) for name in ("rows", "columns"))
    shape = {2: 6 * rows, 3: 6 * columns}
    program = torch.export.export(Layer(), tuple(small), dynamic_shapes=(shape,) * 3 + (None,) * 2)
    assert relative_error(program.module()(*large), Layer()(*large)) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block must be an int of at least 1"),
        ({"stride": 4}, "stride must be a divisor of block, 6"),
        ({"stride": 2}, "q must be of shape"),
        ({"halo": 3}, "rel_h must be of shape"),
        ({"rel_index": "true"}, "rel_index must be one of 'timm', 'exact'"),
        ({"rel_w": None}, "rel_w must be given exactly where rel_h is"),
        ({"mask_padding": 1}, "mask_padding must be True or False"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    names = ("q", "k", "v", "rel_h", "rel_w")
    inputs = {**dict(zip(names, sample(), strict=True)), "block": 6, "halo": 2, **options}
    with pytest.raises((ValueError, TypeError)) as caught:
        halo_attention(**inputs)
    assert f"halo_attention: {message}" in str(caught.value)


PROGRAM = """
import resource, torch
from regard.ops import halo_attention
torch.set_num_threads(1)
def run(side):
    q, k, v = (torch.randn(1, 4, side, side, 16, requires_grad=True) for _ in range(3))
    rel = torch.randn(27, 16, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    halo_attention(q, k, v, rel, rel, block=8, halo=3).sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
run(16)
print(run(128))
"""


@pytest.mark.slow
def test_time_and_memory_grow_with_the_map():
    seconds = {64: math.inf, 128: math.inf}
    inputs = {side: torch.randn(3, 1, 4, side, side, 16) for side in seconds}
    rel = torch.randn(27, 16)
    for _ in range(8):
        for side, maps in inputs.items():
            start = time.process_time()
            halo_attention(*maps, rel, rel, block=8, halo=3)
            seconds[side] = min(seconds[side], time.process_time() - start)
    assert 3.2 < seconds[128] / seconds[64] < 5.5, seconds
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    # Copies of inputs, queries with relative terms and gradients; all scores would be 50 MB
    # and all gathered keys and values 100 MB more.
    assert float(done.stdout) < 130
