"""The forms of `mesa_attention`: what prepares the sums, and which way they are walked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regard.core.dispatch import Form
from regard.core.precision import compute_dtype, without_autocast
from regard.core.state import FixedState
from regard.ops.linear import engine
from regard.ops.linear.chunked import chunked
from regard.ops.mesa import triton
from regard.ops.mesa.reference import mesa_attention_reference
from regard.ops.mesa.registered import read, solve

CHUNK = 64
DIRECT_UP_TO = 32  # head size to which `solver="auto"` factorises a matrix per token
OFFICIAL_ITERATIONS = 30


@dataclass(frozen=True)
class Call:
    """One checked call of `mesa_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    log_decay: Tensor | None
    beta: Tensor | None
    ridge: float | Tensor
    solver: str
    tol: float
    max_iters: int | None
    chunk_size: int | None
    key_mask: Tensor | None
    state: FixedState | None
    return_state: bool
    compat: str | None
    given: tuple[str, ...] = ()  # the options of the solver and the walk that the caller set

    def one(self, q: Tensor, k: Tensor, v: Tensor, **operands: Any) -> Call:
        """The same call on one sequence of a pack."""
        return replace(self, q=q, k=k, v=v, **operands)

    @property
    def method(self) -> str:
        """The solver by its name in `systems.py`: from shapes and options only."""
        if self.compat == "official":
            decodes = self.state is not None and self.k.shape[2] == 1
            return "official_step" if decodes else "official"
        if self.solver != "auto":
            return self.solver
        return "direct" if not self.causal or self.k.shape[3] <= DIRECT_UP_TO else "cg"


def _ridge(call: Call, dtype: torch.dtype) -> Tensor:
    """[B, Hk, D] where all queries of a group share it, else [B, H, D]."""
    (B, H, _, D), Hk = call.q.shape, call.k.shape[1]
    if not isinstance(call.ridge, Tensor):
        return call.q.new_full((B, Hk, D), call.ridge, dtype=dtype)
    ridge = call.ridge.to(dtype)
    return (ridge if ridge.dim() == 2 else ridge.reshape(-1, 1)).expand(B, H, D)


def _masked(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """k, v, beta and log_decay as they came, of all heads; masked keys have no effect."""
    dtype, heads = compute_dtype(call.q.dtype), call.k.shape[1]
    k, v, beta, log_decay = call.k, call.v, call.beta, call.log_decay
    if beta is None:
        beta = k.new_ones(k.shape[0], 1, k.shape[2], dtype=dtype)
    if call.key_mask is not None:  # before anything is computed: NaN there has no gradient either
        masked = ~call.key_mask[:, None]
        k, v = (x.masked_fill(masked[..., None], 0.0) for x in (k, v))
        beta = beta.masked_fill(masked, 0.0)
        if log_decay is not None:
            log_decay = log_decay.masked_fill(masked, 0.0)
    if log_decay is not None:
        log_decay = log_decay.expand(-1, heads, -1)
    return k, v, beta.expand(-1, heads, -1), log_decay


def _state(call: Call) -> Tensor | None:
    """[Hkk | Hkv], if there is a state."""
    if call.state is None:
        return None
    return torch.cat([call.state["Hkk"], call.state["Hkv"]], 3)


def _rule(call: Call) -> engine.Rule:
    """The engine's three steps on the state [Hkk | Hkv], both sums of beta k [k, v]^T."""
    dtype, D, chunk = compute_dtype(call.q.dtype), call.k.shape[3], call.chunk_size or CHUNK
    ridge, method = _ridge(call, dtype), call.method
    limit = call.max_iters or (0 if call.compat is None else OFFICIAL_ITERATIONS)
    tolerances = call.tol, call.tol / 10

    def encode(
        k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None
    ) -> Tensor:
        return engine.encode(beta[..., None] * k, torch.cat([k, v], 3), log_decay, state)

    def answer(q: Tensor, state: Tensor) -> Tensor:
        one = "official" if method == "official_step" else method
        x = read(q, state[..., :D], ridge, one, *tolerances, limit)
        return engine.read(x, state[..., D:])

    def walk(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        past, options = state[..., :D], (chunk, method, *tolerances, limit)
        x, keys = solve(q, k, beta, log_decay, past, ridge, *options)
        out, values = chunked(x, beta[..., None] * k, v, log_decay, state[..., D:], chunk)
        return out, torch.cat([keys, values], 3)

    return engine.Rule(encode, answer, walk if call.causal else None)


def _eager(call: Call) -> Any:
    dtype, D = compute_dtype(call.q.dtype), call.k.shape[3]
    with without_autocast(call.q):
        *keys, log_decay = _masked(call)
        keys = *(x.to(dtype) for x in keys), log_decay
        out, state = engine.follow(_rule(call), call.q.to(dtype), keys, _state(call))
        return _finish(call, out, state[..., :D], state[..., D:])


def _triton(call: Call) -> Any:
    """The walk is one of kernels, on tensors as they came; keys before the queries are eager's."""
    rule, dtype, D = _rule(call), compute_dtype(call.q.dtype), call.k.shape[3]
    options = call.tol, call.tol / 10, call.max_iters or 0
    ridge = _ridge(call, dtype)
    if call.q.shape[2] == call.k.shape[2]:  # the usual call, the short way
        past = (None, None) if call.state is None else (call.state["Hkk"], call.state["Hkv"])
        with without_autocast(call.q):
            out, _, *sums, _ = triton.mesa(call.q, *_masked(call), *past, ridge, *options)
            return _finish(call, out, *sums)

    def encode(
        k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None
    ) -> Tensor:
        return rule.encode(k.to(dtype), v.to(dtype), beta.to(dtype), log_decay, state)

    def answer(q: Tensor, state: Tensor) -> Tensor:
        return rule.read(q.to(dtype), state).to(q.dtype)

    def walk(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        past = state[..., :D], state[..., D:]
        out, _, *sums, _ = triton.mesa(q, k, v, beta, log_decay, *past, ridge, *options)
        return out, torch.cat(sums, 3)

    with without_autocast(call.q):
        kernels = engine.Rule(encode, answer, walk)
        out, state = engine.follow(kernels, call.q, _masked(call), _state(call))
        return _finish(call, out, state[..., :D], state[..., D:])


def _finish(call: Call, out: Tensor, keys: Tensor, values: Tensor) -> Any:
    out = out.to(call.q.dtype)
    if not call.return_state:
        return out
    length = call.state.length if call.state is not None else 0
    tensors = {"Hkk": keys.contiguous(), "Hkv": values.contiguous()}
    return out, FixedState("mesa", length + call.k.shape[2], tensors)


def _reference(call: Call) -> Any:
    with without_autocast(call.q):
        return mesa_attention_reference(
            call.q, call.k, call.v, causal=call.causal, log_decay=call.log_decay,
            beta=call.beta, ridge=call.ridge, key_mask=call.key_mask, state=call.state,
            return_state=call.return_state,
        )  # fmt: skip


def _refuses(causal: bool, call: Call) -> str | None:
    if call.causal == causal:
        return None
    if call.causal:
        return "causal: every query solves a system of its own"
    return "not causal: every query reads one state"


def _reference_refuses(call: Call) -> str | None:
    if call.compat is not None:
        return "it is exact, not what compat='official' computes"
    if call.given:
        return f"it has no chunks and no iterations, nothing to do with {', '.join(call.given)}"
    return None


def _triton_refuses(call: Call) -> str | None:
    if not call.causal:
        return _refuses(True, call)
    if call.method != "cg":
        return f"its kernels make conjugate gradients, not {call.method!r} (see solver, compat)"
    if call.chunk_size not in (None, triton.CHUNK):
        return f"its chunks have {triton.CHUNK} tokens"
    return triton.refuse(call.q, call.v)


def _triton_unverified(call: Call) -> str | None:
    return _triton_refuses(call) or triton.unverified(call.q, call.v)


FORMS = (
    Form("triton", "triton", _triton_unverified, _triton),
    Form("triton", "triton unverified", _triton_refuses, _triton, auto=False),
    Form("eager", "chunked", partial(_refuses, True), _eager),
    Form("eager", "encode_read", partial(_refuses, False), _eager),
    Form("reference", "reference", _reference_refuses, _reference, auto=False),
)
