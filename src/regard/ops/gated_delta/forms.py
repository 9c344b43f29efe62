"""The op in whose name calls of gated delta-rule attention are checked, and its forms."""

from __future__ import annotations

from typing import Any

from regard.core.state import FixedState
from regard.ops.gated_delta.reference import gated_delta_attention_reference
from regard.ops.linear.attend import mechanism
from regard.ops.linear.delta import operands
from regard.ops.linear.problem import Problem


def _reference(problem: Problem, state: FixedState | None) -> Any:
    assert problem.log_decay is not None
    return gated_delta_attention_reference(
        problem.q, problem.k, problem.v, log_decay=problem.log_decay, **operands(problem, state)
    )


OWNER = mechanism("gated_delta_attention", "gated_delta", _reference)
