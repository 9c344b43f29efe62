"""Decays that are one constant per head: the schedules of published models, and how to use them.

A slope s >= 0 is the decay exp(-s) of each step; ops take its negative, `log_decay`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from regard.core.checks import check_integer, reject


def alibi_slopes(heads: int) -> Float[Tensor, " h"]:
    """The slopes of ALiBi: 2^(-8 (h + 1) / H) for head h of H, a power of two.

    For another number of heads: those of the power of two below, then every second one of the
    power of two above. float64 [H], so that a caller rounds once.

    Source: Press et al. 2021, "Train Short, Test Long", arXiv 2108.12409, and its code.
    Raises: ValueError, TypeError unless `heads` is an int of at least 1.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    >>> alibi_slopes(6).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    """
    check_integer("alibi_slopes", "heads", heads)
    whole = 1 << (heads.bit_length() - 1)
    slopes = _powers(whole)
    if whole < heads:
        slopes = torch.cat([slopes, _powers(2 * whole)[::2][: heads - whole]])
    return slopes


def _powers(heads: int) -> Tensor:
    return 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, dtype=torch.float64))


def tnl_layer_slopes(heads: int, layer: int, layers: int) -> Float[Tensor, " h"]:
    """The slopes of TransNormerLLM: ALiBi's times 1 - layer / (layers - 1) + 1e-5.

    The first layer forgets fastest, the last one hardly at all. `layer` counts from 0; a model
    of one layer, for which the formula divides by 0, has ALiBi's own. float64 [H].

    Source: Qin et al. 2023, "TransNormerLLM", arXiv 2307.14995, and its code.
    Raises: ValueError, TypeError unless 0 <= layer < layers.

    >>> tnl_layer_slopes(4, 2, 5)[0].item()
    0.1250025
    """
    _check_layer("tnl_layer_slopes", layer, layers)
    slopes = alibi_slopes(heads)
    return slopes if layers == 1 else slopes * (1 - layer / (layers - 1) + 1e-5)


def fla_log_decay(heads: int, layer: int, layers: int) -> Float[Tensor, " h"]:
    """The decays of flash-linear-attention's lightning attention: -(8 / H) (1 - layer / L) h.

    Logarithms of decays, not slopes, for head h = 0, 1, ... (head 0 does not forget); its ops
    also scale queries by D ** -0.5, where the paper has no scale. float64 [H].

    Source: Yang and Zhang, flash-linear-attention (`lightning_attn`), MIT.
    Raises: ValueError, TypeError unless 0 <= layer < layers.

    >>> fla_log_decay(4, 1, 2).tolist()
    [-0.0, -1.0, -2.0, -3.0]
    """
    check_integer("fla_log_decay", "heads", heads)
    _check_layer("fla_log_decay", layer, layers)
    return -(8 / heads) * (1 - layer / layers) * torch.arange(heads, dtype=torch.float64)


def constant_log_decay(
    per_head: Float[Tensor, " h"], like: Float[Tensor, "b hk s d"]
) -> Float[Tensor, "b h s"]:
    """One logarithm of a decay for each head, [H], as the `log_decay` of every token of `like`.

    A view: nothing is copied, and a gradient that reaches it is summed over the tokens, so that
    decays per head may be learnt. Slopes are given with a minus.

    Raises: ValueError, TypeError unless `per_head` is a floating-point tensor of one axis.

    >>> k = torch.zeros(2, 4, 7, 8)
    >>> constant_log_decay(-alibi_slopes(4), k).shape
    torch.Size([2, 4, 7])
    """
    op = "constant_log_decay"
    if not isinstance(per_head, Tensor) or not per_head.is_floating_point() or per_head.dim() != 1:
        raise reject(op, "per_head", "a floating-point tensor [H]", per_head, kind=TypeError)
    if not isinstance(like, Tensor) or like.dim() != 4:
        raise reject(op, "like", "keys [B, Hk, S, D]", like)
    one = per_head.to(like.device).view(1, -1, 1)
    return one.expand(like.shape[0], -1, like.shape[2])


def _check_layer(op: str, layer: int, layers: int) -> None:
    check_integer(op, "layers", layers)
    check_integer(op, "layer", layer, least=0)
    if layer >= layers:
        raise reject(op, "layer", f"below layers, {layers}", layer)
