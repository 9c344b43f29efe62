"""Random calls against the float64 reference: shapes, patterns, operands and dtypes nobody chose.

Every call is decided by a seed and its number alone, so that one of them can be made again. A
compiled form translates its kernels anew for every dtype, head size, number of heads and set of
operands: calls may therefore be of a few *kinds*, which fix these, while lengths, batch, masks,
windows, ridges and all values stay free.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import regard
from regard.core.budgets import ROOM, relative_error
from regard.core.card import Card, Case
from regard.core.checks import check_choice, check_integer, name_of
from regard.core.dispatch import IMPLS
from regard.core.patterns import Pattern
from regard.explain import explain
from regard.testing.calls import Call, optional
from regard.testing.law import LawBroken
from regard.testing.subject import Subject

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = (1, 3, 8, 16, 16, 24, 32, 32, 40, 64, 64, 96, 128)
LENGTHS = (1, 2, 5, 16, 31, 33, 48, 64, 65, 97, 128, 130, 161, 200)
HEADS = ((1, 1), (2, 1), (2, 2), (4, 2), (6, 3), (8, 1))
LEAST = 16  # queries and keys of a kind that is no step of decoding
FEW, MANY = (1, 2, 3, 4), (200, 260, 385, 500)  # queries and keys of a step of decoding
PARTS = ((3, 60, 0, 1, 66), (40, 41), (5, 90, 33))  # lengths of packed sequences
BLOCKS = (16, 64, 128)
MOST = 2**21  # T S D: the reference holds as many numbers, some of them several times
TRIALS = 50  # draws of a kind, until the form serves it
# What an iterative solver must reach to be judged by rounding: of 16-bit inputs, of float32.
TIGHT = {"mesa": (1e-5, None), "local_linear": (None, 1e-6)}


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


@dataclass(frozen=True)
class Drawn:
    """A call of a number, in float64, the subject that judges it, and in which dtype it is made.

    `parts`: lengths of the sequences that are packed in it.
    """

    subject: Subject
    call: Call
    dtype: torch.dtype
    parts: tuple[int, ...] = ()

    @property
    def typed(self) -> Call:
        """What the op is called with."""
        call = self.call.to(self.dtype)
        if not self.parts:
            return call
        ends = torch.tensor([0, *self.parts]).cumsum(0).to(torch.int32)
        return call.with_options(cu_seqlens=ends.to(self.subject.device))

    def words(self, number: int) -> str:
        """The call, as a failure tells it."""
        call, subject = self.call, self.subject
        sizes = "x".join(str(call.size(axis)) for axis in ("b", "h", "hk", "t", "s", "d", "dv"))
        given = [name for name in call.tensors if name not in "qkv"]
        settings = [f"{name}={value}" for name, value in call.options.items()]
        settings += [f"packed {self.parts}"] if self.parts else []
        pattern = subject.pattern
        pattern = pattern.value if isinstance(pattern, Pattern) else pattern
        words = ", ".join([pattern, name_of(self.dtype), sizes, *given, *settings])
        return f"call {number} of seed {subject.seed} ({words})"


def fuzz(
    count: int,
    *,
    mechanism: str | Card = "local_linear",
    impl: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    start: int = 0,
    kinds: int | None = None,
    share: tuple[int, int] = (0, 1),
    seconds: float | None = None,
) -> dict[str, Any]:
    """Makes `count` random calls of a mechanism and compares outputs and gradients with float64.

    float32 is held to the budgets of the card; 16-bit inputs may err 1.5 times what rounding
    them does to the output, plus rounding the output, or their budget where that is more; their
    gradients likewise, against those of the rounded inputs. Where a form has no gradients of a
    call, its output alone is compared.

    Args:
        count: calls to make, from number `start` on.
        mechanism: the name of a card, or a card.
        impl: the form that is asked for; calls that it refuses are counted with its reason.
        device: "cpu" or "cuda"; the reference runs there, too.
        seed: with the number of a call and `kinds`, decides everything about it.
        start: number of the first call: `fuzz(1, seed=S, start=N, kinds=K)` repeats one.
        kinds: of how many kinds the calls are, in turns, all of them served by the form that is
            asked for if any can be found; None: every call is of its own.
        share: (i, n): only the i-th of n parts of the calls, divided by kind.
        seconds: no call begins later than this after the first.

    Returns:
        {"calls": those made, "gradients": those of them with gradients, "next": number of the
        first call not reached, "lost": whether the device broke, "failures": [words], "refused":
        {reason: count}, "worst": {dtype: the largest part of what was allowed}, and what was
        asked}.

    >>> found = fuzz(2, impl="eager", seed=1)
    >>> found["calls"], found["failures"]
    (2, [])
    """
    check_integer("fuzz", "count", count, least=0)
    if kinds is not None:
        check_integer("fuzz", "kinds", kinds)
    check_choice("fuzz", "impl", impl, IMPLS)
    card = mechanism if isinstance(mechanism, Card) else regard.mechanisms[mechanism]
    failures, refused = [], Counter()
    worst: dict[str, float] = {}
    begun, calls, gradients, number, lost = time.perf_counter(), 0, 0, start, False
    for number in range(start, start + count):
        if (number if kinds is None else number % kinds) % share[1] != share[0]:
            continue
        if seconds is not None and calls and time.perf_counter() - begun > seconds:
            break
        calls += 1
        drawn = draw(card, device, seed, number, kinds, impl)
        try:
            asked = explain(card.op, **drawn.typed.arguments, impl=impl)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            if "impl" not in reason:
                failures.append(f"{drawn.words(number)}: {reason}")
            refused[reason] += 1
            continue
        try:
            share_of_budget, learnt = _compare(drawn, impl)
            gradients += learnt
            name = name_of(drawn.dtype)
            worst[name] = max(share_of_budget, worst.get(name, 0.0))
        except LawBroken as broken:
            told = str(broken).splitlines()[0].partition(": ")[2]
            failures.append(f"{drawn.words(number)}, ran {asked.form}: {told}")
        except Exception as error:  # whatever breaks, the others go on
            told = (str(error).splitlines() or [type(error).__name__])[0]
            failures.append(f"{drawn.words(number)}: {told}")
            if device != "cpu" and "CUDA error" in str(error):  # nothing runs in this process now
                lost, number = True, number + 1
                break
    else:
        number = start + count
    return {
        "mechanism": card.name,
        "impl": impl,
        "device": device,
        "calls": calls,
        "gradients": gradients,
        "seed": seed,
        "start": start,
        "kinds": kinds,
        "next": number,
        "lost": lost,
        "failures": failures,
        "refused": dict(refused),
        "worst": worst,
    }


@lru_cache(maxsize=64)
def _subject(card: Card, device: str, seed: int, place: int, trial: int) -> Subject:
    """Of a kind; what it serves is learnt once."""
    kind = _Choice("subject", card.name, seed, place, trial)
    case = kind.of(card.cases)
    options = {**case.options, **_options(card, kind)}
    return Subject(
        card, Case("fuzz", options, case.dims), kind.of(card.patterns), device, seed,
        law=f"fuzz {place}",
    )  # fmt: skip


def draw(
    card: Card,
    device: str,
    seed: int,
    number: int,
    kinds: int | None = None,
    impl: str = "auto",
) -> Drawn:
    """The call of a number."""
    trial = 0 if kinds is None else _trial(card, device, seed, number % kinds, kinds, impl)
    return _drawn(card, device, seed, number, kinds, trial)


@lru_cache(maxsize=256)
def _trial(card: Card, device: str, seed: int, place: int, kinds: int, impl: str) -> int:
    """Which of several draws of a kind is taken: the first that the form serves, or the last."""
    trial = 0
    for trial in range(TRIALS):
        drawn = _drawn(card, device, seed, place, kinds, trial)
        try:
            explain(card.op, **drawn.typed.arguments, impl=impl)
            break
        except ValueError:
            continue
    return trial


def _drawn(card: Card, device: str, seed: int, number: int, kinds: int | None, trial: int) -> Drawn:
    place = number if kinds is None else number % kinds
    kind, one = _Choice("kind", card.name, seed, place, trial), _Choice("one", seed, number)
    subject, dtype = _subject(card, device, seed, place, trial), kind.of(DTYPES)
    chosen: list[str] = []
    for name in subject.options:
        if kind.happens(0.35) and subject.refusal((*chosen, name)) is None:
            chosen.append(name)
    D = kind.of(DIMS)
    Dv = D if kind.happens(0.7) else kind.of(DIMS)
    H, Hk = kind.of(HEADS)
    packed = kind.happens(0.15) and card.accepts("cu_seqlens") and not subject.pattern.cross
    few = kind.happens(0.12) and not packed
    parts: tuple[int, ...] = ()
    B = one.of((1, 1, 2))
    if packed:
        parts = one.of(PARTS)
        B, T = 1, sum(parts)
        S = T
    elif few:
        T, S = kind.of(FEW), one.of(MANY)
    else:
        # What a kind fixes: whether there are few queries, whether strides are multiples of 16.
        odd = kinds is not None and (D % 16 > 0 or Dv % 16 > 0)
        least = 1 if kinds is None else LEAST
        lengths = [n for n in LENGTHS if n >= least and (n % 2 or not odd)]
        S = one.of(lengths)
        T = S if one.happens(0.6) else one.of(lengths if kinds else (1, *lengths))
        while T * S * D > MOST:
            T, S = ((n + 1) // 2 | odd for n in (T, S))
    dims: dict[str, Any] = {"B": B, "H": H, "Hk": Hk, "T": T, "S": S, "D": D, "Dv": Dv}
    dims = {name: size for name, size in dims.items() if name not in subject.case.dims}
    forget = "log_decay" in chosen and one.happens(0.3)
    call = subject.sample(chosen, forget=forget, salt=number, **dims)
    tol = TIGHT.get(card.name, (None, None))[dtype == torch.float32]
    if tol is not None and call.options.get("solver") != "direct":
        call = call.with_options(tol=min(tol, call.options.get("tol", 1.0)))
    return Drawn(subject, _settled(call, subject, chosen, kind, one), dtype, parts)


def _settled(call: Call, subject: Subject, chosen: list[str], kind: _Choice, one: _Choice) -> Call:
    """The call with what a kind fixes fixed, and what it leaves free drawn anew."""
    made = torch.Generator().manual_seed(int(one.between(1, 1e9)))
    if "window" in chosen:  # which sides are bounded is the kind's
        wide = call.options["window"]
        wide = kind.of(((3, 0), (2, -1), (-1, 1), (4, 2))) if wide else wide
        call = call.with_options(
            window=tuple(int(one.between(1, 90)) - 1 if side > 0 else side for side in wide)
        )
    if "key_bias" in chosen:
        axes = ["b", kind.of(("1", "hk", "h")), "s"]
        sizes = {axis: call.size(axis) for axis in ("b", "h", "hk", "s")}
        value = optional("key_bias", axes, sizes, made).to(call["q"].device)
        call = call.with_tensor("key_bias", value, axes)
    if isinstance(call.options.get("ridge"), float):
        call = call.with_options(ridge=one.between(0.1, 10.0))
    if "levels" in call:
        block_q, block_k = kind.of(BLOCKS), kind.of(BLOCKS)
        blocks = [-(-call.size("t") // block_q), -(-call.size("s") // block_k)]
        density = one.between(0.1, 1.0)
        plan = torch.rand(call.size("b"), call.size("h"), *blocks, generator=made) < density
        axes = ("b", "h", "nq", "nk")
        call = call.with_tensor("levels", plan.to(call["levels"]), axes)
        call = call.with_options(block_q=block_q, block_k=block_k)
    return call


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


def _compare(drawn: Drawn, impl: str) -> tuple[float, bool]:
    """Which part of the allowed error the output took, and whether there were gradients.

    Raises `LawBroken`.
    """
    subject, call, dtype = drawn.subject, drawn.call, drawn.dtype
    typed = drawn.typed
    names = [n for n in call.differentiable if n != "log_decay" or _finite(call)]
    learnt = _learns(drawn, names, impl)
    if learnt:
        out, actual = subject.gradients(typed, names, impl=impl)
    else:
        with torch.no_grad():
            out, actual = subject.run(typed, impl=impl), {}

    def reference(given: Call) -> Tensor:
        return _apart(subject, given, drawn.parts)

    def both(given: Call) -> tuple[Tensor, dict[str, Tensor]]:
        if learnt:
            return subject.gradients(given, names, function=reference)
        with torch.no_grad():
            return reference(given), {}

    exact, unrounded = both(call)
    near, expected = exact, unrounded
    allowed = subject.allowed(dtype, "value")
    if dtype != torch.float32:
        near, expected = both(call.to(dtype).to(torch.float64))
        output = relative_error(exact.to(dtype), exact)
        allowed = max(ROOM * relative_error(near, exact) + output, allowed)
    error = relative_error(out, exact)
    if not error <= allowed:
        subject.broken(f"output: relative error {error:.3g}, allowed {allowed:.3g}", dtype)
    judged = {
        name: gradient
        for name, gradient in actual.items()
        if not relative_error(gradient, expected[name])
        <= ROOM * relative_error(expected[name], unrounded[name])
    }
    subject.close_all(call, judged, expected, "gradient", "random", dtype)
    return (error / allowed if allowed else 0.0), learnt


def _learns(drawn: Drawn, names: list[str], impl: str) -> bool:
    """Whether the form has gradients of the call."""
    try:
        explain(drawn.subject.card.op, **drawn.typed.leaves(names).arguments, impl=impl)
    except ValueError:
        return False
    return True


def _apart(subject: Subject, call: Call, parts: tuple[int, ...]) -> Tensor:
    """The reference, of every packed sequence by itself."""
    if not parts:
        return subject.reference(call)
    outputs, at = [], 0
    for length in parts:
        if length:
            outputs.append(subject.reference(call.narrow("ts", at, at + length)))
        at += length
    return torch.cat(outputs, 2)


def _finite(call: Call) -> bool:
    """Whether the reference has a derivative in the decays."""
    return "log_decay" not in call or bool(call["log_decay"].isfinite().all())
