"""The forms of `linear_attention`: what prepares features, and which walk they go through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.core.dispatch import Form
from regard.core.precision import compute_dtype, without_autocast
from regard.core.state import FixedState
from regard.ops.linear.chunked import chunked
from regard.ops.linear.engine import Walk, attend
from regard.ops.linear.features import FEATURE_MAPS
from regard.ops.linear.normaliser import mean
from regard.ops.linear.recurrent import recurrent
from regard.ops.linear.reference import linear_attention_reference


@dataclass(frozen=True)
class Call:
    """One checked call of `linear_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    feature_map: str
    normalise: bool
    scale: float | Tensor | None
    key_mask: Tensor | None
    log_decay: Tensor | None
    chunk_size: int | None
    state: FixedState | None
    return_state: bool

    def one(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, log_decay: Tensor | None
    ) -> Call:
        """The same call on one sequence of a pack."""
        return replace(
            self, q=q, k=k, v=v, key_mask=key_mask, log_decay=log_decay, return_state=False
        )


def _prepare(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Features of q and k, values (with a column of ones for the normaliser), decay, state."""
    dtype, phi = compute_dtype(call.q.dtype), FEATURE_MAPS[call.feature_map]
    k, v, log_decay = call.k, call.v, call.log_decay
    if call.key_mask is not None:  # before anything is computed: NaN there has no gradient either
        masked = ~call.key_mask[:, None, :, None]
        k, v = k.masked_fill(masked, 0.0), v.masked_fill(masked, 0.0)
        if log_decay is not None:
            log_decay = log_decay.masked_fill(masked[..., 0], 0.0)
    q, k, v = phi(call.q.to(dtype)), phi(k.to(dtype)), v.to(dtype)
    if call.key_mask is not None and call.feature_map != "identity":
        k = k.masked_fill(masked, 0.0)
    if isinstance(call.scale, Tensor) and not call.normalise:
        q = q * call.scale.to(dtype).reshape(-1, 1, 1)
    elif call.scale is not None and not call.normalise:
        q = q * call.scale
    if log_decay is not None:
        log_decay = log_decay.expand(-1, k.shape[1], -1)
    if call.normalise:
        v = pad(v, (0, 1), value=1.0)
    state = None
    if call.state is not None:
        state = call.state["S"]
        if call.normalise:
            state = torch.cat([state, call.state["z"][..., None]], 3)
    return q, k, v, log_decay, state


def _finish(call: Call, out: Tensor, state: Tensor) -> Tensor | tuple[Tensor, FixedState]:
    if call.normalise:
        out = mean(out)
        if isinstance(call.scale, Tensor):  # it cancels: exactly, and so does its gradient
            out = out + 0.0 * call.scale.to(out.dtype).reshape(-1, 1, 1)
    out = out.to(call.q.dtype)
    if not call.return_state:
        return out
    tensors = {"S": state}
    if call.normalise:
        tensors = {"S": state[..., :-1].contiguous(), "z": state[..., -1].contiguous()}
    length = call.state.length if call.state is not None else 0
    return out, FixedState("linear", length + call.k.shape[2], tensors)


def _eager(call: Call, walk: Walk | None) -> Tensor | tuple[Tensor, FixedState]:
    with without_autocast(call.q):
        out, state = attend(*_prepare(call), walk=walk)
        return _finish(call, out, state)


def _recurrent(call: Call) -> Tensor | tuple[Tensor, FixedState]:
    return _eager(call, recurrent)


def _chunked(call: Call) -> Tensor | tuple[Tensor, FixedState]:
    return _eager(call, partial(chunked, chunk=call.chunk_size))


def _encode_read(call: Call) -> Tensor | tuple[Tensor, FixedState]:
    return _eager(call, None)


def _reference(call: Call) -> Tensor | tuple[Tensor, FixedState]:
    with without_autocast(call.q):
        return linear_attention_reference(
            call.q,
            call.k,
            call.v,
            causal=call.causal,
            feature_map=call.feature_map,
            normalise=call.normalise,
            scale=call.scale,
            key_mask=call.key_mask,
            log_decay=call.log_decay,
            state=call.state,
            return_state=call.return_state,
        )


def _needs_one_token(call: Call) -> str | None:
    if not call.causal:
        return "not causal: every query reads one state"
    if min(call.q.shape[2], call.k.shape[2]) != 1:
        return "for one token; more of them are faster in chunks"
    return None


def _reference_refuses(call: Call) -> str | None:
    return None if call.chunk_size is None else "it has no chunks, nothing to do with chunk_size"


FORMS = (
    Form("eager", "recurrent", _needs_one_token, _recurrent),
    Form(
        "eager",
        "chunked",
        lambda call: None if call.causal else "not causal: every query reads one state",
        _chunked,
    ),
    Form(
        "eager",
        "encode_read",
        lambda call: "causal: every query reads a state of its own" if call.causal else None,
        _encode_read,
    ),
    Form("reference", "reference", _reference_refuses, _reference, auto=False),
)
