"""ACT: take attention away from tokens that draw it without meaning, in heads chosen for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.lens.sinks import Columns
from regard.lens.sinks import find_sinks as heavy_keys
from regard.lens.tap import Attention, Edit, points, tap
from regard.steer.context import Steering, for_keys

Compat = Literal["official"] | None
EPSILON = 1e-9  # a row whose other tokens hold less than this has nowhere to put what is freed


def find_sinks(
    weights: Float[Tensor, "*b t s"],
    *,
    theta: float | None = 0.1,
    alpha: float | None = None,
    visible: Bool[Tensor, "*b t s"] | None = None,
    spare_first: bool = False,
) -> Bool[Tensor, "*b s"]:
    """Keys whose mean weight, over the queries that can see them, exceeds a bound.

        c_j = Σ_i w_ij / #{i sees j}  >  theta,   or alpha / (number of keys)

    Args:
        weights: [..., T, S], rows summing to 1.
        theta: absolute bound (released code: 0.1); None: use alpha.
        alpha: bound relative to a uniform weight (the paper: 5); replaces theta.
        visible: True where a (real) query sees a key; None: the causal mask, aligned at the end.
        spare_first: leave out the first sink, which is meant for the first token; if that is no
            sink, another one is spared, as in the released code.

    The last keys are seen by few queries, so that their means are often high.
    """
    if visible is None:
        T, S = weights.shape[-2:]
        visible = torch.ones(T, S, dtype=torch.bool, device=weights.device).tril(S - T)
    if alpha is not None:
        theta = None
    sinks = heavy_keys(weights, theta=theta, alpha=alpha, visible=visible)
    return _without_first(sinks) if spare_first else sinks


def _without_first(sinks: Bool[Tensor, "*b s"]) -> Bool[Tensor, "*b s"]:
    return sinks & (sinks.cumsum(-1) > 1)


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
    # (two outer products: `where` over whole maps takes several times as long)
    kept = torch.full_like(gain, beta).where(possible, 1.0)
    return weights * (gain.where(possible, 1.0) * ~taken + kept * taken)


def calibrate_attention(
    weights: Float[Tensor, "*b t s"],
    beta: float = 0.4,
    theta: float | None = 0.1,
    alpha: float | None = None,
    visible: Bool[Tensor, "*b t s"] | None = None,
    spare_first: bool = True,
    compat: Compat = None,
) -> Float[Tensor, "*b t s"]:
    """Find the sinks of attention maps and calibrate them: `find_sinks`, then `calibrate`.

    compat: "official" does what the released code does, for a whole prompt (T = S) or one token
    with a cache (T = 1): element 0 of the first axis only; a key's mean is its sum / (S - j), of
    one token the weight itself; and the first row's weight on the first key becomes 1 in the end,
    so that the row of a cached token sums to more than 1.

    >>> weights = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.6, 0.2]])
    >>> calibrate_attention(weights, beta=0.5, theta=0.3)[-1]
    tensor([0.3500, 0.3000, 0.3500])
    """
    check_compat("calibrate_attention", compat, theta, alpha, spare_first)
    if compat == "official":
        return _as_released(weights, beta, theta or 0.0)
    sinks = find_sinks(weights, theta=theta, alpha=alpha, visible=visible, spare_first=spare_first)
    return calibrate(weights, sinks, beta)


def check_compat(
    operation: str, compat: Any, theta: float | None, alpha: float | None, spare_first: bool
) -> None:
    """ValueError where the released code has no such option."""
    if compat not in (None, "official"):
        raise ValueError(f"{operation}: compat {compat!r}: must be 'official' or None")
    if compat and (theta is None or alpha is not None or not spare_first):
        raise ValueError(
            f"{operation}: compat 'official': needs theta, no alpha and spare_first=True, "
            f"got theta {theta}, alpha {alpha}, spare_first {spare_first}"
        )


def _as_released(weights: Tensor, beta: float, theta: float) -> Tensor:
    T, S = weights.shape[-2:]
    if T not in (1, S):
        raise ValueError(
            f"calibrate_attention: compat 'official': weights [..., {T}, {S}]: must be of a whole "
            "prompt (T = S) or of one token (T = 1)"
        )
    first = weights[:1]
    means = first.sum(-2) / torch.arange(T, 0, -1, device=weights.device)
    sinks = means > theta
    new = calibrate(first, _without_first(sinks), beta)
    new[..., 0, 0] = 1
    return torch.cat([new, weights[1:]])


def calibrate_output(
    output: Float[Tensor, "*b t dv"],
    sink_weights: Float[Tensor, "*b t j"],
    sink_values: Float[Tensor, "*b j dv"],
    beta: float,
) -> Float[Tensor, "*b t dv"]:
    """The same from partial sums, with the weights of the sinks only.

        o' = (1 + (1 - beta) s / (1 - s)) (o - o_J) + beta o_J,   o_J = Σ_{j in J} w_j v_j

    for weights that sum to 1: on top of any fused attention this costs O(T |J| Dv). Where sinks
    hold nearly all of a row it loses digits that `calibrate` keeps: about 1 / (1 - s) roundings.
    """
    part = sink_weights @ sink_values
    s = sink_weights.sum(-1, keepdim=True)
    gain = 1 + (1 - beta) * s / (1 - s).clamp_min(EPSILON)
    return torch.where(1 - s > EPSILON, gain * (output - part) + beta * part, output)


class act_calibration(Steering):  # noqa: N801 (a context manager, used as a function)
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
        prompt: how many of the first tokens (padding included) are the prompt, where later ones
            run with it: generation without a cache is then as with one. None: all of them.
        compat: "official" does in every call what the released code does, see
            `calibrate_attention`.

    Attributes:
        sinks: of the prompt, by layer and module: bool [B, heads, S].

    Cost: explicit weights of the chosen heads, twice at a prompt of more than one block, in blocks
    of queries: O(block S) memory; the released code's way needs O(T S). Other heads run as before
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
        prompt: int | None = None,
        compat: Compat = None,
    ) -> None:
        if prompt is not None and prompt < 1:
            raise ValueError(f"act_calibration: prompt {prompt}: must be at least 1")
        if not 0 <= beta <= 1:
            raise ValueError(f"act_calibration: beta {beta}: must be in [0, 1]")
        check_compat("act_calibration", compat, theta, alpha, spare_first)
        self.compat, self.prompt = compat, prompt
        self.beta, self.theta, self.alpha, self.spare_first = beta, theta, alpha, spare_first
        survey, by_rows = (None, False) if compat else (self._look, True)
        edit = Edit(post=self._calibrate, heads=heads, survey=survey, by_rows=by_rows)
        self._tap = tap(model, edit=edit, layers=layers, kind="self", where=where)
        self.sinks: dict[str, Tensor] = {}

    def parts(self) -> list[AbstractContextManager[Any]]:
        """The tap."""
        return [self._tap]

    def start(self) -> None:
        """Forget the sinks of the last prompt."""
        self.sinks = {}

    def _look(self, blocks: Iterator[tuple[range, Tensor]], attention: Attention) -> None:
        if self.beta == 1:
            return
        key = _key(attention)
        if attention.offset == 0:
            options = {"theta": self.theta, "alpha": self.alpha, "spare_first": self.spare_first}
            self.sinks[key] = _sinks_of_prompt(blocks, attention, self.prompt, **options)
        elif key not in self.sinks:
            raise ValueError(
                f"act_calibration: {attention.name} goes on from a cache whose prompt was run "
                "outside; run the prompt inside the context too"
            )

    def _calibrate(self, weights: Tensor, attention: Attention) -> Tensor | None:
        if self.beta == 1:
            return None
        if self.compat == "official":
            return _as_released(weights, self.beta, self.theta or 0.0)
        return calibrate(weights, for_keys(self.sinks[_key(attention)], attention), self.beta)


def _key(attention: Attention) -> str:
    return f"{attention.name}#{attention.layer}"


def _sinks_of_prompt(
    blocks: Iterable[tuple[range, Tensor]],
    attention: Attention,
    prompt: int | None = None,
    *,
    spare_first: bool,
    **options: Any,
) -> Tensor:
    """`find_sinks` among real keys, by real queries; the weights come block after block."""
    columns, real = Columns(), attention.query_mask
    for rows, weights in blocks:
        rows = rows[: None if prompt is None else max(prompt - rows.start, 0)]
        if not rows:
            break
        visible = attention.visible_of(rows) & real[:, None, rows.start : rows.stop, None]
        if visible.shape[1] > 1:
            visible = visible[:, attention.heads]
        columns.add(weights[..., : len(rows), :prompt], visible[..., :prompt])
    sinks = columns.sinks(**options)
    return _without_first(sinks) if spare_first else sinks


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
    Raises: ValueError for layers that are not there, two towers with layers of the same number
    (`where` chooses one), or a model that does not say how many heads it has.
    """
    base = float(metric(model))
    scores: dict[tuple[int, int], float] = {}
    found: dict[int, list[int]] = {}
    options = {"beta": beta, "theta": theta, "alpha": alpha, "spare_first": spare_first}
    for layer, heads in _layers("search_heads", model, layers, where).items():
        for head in range(heads):
            with act_calibration(model, {layer: [head]}, where=where, **options):
                scores[layer, head] = float(metric(model)) - base
            if scores[layer, head] > margin:
                found.setdefault(layer, []).append(head)
    return HeadSearch(base, scores, found)


def _layers(
    operation: str, model: nn.Module, layers: Sequence[int] | None, where: str | None
) -> dict[int, int]:
    """Heads of every layer of self-attention that is to be tried."""
    heads: dict[int, int] = {}
    for point in points(model):
        if point.kind != "self" or (where is not None and where not in point.name):
            continue
        if point.heads is None:
            raise ValueError(f"{operation}: {point.name} does not say how many heads it has")
        for layer in range(point.layer, point.layer + point.repeats):
            if layer in heads:
                raise ValueError(
                    f"{operation}: where {where!r}: several towers have a layer {layer}; choose "
                    f"one of them by a part of its path, such as {point.tower!r}"
                )
            heads[layer] = point.heads
    if missing := sorted(set(layers or ()) - heads.keys()):
        raise ValueError(f"{operation}: layers {missing}: the model has {sorted(heads)}")
    return {layer: n for layer, n in heads.items() if layers is None or layer in layers}


def head_slopes(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    *,
    layers: Sequence[int] | None = None,
    theta: float | None = 0.1,
    alpha: float | None = None,
    spare_first: bool = True,
    where: str | None = None,
) -> dict[tuple[int, int], float]:
    """By how much a loss falls per unit of calibration, of every head, from one backward pass.

        slope_lh = -d loss / d(1 - beta_lh)   at beta = 1

    The first-order effect of all heads at once, by (layer, head): a cheap choice of candidates
    that `search_heads` can then try. Prompts only (no cache).

    Args:
        loss: runs the model and gives a scalar with its graph, lower is better.
        layers: numbers of layers, all of them if None.

    Cost: one run forward and backward of the loss, with weights of all heads kept for it.
    Raises: as `search_heads`.
    """
    there = _layers("head_slopes", model, layers, where)
    amounts: dict[int, Tensor] = {}
    options: Any = {"theta": theta, "alpha": alpha, "spare_first": spare_first}

    def lean(output: Tensor, attention: Attention) -> Tensor:
        weights = attention.weights_of(attention.heads, attention.rows)
        found = _sinks_of_prompt([(attention.rows, weights.detach())], attention, **options)
        sinks = found.unsqueeze(-2)
        s = (weights * sinks).sum(-1, keepdim=True)
        part = attention.mix(weights * sinks, attention.heads)
        # d o' / d(1 - beta) at beta = 1, as in `calibrate_output`; nothing where only sinks are.
        change = s / (1 - s).clamp_min(EPSILON) * (output - part) - part
        change = torch.where(1 - s > EPSILON, change, 0.0)
        zero = output.new_zeros(output.shape[1], 1, 1).requires_grad_()
        return output + amounts.setdefault(attention.layer, zero) * change

    leaning = tap(model, edit=Edit(output=lean), layers=list(there), kind="self", where=where)
    with torch.enable_grad(), leaning:
        value = loss(model)
        order = sorted(amounts)
        slopes = torch.autograd.grad(value, [amounts[layer] for layer in order])
    return {
        (layer, head): -float(part)
        for layer, slope in zip(order, slopes, strict=True)
        for head, part in enumerate(slope.flatten())
    }
