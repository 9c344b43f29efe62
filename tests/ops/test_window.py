"""Attention within windows: the right keys on every axis, and FreeSwim's windows exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from golden_files import parts, settings
from ops.samples import megabytes_over_inputs, tensors
from regard.core.budgets import relative_error
from regard.ops import softmax_attention, window_attention
from regard.ops.window import (
    entropy_scale,
    inward_window_attention,
    inward_window_mask,
    window_mask,
)

CASES: list[dict[str, Any]] = [
    {"window": (3, 1)},
    {"window": (5, 0), "causal": True},
    {"window": (-1, 2)},
    {"window": (3, 1), "dilation": 4},
    {"window": (2, 2), "dilation": 7, "causal": True},
    {"window": (4, 4), "inward": True},
    {"window": [(1, 1), (2, 0)], "grid": (6, 10)},
    {"window": [(1, 2), (2, 1)], "grid": (6, 10), "inward": True},
    {"window": [(1, 1), (2, 0)], "grid": (6, 10), "dilation": (2, 3)},
    {"window": [(-1, -1), (1, 1), (2, 2)], "grid": (3, 4, 5), "inward": True},
    {"window": [(1, 0), (1, 1), (9, 9)], "grid": (3, 4, 5)},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_every_window(options: dict[str, Any], masked: bool):
    inputs = [x.requires_grad_() for x in tensors(T=60, S=60)]
    mask = torch.rand(2, 60, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    found, expected = (
        window_attention(*inputs, key_mask=mask, impl=impl, **options)
        for impl in ("eager", "reference")
    )
    assert relative_error(found, expected) < 1e-12
    weight = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, weight),
        torch.autograd.grad(expected, inputs, weight),
        strict=True,
    ):
        assert relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize("tile", [1, 3, 64])
def test_tiles_change_rounding_only(tile: int):
    q, k, v = tensors(T=60, S=60)
    for options in CASES[:3] + CASES[5:8]:
        sides = [tile] * len(options.get("grid", (1,)))
        whole = window_attention(q, k, v, **options)
        assert relative_error(window_attention(q, k, v, tile=sides, **options), whole) < 1e-12


@pytest.mark.parametrize(("T", "S"), [(20, 50), (50, 20)])
@pytest.mark.parametrize("causal", [False, True])
def test_sequences_are_aligned_at_the_end(T: int, S: int, causal: bool):
    q, k, v = tensors(T=T, S=S)
    options = {"window": (4, 2), "causal": causal}
    expected = softmax_attention(q, k, v, **options)
    assert relative_error(window_attention(q, k, v, **options), expected) < 1e-12


def test_windows_as_wide_as_the_grid_are_dense_attention():
    q, k, v = tensors(T=60, S=60, dtype=torch.float32)
    out = inward_window_attention(q, k, v, (3, 4, 5), 9)
    assert relative_error(out, softmax_attention(q, k, v)) < 1e-6


def test_official_masks():
    masks = parts("freeswim/masks_a")["out"]
    for name, mask in masks.items():
        sizes = [int(n) for n in name.removeprefix("mask_").split("x")]
        assert torch.equal(inward_window_mask(sizes[:3], sizes[3:]), mask)


@pytest.mark.parametrize("grid", [(1, 7, 9), (2, 6, 8)])
def test_every_query_sees_equally_many_keys(grid: tuple[int, ...]):
    seen = inward_window_mask(grid, (2, 3)).sum(1)
    assert set(seen.tolist()) == {grid[0] * 5 * 7}
    assert inward_window_mask(grid, (2, 3), time_half=0).sum(1).unique().tolist() == [35]


def test_official_window_attention():
    file, config = parts("freeswim/window_op"), settings("freeswim/window_op")
    inputs = [file["in"][n].requires_grad_() for n in "qkv"]
    grid = (config["frames"], config["height"], config["width"])
    half = (config["d_h"], config["d_w"])
    out = inward_window_attention(*inputs, grid, half, scale=config["scale"])
    assert torch.allclose(out, file["out"]["o"], atol=1e-5)
    found = torch.autograd.grad(out, inputs, file["in"]["grad_out"])
    for n, gradient in zip("qkv", found, strict=True):
        assert torch.allclose(gradient, file["grad"][n], atol=1e-5, rtol=1e-4)


def test_entropy_scale():
    assert entropy_scale(64, 1560) ** 2 * 64 == pytest.approx(1.0943, abs=1e-4)


def test_mask_of_a_sequence():
    assert torch.equal(window_mask((5,), [(1, 0)]), torch.ones(5, 5).tril().triu(-1).bool())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window": (1, 2, 3)}, "window"),
        ({"window": [(1, 1)], "grid": (6, 10)}, r"window must be \(left, right\), or 2 of them"),
        ({"window": (1, 1), "grid": (6, 9)}, "grid must be of 60 queries and 60 keys"),
        ({"window": (1, 1), "grid": (6, 10), "causal": True}, "causal must be False on a grid"),
        ({"window": (1, 1), "inward": True, "dilation": 2}, "dilation must be 1 with inward"),
        ({"window": (1, 1), "dilation": 0}, "dilation must be a positive integer"),
        ({"window": (1, 1), "tile": (1, 2)}, "tile must be a positive integer, or 1 of them"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, Any], match: str):
    q, k, v = tensors(T=60, S=60)
    with pytest.raises((ValueError, TypeError), match=match):
        window_attention(q, k, v, **options)


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
def test_memory_at_16384_tokens(backward: bool):
    used = megabytes_over_inputs(
        "regard.ops:window_attention", 16384, backward=backward, options="window=(255, 0)"
    )
    assert used < (100 if backward else 64), used


@pytest.mark.slow
def test_memory_of_windows_of_a_video():
    """4 x 64 x 64 tokens: no mask of all pairs, which would be 256 MB."""
    grid = "(4, *[round((given[0].shape[2] / 4) ** 0.5)] * 2)"
    used = megabytes_over_inputs(
        "regard.ops:inward_window_attention", 16384, options=f"grid={grid}, half=9"
    )
    assert used < 64, used
