"""The op in whose name calls of delta-rule attention are checked, and its forms."""

from __future__ import annotations

from typing import Any

from regard.core.state import FixedState
from regard.ops.delta.reference import delta_attention_reference
from regard.ops.linear.attend import mechanism
from regard.ops.linear.delta import operands
from regard.ops.linear.problem import Problem


def _reference(problem: Problem, state: FixedState | None) -> Any:
    return delta_attention_reference(problem.q, problem.k, problem.v, **operands(problem, state))


OWNER = mechanism("delta_attention", "delta", _reference)
