"""Which forms of a mechanism run on a device, asked with a small call that is never computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.card import Card
from regard.explain import explain

_SIZES = {"b": 1, "h": 2, "hk": 2, "t": 64, "s": 64, "d": 32, "dv": 32}


@dataclass(frozen=True)
class Forms:
    """What `explain` says of one call.

    `runs` is the form that `impl="auto"` takes; `reasons` maps every form to why it cannot run,
    None where it could. When no form can serve the call, `problem` is the op's error.
    """

    runs: str | None
    reasons: dict[str, str | None]
    problem: str | None = None


def forms_on(card: Card, device: str) -> dict[str, Forms]:
    """`causal` and `noncausal`, where the mechanism has them -> its forms on `device`.

    The call has float32 tensors of 64 tokens, needs no gradient, and takes the first case of the
    card.
    """
    masks = sorted({pattern.causal for pattern in card.patterns}, reverse=True)
    return {"causal" if causal else "noncausal": _ask(card, device, causal) for causal in masks}


def able(forms: dict[str, Forms]) -> list[str]:
    """The names of the forms that can run under one mask or another, the fastest first."""
    found = [n for f in forms.values() for n, reason in f.reasons.items() if reason is None]
    every = dict.fromkeys(name for f in forms.values() for name in f.reasons)
    return [name for name in every if name in found]


def _ask(card: Card, device: str, causal: bool) -> Forms:
    sizes = _SIZES | {axis.lower(): size for axis, size in card.cases[0].dims.items()}

    def tensor(axes: str) -> Tensor:
        return torch.zeros([sizes[axis] for axis in axes.split()], device=device)

    options: dict[str, Any] = dict(card.cases[0].options)
    for operand in card.operands:
        value = tensor(operand.shape)
        options[operand.name] = value.long() if operand.domain in ("index", "flag") else value
    if card.accepts("causal"):
        options["causal"] = causal
    qkv = {"q": tensor("b h t d"), "k": tensor("b hk s d"), "v": tensor("b hk s dv")}
    try:
        with torch.no_grad():
            explanation = explain(card.op, **qkv, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        return Forms(None, {}, str(error))
    return Forms(explanation.form, explanation.reasons)
