"""Training one model for full and for sparse attention: SSA.

In every step one stream, drawn at random, carries the hidden states through the whole model; every
layer computes the other one too, and the loss draws the two together:

    loss = task + alpha * mean over layers of AlignmentLoss(full, sparse)

It needs a model whose attention layers are `regard.mixers.SSAAttention`, whatever is around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard.core.checks import check_choice, check_number, reject
from regard.mixers.ssa import STREAMS, SSAAttention, Streams

__all__ = ["SsaLosses", "aligned", "set_budget", "ssa_step"]


class SsaLosses(NamedTuple):
    """`total` = `task` + alpha `alignment`; `carry` is the stream that was drawn."""

    total: Tensor
    task: Tensor
    alignment: Tensor
    carry: str


@contextmanager
def aligned(model: nn.Module, carry: str) -> Iterator[list[Tensor]]:
    """Inside, all SSA layers of the model carry that stream and append their losses to a list.

    Calls with a state are as always.
    """
    check_choice("aligned", "carry", carry, STREAMS)
    layers, losses = _layers("aligned", model), []
    before = [layer.streams for layer in layers]
    try:
        for layer in layers:
            layer.streams = Streams(carry, losses)
        yield losses
    finally:
        for layer, streams in zip(layers, before, strict=True):
            layer.streams = streams


def ssa_step(
    model: nn.Module,
    batch: Any,
    *,
    alpha: float = 10.0,
    p_full: float = 0.5,
    loss: Callable[[Any, Any], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> SsaLosses:
    """The losses of one step, for `.total.backward()`.

    Args:
        model: any module with `SSAAttention` inside.
        batch: what `loss` takes.
        alpha: of the alignment: a mean over elements is small, hence 10.
        p_full: the probability that full attention carries the hidden states.
        loss: `loss(model, batch)`, the task; None: `model.loss(batch)`, which decoders have.
        generator: where chance comes from.

    Source: Shen et al. 2025, arXiv 2511.20102; losses and gradients of the authors' model are
    matched to 1e-4 and 1e-3.

    >>> from regard.models import Decoder, DecoderConfig, MixerConfig
    >>> mixer = MixerConfig("ssa", {"heads": 2, "block": 4, "count": 2})
    >>> model = Decoder(DecoderConfig((mixer,), vocabulary=11, dim=16, layers=2, mlp_dim=32))
    >>> step = ssa_step(model, torch.randint(11, (3, 20)))
    >>> step.total.backward()
    """
    op = "ssa_step"
    check_number(op, "alpha", alpha, least=0.0)
    check_number(op, "p_full", p_full, least=0.0)
    if p_full > 1:
        raise reject(op, "p_full", "a probability", p_full)
    full = float(torch.rand((), generator=generator)) < p_full
    carry = "full" if full else "sparse"
    with aligned(model, carry) as losses:
        task = model.loss(batch) if loss is None else loss(model, batch)  # pyright: ignore
    if not losses:
        raise reject(op, "loss", "a function that runs the model", loss)
    alignment = torch.stack(losses).mean()
    return SsaLosses(task + alpha * alignment, task, alignment, carry)


def set_budget(
    model: nn.Module,
    *,
    mode: str | None = None,
    block: int | None = None,
    count: int | None = None,
) -> None:
    """Gives all SSA layers of a trained model another stream, or other blocks; None: as it is."""
    if mode is not None:
        check_choice("set_budget", "mode", mode, STREAMS)
    for name, value in {"block": block, "count": count}.items():
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise reject("set_budget", name, "an int of at least 1", value)
    for layer in _layers("set_budget", model):
        layer.mode = layer.mode if mode is None else mode
        layer.block = layer.block if block is None else block
        layer.count = layer.count if count is None else count


def _layers(op: str, model: nn.Module) -> list[SSAAttention]:
    layers = [module for module in model.modules() if isinstance(module, SSAAttention)]
    if not layers:
        raise reject(op, "model", "one with SSAAttention layers", type(model).__name__)
    return layers
