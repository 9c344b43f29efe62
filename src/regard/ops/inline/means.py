"""Keys and values less the means of those before them: `regard::inline_means_fwd` and `_bwd`.

    m_j = (k_1 + .. + k_j) / n_j,    keys_j = k_j - m_{j-1},    values_j = (v_j - u_{j-1}) r_j

with u the means of v, r_j = 1 - 1 / n_j, and n_j the real keys up to j. Written as plain torch
operators, the running sums and their gradients hold twice as many tensors of the size of k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.core.library import define
from regard.core.mapped import batched

BLOCK = 4096  # tokens whose gradients are summed at once


def _means(
    k: Tensor, v: Tensor, inverse: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """keys, values, u_1 .. u_S and m_S, from inverse [B, 1, S, 1] = 1 / n_j."""
    sums = k.cumsum(2).mul_(inverse)
    keys, last = k.clone(memory_format=torch.contiguous_format), sums[:, :, -1:].sum(2)
    keys[:, :, 1:] -= sums[:, :, :-1]
    if hidden is not None:
        keys.masked_fill_(hidden, 0.0)
    del sums
    u, values = v.cumsum(2).mul_(inverse), v.clone(memory_format=torch.contiguous_format)
    values[:, :, 1:] -= u[:, :, :-1]
    return keys, values.mul_(1.0 - inverse), u, last


def _differentiate(
    d_keys: Tensor,
    d_values: Tensor,
    d_u: Tensor,
    d_last: Tensor,
    inverse: Tensor,
    hidden: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if hidden is not None:
        d_keys = d_keys.masked_fill(hidden, 0.0)
    own = d_values * (1.0 - inverse)
    return _back(d_keys, None, d_last, inverse), _back(own, d_u, None, inverse)


def _back(own: Tensor, d_u: Tensor | None, d_last: Tensor | None, inverse: Tensor) -> Tensor:
    """Of x, from the gradients of x_j - mean_{j-1}, of every mean_j and of the last one.

    x_l is in all means from l on: sums from the end, to which what is later adds exact zeros
    where it is zero.
    """
    out, S = torch.empty_like(own, memory_format=torch.contiguous_format), own.shape[2]
    later = torch.zeros_like(own[:, :, :1])  # the sum over all blocks that follow
    for start in reversed(range(0, S, BLOCK)):
        stop = min(start + BLOCK, S)
        part = torch.zeros_like(own[:, :, start:stop], memory_format=torch.contiguous_format)
        inside = own[:, :, start + 1 : stop + 1]
        part[:, :, : inside.shape[2]] -= inside
        if d_u is not None:
            part += d_u[:, :, start:stop]
        if d_last is not None and stop == S:
            part[:, :, -1] += d_last
        part = part.mul_(inverse[:, :, start:stop]).flip(2).cumsum_(2).add_(later)
        later = part[:, :, -1:]
        torch.add(own[:, :, start:stop], part.flip(2), out=out[:, :, start:stop])
    return out


def _fake(k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    last = k.new_empty(*k.shape[:2], k.shape[3])
    return k.new_empty(k.shape), v.new_empty(v.shape), v.new_empty(v.shape), last


def _fake_gradient(d_keys: Tensor, d_values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return d_keys.new_empty(d_keys.shape), d_values.new_empty(d_values.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[2:])


def _backward_of_forward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    return *_backward(*gradients, *ctx.saved_tensors), None, None


_backward = define(
    "inline_means_bwd",
    "(Tensor d_keys, Tensor d_values, Tensor d_u, Tensor d_last, Tensor inverse, "
    "Tensor? hidden) -> (Tensor, Tensor)",
    _differentiate,
    _fake_gradient,
    vmap=batched(lambda *given: _backward(*given)),
)
means = define(
    "inline_means_fwd",
    "(Tensor k, Tensor v, Tensor inverse, Tensor? hidden) -> (Tensor, Tensor, Tensor, Tensor)",
    _means,
    _fake,
    backward=_backward_of_forward,
    setup_context=_save,
    vmap=batched(lambda *given: means(*given)),
)
