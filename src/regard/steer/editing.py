"""Change the scores, weights or outputs of any attention layer, by functions of your own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from regard.lens.tap import Edit, tap


def edit(
    model: nn.Module,
    *,
    pre: Any = None,
    post: Any = None,
    output: Any = None,
    heads: Any = None,
    queries: slice | None = None,
    layers: Collection[int] | int | None = None,
    kind: str | None = None,
    where: str | None = None,
) -> tap:
    """A context in which a model's attention is changed by the given functions.

        scores = pre(scale q kᵀ + mask),  weights = post(softmax(scores)),  out = output(weights v)

    Args:
        model: as for `regard.lens.tap.tap`.
        pre, post, output: functions of (tensor, attention) that give a new tensor, or None to
            change nothing; see `regard.lens.tap.Edit`.
        heads: which heads; by layer as a mapping; None: all.
        queries: which queries of a call, such as `slice(-1, None)`; None: all.
        layers, kind, where: which layers, as for `tap`.

    Where the functions change nothing (all None, or giving None), outputs are those of the model
    bit for bit.
    Raises: as `tap`; ValueError without any function.

    >>> import torch
    >>> from regard.mixers import Attention as Layer
    >>> layer, x = Layer(8, 2), torch.randn(1, 3, 8)
    >>> with torch.no_grad(), edit(layer, output=lambda out, attention: 0 * out, heads=[0, 1]):
    ...     float(layer(x).abs().max())
    0.0
    """
    if pre is None and post is None and output is None:
        raise ValueError("edit: pre, post, output: at least one function is needed")
    rows = slice(None) if queries is None else queries
    change = Edit(pre=pre, post=post, output=output, heads=heads, queries=rows)
    return tap(model, edit=change, layers=layers, kind=kind, where=where)
