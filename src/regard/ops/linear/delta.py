"""The delta rule behind `delta_attention` and `gated_delta_attention`: checks, forms, states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regard.core.checks import (
    check_flag,
    check_float_operand,
    check_integer,
    check_key_mask,
    check_qkv,
    check_scale,
    reject,
)
from regard.core.dispatch import Form, choose
from regard.core.packed import check_packed, run_packed, spans
from regard.core.precision import cast_for_autocast, compute_dtype, without_autocast
from regard.core.state import FixedState
from regard.ops.linear.chunked_delta import chunked_delta, encode_delta
from regard.ops.linear.engine import Rule, follow, read
from regard.ops.linear.recurrent_delta import recurrent_delta
from regard.ops.linear.states import check_fixed


@dataclass(frozen=True)
class Delta:
    """One call of an op whose tokens correct what the state holds for their key."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    causal: bool
    normalise_keys: bool
    scale: float | Tensor | None
    key_mask: Tensor | None
    chunk_size: int | None
    state: FixedState | None
    return_state: bool

    @property
    def common(self) -> dict[str, Any]:
        """The arguments that every reference of the delta rule takes."""
        names = ("causal", "normalise_keys", "scale", "key_mask", "state", "return_state")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Owner:
    """The op in whose name a call is checked, the name in its states, and its reference."""

    op: str
    mechanism: str
    reference: Callable[[Delta], Any]
    gated: bool = False


def attend_by_delta(owner: Owner, call: Delta, cu: Any, cu_k: Any, impl: str) -> Any:
    """Checks the call and runs the form that serves it; `cu`, `cu_k`: cu_seqlens(_k)."""
    op = owner.op
    q, k, v = cast_for_autocast(call.q, call.k, call.v)
    call = replace(call, q=q, k=k, v=v)
    sizes = check_qkv(op, q, k, v)
    for name in ("causal", "normalise_keys", "return_state"):
        check_flag(op, name, getattr(call, name))
    check_scale(op, call.scale, sizes, q)
    check_key_mask(op, call.key_mask, sizes, q)
    per_key = (sizes.B, (1, sizes.Hk), sizes.S)
    for name in ("beta", "log_decay") if owner.gated else ("beta",):
        value = getattr(call, name)
        if value is None:
            raise reject(op, name, "a torch.Tensor", None, kind=TypeError)
        check_float_operand(op, name, value, per_key, q)
    if call.chunk_size is not None:
        check_integer(op, "chunk_size", call.chunk_size)
    shapes = {"S": (sizes.B, sizes.Hk, sizes.D, sizes.Dv)}
    check_fixed(op, owner.mechanism, call.state, shapes, sizes, q, call.causal)
    check_packed(op, cu, cu_k, sizes, call.state)
    if cu is not None and call.return_state:
        raise reject(op, "return_state", "False with packed sequences", call.return_state)
    forms = _forms(owner)
    form = choose(op, forms, impl, call)
    if cu is None:
        return form.run(call)

    def one(q: Tensor, k: Tensor, v: Tensor, **operands: Any) -> Tensor:
        piece = replace(call, q=q, k=k, v=v, **operands)
        return choose(op, forms, impl, piece).run(piece)

    operands: dict[str, tuple[Tensor | None, int]]
    operands = {
        "key_mask": (call.key_mask, 1),
        "beta": (call.beta, 2),
        "log_decay": (call.log_decay, 2),
    }
    return run_packed(one, spans(op, cu, cu_k, sizes), q, k, v, {}, operands)


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last axis, of any size that the dtype holds; 0 stays 0.

    >>> unit(torch.tensor([[3e30, 4e30], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    largest = x.detach().abs().amax(-1, keepdim=True)  # cancels, in value and gradient
    some = largest > 0
    x = x / torch.where(some, largest, 1.0)
    return x / torch.where(some, x.square().sum(-1, keepdim=True), 1.0).sqrt()


def _prepare(call: Delta) -> tuple[Tensor, tuple[Tensor | None, ...], Tensor | None]:
    """Queries, key-side tensors and the state in the compute dtype; masked keys write nothing."""
    dtype, heads = compute_dtype(call.q.dtype), call.k.shape[1]
    k, v, beta, log_decay = call.k, call.v, call.beta, call.log_decay
    if call.key_mask is not None:  # before anything is computed: NaN there has no gradient either
        masked = ~call.key_mask[:, None]
        k, v = (x.masked_fill(masked[..., None], 0.0) for x in (k, v))
        beta = beta.masked_fill(masked, 0.0)
        if log_decay is not None:
            log_decay = log_decay.masked_fill(masked, 0.0)
    k = k.to(dtype)
    if call.normalise_keys:
        k = unit(k)
    if log_decay is not None:
        log_decay = log_decay.expand(-1, heads, -1)
    q, scale = call.q.to(dtype), call.scale
    if isinstance(scale, Tensor):
        q = q * scale.to(dtype).reshape(-1, 1, 1)
    else:
        q = q * (q.shape[3] ** -0.5 if scale is None else scale)
    keys = k, v.to(dtype), beta.to(dtype).expand(-1, heads, -1), log_decay
    return q, keys, None if call.state is None else call.state["S"]


def _eager(walk: Callable[..., Any] | None, owner: Owner, call: Delta) -> Any:
    with without_autocast(call.q):
        q, keys, state = _prepare(call)
        encode = partial(encode_delta, chunk=call.chunk_size)
        out, state = follow(Rule(encode, read, walk), q, keys, state)
        out = out.to(call.q.dtype)
    if not call.return_state:
        return out
    length = call.state.length if call.state is not None else 0
    return out, FixedState(owner.mechanism, length + call.k.shape[2], {"S": state})


def _chunked(owner: Owner, call: Delta) -> Any:
    return _eager(partial(chunked_delta, chunk=call.chunk_size), owner, call)


def _reference(owner: Owner, call: Delta) -> Any:
    with without_autocast(call.q):
        return owner.reference(call)


def _needs_causal(call: Delta) -> str | None:
    return None if call.causal else "not causal: every query reads one state"


def _needs_one_token(call: Delta) -> str | None:
    if not call.causal:
        return _needs_causal(call)
    if min(call.q.shape[2], call.k.shape[2]) != 1:
        return "for one token; more of them are faster in chunks"
    return None


def _refuses_causal(call: Delta) -> str | None:
    return "causal: every query reads a state of its own" if call.causal else None


def _reference_refuses(call: Delta) -> str | None:
    return None if call.chunk_size is None else "it has no chunks, nothing to do with chunk_size"


def _forms(owner: Owner) -> tuple[Form, ...]:
    return (
        Form("eager", "recurrent", _needs_one_token, partial(_eager, recurrent_delta, owner)),
        Form("eager", "chunked", _needs_causal, partial(_chunked, owner)),
        Form("eager", "encode_read", _refuses_causal, partial(_eager, None, owner)),
        Form(
            "reference", "reference", _reference_refuses, partial(_reference, owner), auto=False
        ),
    )
