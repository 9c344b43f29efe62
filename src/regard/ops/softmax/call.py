"""What a call of `softmax_attention` asks for, and what it comes down to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.core import checks
from regard.core.cache import KVCache
from regard.core.checks import reject
from regard.core.decay import decay_sums
from regard.core.packed import check_packed, run_packed, spans
from regard.core.visibility import Visibility

OP = "softmax_attention"


class SoftmaxAux(NamedTuple):
    """`lse` [B, H, T]: the log of the sum of the exponentiated scores, -inf without a key."""

    lse: Tensor


@dataclass(frozen=True)
class Call:
    """The arguments as they came; forms look here to see whether they can serve."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    scale: float | Tensor | None
    key_mask: Tensor | None
    key_bias: Tensor | None
    bias: Tensor | None
    log_decay: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    window: tuple[int, int] | None
    cu_seqlens: Tensor | None
    cu_seqlens_k: Tensor | None
    block_size: int | None
    state: KVCache | None
    return_state: bool
    return_aux: bool

    @property
    def decays(self) -> bool:
        """Whether any key, old or new, came with a decay."""
        old = self.state is not None and self.state.decay is not None
        return self.log_decay is not None or old

    @property
    def biased(self) -> bool:
        """Whether anything is added to the scores, by this call or an earlier one."""
        old = self.state is not None and self.state.key_bias is not None
        return self.bias is not None or self.key_bias is not None or old


@dataclass(frozen=True)
class Problem:
    """One attention to compute: all keys, masked ones zeroed; `sees` knows masks and biases."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | Tensor
    sees: Visibility
    softcap: float | None
    sinks: Tensor | None
    block_size: int | None


def check(call: Call) -> None:
    """Raises the error of the first argument that is wrong."""
    q = call.q
    sizes = checks.check_qkv(OP, q, call.k, call.v)
    for name in ("causal", "return_state", "return_aux"):
        checks.check_flag(OP, name, getattr(call, name))
    checks.check_scale(OP, call.scale, sizes, q)
    checks.check_state(OP, call.state, KVCache)
    checks.check_key_mask(OP, call.key_mask, sizes, q)
    heads = (1, sizes.Hk, sizes.H)
    for name in ("key_bias", "log_decay"):
        shape = (sizes.B, heads, sizes.S)
        checks.check_float_operand(OP, name, getattr(call, name), shape, q)
    past = call.state.length if call.state is not None else 0
    _check_bias(call.bias, (sizes.B, sizes.H, sizes.T, past + sizes.S), q)
    if call.softcap is not None:
        checks.check_number(OP, "softcap", call.softcap, above=0)
    checks.check_float_operand(OP, "sinks", call.sinks, (sizes.H,), q)
    checks.check_window(OP, call.window)
    if call.block_size is not None:
        checks.check_integer(OP, "block_size", call.block_size)
    check_packed(OP, call.cu_seqlens, call.cu_seqlens_k, sizes, call.state)
    if call.cu_seqlens is not None:
        if call.return_state:
            raise reject(OP, "return_state", "False with packed sequences", True)
        if call.bias is not None:
            accepted = "None with packed sequences (key_bias is cut with its keys)"
            raise reject(OP, "bias", accepted, call.bias)


def _check_bias(bias: Tensor | None, full: tuple[int, ...], like: Tensor) -> None:
    if bias is None:
        return
    shape = tuple(bias.shape) if isinstance(bias, Tensor) else ()
    if len(shape) > len(full):
        raise reject(OP, "bias", f"broadcastable to {list(full)}", bias)
    axes = tuple((1, size) for size in full[len(full) - len(shape) :])
    checks.check_float_operand(OP, "bias", bias, axes, like)


def remember(call: Call) -> tuple[Call, KVCache]:
    """The call on all keys, old and new, and the cache that holds them."""
    call = _clean(call)
    cache = KVCache.extend(
        OP, call.state, call.k, call.v,
        key_mask=call.key_mask, key_bias=call.key_bias, log_decay=call.log_decay,
    )  # fmt: skip
    if call.state is None:  # nothing to add: the given tensors are nearer than their copies
        return call, cache
    return replace(call, k=cache.k, v=cache.v, key_mask=None, key_bias=None), cache


def resolve(call: Call, cache: KVCache | None = None) -> Problem:
    """The call with its defaults filled in; masks, biases and decays are the cache's, if any."""
    if cache is None:
        call = _clean(call)
        key_mask, key_bias, decay = call.key_mask, call.key_bias, None
        if call.log_decay is not None:
            decay = decay_sums(call.log_decay, key_mask)
    else:
        key_mask, key_bias, decay = cache.key_mask, cache.key_bias, cache.decay
    bias = call.bias
    sees = Visibility(
        queries=call.q.shape[2],
        keys=call.k.shape[2],
        causal=call.causal,
        window=call.window,
        key_mask=key_mask,
        key_bias=key_bias,
        decay=decay,
        bias=bias if bias is None else bias[(None,) * (4 - bias.dim())],
        heads=call.q.shape[1],
        device=call.q.device,
    )
    scale = call.q.shape[3] ** -0.5 if call.scale is None else call.scale
    return Problem(
        call.q, call.k, call.v, scale, sees, call.softcap, call.sinks, call.block_size
    )  # fmt: skip


def _clean(call: Call) -> Call:
    """Masked keys and values replaced by 0, so that no product ever meets their contents."""
    if call.key_mask is None:
        return call
    real = call.key_mask[:, None, :, None]
    return replace(call, k=torch.where(real, call.k, 0.0), v=torch.where(real, call.v, 0.0))


def separate(
    call: Call, run: Callable[[Problem], tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    """`run` on each packed sequence."""
    sums: list[Tensor] = []

    def one(q: Tensor, k: Tensor, v: Tensor, **operands: Any) -> Tensor:
        out, lse = run(resolve(replace(call, q=q, k=k, v=v, **operands)))
        if lse is not None:
            sums.append(lse)
        return out

    q, k, v = call.q, call.k, call.v
    sizes = checks.check_qkv(OP, q, k, v)
    assert call.cu_seqlens is not None
    sequences = spans(OP, call.cu_seqlens, call.cu_seqlens_k, sizes)
    key_side = {
        "key_mask": (call.key_mask, 1),
        "key_bias": (call.key_bias, 2),
        "log_decay": (call.log_decay, 2),
    }
    out = run_packed(one, sequences, q, k, v, {}, key_side)
    if sequences:
        return out, torch.cat(sums, 2) if sums else None
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, out.new_zeros(out.shape[:3], dtype=dtype)
