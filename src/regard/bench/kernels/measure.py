"""Measures one case: which form runs, is it right, how much memory, how long."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import regard
from regard.bench.kernels import flops, judge, others, sparse
from regard.bench.kernels.case import PACKED, Case
from regard.bench.kernels.rows import Left, Row
from regard.bench.measure import memory
from regard.bench.measure.clock import MOVED, Sentinel, Stopwatch
from regard.bench.measure.interleaved import undisturbed

Calls = dict[str, Callable[[], Any]]
LONGEST = 2**15  # tokens: beyond, torch's attention takes minutes on one thread
LONG_ROUND, FEW_ROUNDS = 0.15, 3  # seconds of all calls once, above which so many rounds do
PATIENCE = 0.3  # seconds of plain calls
FLUSHED = 2**28  # bytes: more than any cache of a GPU
_KERNELS = {
    "cpu": {"SDPA": None},
    "cuda": {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION},
}


class Bench:
    """Measures cases on one device, in this process.

    `timed=False` only judges them. `peak(isa)` gives the processor's multiply-and-add peak in
    GFLOP/s on an instruction set (None: the best); it is asked before and after every row.
    `within(isa)` is a context in which native forms use that instruction set.
    """

    def __init__(
        self,
        device: str = "cpu",
        *,
        timed: bool = True,
        rounds: int = 5,
        attempts: int = 3,
        peak: Callable[[str | None], float] | None = None,
        within: Callable[[str], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.device, self.timed, self.rounds, self.attempts = device, timed, rounds, attempts
        self.kind = torch.device(device).type
        self.watch = Stopwatch(device)
        self.sentinel = Sentinel(device, self.watch)
        self.peak, self.within = peak, within
        # Seconds of torch's kernels by what they depend on, where these take long: timed once.
        self._known: dict[tuple[Any, ...], dict[str, float]] = {}
        self._flushed = torch.empty(FLUSHED, dtype=torch.int8, device=device) if timed and (
            self.kind == "cuda"
        ) else None  # fmt: skip

    def row(self, case: Case) -> Row | Left:
        """The row of a case, or why there is none."""
        return self._guarded(case, lambda: self._row(case))

    def check(self, case: Case, learn: tuple[str, ...]) -> Row | Left:
        """A short call compared whole, with its gradients where the form has them; not timed."""

        def judged() -> Row | Left:
            form, backward = self._form(case, gradients=True), True
            if isinstance(form, Left):
                form, backward = self._form(case, gradients=False), False
            if isinstance(form, Left):
                return form
            found = judge.whole(case, self.device, learn=learn, backward=backward)
            row = Row(case, form, found)
            errors = {verdict.quantity: verdict.error for verdict in row.verdicts}
            row.numbers["output"] = errors["output"]
            if backward:
                row.numbers["gradients"] = max(errors[n] for n in ("dq", "dk", "dv"))
                row.numbers["gradients/bound"] = max(
                    v.error / max(case.gradient_bound, v.rounding)
                    for v in row.verdicts
                    if v.quantity != "output"
                )
            rounding = [v.error / v.rounding for v in row.verdicts if v.rounding]
            if rounding:
                row.numbers["error/rounding"] = rounding[0]
            return row

        return self._guarded(case, judged)

    def _guarded(self, case: Case, found: Callable[[], Row | Left]) -> Row | Left:
        context = nullcontext()
        if case.isa is not None:
            if self.within is None:
                return Left(case, "this build cannot choose an instruction set")
            context = self.within(case.isa)
        try:
            with context:
                return found()
        except Exception as error:  # whatever breaks, the others go on
            return Left(case, _words(error), failed=True)

    def _form(self, case: Case, gradients: bool) -> str | Left:
        """The form that would run, or why none can."""
        asked = case.arguments(self.device)
        if gradients:
            asked = {n: _leaf(x) if n in "qkv" else x for n, x in asked.items()}
        try:
            told = regard.explain(case.card.op, **asked, **case.options, impl=case.impl)
        except (TypeError, ValueError) as error:
            return Left(case, str(error).splitlines()[0])
        if case.impl == "native" and told.form == "torch_sdpa":
            return Left(case, "its native form is torch's own kernel")
        return told.form

    def _row(self, case: Case) -> Row | Left:
        form = self._form(case, case.work == "gradients")
        if isinstance(form, Left):
            return form
        given = case.arguments(self.device)
        begun = time.perf_counter()
        with torch.no_grad():
            out, grown = case.run(given), None
            first = time.perf_counter() - begun
            if self.timed:  # what the first call keeps for later ones is none of a call's memory
                grown, _ = memory.growth(lambda: case.run(given), self.device)
        row = Row(case, form, judge.outputs(case, out, self.device), peak_bytes=grown)
        row.numbers["first call"] = first
        if case.work == "gradients":
            row.verdicts += judge.gradients(case, self.device)
        del out
        if self.timed and case.fixed_state and case.work == "gradients":
            both = passes("", lambda a: case.run(a), given, True, only_both=True)["both"]
            held, _ = memory.growth(both, self.device)
            if held is not None:
                row.numbers["memory of both/q"] = held / given["q"].nbytes
        iterations = self._look_inside(case, given, row)
        inputs = sum(x.nbytes for n, x in given.items() if n in "qkv")
        if grown is not None and inputs:
            row.numbers["memory/inputs"] = grown / inputs
        row.numbers["output"] = row.verdicts[0].error
        rounding = [v.error / v.rounding for v in row.verdicts if v.rounding]
        if rounding:
            row.numbers["error/rounding"] = rounding[0]  # of the output
        if self.timed:
            self._time(case, given, row, iterations)
        return row

    def _look_inside(self, case: Case, given: dict[str, Any], row: Row) -> Tensor | None:
        """Iterations and residuals, of mechanisms that tell."""
        if case.mechanism != "local_linear":
            return None
        with torch.no_grad():
            _, aux = case.run({**given, "return_aux": True})
        row.residual = float(aux.residual.max())
        seen = case.seen
        if "packed" not in case.extra and case.pairs:
            mean = float((aux.iterations[0].double().cpu() * seen).sum()) / case.pairs
            row.iterations = (mean, int(aux.iterations.max()))
            return aux.iterations
        return None

    def _time(self, case: Case, given: dict[str, Any], row: Row, iterations: Tensor | None) -> None:
        calls = self._contestants(case, given)
        once = sum(self.watch.once(call)[0] for call in calls.values())
        few = self.kind == "cuda" and once > LONG_ROUND
        peaks = [self.peak(case.isa)] if self.peak is not None else []
        found, change = undisturbed(
            calls, self.watch, self.sentinel,
            rounds=min(self.rounds, FEW_ROUNDS) if few else self.rounds,
            before=self._flush, attempts=self.attempts,
        )  # fmt: skip
        row.seconds = {name: timing.seconds for name, timing in found.items()}
        theirs = {n: t for n, t in row.seconds.items() if n.split()[0] in _KERNELS[self.kind]}
        if self.kind == "cuda" and sum(theirs.values()) > LONG_ROUND:
            self._known[_of_torch(case)] = theirs
        row.seconds |= self._known.get(_of_torch(case), {})
        row.runs = min(timing.runs for timing in found.values())
        row.sentinel_moved, row.noisy = change, change > MOVED
        names = [*_KERNELS[self.kind], *others.NAMES]
        row.numbers |= ratios(row.seconds, names)
        if self.kind == "cuda":
            ours = [name for name in ("forward", "backward", "both") if name in calls]
            row.calls = {
                name: self.watch.sample(calls[name], patience=PATIENCE).seconds for name in ours
            }
        if case.fixed_state or case.mechanism in sparse.MECHANISMS:
            row.numbers |= plain_numbers(row, names)
        if "plan" in row.seconds:
            row.numbers |= of_plan(row.seconds, names)
        if "base forward" in row.seconds and case.against is not None:
            ratio = row.seconds["forward"] / row.seconds["base forward"]
            row.numbers["forward/base"] = ratio
            row.numbers["pair/base"] = ratio * case.against.pairs / case.pairs
        if case.published is not None:
            row.numbers["published/forward"] = case.published / (1e3 * row.seconds["forward"])
        counts = case.mechanism != "local_linear" or iterations is not None
        asked = flops.forward(case, iterations) if counts and case.pairs else None
        if asked is not None:
            rate = asked / row.seconds["forward"] / 1e9
            row.numbers["GFLOP/s"] = rate
            if self.peak is not None:
                peaks.append(self.peak(case.isa))
                row.numbers["of peak"] = rate / max(peaks)

    def _contestants(self, case: Case, given: dict[str, Any]) -> Calls:
        """What is timed, by name: ours, torch's kernels, another case of ours."""
        # Whether a backward is timed by itself.
        alone = not case.fixed_state and case.mechanism not in sparse.MECHANISMS
        gradients = case.work == "gradients"
        calls: Calls = passes("", lambda a: case.run(a), given, gradients, only_both=not alone)
        if case.fixed_state and case.work == "decode":
            return {**calls, **_decoding(case, given)}
        calls |= sparse.policies(case, given) if case.mechanism in sparse.MECHANISMS else {}
        plain = _without_operands(case, given)
        causal = case.causal and case.rows > 1
        same = case.rows == case.length or not causal
        for name, kernel in _KERNELS[self.kind].items():
            slow = self.kind == "cpu" and (bool(case.extra) or case.length > LONGEST)
            if not same or slow or _of_torch(case) in self._known:
                continue
            sdpa = _sdpa(kernel, causal, case.kv_heads not in (None, case.heads))
            try:
                theirs = passes(f"{name} ", sdpa, plain, gradients, only_both=not alone)
                for call in theirs.values():
                    call()
            except RuntimeError:  # a kernel that does not serve this call
                continue
            calls |= theirs
        for name, call in self._others(case, given).items():
            try:
                call()
            except Exception:  # whatever another library makes of this machine
                continue
            calls[name] = call
        if case.against is not None:
            base, other = case.against, case.against.arguments(self.device)
            calls |= passes("base ", lambda a: base.run(a), other, False)
        return calls

    def _others(self, case: Case, given: dict[str, Any]) -> Calls:
        try:
            return others.contestants(case, given, self.kind)
        except Exception as error:  # another library's fault is no wrong result of ours
            print(f"beside {case.name}: {_words(error)}", file=sys.stderr)
            return {}

    def _flush(self) -> None:
        if self._flushed is not None:
            self._flushed.zero_()


def _of_torch(case: Case) -> tuple[Any, ...]:
    """What the time of torch's kernels depends on."""
    names = ("dim", "length", "rows", "heads", "kv_heads", "causal", "dtype", "work")
    return (*(getattr(case, name) for name in names), "packed" in case.extra)


def passes(
    prefix: str,
    run: Callable[[Mapping[str, Any]], Tensor],
    given: dict[str, Any],
    gradients: bool,
    only_both: bool = False,
) -> Calls:
    """The forward of a call, and where asked for its backward and both.

    A backward alone keeps what its forward left behind; `only_both` leaves it out.
    """

    def forward() -> Tensor:
        with torch.no_grad():
            return run(given)

    calls: Calls = {f"{prefix}forward": forward}
    if not gradients:
        return calls
    leaves = {name: _leaf(x) for name, x in given.items()}
    wanted = [x for x in leaves.values() if isinstance(x, Tensor) and x.requires_grad]
    like = given["q"][..., :1].expand(*given["q"].shape[:-1], given["v"].shape[3])
    cotangent = torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(like)

    def both() -> None:
        torch.autograd.grad(run(leaves), wanted, cotangent)

    calls[f"{prefix}both"] = both
    if only_both:
        return calls
    kept = run(leaves)

    def backward() -> None:
        torch.autograd.grad(kept, wanted, cotangent, retain_graph=True)

    return {**calls, f"{prefix}backward": backward}


def ratios(seconds: Mapping[str, float], yardsticks: list[str]) -> dict[str, float]:
    """Our times over those of torch's kernels, and ours among each other.

    >>> ratios({"forward": 2.0, "both": 5.0, "SDPA forward": 1.0}, ["SDPA"])
    {'forward/SDPA': 2.0, 'both/forward': 2.5}
    """
    found = {}
    for work in ("forward", "backward", "both"):
        for name in yardsticks:
            if work in seconds and f"{name} {work}" in seconds:
                found[f"{work}/{name}"] = seconds[work] / (seconds[f"{name} {work}"] or math.nan)
    for work in ("backward", "both"):
        if work in seconds:
            found[f"{work}/forward"] = seconds[work] / seconds["forward"]
    return found


def plain_numbers(row: Row, names: list[str]) -> dict[str, float]:
    """Times by themselves, and how many times as fast as the others ours is."""
    one = row.seconds["forward"]
    found = {"ms": 1e3 * one, "us": 1e6 * one}
    for name, work in DECODED.items():
        if work in row.seconds:
            found[name] = 1e6 * row.seconds[work]
    if "both" in row.seconds:
        found["ms of both"] = 1e3 * row.seconds["both"]
    if row.calls:
        found["call ms"] = 1e3 * row.calls["forward"]
    for name in names:
        for work in ("forward", "both"):
            ratio = row.numbers.get(f"{work}/{name}")
            if ratio:
                found[f"{name}/{work}"] = 1.0 / ratio
    return found


def of_plan(seconds: Mapping[str, float], names: list[str]) -> dict[str, float]:
    """A plan by itself, and with the attention, over torch's kernels.

    >>> of_plan({"plan": 0.5, "planned": 2.0, "flash forward": 4.0}, ["flash"])
    {'plan ms': 500.0, 'with plan ms': 2000.0, 'with plan/flash': 0.5}
    """
    whole = seconds.get("planned", seconds.get("forward", 0.0))  # a call that makes its own plan
    found = {"plan ms": 1e3 * seconds["plan"], "with plan ms": 1e3 * whole}
    for name in names:
        if f"{name} forward" in seconds:
            found[f"with plan/{name}"] = whole / seconds[f"{name} forward"]
    return found


def _without_operands(case: Case, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """q, k and v for torch's kernels: packed sequences in a batch, no mask, no decay."""
    plain = {name: given[name] for name in "qkv"}
    if "packed" not in case.extra:
        return plain
    apart = {name: x.unflatten(2, (PACKED, -1))[0].transpose(0, 1) for name, x in plain.items()}
    return {name: x.contiguous() for name, x in apart.items()}


# What one token costs beside inference mode: in grad mode as a user calls it, of tensors that ask
# for no gradient; and of tensors that all ask for theirs.
DECODED = {"us in grad mode": "grad forward", "us asking for gradients": "asking forward"}


def _decoding(case: Case, given: dict[str, Any]) -> Calls:
    """One token in inference mode, in grad mode, and where a gradient is asked for."""
    leaves = {name: _leaf(x) for name, x in given.items()}

    def forward() -> Tensor:
        with torch.inference_mode():
            return case.run(given)

    return {
        "forward": forward,
        "grad forward": lambda: case.run(given),
        "asking forward": lambda: case.run(leaves),
    }


def _sdpa(kernel: SDPBackend | None, causal: bool, grouped: bool) -> Callable[..., Tensor]:
    def run(given: Mapping[str, Any]) -> Tensor:
        with sdpa_kernel(kernel) if kernel is not None else nullcontext():
            return scaled_dot_product_attention(
                given["q"], given["k"], given["v"], is_causal=causal, enable_gqa=grouped
            )

    return run


def _leaf(x: Any) -> Any:
    """A copy that asks for its gradient; what has none stays as it is."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().clone().requires_grad_()
    return x


def _words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
