"""Random calls against the float64 reference: shapes, patterns, operands and dtypes nobody chose.

Every call is decided by a seed and its number alone, so that one of them can be made again.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

import regard
from regard.core.budgets import relative_error
from regard.core.card import Card, Case
from regard.core.checks import check_choice, check_integer, name_of
from regard.core.dispatch import IMPLS
from regard.core.patterns import Pattern
from regard.explain import explain
from regard.testing.calls import Call
from regard.testing.law import LawBroken
from regard.testing.subject import Subject

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = (1, 3, 8, 16, 16, 24, 32, 32, 40, 64, 64, 96, 128)
LENGTHS = (1, 2, 5, 16, 31, 33, 48, 64, 65, 97, 128, 130, 161, 200)
HEADS = ((1, 1), (2, 1), (2, 2), (4, 2), (6, 3), (8, 1))
MOST = 2**21  # T S D: the reference holds as many numbers, some of them several times
ROOM = 1.5  # times what rounding the inputs does by itself


class _Choice:
    """Choices of one generator."""

    def __init__(self, *salt: object) -> None:
        self._made = torch.Generator().manual_seed(zlib.crc32(repr(salt).encode()))

    def of(self, values: Sequence[Any]) -> Any:
        return values[int(torch.randint(len(values), (1,), generator=self._made))]

    def happens(self, chance: float) -> bool:
        return bool(torch.rand(1, generator=self._made) < chance)

    def between(self, least: float, most: float) -> float:
        """Uniform in the logarithm."""
        part = float(torch.rand(1, generator=self._made))
        return float(f"{least * (most / least) ** part:.3g}")


def fuzz(
    count: int,
    *,
    mechanism: str | Card = "local_linear",
    impl: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    start: int = 0,
    alike: int = 1,
) -> dict[str, Any]:
    """Makes `count` random calls of a mechanism and compares outputs and gradients with float64.

    float32 is held to the budgets of the card; 16-bit inputs may err 1.5 times what rounding
    them does to the output, plus rounding the output, and to the gradients of the rounded inputs
    within their budget.

    Args:
        count: calls to make, from number `start` on.
        mechanism: the name of a card, or a card.
        impl: the form that is asked for; calls that it refuses are counted with its reason.
        device: "cpu" or "cuda"; the reference runs there, too.
        seed: with the number of a call, decides everything about it.
        start: number of the first call: `fuzz(1, seed=S, start=N)` repeats one.
        alike: calls that share dtype, head size and options, and differ in their lengths and
            values; a compiled form then compiles less often.

    Returns:
        {"calls", "seed", "failures": [words], "refused": {reason: count}, "worst": {dtype: the
        largest part of what was allowed}}.

    >>> found = fuzz(2, impl="eager", seed=1)
    >>> found["calls"], found["failures"]
    (2, [])
    """
    check_integer("fuzz", "count", count, least=0)
    check_integer("fuzz", "alike", alike)
    check_choice("fuzz", "impl", impl, IMPLS)
    card = mechanism if isinstance(mechanism, Card) else regard.mechanisms[mechanism]
    failures, refused = [], Counter()
    worst: dict[str, float] = {}
    for number in range(start, start + count):
        subject, call, dtype = _drawn(card, device, seed, number, alike)
        typed = call.to(dtype)
        try:
            asked = explain(card.op, **typed.leaves().arguments, impl=impl)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            if "impl" not in reason:
                failures.append(f"{_words(number, subject, call, dtype)}: {reason}")
            refused[reason] += 1
            continue
        try:
            share = _compare(subject, call, dtype, impl)
            worst[name_of(dtype)] = max(share, worst.get(name_of(dtype), 0.0))
        except LawBroken as broken:
            told = str(broken).splitlines()[0].partition(": ")[2]
            failures.append(f"{_words(number, subject, call, dtype)}, ran {asked.form}: {told}")
        except Exception as error:  # whatever breaks, the others go on
            told = (str(error).splitlines() or [type(error).__name__])[0]
            failures.append(f"{_words(number, subject, call, dtype)}: {told}")
    return {
        "mechanism": card.name,
        "impl": impl,
        "device": device,
        "calls": count,
        "seed": seed,
        "start": start,
        "failures": failures,
        "refused": dict(refused),
        "worst": worst,
    }


def _drawn(
    card: Card, device: str, seed: int, number: int, alike: int
) -> tuple[Subject, Call, torch.dtype]:
    """The call of a number, in float64, with the subject that judges it."""
    kind = _Choice("kind", seed, number // alike)
    one = _Choice("one", seed, number)
    dtype, D = kind.of(DTYPES), kind.of(DIMS)
    options = _options(card, kind)
    subject = Subject(
        card, Case("fuzz", options), kind.of(card.patterns), device, seed, law=f"fuzz {number}"
    )
    chosen: list[str] = []
    for name in subject.options:
        if kind.happens(0.35) and subject.refusal((*chosen, name)) is None:
            chosen.append(name)
    S = one.of(LENGTHS)
    T = S if one.happens(0.6) else one.of((1, *LENGTHS))
    while T * S * D > MOST:
        T, S = (T + 1) // 2, (S + 1) // 2
    H, Hk = one.of(HEADS)
    dims: dict[str, Any] = {"B": one.of((1, 1, 2)), "H": H, "Hk": Hk, "T": T, "S": S, "D": D}
    dims["Dv"] = D if kind.happens(0.7) else kind.of(DIMS)
    forget = "log_decay" in chosen and one.happens(0.3)
    return subject, subject.sample(chosen, forget=forget, salt=number, **dims), dtype


def _options(card: Card, kind: _Choice) -> dict[str, Any]:
    """Settings of the mechanism beside the vocabulary of `Subject`."""
    options: dict[str, Any] = {}
    if card.name != "local_linear":
        return options
    if kind.happens(0.6):
        options["ridge"] = kind.between(0.1, 10.0)
    if kind.happens(0.2):
        options |= {"ridge_mode": "absolute", "scale": 0.2}
    if kind.happens(0.2):
        options |= {"kernel": "gaussian"}
    if kind.happens(0.2):
        options["intercept"] = False
    if kind.happens(0.3):
        options["solver"] = kind.of(("cg", "direct"))
    return options


def _compare(subject: Subject, call: Call, dtype: torch.dtype, impl: str) -> float:
    """Raises `LawBroken`, or says which part of the allowed error the output took."""
    typed = call.to(dtype)
    names = [n for n in typed.differentiable if n != "log_decay" or _finite(call)]
    out, actual = subject.gradients(typed, names, impl=impl)
    exact = subject.reference(call)
    if dtype == torch.float32:
        allowed = subject.allowed(dtype, "value")
        rounded = call
    else:
        rounded = typed.to(torch.float64)
        near = subject.reference(rounded)
        output = relative_error(exact.to(dtype), exact)
        allowed = max(
            ROOM * relative_error(near, exact) + output,
            subject.allowed(dtype, "value") if name_of(dtype) in subject.card.budgets else 0.0,
        )
    error = relative_error(out, exact)
    if not error <= allowed:
        subject.broken(f"output: relative error {error:.3g}, allowed {allowed:.3g}", dtype)
    _, expected = subject.gradients(rounded, names, function=subject.reference)
    subject.close_all(call, actual, expected, "gradient", "random", dtype)
    return error / allowed if allowed else 0.0


def _finite(call: Call) -> bool:
    """Whether the reference has a derivative in the decays."""
    return "log_decay" not in call or bool(call["log_decay"].isfinite().all())


def _words(number: int, subject: Subject, call: Call, dtype: torch.dtype) -> str:
    sizes = "x".join(str(call.size(axis)) for axis in ("b", "h", "hk", "t", "s", "d", "dv"))
    given = [name for name in call.tensors if name not in "qkv"]
    settings = [f"{name}={value}" for name, value in call.options.items()]
    pattern = subject.pattern.value if isinstance(subject.pattern, Pattern) else subject.pattern
    words = ", ".join([pattern, name_of(dtype), sizes, *given, *settings])
    return f"call {number} of seed {subject.seed} ({words})"
