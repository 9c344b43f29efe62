"""ACT: take attention away from tokens that draw it without meaning, in heads chosen for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.lens.tap import Attention, Edit, points, tap

EPSILON = 1e-9  # a row whose other tokens hold less than this has nowhere to put what is freed


def sink_means(
    weights: Float[Tensor, "*b t s"], visible: Bool[Tensor, "*b t s"] | None = None
) -> Float[Tensor, "*b s"]:
    """Mean weight of every key over the queries that can see it: c_j = Σ_i w_ij / #{i sees j}.

    Args:
        weights: [..., T, S], rows summing to 1.
        visible: True where a (real) query sees a key; None: the causal mask, aligned at the end.
    """
    T, S = weights.shape[-2:]
    if visible is None:
        visible = torch.ones(T, S, dtype=torch.bool, device=weights.device).tril(S - T)
    seen = visible.expand_as(weights)
    return (weights * seen).sum(-2) / seen.sum(-2).clamp_min(1)


def find_sinks(
    weights: Float[Tensor, "*b t s"],
    *,
    theta: float | None = 0.1,
    alpha: float | None = None,
    visible: Bool[Tensor, "*b t s"] | None = None,
    spare_first: bool = False,
) -> Bool[Tensor, "*b s"]:
    """Keys whose mean weight exceeds a bound: theta, or alpha / (number of keys).

    Args:
        weights, visible: as in `sink_means`.
        theta: absolute bound (released code: 0.1); None: use alpha.
        alpha: bound relative to a uniform weight (the paper: 5); replaces theta.
        spare_first: leave out the first sink, which is meant for the first token; if that is no
            sink, another one is spared, as in the released code.
    """
    if (theta is None) == (alpha is None) and alpha is None:
        raise ValueError("find_sinks: theta, alpha: one of them must be given")
    means = sink_means(weights, visible)
    if alpha is None:
        bound: float | Tensor = theta if theta is not None else 0.0
    elif visible is None:
        bound = alpha / weights.shape[-1]
    else:
        bound = alpha / visible.expand_as(weights).any(-2).sum(-1, keepdim=True).clamp_min(1)
    sinks = means > bound
    return sinks & (sinks.cumsum(-1) > 1) if spare_first else sinks


def calibrate(
    weights: Float[Tensor, "*b t s"], sinks: Bool[Tensor, "*b s"], beta: float
) -> Float[Tensor, "*b t s"]:
    """Multiply sinks by beta and give what is freed to the other keys in proportion.

        w'_ij = beta w_ij for sinks j;   w'_ij = w_ij (1 + (1 - beta) s_i / r_i) for others,

    with s_i the row's weight on sinks and r_i that on other keys. Rows keep their sums; a row
    that sees nothing but sinks stays as it is.
    """
    taken = sinks.unsqueeze(-2)
    on_sinks = (weights * taken).sum(-1, keepdim=True)
    on_others = (weights * ~taken).sum(-1, keepdim=True)
    possible = on_others > EPSILON
    gain = 1 + (1 - beta) * on_sinks / on_others.clamp_min(EPSILON)
    return torch.where(possible, weights * torch.where(taken, beta, gain), weights)


def calibrate_attention(
    weights: Float[Tensor, "*b t s"],
    beta: float = 0.4,
    theta: float | None = 0.1,
    alpha: float | None = None,
    visible: Bool[Tensor, "*b t s"] | None = None,
    spare_first: bool = True,
) -> Float[Tensor, "*b t s"]:
    """Find the sinks of attention maps and calibrate them: `find_sinks`, then `calibrate`.

    >>> weights = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.6, 0.2]])
    >>> calibrate_attention(weights, beta=0.5, theta=0.3)[-1]
    tensor([0.3500, 0.3000, 0.3500])
    """
    sinks = find_sinks(weights, theta=theta, alpha=alpha, visible=visible, spare_first=spare_first)
    return calibrate(weights, sinks, beta)


def calibrate_output(
    output: Float[Tensor, "*b t dv"],
    sink_weights: Float[Tensor, "*b t j"],
    sink_values: Float[Tensor, "*b j dv"],
    beta: float,
) -> Float[Tensor, "*b t dv"]:
    """The same from partial sums, with the weights of the sinks only.

        o' = (1 + (1 - beta) s / (1 - s)) (o - o_J) + beta o_J,   o_J = Σ_{j in J} w_j v_j

    for weights that sum to 1: on top of any fused attention this costs O(T |J| Dv).
    """
    part = sink_weights @ sink_values
    s = sink_weights.sum(-1, keepdim=True)
    gain = 1 + (1 - beta) * s / (1 - s).clamp_min(EPSILON)
    return torch.where(1 - s > EPSILON, gain * (output - part) + beta * part, output)


class act_calibration:  # noqa: N801 (a context manager, used as a function)
    """Calibrates the sinks of chosen heads while it is open (ACT).

    Yu et al., "Unveiling and Harnessing Hidden Attention Sinks" (arXiv 2406.15765, ICML 2024).
    Matched to the released code's weights to 1e-6 and to logits of a Llama with it to 1e-5.

    At the prompt, sinks are found per row of the batch, layer and head. With a cache, the sinks
    of the prompt stay the sinks: every later query is calibrated at them and new tokens are
    none (the released code raises the first token's weight there instead). Padding on either
    side counts nowhere, so a batch gives what its rows give alone.

    Args:
        model: as for `regard.lens.tap.tap`.
        heads: heads by layer, {layer: [head, ...]}, from `search_heads` or `act_heads`; None:
            all of them.
        beta: what sinks keep; 1 changes nothing, bit for bit.
        theta, alpha: as in `find_sinks`.
        spare_first: as in `find_sinks`.
        layers, where: which layers, as for `tap`; self-attention only.

    Cost: one explicit softmax of the chosen heads, O(T S) memory each; other heads run as before
    (a fused kernel computes the layer's output in any case).
    Raises: ValueError for heads or layers that are not there, or beta outside [0, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Mapping[int, Sequence[int]] | Sequence[int] | None = None,
        *,
        beta: float = 0.4,
        theta: float | None = 0.1,
        alpha: float | None = None,
        spare_first: bool = True,
        layers: Sequence[int] | None = None,
        where: str | None = None,
    ) -> None:
        if not 0 <= beta <= 1:
            raise ValueError(f"act_calibration: beta {beta}: must be in [0, 1]")
        self.beta, self.theta, self.alpha, self.spare_first = beta, theta, alpha, spare_first
        edit = Edit(post=self._calibrate, heads=heads)
        self._tap = tap(model, edit=edit, layers=layers, kind="self", where=where)
        self.sinks: dict[str, Tensor] = {}  # of the prompt, by layer: [B, h, S]

    def __enter__(self) -> Self:
        self.sinks = {}
        self._tap.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tap.__exit__(kind, error, trace)

    def _calibrate(self, weights: Tensor, attention: Attention) -> Tensor | None:
        if self.beta == 1:
            return None
        key = f"{attention.name}#{attention.layer}"
        if attention.offset == 0:
            visible = attention.visible & attention.query_mask[:, None, :, None]
            if visible.shape[1] > 1:
                visible = visible[:, attention.heads]
            sinks = find_sinks(
                weights,
                theta=self.theta,
                alpha=self.alpha,
                visible=visible,
                spare_first=self.spare_first,
            )
            self.sinks[key] = sinks
        elif key not in self.sinks:
            raise ValueError(
                f"act_calibration: {attention.name} goes on from a cache whose prompt was run "
                "outside; run the prompt inside the context too"
            )
        sinks = for_keys(self.sinks[key], attention)
        return calibrate(weights, sinks, self.beta)


def for_keys(marks: Bool[Tensor, "b *h s"], attention: Attention) -> Bool[Tensor, "b *h s"]:
    """Marks of the prompt's tokens, laid along the keys of a later call.

    New keys are unmarked, a window's cache holds the last keys only, and the rows of a batch are
    repeated where each became several beams.
    """
    B, S, T = attention.q.shape[0], attention.k.shape[2], attention.q.shape[2]
    if marks.shape[0] != B and B % marks.shape[0] == 0:
        marks = marks.repeat_interleave(B // marks.shape[0], 0)
    start = max(attention.offset + T - S, 0)
    marks = marks[..., start : start + S]
    return torch.nn.functional.pad(marks, (0, S - marks.shape[-1]))


@dataclass(frozen=True)
class HeadSearch:
    """What `search_heads` found.

    Attributes:
        base: the metric without calibration.
        scores: by (layer, head), the metric with that head alone calibrated, less base.
        heads: {layer: heads} whose score exceeds the margin.
    """

    base: float
    scores: dict[tuple[int, int], float]
    heads: dict[int, list[int]]


def search_heads(
    model: nn.Module,
    metric: Callable[[nn.Module], float],
    *,
    layers: Sequence[int] | None = None,
    margin: float = 0.0,
    beta: float = 0.4,
    theta: float | None = 0.1,
    alpha: float | None = None,
    spare_first: bool = True,
    where: str | None = None,
) -> HeadSearch:
    """Which heads to calibrate: those whose calibration alone raises a metric.

    Args:
        metric: runs the model on a calibration set and gives a number, higher is better.
        layers: to be tried; None: all (the authors leave out the first two).
        margin: by how much the metric must rise.

    Cost: layers x heads + 1 runs of the metric.
    Raises: ValueError where the model does not say how many heads it has.
    """
    base = float(metric(model))
    scores: dict[tuple[int, int], float] = {}
    found: dict[int, list[int]] = {}
    for point in points(model):
        inside = point.kind == "self" and (where is None or where in point.name)
        for layer in range(point.layer, point.layer + point.repeats) if inside else ():
            if layers is not None and layer not in layers:
                continue
            if point.heads is None:
                raise ValueError(f"search_heads: {point.name} does not say how many heads it has")
            for head in range(point.heads):
                chosen = {layer: [head]}
                with act_calibration(
                    model,
                    chosen,
                    beta=beta,
                    theta=theta,
                    alpha=alpha,
                    spare_first=spare_first,
                    where=where,
                ):
                    scores[layer, head] = float(metric(model)) - base
                if scores[layer, head] > margin:
                    found.setdefault(layer, []).append(head)
    return HeadSearch(base, scores, found)
