"""The module: rearranged, attended, put back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from regard.core.budgets import relative_error
from regard.mixers import PyramidSparseAttention
from regard.ops import softmax_attention
from regard.ops.pyramid_sparse.presets import PRESETS, PyramidConfig

GRID, TEXT = (4, 4, 6), 10
FULL = {1: 1.0, 0: 1.0}


def inputs(length: int, heads: int = 2, seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(3, 1, heads, length, 8, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("text", [0, TEXT])
@pytest.mark.parametrize("rearrange", ["none", "gilbert", "tile", "semantic", "hybrid"])
def test_everything_kept_is_dense_attention(rearrange: str, text: int):
    config = PyramidConfig(
        FULL, block_q=16, block_k=16, rearrange=rearrange, text=text, clusters=(3, 5),
        tile_shape=(2, 2, 3) if rearrange == "tile" else (),
    )  # fmt: skip
    layer = PyramidSparseAttention(config, GRID)
    for seed in range(2):  # clusters start anew, then from those before
        q, k, v = inputs(96 + text, seed=seed)
        assert relative_error(layer(q, k, v), softmax_attention(q, k, v)) < 1e-5
    assert layer.density == 1.0


@pytest.mark.parametrize("rearrange", ["none", "gilbert", "tile", "semantic", "hybrid"])
def test_text_is_seen_finely_by_all(rearrange: str):
    config = PyramidConfig(
        {1: 0.1, 0: 1.0}, block_q=16, block_k=16, rearrange=rearrange, text=16,
        tile_shape=(2, 2, 3) if rearrange == "tile" else (),
    )  # fmt: skip
    layer = PyramidSparseAttention(config, GRID)
    layer(*inputs(112))
    assert layer.plan is not None
    place = 0 if rearrange in ("none", "tile") else -1
    assert (layer.plan.levels[..., place] == 1).all()
    assert layer.density < 0.5


@pytest.mark.parametrize("name", PRESETS)
def test_published_configurations(name: str):
    config = PRESETS[name]
    grid = (4, 8, 10)
    q, k, v = (x.requires_grad_() for x in inputs(320 + (config.text if config.text < 300 else 0)))
    if config.causal:
        config = replace(config, text=0)
    layer = PyramidSparseAttention(config, grid)
    out = layer(q, k, v, step=config.dense_steps)
    assert out.shape == q.shape
    assert out.isfinite().all()
    assert 0 < layer.density <= 1
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(x.isfinite().all() for x in gradients)
    if config.dense_steps:
        dense = layer(q, k, v, step=0)
        assert relative_error(dense, softmax_attention(q, k, v)) < 1e-5
        assert layer.density == 1.0


def test_cross_attention_rearranges_the_side_that_has_the_grid():
    config = PyramidConfig(FULL, block_q=16, block_k=16, rearrange="gilbert")
    q, _, _ = inputs(96)
    _, k, v = inputs(20)
    out = PyramidSparseAttention(config, GRID)(q, k, v)
    assert relative_error(out, softmax_attention(q, k, v)) < 1e-5


def test_causal_rows_do_not_see_the_future():
    config = replace(PRESETS["qwen2.5-vl"], text=0)
    q, k, v = inputs(300)
    layer = PyramidSparseAttention(config)
    before = layer(q, k, v)
    assert layer.plan is not None
    v2 = v.clone()
    v2[:, :, 200:] = 1e4  # the plan depends on q and k alone
    assert torch.equal(layer(q, k, v2)[:, :, :200], before[:, :, :200])


def test_seeds_and_refusals():
    config = PyramidConfig({1: 0.3, 0: 1.0}, block_q=16, block_k=16, seed=3)
    q, k, v = inputs(96)
    layer = PyramidSparseAttention(config)
    assert torch.equal(layer(q, k, v), layer(q, k, v))
    with pytest.raises(ValueError, match="config must be one of"):
        PyramidSparseAttention("wan3")
    with pytest.raises(ValueError, match="grid must be given"):
        PyramidSparseAttention("wan2.1-14b")
    with pytest.raises(ValueError, match="rearrange must be"):
        PyramidConfig(causal=True, rearrange="gilbert")
    with pytest.raises(ValueError, match="tile_shape must be"):
        PyramidConfig(rearrange="tile")
    text = PyramidConfig(rearrange="gilbert", text=5)
    with pytest.raises(ValueError, match="5 tokens of text and the cells of the grid"):
        PyramidSparseAttention(text, GRID)(q, k, v)
