"""How spread out attention is: the entropy of its rows, per layer and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.core.checks import reject
from regard.lens.inputs import array, tensor
from regard.lens.maps import Inputs, run, same_size
from regard.lens.records import Record, drawing
from regard.lens.tap import Attention


def attention_entropy(
    weights: Float[Tensor, "*batch S"],
    *,
    visible: Bool[Tensor, "*batch S"] | None = None,
    relative: bool = False,
) -> Float[Tensor, "*batch"]:
    """−Σ_j w_j ln w_j of every row, in nats; a weight of 0 adds nothing.

    relative: divided by the logarithm of how many keys the query sees (`visible`; all if None), so
    that 1 is uniform. A query that sees at most one key gets 0.

    >>> attention_entropy(torch.full((1, 4), 0.25), relative=True).tolist()
    [1.0]
    """
    operation = "attention_entropy"
    found = torch.special.entr(tensor(operation, "weights", weights, axes=1, more=True)).sum(-1)
    if not relative:
        return found
    if visible is None:
        seen = torch.full_like(found, weights.shape[-1])
    else:
        try:
            seen = visible.expand(weights.shape).sum(-1)
        except RuntimeError:
            raise reject(operation, "visible", f"bool {list(weights.shape)}", visible) from None
    return torch.where(seen > 1, found / seen.clamp(min=2).to(found.dtype).log(), 0.0)


@dataclass(frozen=True)
class Entropy(Record):
    """mean: [L, H], mean entropy in nats over the real queries of a batch; relative: the same
    divided by the logarithm of the number of visible keys, 0 (one key) to 1 (uniform).
    """

    mean: np.ndarray
    relative: np.ndarray
    names: tuple[str, ...]

    def picture(self, path: Any) -> None:
        """Relative entropy, a row per layer and a column per head."""
        with drawing(path, (1.5 + 0.4 * self.relative.shape[1], 1.2 + 0.35 * len(self.names))) as a:
            image = a[0, 0].imshow(self.relative, vmin=0, vmax=1, aspect="auto")
            a[0, 0].set(xlabel="head", ylabel="layer", title="relative entropy")
            a[0, 0].figure.colorbar(image, ax=a[0, 0])


def entropies(model: nn.Module, inputs: Inputs, **where: Any) -> Entropy:
    """The entropy of every head in one run; `where`: kind, layers and where, as for `tap`.

    Padding is no query and no key. Costs the weights of one layer at a time.

    Raises:
        ValueError: no such layer, or layers of different numbers of heads (choose some).
    """
    mean, relative, names = [], [], []

    def read(attention: Attention) -> None:
        weights = attention.weights
        size = weights.shape
        visible = attention.visible
        visible = torch.ones_like(weights, dtype=torch.bool) if visible is None else visible
        visible = visible.expand(size)
        if attention.key_mask is not None:
            visible = visible & attention.key_mask[:, None, None]
        real = visible.any(-1)
        if attention.query_mask is not None:
            real = real & attention.query_mask[:, None]
        count = real.sum((0, 2)).clamp(min=1)
        for values, flag in ((mean, False), (relative, True)):
            rows = attention_entropy(weights.float(), visible=visible, relative=flag)
            values.append(array(torch.where(real, rows, 0.0).sum((0, 2)) / count))
        names.append(attention.name)

    run(model, inputs, read, **where)
    same_size("entropies", mean)
    return Entropy(np.stack(mean), np.stack(relative), tuple(names))
