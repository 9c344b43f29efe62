"""Attention sinks: tokens that get much attention for no meaning, and the activations behind them.

Three ways to see them: columns of the weights that are heavy on average (`find_sinks`), hidden
states with single enormous channels (`massive_activations`), and the few channels in which the
model keeps them (`sink_dimensions`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.core.checks import check_flag, check_integer, check_number, reject
from regard.lens.inputs import array, tensor
from regard.lens.maps import Inputs, run, same_size
from regard.lens.records import Record, drawing
from regard.lens.tap import Attention


def column_means(
    weights: Float[Tensor, "... T S"], *, visible: Bool[Tensor, "... T S"] | None = None
) -> Float[Tensor, "... S"]:
    """The mean weight that a key gets from the queries that can see it; 0 if none can.

        c_j = Σ_i w_ij / #{i sees j}

    visible: None lets every query see every key.

    >>> causal = torch.tensor([[1.0, 0.0], [0.6, 0.4]])
    >>> column_means(causal, visible=torch.ones(2, 2, dtype=torch.bool).tril()).tolist()
    [0.800000011920929, 0.4000000059604645]
    """
    operation = "column_means"
    values = tensor(operation, "weights", weights, axes=2, more=True)
    if visible is None:
        return values.mean(-2)
    try:
        visible = visible.expand(values.shape)
    except RuntimeError:
        raise reject(operation, "visible", f"bool {list(values.shape)}", visible) from None
    total = torch.where(visible, values, 0.0).sum(-2)
    return total / visible.sum(-2).clamp(min=1)


def find_sinks(
    weights: Float[Tensor, "... T S"],
    *,
    theta: float | None = 0.1,
    alpha: float | None = None,
    visible: Bool[Tensor, "... T S"] | None = None,
) -> Bool[Tensor, "... S"]:
    """Which keys are sinks: column mean above `theta`, or above `alpha` / number of keys.

    Give one of both. Keys that no query sees do not count.

    Source: ACT, https://arxiv.org/abs/2406.15765 (theta 0.1 in its code, alpha 5 in its text).
    """
    means = column_means(weights, visible=visible)
    keys: Any = None
    if visible is not None and alpha is not None:
        keys = visible.expand(weights.shape).any(-2).sum(-1, keepdim=True)
    return _heavy(means, keys, theta, alpha)


def _heavy(
    means: Tensor, keys: Tensor | None, theta: float | None, alpha: float | None
) -> Bool[Tensor, "... S"]:
    """Column means above a bound; of `keys` keys, where those are not all."""
    if (theta is None) == (alpha is None):
        raise reject("find_sinks", "theta, alpha", "one number and one None", (theta, alpha))
    if alpha is not None:
        check_number("find_sinks", "alpha", alpha, above=0.0)
        return means > alpha / (means.shape[-1] if keys is None else keys.clamp(min=1))
    assert theta is not None  # one of the two is given
    check_number("find_sinks", "theta", theta, least=0.0)
    return means > theta


class Columns:
    """Column sums of weights that come block after block of queries, for `find_sinks`.

    >>> causal, columns = torch.tensor([[1.0, 0.0], [0.6, 0.4]]), Columns()
    >>> for row in (0, 1):
    ...     columns.add(causal[row : row + 1], torch.tensor([[True, row == 1]]))
    >>> columns.sinks(theta=0.5).tolist()
    [True, False]
    """

    total: Tensor | None = None
    seen: Tensor | None = None

    def add(self, weights: Float[Tensor, "... t S"], visible: Bool[Tensor, "... t S"]) -> None:
        """Some queries more; `visible` may leave axes of the weights out."""
        dtype = torch.promote_types(weights.dtype, torch.float32)
        total = torch.where(visible, weights, 0.0).sum(-2, dtype=dtype)
        seen = visible.sum(-2)
        self.total = total if self.total is None else self.total + total
        self.seen = seen if self.seen is None else self.seen + seen

    def sinks(
        self, *, theta: float | None = 0.1, alpha: float | None = None
    ) -> Bool[Tensor, "... S"]:
        """As `find_sinks` of all of them at once."""
        if self.total is None or self.seen is None:
            raise ValueError("Columns: no weights were added")
        keys = (self.seen > 0).sum(-1, keepdim=True)
        return _heavy(self.total / self.seen.clamp(min=1), keys, theta, alpha)


def massive_activations(
    hidden: Float[Tensor, "... C"], *, least: float = 100.0, ratio: float = 1000.0
) -> Bool[Tensor, "... C"]:
    """Which activations are massive: |x| above `least` and above `ratio` times the median |x|.

    The median is over all of `hidden` (one layer). Small models have milder ones: lower both.
    Source: https://arxiv.org/abs/2402.17762.
    """
    size = tensor("massive_activations", "hidden", hidden, axes=2, more=True).abs()
    check_number("massive_activations", "least", least, least=0.0)
    check_number("massive_activations", "ratio", ratio, above=0.0)
    return (size > least) & (size > ratio * size.median())


def sink_dimensions(
    hidden: Float[Tensor, "L B T C"],
    *,
    token: int | Int[Tensor, " B"] = 0,
    most: int = 4,
    ratio: float = 10.0,
    share: float = 0.5,
) -> list[int]:
    """The channels in which a model marks its sink token, found from its hidden states.

    A channel counts in a layer and input if |x_d| / rms(x) of the sink token is among the `most`
    largest of the token and above `ratio` times the median of its channels; returned are those
    that count in more than `share` of layers and inputs, the most frequent first.

    hidden: at the input of layers; leave out the first three and the last two layers of a deep
    model, which differ. token: position of the sink, one for all or one per input.
    """
    operation = "sink_dimensions"
    values = tensor(operation, "hidden", hidden, axes=4).float()
    check_integer(operation, "most", most)
    check_number(operation, "ratio", ratio, above=0.0)
    check_number(operation, "share", share, least=0.0)
    batch = torch.arange(values.shape[1])
    at = values[:, batch, torch.as_tensor(token).expand(len(batch))].abs()  # [L, B, C]
    scaled = at / (at.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    heavy = scaled > ratio * scaled.median(-1, keepdim=True).values
    top = torch.zeros_like(heavy)
    top.scatter_(-1, scaled.topk(min(most, scaled.shape[-1]), dim=-1).indices, True)
    counts = (heavy & top).flatten(0, 1).float().mean(0)
    order = counts.argsort(descending=True, stable=True)
    return [int(channel) for channel in order if counts[channel] > share]


@dataclass(frozen=True)
class Sinks(Record):
    """Where one run's attention collects.

    received: [L, B, H, S], mean weight per key; sink: [L, B, H, S], which keys are sinks; mass:
    [L, H], share of attention that goes to sinks, over the batch; largest: [L, B, S], the largest
    |x_d| / rms(x) of every token at the layer's input, where the tap gives it (else NaN);
    dimensions: `sink_dimensions` of the token with the most attention.
    """

    received: np.ndarray
    sink: np.ndarray
    mass: np.ndarray
    largest: np.ndarray
    dimensions: tuple[int, ...]
    names: tuple[str, ...]

    def picture(self, path: Any) -> None:
        """Attention per token (mean of heads) and largest activations, of the first input."""
        with drawing(path, (9, 3), 1, 2) as axes:
            for axis, values, title in (
                (axes[0, 0], self.received[:, 0].mean(1), "mean attention received"),
                (axes[0, 1], self.largest[:, 0], "largest |x| / rms"),
            ):
                image = axis.imshow(values, aspect="auto")
                axis.set(xlabel="token", ylabel="layer", title=title)
                axis.figure.colorbar(image, ax=axis)


def sinks(
    model: nn.Module,
    inputs: Inputs,
    *,
    theta: float | None = 0.1,
    alpha: float | None = None,
    spare_first: bool = False,
    **where: Any,
) -> Sinks:
    """Finds sinks in every layer and head of one run; padding is no token and no query.

    theta, alpha: as for `find_sinks`. spare_first: the first real key is
    no sink, whatever it gets. `where`: kind, layers and where, as for `tap`.

    Raises:
        ValueError: no such layer, or layers of different sizes (choose some, or a tower).
    """
    check_flag("sinks", "spare_first", spare_first)
    received, found, mass, largest, hidden, names = [], [], [], [], [], []

    def read(attention: Attention) -> None:
        weights = attention.weights.float()
        visible = torch.ones_like(weights, dtype=torch.bool)
        if attention.visible is not None:
            visible = visible & attention.visible
        if attention.key_mask is not None:
            visible = visible & attention.key_mask[:, None, None]
        if attention.query_mask is not None:
            visible = visible & attention.query_mask[:, None, :, None]
        means = column_means(weights, visible=visible)
        sink = find_sinks(weights, theta=theta, alpha=alpha, visible=visible)
        if spare_first:
            first = visible.any((1, 2)).float().argmax(-1)  # [B]
            sink[torch.arange(len(sink)), :, first] = False
        rows = visible.any(-1)
        weight = torch.where(rows[..., None] & sink[:, :, None], weights, 0.0)
        mass.append(array(weight.sum((0, 2, 3)) / rows.sum((0, 2)).clamp(min=1)))
        received.append(means)
        found.append(sink)
        names.append(attention.name)
        if attention.kind == "self" and attention.hidden is not None:
            states = attention.hidden.float()
            scale = (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            largest.append(array((states.abs() / scale).amax(-1)))
            hidden.append(states)

    run(model, inputs, read, **where)
    same_size("sinks", received)
    columns = torch.stack(received)
    dimensions: list[int] = []
    sizes = np.full((columns.shape[0], columns.shape[1], columns.shape[3]), np.nan)
    known = len(hidden) == len(columns) and len({states.shape for states in hidden}) == 1
    if known and columns.shape[3] == hidden[0].shape[1]:
        sizes = np.stack(largest)
        heaviest = columns.mean((0, 2)).argmax(-1)
        dimensions = sink_dimensions(torch.stack(hidden), token=heaviest)
    return Sinks(
        array(columns),
        array(torch.stack(found)),
        np.stack(mass),
        sizes,
        tuple(dimensions),
        tuple(names),
    )
