"""The vmap rules of operators: what `define(..., vmap=)` is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Rule = Callable[..., tuple[Any, Any]]


def rowwise(op: Callable[..., Any]) -> Rule:
    """For an op that works on the last axis or on single elements: the mapped axis goes first."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Any, Any]:
        moved = [
            x.expand(info.batch_size, *x.shape) if axis is None else x.movedim(axis, 0)
            for x, axis in zip(tensors, in_dims, strict=True)
        ]
        results = op(*moved)
        return results, (0,) * len(results) if isinstance(results, tuple) else 0

    return rule


def batched(op: Callable[..., Any]) -> Rule:
    """For an op with the batch in front: the mapped axis is folded into it and taken out again.

    Results of one axis (placeholders of what was not asked for) are not mapped.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        n, folded = info.batch_size, []
        for value, axis in zip(args, in_dims, strict=True):
            if isinstance(value, Tensor):
                in_front = value.expand(n, *value.shape) if axis is None else value.movedim(axis, 0)
                value = in_front.flatten(0, 1)
            folded.append(value)
        results = op(*folded)
        unfolded = tuple(
            x.unflatten(0, (n, x.shape[0] // n)) if x.dim() > 1 else x for x in results
        )
        return unfolded, tuple(0 if x.dim() > 1 else None for x in results)

    return rule
