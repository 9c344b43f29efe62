"""Which form of an op would run on these arguments, and why not the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regard.core.checks import reject
from regard.core.dispatch import Choice, Explained, asking


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`: `form` would run; `reasons` says why each other cannot.

    `available` are the values of `impl` that can serve the call, the fastest first.
    """

    op: str
    form: str
    impl: str
    available: tuple[str, ...]
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"{self.op}: runs {self.form} (impl={self.impl!r})"]
        for name, reason in self.reasons.items():
            if name != self.form:
                lines.append(f"  {name}: {reason or 'could serve; another was preferred'}")
        return "\n".join(lines)


def explain(op: Callable[..., Any], *arguments: Any, **options: Any) -> Explanation:
    """Says which form `op(*arguments, **options)` would run, without running it.

    The arguments are checked as in a real call, so a bad one raises the op's own error. Only
    shapes, dtypes, devices and options matter; tensors on the meta device do.

    >>> import torch, regard
    >>> q = torch.randn(1, 2, 8, 16)
    >>> regard.explain(regard.ops.softmax_attention, q, q, q, impl="eager").impl
    'eager'
    """
    if not callable(op):
        accepted = "an op of regard itself, such as regard.ops.softmax_attention"
        raise reject("explain", "op", accepted, op, kind=TypeError)
    try:
        with asking():
            op(*arguments, **options)
    except Explained as explained:
        return _explanation(explained.choice)
    raise TypeError(f"explain: {op!r} chooses no form; it is not an op of regard")


def _explanation(choice: Choice) -> Explanation:
    form = choice.form
    return Explanation(choice.op, form.name, form.impl, choice.available, dict(choice.reasons))
