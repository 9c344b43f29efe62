"""Which form of an op runs: chosen from metadata, never silently, and explainable.

An op lists its forms fastest first; each says in words why it cannot serve a call, or None.
`choose` takes the first that can under `impl="auto"`, or exactly the one that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from regard.core.checks import check_choice

IMPLS = ("auto", "reference", "eager", "native", "triton")


@dataclass(frozen=True)
class Form:
    """One way to compute an op.

    `impl` is the word by which a caller asks for it (several forms may share one word, as
    `eager` does for a call into torch and for our own blocks), `name` says which it is,
    `refuse(call)` gives the reason why it cannot serve, and `run(call)` computes. `auto=False`
    keeps a form for those who ask for it.
    """

    impl: str
    name: str
    refuse: Callable[[Any], str | None]
    run: Callable[[Any], Any]
    auto: bool = True


@dataclass(frozen=True)
class Choice:
    """What `choose` decided and why: `reasons[form name]` is None for a form that could serve."""

    op: str
    form: Form
    reasons: dict[str, str | None]
    impls: dict[str, str]

    @property
    def available(self) -> tuple[str, ...]:
        """The values of `impl` that can serve this call, the fastest first."""
        can = (self.impls[name] for name, reason in self.reasons.items() if reason is None)
        return tuple(dict.fromkeys(can))


class Explained(Exception):
    """Carries a `Choice` out of an op that was called only to learn which form it would run."""

    def __init__(self, choice: Choice) -> None:
        super().__init__(choice.form.name)
        self.choice = choice


_asking: ContextVar[bool] = ContextVar("regard_asking_which_form", default=False)


@contextmanager
def asking() -> Iterator[None]:
    """Inside, the next op validates its arguments, chooses, and raises `Explained`."""
    token = _asking.set(True)
    try:
        yield
    finally:
        _asking.reset(token)


def is_asking() -> bool:
    """Whether an op is being called only to learn which form it would run."""
    return _asking.get()


def choose(op: str, forms: Sequence[Form], impl: str, call: Any) -> Form:
    """The form that serves `call`, or a `ValueError` that says why none does."""
    check_choice(op, "impl", impl, IMPLS)
    chosen, refusals = None, []
    for form in forms:
        wanted = form.auto if impl == "auto" else form.impl == impl
        if not wanted or chosen is not None:
            continue
        reason = form.refuse(call)
        if reason is None:
            chosen = form
        else:
            refusals.append(f"{form.name}: {reason}")
    if chosen is None:
        why = "; ".join(refusals) or "this op has no such form"
        raise ValueError(f"{op}: impl={impl!r} cannot serve this call ({why})")
    if not torch.compiler.is_compiling() and _asking.get():
        reasons = {form.name: form.refuse(call) for form in forms}
        raise Explained(Choice(op, chosen, reasons, {form.name: form.impl for form in forms}))
    return chosen
