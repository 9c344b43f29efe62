"""The forms of `inline_attention`: those of the engine, on centred keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard.core.dispatch import Form
from regard.core.precision import compute_dtype, without_autocast
from regard.core.state import FixedState
from regard.ops.inline.features import FEATURE_MAPS
from regard.ops.inline.moments import Centred, Past, centred, running
from regard.ops.inline.reference import inline_attention_reference
from regard.ops.inline.tiled import tiled
from regard.ops.linear.forms import ENGINE
from regard.ops.linear.native import whole
from regard.ops.linear.problem import Problem, Solution

STATE = "inline"


@dataclass(frozen=True)
class Call:
    """One checked call of `inline_attention`, of one sequence per row."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    feature_map: str
    scale: float | Tensor | None
    key_mask: Tensor | None
    chunk_size: int | None
    state: FixedState | None
    return_state: bool

    def one(self, q: Tensor, k: Tensor, v: Tensor, **operands: Any) -> Call:
        """The same call on one sequence of a pack."""
        return replace(self, q=q, k=k, v=v, **operands)

    @property
    def problem(self) -> Problem:
        """What the engine is asked to sum, by its sizes; the values are those of `_prepare`."""
        dtype = compute_dtype(self.q.dtype)
        q, k, v = (x.new_empty((), dtype=dtype).expand(x.shape) for x in (self.q, self.k, self.v))
        S = None
        if self.state is not None:
            S = self.state["S"]
        return Problem(
            q, k, v, self.causal, scale=self.scale, S=S, chunk=self.chunk_size,
            wants_state=self.return_state,
        )  # fmt: skip


def _prepare(call: Call) -> tuple[Problem, Centred]:
    dtype, phi = compute_dtype(call.q.dtype), FEATURE_MAPS[call.feature_map]
    k, v, past = call.k, call.v, None
    if call.key_mask is not None:  # before anything is computed: NaN there has no gradient either
        hidden = ~call.key_mask[:, None, :, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    q, k, v = phi(call.q.to(dtype)), phi(k.to(dtype)), v.to(dtype)
    if call.state is not None:
        past = Past(*(call.state[name] for name in Past._fields))
    if call.causal:
        parts = running(k, v, call.key_mask, past, q.shape[2])
    else:
        parts = centred(k, v, call.key_mask, past)
    scale = call.q.shape[3] ** -0.5 if call.scale is None else call.scale
    # A number multiplies the rows, with 1 / n. A tensor goes to the queries: its gradient would
    # be 0 times infinity where a later row, which has none, overflows.
    if isinstance(parts.share, Tensor) and not isinstance(scale, Tensor):
        parts, scale = parts._replace(share=parts.share * scale), None
    return call.problem._replace(q=q, k=parts.k, v=parts.v, scale=scale, S=parts.S), parts


def _finish(call: Call, parts: Centred, solution: Solution) -> Any:
    (B, H, T, E), Hk = solution.out.shape, call.k.shape[1]
    out, mean = solution.out.view(B, Hk, H // Hk, T, E), parts.mean[:, :, None]
    if isinstance(parts.share, Tensor):
        out = torch.addcmul(mean, out, parts.share[:, :, None])
    else:
        out = out + mean
    out = out.view(B, H, T, E).to(call.q.dtype)
    if not call.return_state:
        return out
    assert solution.S is not None
    count, k_mean, v_mean = parts.after
    S = solution.S * parts.rescale
    tensors = {"S": S, "k_mean": k_mean, "v_mean": v_mean, "count": count}
    length = call.state.length if call.state is not None else 0
    return out, FixedState(STATE, length + call.k.shape[2], tensors)


def _wrapped(form: Form) -> Form:
    """A form of the engine as one of this op."""

    def refuse(call: Call) -> str | None:
        return form.refuse(call.problem)

    def run(call: Call) -> Any:
        with without_autocast(call.q):
            problem, parts = _prepare(call)
            return _finish(call, parts, form.run(problem))

    return Form(form.impl, form.name, refuse, run, form.auto)


def _reference(call: Call) -> Any:
    with without_autocast(call.q):
        return inline_attention_reference(
            call.q, call.k, call.v, causal=call.causal, feature_map=call.feature_map,
            scale=call.scale, key_mask=call.key_mask, state=call.state,
            return_state=call.return_state,
        )  # fmt: skip


def _reference_refuses(call: Call) -> str | None:
    return None if call.chunk_size is None else "it has no chunks, nothing to do with chunk_size"


def _tiled(call: Call) -> Any:
    return _with_state(call, tiled(call.q, call.k, call.v, call.feature_map, _scale(call)))


def _whole(call: Call) -> Any:
    name = call.feature_map
    found = whole.whole(
        call.q, call.k, call.v, None, None, name, name, _scale(call), whole.CENTRED, 0.0
    )
    return _with_state(call, found)


def _scale(call: Call) -> float:
    return float(call.q.shape[3] ** -0.5 if call.scale is None else call.scale)


def _with_state(call: Call, found: tuple[Tensor, ...]) -> Any:
    out, S, k_mean, v_mean = found
    if not call.return_state:
        return out
    B, length = call.k.shape[0], call.k.shape[2]
    count = torch.full((B,), length, dtype=torch.int64, device=call.k.device)
    tensors = {"S": S, "k_mean": k_mean, "v_mean": v_mean, "count": count}
    return out, FixedState(STATE, length, tensors)


def _whole_refuses(call: Call) -> str | None:
    return _sees_all(call) or whole.refuse_tensors(call.q)


def _tiled_refuses(call: Call) -> str | None:
    if call.q.device.type not in ("cpu", "meta"):
        return "its tiles fit the cache of a CPU"
    return _sees_all(call)


def _sees_all(call: Call) -> str | None:
    if call.causal:
        return "causal: means run along"
    for name in ("key_mask", "state", "chunk_size"):
        if getattr(call, name) is not None:
            return f"it takes no {name}"
    return "one scale for all heads only" if isinstance(call.scale, Tensor) else None


FORMS = (
    Form("native", "centred", _whole_refuses, _whole),
    *(_wrapped(form) for form in ENGINE if form.impl != "eager"),
    Form("eager", "tiled", _tiled_refuses, _tiled),
    *(_wrapped(form) for form in ENGINE if form.impl == "eager"),
    Form("reference", "reference", _reference_refuses, _reference, auto=False),
)
