"""Attention inside the windows of an image."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

from regard.core.budgets import budget, relative_error
from regard.mixers import WindowAttention2d
from regard.mixers.grids import cut, join
from regard.mixers.window import relative_positions


def layer_of(dtype=torch.float64, **settings) -> WindowAttention2d:
    torch.manual_seed(0)
    layer = WindowAttention2d(12, 3, **settings).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def one_by_one(layer: WindowAttention2d, x: torch.Tensor) -> torch.Tensor:
    """From token to token: who is in its window, and which bias belongs to the offset."""
    (h, w), shift = layer.window, layer.shift
    _, H, W, C = x.shape
    x = pad(x, (0, 0, 0, -W % w, 0, -H % h))
    high, wide = x.shape[1:3]
    down, right = shift * (high > h), shift * (wide > w)
    q, k, v = layer.qkv(x).unflatten(3, (3, 3, C // 3)).unbind(3)
    out = torch.zeros_like(x)

    def window(place: int, size: int, moved: int, side: int) -> int:
        """The number of the window; places before the first shifted one are of their own."""
        return (place - moved) // size if place >= moved else -1

    for i in range(H):
        for j in range(W):
            own = window(i, h, down, high), window(j, w, right, wide)
            seen = [
                (a, b)
                for a in range(high)
                for b in range(wide)
                if (window(a, h, down, high), window(b, w, right, wide)) == own
            ]
            for head in range(3):
                scores = []
                for a, b in seen:
                    score = (q[:, i, j, head] * k[:, a, b, head]).sum(-1) * (C // 3) ** -0.5
                    if layer.relative_position_bias_table is not None:
                        row = (i - a + h - 1) * (2 * w - 1) + j - b + w - 1
                        score = score + layer.relative_position_bias_table[row, head]
                    scores.append(score)
                weights = torch.stack(scores, 1).softmax(1)
                values = torch.stack([v[:, a, b, head] for a, b in seen], 1)
                part = slice(head * C // 3, (head + 1) * C // 3)
                out[:, i, j, part] = (weights[..., None] * values).sum(1)
    return layer.proj(out)[:, :H, :W]


@pytest.mark.parametrize("relative_bias", [False, True])
@pytest.mark.parametrize(
    ("window", "shift", "sides"),
    [(3, 0, (6, 3)), (3, 1, (6, 9)), (3, 1, (5, 7)), ((2, 3), 1, (4, 3)), (4, 2, (4, 4))],
)
def test_every_token_attends_to_its_window(window, shift, sides, relative_bias):
    layer = layer_of(window=window, shift=shift, relative_bias=relative_bias)
    x = torch.randn(2, *sides, 12).double()
    with torch.no_grad():
        assert relative_error(layer(x), one_by_one(layer, x)) < budget(torch.float64)


def test_windows_are_cut_and_joined():
    x = torch.arange(2 * 4 * 6 * 3).view(2, 4, 6, 3)
    windows = cut(x, (2, 3))
    assert windows.shape == (2, 4, 6, 3)
    assert torch.equal(windows[1, 1], x[1, :2, 3:].reshape(6, 3))
    assert torch.equal(join(windows, (2, 3), (4, 6)), x)


def test_positions_are_numbered_by_offset():
    index = relative_positions((2, 2))
    assert index.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert relative_positions((3, 5)).unique().numel() == 5 * 9


def test_every_parameter_learns_and_it_compiles():
    layer = layer_of(torch.float32, window=3, shift=1, relative_bias=True)
    x = torch.randn(2, 6, 7, 12)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), layer(x)) < budget(torch.float32)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_of(window=0), "window must be (height, width), two ints of at least 1"),
        (lambda: layer_of(window=3, shift=3), "shift must be below the side of the window, 3"),
        (lambda: layer_of(window=3, relative_bias=1), "relative_bias must be True or False"),
        (lambda: layer_of(window=3)(torch.zeros(1, 3, 12)), "x must be of shape"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert f"WindowAttention2d: {message}" in str(caught.value)
