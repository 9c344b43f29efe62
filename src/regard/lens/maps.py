"""Attention maps of every layer and head, and the rollout that follows attention to the input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.core.checks import check_choice, check_number, reject
from regard.lens.inputs import array, tensor
from regard.lens.records import Record, drawing
from regard.lens.tap import Attention, tap

Inputs = Tensor | Mapping[str, Any]


@dataclass(frozen=True)
class AttentionMaps(Record):
    """The weights of one run: [L, B, H, T, S], and the numbers and places of the layers."""

    weights: np.ndarray
    layers: tuple[int, ...]
    names: tuple[str, ...]

    def picture(self, path: Any) -> None:
        """The maps of the first input: a row per layer, a column per head."""
        draw_heads(self.weights[:, 0], self.layers, path)


@dataclass(frozen=True)
class Rollout(Record):
    """How much of every input token arrives at every token after all layers: [B, T, T]."""

    shares: np.ndarray

    def picture(self, path: Any) -> None:
        """The rollout of the first input."""
        with drawing(path, (4.5, 4)) as axes:
            image = axes[0, 0].imshow(self.shares[0], vmin=0)
            axes[0, 0].set(xlabel="input token", ylabel="token after the last layer")
            axes[0, 0].figure.colorbar(image, ax=axes[0, 0])


def draw_heads(weights: Float[np.ndarray, "L H T S"], layers: Sequence[int], path: Any) -> None:
    """A picture of the maps of every layer (row) and head (column), each on a scale of its own."""
    count, heads = weights.shape[:2]
    with drawing(path, (1.3 * heads, 1.3 * count), count, heads) as axes:
        for (row, column), axis in np.ndenumerate(axes):
            axis.imshow(weights[row, column], vmin=0, aspect="auto")
            axis.set(xticks=[], yticks=[])
        for row, layer in enumerate(layers):
            axes[row, 0].set_ylabel(f"layer {layer}")
        for column in range(heads):
            axes[0, column].set_title(f"head {column}", fontsize=8)


def same_size(operation: str, parts: Sequence[Tensor | np.ndarray]) -> None:
    """ValueError where layers of a model are of several shapes and cannot be one array."""
    shapes = {tuple(part.shape) for part in parts}
    if len(shapes) != 1:
        accepted = "layers of one size (choose with layers, kind or where)"
        raise reject(operation, "model", accepted, sorted(shapes))


def run(model: nn.Module, inputs: Inputs, read: Callable[[Attention], None], **where: Any) -> None:
    """Runs a model once, without gradients, with a reader on its attention layers."""
    with tap(model, read=read, **where), torch.inference_mode():
        model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def attention_maps(
    model: nn.Module,
    inputs: Inputs,
    *,
    kind: Literal["self", "cross"] = "self",
    layers: Sequence[int] | None = None,
    where: str | None = None,
) -> AttentionMaps:
    """The attention weights of one run of somebody else's model.

    inputs: the model's keyword arguments (a batch, as its tokenizer makes it) or its one tensor.
    where: part of the module path, such as "encoder", if a model has several towers. Costs
    B H T S numbers per layer; `regard.lens.reductions` sums up without keeping maps.

    Raises:
        ValueError: no such layer, or layers of different sizes (choose some, or a tower).
    """
    seen: list[Attention] = []
    kept: list[Tensor] = []

    def read(attention: Attention) -> None:
        seen.append(attention)
        kept.append(attention.weights.detach().float().cpu())

    run(model, inputs, read, kind=kind, layers=layers, where=where)
    same_size("attention_maps", kept)
    numbers, names = [a.layer for a in seen], [a.name for a in seen]
    return AttentionMaps(array(torch.stack(kept)), tuple(numbers), tuple(names))


def rollout(
    weights: Float[Tensor, "L B H T T"],
    *,
    keep: float = 0.5,
    heads: Literal["mean", "max", "min"] = "mean",
    discard: float = 0.0,
) -> Rollout:
    """Multiplies the layers' attention, with the residual stream, from the first to the last.

        R = Π_l (keep I + (1 − keep) Ā_l)

    with Ā_l the heads' mean, max or min, its rows scaled to sum to 1.
    discard: the share of smallest weights per row that is dropped before (noise that many layers
    would add up). Rows sum to 1. float64. Source: https://arxiv.org/abs/2005.00928.

    >>> uniform = torch.full((2, 1, 1, 4, 4), 0.25)
    >>> rollout(uniform, keep=0.5).shares[0, 0].round(4).tolist()
    [0.4375, 0.1875, 0.1875, 0.1875]
    """
    operation = "rollout"
    check_choice(operation, "heads", heads, ("mean", "max", "min"))
    for name, value in (("keep", keep), ("discard", discard)):
        check_number(operation, name, value, least=0.0)
        if value > 1:
            raise reject(operation, name, "a number between 0 and 1", value)
    maps = tensor(operation, "weights", weights, axes=5).double()
    if maps.shape[3] != maps.shape[4]:
        raise reject(operation, "weights", "self-attention [L, B, H, T, T]", maps)
    joined = {"mean": maps.mean, "max": maps.amax, "min": maps.amin}[heads](2)
    dropped = int(discard * joined.shape[-1])
    if dropped:
        least = joined.topk(dropped, largest=False).indices
        joined = joined.scatter(-1, least, 0.0)
    total = joined.sum(-1, keepdim=True)
    # A row that attends to nothing (padding, or "min" of heads that disagree) keeps its token.
    identity = torch.eye(joined.shape[-1], dtype=joined.dtype).expand_as(joined)
    joined = torch.where(total > 0, joined / total, identity)
    mixed = keep * identity + (1 - keep) * joined
    shares = mixed[0]
    for layer in mixed[1:]:
        shares = layer @ shares
    return Rollout(array(shares))
