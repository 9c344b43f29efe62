"""Queries, keys and values of the kinds on which kernels are judged."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from regard.core.checks import check_choice

Kind = Literal["normal", "cluster", "offset", "smooth", "sharp"]
KINDS: tuple[Kind, ...] = ("normal", "cluster", "offset", "smooth", "sharp")
CENTRES = 16
DEVIATION = 0.1  # of a cluster
OFFSET = 2.0
MEMORY = 0.98  # of smooth keys: x_t = .98 x_{t-1} + noise


class Drawn(NamedTuple):
    """float32; in float64 they are the same values."""

    q: Float[Tensor, "b h t d"]
    k: Float[Tensor, "b hk s d"]
    v: Float[Tensor, "b hk s dv"]


def draw(
    kind: Kind,
    *,
    heads: int,
    length: int,
    dim: int,
    queries: int | None = None,
    kv_heads: int | None = None,
    batch: int = 1,
    seed: int = 0,
    device: str = "cpu",
) -> Drawn:
    """q, k, v of one kind; queries are drawn like keys, values are normal.

        normal    N(0, I)
        cluster   one of 16 normal centres of the head, and .1 N(0, I)
        offset    2 + N(0, I): an offset that all keys have in common
        smooth    x_t = .98 x_{t-1} + noise, of variance 1
        sharp     N(0, I) times 2 * 10^(.5 ... -1.5) by channel: a few long directions

    Keys of a head are the same whatever `heads` and `queries` are. Every kind of device has a
    generator, and numbers, of its own.

    >>> drawn = draw("offset", heads=2, length=8, dim=4, queries=3)
    >>> drawn.q.shape, drawn.k.shape, drawn.k.dtype
    (torch.Size([1, 2, 3, 4]), torch.Size([1, 2, 8, 4]), torch.float32)
    """
    check_choice("draw", "kind", kind, KINDS)
    kv_heads = heads if kv_heads is None else kv_heads
    queries = length if queries is None else queries

    def generator(number: int) -> torch.Generator:
        return torch.Generator(device).manual_seed(seed * 7919 + number)

    def tokens(role: int, count: int, tokens: int) -> Tensor:
        drawn = []
        for row in range(batch):
            for head in range(count):
                made = generator(row * 613 + head * 8 + role)
                x = torch.randn(tokens, dim, generator=made, device=device)
                if kind == "cluster":
                    key_head = head * kv_heads // count  # queries lie where its keys do
                    at = generator(row * 613 + key_head * 8 + 7)
                    centres = torch.randn(CENTRES, dim, generator=at, device=device)
                    which = torch.randint(CENTRES, (tokens,), generator=made, device=device)
                    x = centres[which] + DEVIATION * x
                drawn.append(x)
        return _of_kind(kind, torch.stack(drawn).view(batch, count, tokens, dim))

    values = generator(5)
    v = torch.randn(batch, kv_heads, length, dim, generator=values, device=device)
    return Drawn(tokens(0, heads, queries), tokens(1, kv_heads, length), v)


def _of_kind(kind: Kind, x: Tensor) -> Tensor:
    """What makes a kind of normal numbers [B, H, length, D]."""
    if kind == "offset":
        return x + OFFSET
    if kind == "smooth":
        fresh = math.sqrt(1 - MEMORY**2)
        for t in range(1, x.shape[2]):
            x[:, :, t] = MEMORY * x[:, :, t - 1] + fresh * x[:, :, t]
    if kind == "sharp":
        return x * (2 * torch.logspace(0.5, -1.5, x.shape[3], device=x.device))
    return x
