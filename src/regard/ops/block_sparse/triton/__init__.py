"""The Triton form of attention to blocks and within windows: which calls it serves, and how.

Importing this needs no Triton and no GPU. The files:

- `registered.py`: the operators; `launch.py`: from operands to kernels and back; `table.py`: the
  tiles of kernels
- `lists.py`: from a plan to lists of blocks, on the device; `pooling.py`: rows of coarser levels
- `forward.py`, `of_queries.py`, `of_keys.py`: outputs, and gradients by query and by key;
  `tile.py`: what they share
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard import gpu
from regard.core.dispatch import Form
from regard.ops.block_sparse.triton.registered import attention

if TYPE_CHECKING:
    from regard.ops.block_sparse.forms import Call

NAME = "block_sparse"
WIDEST = 128  # channels of a head


def refuse(q: Tensor, v: Tensor) -> str | None:
    """Why no kernel here can serve such queries and values, from their metadata."""
    reason = gpu.refusal(q.device, q.dtype)
    if reason is not None:
        return reason
    wide = max(q.shape[3], v.shape[3])
    return f"its heads have at most {WIDEST} channels, not {wide}" if wide > WIDEST else None


def refuse_unverified(q: Tensor, v: Tensor) -> str | None:
    """The same, or that nobody has run it on such a device."""
    reason = refuse(q, v)
    if reason is not None:
        return reason
    return gpu.unverified(NAME, q.device, q.dtype, max(q.shape[3], v.shape[3]))


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Tensor | None, *, indices: bool, blocks: tuple[int, int],
    reach: tuple[int, int], scale: float | Tensor | None, key_mask: Tensor | None,
    key_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention to the blocks of a plan, or, without one, to all keys in reach.

    plan: levels or, with `indices`, indices of blocks; `blocks`: queries and keys of one.
    reach: tokens before and behind the query's own, -1 without bound.
    """
    H, Hk = q.shape[1], k.shape[1]
    if key_bias is not None and key_bias.shape[1] not in (1, Hk):
        # A bias per query head: what it weighs in the means is its head's own.
        if plan is not None and plan.shape[1] == Hk > 1:
            plan = plan.repeat_interleave(H // Hk, 1)
        k, v = (x.repeat_interleave(H // Hk, 1) for x in (k, v))
    bias = None if key_bias is None else key_bias.float()
    if key_mask is not None:
        real = key_mask[:, None]
        k, v = (torch.where(real[..., None], x, 0.0) for x in (k, v))
        bias = torch.where(real, 0.0 if bias is None else bias, -torch.inf).float()
    scales, factor = None, q.shape[3] ** -0.5
    if isinstance(scale, Tensor):
        scales = scale.detach().float().expand(q.shape[:2])
        if scale.requires_grad:  # 1, with the derivative of log scale
            ratio = (scale.float() / scale.detach().float()).reshape(-1, 1, 1)
            q = (q.float() * ratio).to(q.dtype)
    elif scale is not None:
        factor = float(scale)
    return attention(q, k, v, bias, plan, scales, indices, *blocks, *reach, factor)


def _replicated(call: Call) -> str | None:
    return 'it has tail="exact" only' if call.replicate else None


def _run(call: Call) -> Tensor:
    return attend(
        call.q, call.k, call.v, call.plan, indices=call.indices,
        blocks=(call.block_q, call.block_k), reach=call.reach, scale=call.scale,
        key_mask=call.key_mask, key_bias=call.key_bias,
    )  # fmt: skip


def _refuse(call: Call) -> str | None:
    return _replicated(call) or refuse(call.q, call.v)


def _refuse_unverified(call: Call) -> str | None:
    return _replicated(call) or refuse_unverified(call.q, call.v)


FORMS = (
    Form("triton", "triton", _refuse_unverified, _run),
    Form("triton", "triton unverified", _refuse, _run, auto=False),
)
