"""One token behind a state, in eager torch: what a decoding step needs and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.core.precision import compute_dtype, without_autocast
from regard.core.state import FixedState
from regard.ops.rat.attend import per_group, turned
from regard.ops.rat.call import Call


def refuse(call: Call) -> str | None:
    """Why this form cannot serve a call, or None."""
    if call.q.shape[2] != 1 or call.k.shape[2] != 1:
        return "for one token; more of them are faster in chunks"
    held = call.state is not None and "count" in call.state.tensors
    if call.key_mask is not None or held:
        return "its rows have one length, without masked tokens"
    if call.chunk_length is None:
        return "for chunks that end"
    return None


def run(call: Call) -> Any:
    """The answer of a call that was not refused."""
    with without_autocast(call.q):
        dtype, length, L, state = compute_dtype(call.q.dtype), call.length, call.chunk, call.state
        q, k, v, gate = (x.to(dtype) for x in (call.q, call.k, call.v, call.gate))
        number, fresh = length // L, length % L == 0
        k, v = (1 - gate) * k, (1 - gate) * v
        if state is None:
            ends_k, ends_v = (x[:, :, :0].to(call.q.dtype) for x in (k, v))
        else:
            ends_k, ends_v = state["ends_k"], state["ends_v"]
            if fresh and length:
                last = _turn(call, state["k"][:, :, None], number - 1).to(ends_k.dtype)
                ends_k = torch.cat([ends_k, last], 2)
                ends_v = torch.cat([ends_v, state["v"][:, :, None].to(ends_v.dtype)], 2)
            elif not fresh:
                k = torch.addcmul(k, gate, state["k"][:, :, None])
                v = torch.addcmul(v, gate, state["v"][:, :, None])
        scale = call.q.shape[3] ** -0.5 if call.scale is None else call.scale
        q = q * (scale.to(dtype).reshape(-1, 1, 1) if isinstance(scale, Tensor) else scale)
        own = per_group(q, k.mT)  # not turned: the same angle on both sides
        if ends_k.shape[2]:
            past = per_group(_turn(call, q, number), ends_k.to(dtype).mT)
            weights = torch.cat([past, own], 3).softmax(3)
            out = per_group(weights[..., :-1], ends_v.to(dtype))
            out = out + per_group(weights[..., -1:], v)
        else:
            out = per_group(own.softmax(3), v)
        out = out.to(call.q.dtype)
    if not call.return_state:
        return out
    kept = {"ends_k": ends_k, "ends_v": ends_v, "k": k[:, :, 0], "v": v[:, :, 0]}
    return out, FixedState(call.name, length + 1, kept)


def _turn(call: Call, x: Tensor, chunk: int) -> Tensor:
    """By the angles of a chunk."""
    if call.rope is None or chunk == 0:
        return x
    half = x.shape[3] // 2
    power = torch.arange(half, dtype=torch.float64, device=x.device) / half
    angle = chunk * torch.pow(call.rope, -power)
    return turned(x, angle.cos().to(x.dtype), angle.sin().to(x.dtype))
