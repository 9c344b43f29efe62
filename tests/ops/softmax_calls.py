"""What the tests of exact attention share: inputs, operands, leaves, the forms that serve."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch
from torch import Tensor

import regard
from ops import samples
from regard.ops.softmax import softmax_attention

INF = float("inf")
FORMS = ("native", "eager", "reference")


tensors = partial(samples.tensors, T=7, S=7, D=4)


def operands(seed: int, q: Tensor, k: Tensor) -> dict[str, Any]:
    """One value of every optional operand, on a random number of heads where that is free."""
    (B, H, T, _), (Hk, S) = q.shape, k.shape[1:3]
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    decay = -torch.rand(B, choose.choice((1, Hk, H)), S, generator=generator, dtype=torch.float64)
    decay[torch.rand(decay.shape, generator=generator) < 0.15] = -INF
    bias = normal(choose.choice((1, B)), choose.choice((1, H)), T, S)
    bias[torch.rand(bias.shape, generator=generator) < 0.15] = -INF
    return {
        "causal": choose.random() < 0.6,
        "scale": choose.choice((0.7, normal(H))),
        "key_mask": torch.rand(B, S, generator=generator) < 0.7,
        "key_bias": normal(B, choose.choice((1, Hk, H)), S),
        "bias": choose.choice((bias, bias[:, :, :1], bias[0, 0])),
        "log_decay": decay,
        "softcap": 1.5,
        "sinks": normal(H),
        "window": choose.choice(((2, 1), (-1, 0), (3, -1), (0, 0))),
    }


def some_operands(seed: int, q: Tensor, k: Tensor, share: float = 0.4) -> dict[str, Any]:
    choose = random.Random(seed)
    return {n: x for n, x in operands(seed, q, k).items() if choose.random() < share}


def differentiable(inputs: tuple[Tensor, ...], options: dict[str, Any]) -> list[Tensor]:
    """Fresh leaves in place of every floating-point tensor of a call, in `options` too."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    for name, value in options.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            options[name] = value.detach().clone().requires_grad_()
            leaves.append(options[name])
    return leaves


def serving(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[str, ...]:
    return regard.explain(softmax_attention, q, k, v, **options).available
