"""The forms of lightning attention: those of the engine, the left product, the references."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regard.core.state import FixedState
from regard.ops.lightning.left_product import FORM as LEFT_PRODUCT
from regard.ops.lightning.reference import (
    bidirectional_lightning_attention_reference,
    lightning_attention_reference,
)
from regard.ops.linear.attend import Mechanism, mechanism
from regard.ops.linear.problem import Problem

OP, BIDIRECTIONAL = "lightning_attention", "bidirectional_lightning_attention"


def _reference(problem: Problem, state: FixedState | None) -> Any:
    return lightning_attention_reference(
        problem.q, problem.k, problem.v, causal=problem.causal, log_decay=problem.log_decay,
        scale=problem.scale, key_mask=problem.key_mask, state=state, return_state=True,
    )  # fmt: skip


SECOND = mechanism(OP, "lightning", _reference)
FIRST = Mechanism(OP, "lightning", (LEFT_PRODUCT, SECOND.forms[-1]))
HALF = Mechanism(BIDIRECTIONAL, "lightning", SECOND.forms[:-1])  # the reference has no halves


def bidirectional_reference(problem: Problem) -> Tensor:
    """The equations of both directions, on a problem of one of them."""
    return bidirectional_lightning_attention_reference(
        problem.q, problem.k, problem.v, log_decay=problem.log_decay, scale=problem.scale,
        key_mask=problem.key_mask,
    )  # fmt: skip
