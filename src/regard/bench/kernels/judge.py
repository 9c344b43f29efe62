"""Whether a kernel is right: outputs and gradients against float64.

Outputs of long calls are compared at some queries, which the reference evaluates one block at a
time; gradients of long calls are those of the same queries, all other rows of the cotangent being
zero. Short calls are compared whole, with the gradients of every operand.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.bench.kernels import family, sparse
from regard.bench.kernels.case import PACKED, Case
from regard.core.budgets import ROOM, allowed_of_half, relative_error
from regard.core.state import FixedState

ROWS = 16  # of a block of queries
GRADIENT_ROWS = 8
EARLY = (64, 128)  # queries that see few keys: where rounding does not average out
SMALL = 2**24  # numbers that the reference may hold when a call is compared whole


@dataclass(frozen=True)
class Verdict:
    """Relative errors of one quantity, and what is allowed.

    `rounding`: what rounding the inputs to their 16 bits does by itself, 0 for float32.
    """

    quantity: str
    error: float
    allowed: float
    rounding: float = 0.0

    @property
    def right(self) -> bool:
        """Within what is allowed; NaN is not."""
        return self.error <= self.allowed


def outputs(case: Case, out: Tensor, device: str = "cpu") -> list[Verdict]:
    """The output of `case.run(case.arguments())` at some queries of the first and last head.

    Of long calls also at early ones, by themselves.
    """
    heads, wide = sorted({0, case.heads - 1}), _wide(case, device)
    asked = {"output": blocks_of(case, ROWS)}
    if case.rows > EARLY[1]:
        asked["early rows"] = (EARLY,)
    verdicts = []
    for quantity, blocks in asked.items():
        actual = torch.cat([_rows(out[:, h : h + 1], blocks) for h in heads], 1)
        found = [_both_rows(case, wide, blocks, h) for h in heads]
        exact, rounded = (torch.cat(rows, 1) for rows in zip(*found, strict=True))
        verdicts.append(_of_output(quantity, case, actual, exact, rounded, device))
    return verdicts


def gradients(case: Case, device: str = "cpu") -> list[Verdict]:
    """Those of q, k and v of the first head, from a cotangent at some of its queries."""
    blocks = blocks_of(case, GRADIENT_ROWS)
    given = case.arguments(device)
    names = [name for name in ("q", "r", "k", "v") if name in given]
    leaves = {**given, **{name: given[name].detach().requires_grad_() for name in names}}
    out = case.run(leaves)
    cotangent = torch.zeros_like(out)
    made = torch.Generator().manual_seed(3)
    for start, stop in blocks:
        weight = torch.randn(stop - start, out.shape[3], generator=made)
        cotangent[0, 0, start:stop] = weight.to(cotangent)
    found = torch.autograd.grad(out, [leaves[name] for name in names], cotangent)

    wide = [
        {**one, **{name: one[name].detach().requires_grad_() for name in names}}
        for one in _wide(case, device)
    ]
    rows = _both_rows(case, (wide[0], wide[1]), blocks, 0)
    weight = _rows(cotangent[:1, :1], blocks).double()
    at = [one[name] for one in wide for name in names]
    expected = torch.autograd.grad(rows, at, [weight, weight])
    exact, rounded = expected[: len(names)], expected[len(names) :]
    return [
        _of_gradient(name, case, one, wide, near)
        for name, one, wide, near in zip(names, found, exact, rounded, strict=True)
    ]


def whole(
    case: Case, device: str = "cpu", *, learn: tuple[str, ...] = (), backward: bool = True
) -> list[Verdict]:
    """Output and all gradients of one short call; `learn` may name "ridge" and "log_decay".

    Without `backward` the output alone: of a form that has no gradients of such a call.

    Against float64 autograd through the reference, or through the eager form in float64 where
    the reference would hold too much.
    """
    plain = replace(  # the same for every form, dtype and bound: evaluated once
        case, section="", note="", impl="eager", options=_meaning(case), dtype="float32",
        bound=0.0, gradient_bound=0.0, targets=(), isa=None,
    )  # fmt: skip
    if backward:
        out, found = _with_gradients(case, case.arguments(device), device, learn)
    else:
        with torch.no_grad():
            out, found = case.run(_learnt(case, case.arguments(device), device, learn)), {}
    exact, expected = _exactly(plain, torch.float32, device, learn)
    near, rounded = _exactly(plain, case.torch_dtype, device, learn)
    verdicts = [_of_output("output", case, out.detach(), exact, near, device)]
    if not backward:
        return verdicts
    wide = case.arguments(device, torch.float64)
    terms = float((wide["v"] * expected["v"]).norm())
    for name, gradient in found.items():
        usual = case.ridge if name == "ridge" else float(wide[name].square().mean().sqrt())
        least = terms / max(1.0, usual)
        verdicts.append(_of_gradient(name, case, gradient, expected[name], rounded[name], least))
    return verdicts


def _with_gradients(
    case: Case, given: dict[str, Any], device: str, learn: tuple[str, ...], impl: str | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    given = _learnt(case, given, device, learn)
    names = [name for name in ("q", "r", "k", "v", *learn) if name in given]
    for name in names:
        given[name] = given[name].detach().requires_grad_()
    out = case.run(given) if impl is None else case.card.op(**given, **case.options, impl=impl)
    made = torch.Generator().manual_seed(3)
    # Values that every dtype holds: the cotangent is not what is judged.
    cotangent = torch.randn(out.shape, generator=made).to(torch.bfloat16).to(out)
    found = torch.autograd.grad(out, [given[n] for n in names], cotangent)
    return out, dict(zip(names, found, strict=True))


def _learnt(
    case: Case, given: dict[str, Any], device: str, learn: tuple[str, ...]
) -> dict[str, Any]:
    """The arguments with a ridge that can have a gradient, where one is asked for."""
    given = dict(given)
    if "ridge" in learn:
        wide = torch.promote_types(given["q"].dtype, torch.float32)
        given["ridge"] = torch.full((case.heads,), case.ridge, dtype=wide, device=device)
    return given


@lru_cache(maxsize=64)
def _exactly(
    case: Case, dtype: torch.dtype, device: str, learn: tuple[str, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """In float64, on inputs rounded to `dtype`."""
    exact, rounded = _wide(replace(case, dtype=str(dtype).removeprefix("torch.")), device)
    dense = case.rows * case.length * case.dim * case.heads <= SMALL
    out, found = _with_gradients(
        case, rounded if dtype.itemsize < 4 else exact, device, learn,
        "reference" if dense else "eager",
    )  # fmt: skip
    return out.detach(), found


def blocks_of(case: Case, rows: int) -> tuple[tuple[int, int], ...]:
    """Queries [start, stop) at the beginning, in the middle and at the end.

    >>> blocks_of(Case("", length=1000), 16)
    ((0, 16), (492, 508), (984, 1000))
    """
    count = case.rows
    if count <= 3 * rows:
        return ((0, count),)
    middle = count // 2 - rows // 2
    return (0, rows), (middle, middle + rows), (count - rows, count)


def _of_output(
    quantity: str, case: Case, actual: Tensor, exact: Tensor, rounded: Tensor, device: str
) -> Verdict:
    """`exact` is of the unrounded inputs, `rounded` of what the kernel was given."""
    dtype, error = case.torch_dtype, relative_error(actual, exact)
    if dtype.itemsize > 2:
        return Verdict(quantity, error, case.bound)
    rounding = relative_error(rounded, exact)
    output = relative_error(exact.to(dtype), exact)
    own = max(case.bound, case.card.budgets.get(case.dtype, (0.0, ""))[0])
    return Verdict(quantity, error, allowed_of_half(dtype, rounding, output, device, own), rounding)


def _of_gradient(
    name: str, case: Case, actual: Tensor, exact: Tensor, rounded: Tensor, least: float = 0.0
) -> Verdict:
    """One whose size is below `least` vanished by cancellation: its terms' size is its measure."""
    dtype, size = case.torch_dtype, float(exact.double().norm())
    shrink = 1.0 if size >= least else (size or 1.0) / least
    error = shrink * relative_error(actual, exact)
    if dtype.itemsize > 2:
        return Verdict(f"d{name}", error, case.gradient_bound)
    rounding = shrink * relative_error(rounded, exact)
    output = relative_error(exact.to(dtype), exact)
    allowed = max(ROOM * rounding + output, case.gradient_bound)
    return Verdict(f"d{name}", error, allowed, rounding)


def _wide(case: Case, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments in float64: unrounded, and rounded to the dtype of the case."""
    exact = case.arguments(device, torch.float64)
    if case.torch_dtype in (torch.float32, torch.float64):
        return exact, exact
    return exact, {name: _double(x) for name, x in case.arguments(device).items()}


def _double(x: Any) -> Any:
    if isinstance(x, FixedState):
        wide = {name: tensor.double() for name, tensor in x.tensors.items()}
        return FixedState(x.mechanism, x.length, wide)
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _meaning(case: Case) -> dict[str, Any]:
    """The options of a case that change what is computed, not how."""
    known = inspect.signature(case.card.reference).parameters
    return {name: value for name, value in case.options.items() if name in known}


def _reference_rows(
    case: Case, given: Mapping[str, Any], blocks: tuple[tuple[int, int], ...], head: int
) -> Tensor:
    """The reference at these queries of one head; every block is a call of its own.

    The references of the linear family go token by token: there it is the eager form.
    """
    if case.fixed_state:
        return family.exact_rows(case, given, _meaning(case), blocks, head)
    if case.mechanism in sparse.MECHANISMS:
        return sparse.exact_rows(case, given, _meaning(case), blocks, head)
    group = case.heads // (case.kv_heads or case.heads)
    parts = []
    for start, stop in blocks:
        for first, last, low, high in _pieces(case, start, stop):
            part = dict(given)
            part.pop("cu_seqlens", None)
            for name in ("q", "r"):
                if name in part:
                    part[name] = part[name][:1, head : head + 1, first:last]
            at = head // group
            for name in ("k", "v", "log_decay"):
                if name in part:
                    part[name] = part[name][:1, at : at + 1, low:high]
            if "key_mask" in part:
                part["key_mask"] = part["key_mask"][:1, low:high]
            if isinstance(part.get("ridge"), Tensor):
                part["ridge"] = part["ridge"][head : head + 1]
            parts.append(case.card.reference(**part, **_meaning(case)))
    return torch.cat(parts, 2)


def _both_rows(
    case: Case, wide: tuple[dict[str, Any], dict[str, Any]],
    blocks: tuple[tuple[int, int], ...], head: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The reference at these queries of one head, of unrounded inputs and of rounded ones."""
    if wide[0] is wide[1]:
        rows = _reference_rows(case, wide[0], blocks, head)
        return rows, rows
    both = family.together(*wide, head) if case.fixed_state else None
    if both is None:
        exact, rounded = (_reference_rows(case, given, blocks, head) for given in wide)
        return exact, rounded
    rows = family.exact_rows(case, both, _meaning(case), blocks, 0)
    return rows[:1], rows[1:]


def _pieces(case: Case, start: int, stop: int) -> list[tuple[int, int, int, int]]:
    """Queries [first, last) with the keys [low, high) of which the last query sees the end."""
    offset = case.length - case.rows
    if "packed" not in case.extra:
        return [(start, stop, 0, stop + offset if case.causal else case.length)]
    part = case.length // PACKED
    found = []
    while start < stop:
        low = start // part * part
        end = min(stop, low + part)
        found.append((start, end, low, end if case.causal else low + part))
        start = end
    return found


def _rows(out: Tensor, blocks: tuple[tuple[int, int], ...]) -> Tensor:
    return torch.cat([out[:, :, start:stop] for start, stop in blocks], 2)
