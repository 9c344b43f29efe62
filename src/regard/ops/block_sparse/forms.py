"""The forms of attention to blocks: what a call is, and which form serves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.dispatch import Form
from regard.core.precision import compute_dtype
from regard.ops.block_sparse import native, triton
from regard.ops.block_sparse.pyramid import Layout, Rows, pyramid
from regard.ops.block_sparse.reference import block_sparse_reference
from regard.ops.block_sparse.registered import block_sparse, block_sparse_native


@dataclass(frozen=True)
class Call:
    """One checked call; `plan` is levels, or with `indices` the indices of key blocks."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: Tensor
    indices: bool
    block_q: int
    block_k: int
    causal: bool
    scale: float | Tensor | None
    key_mask: Tensor | None
    key_bias: Tensor | None
    window: tuple[int, int] | None
    replicate: bool

    @property
    def reach(self) -> tuple[int, int]:
        left, right = (-1, -1) if self.window is None else self.window
        return left, 0 if self.causal else right


def attend(
    call: Call, op: Callable[..., tuple[Tensor, Tensor]], pools: bool = False, scales: bool = False
) -> Tensor:
    """A call by a registered op that takes scaled queries and the rows of all levels.

    An op that `pools` takes the keys themselves where no mask or bias is to be weighed in; one
    that `scales` takes a scale that is a number as its last argument.
    """
    dtype, S, plan = compute_dtype(call.q.dtype), call.k.shape[2], call.plan
    q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
    scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
    last: tuple[float, ...] = (1.0,) if scales else ()
    if isinstance(scale, Tensor):
        q = q * scale.to(dtype).reshape(-1, 1, 1)
    elif scales:
        last = (scale,)
    else:
        q = q * scale
    if not S:
        return (q.sum(3, keepdim=True) * 0.0).expand(-1, -1, -1, v.shape[3])
    if call.key_bias is not None and call.key_bias.shape[1] not in (1, k.shape[1]):
        # A bias per query head: what it weighs in the means is its head's own.
        group = q.shape[1] // k.shape[1]
        if plan.shape[1] == k.shape[1] > 1:
            plan = plan.repeat_interleave(group, 1)
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    layout = Layout(S, 1 if call.indices else call.block_k, call.replicate)
    if pools and call.key_mask is None and call.key_bias is None:
        rows = Rows(k, v, None)
    else:
        rows = pyramid(k, v, layout, call.key_mask, call.key_bias)
    return op(
        q, rows.k, rows.v, rows.bias, plan, call.indices, call.block_q, call.block_k, S,
        *call.reach, call.replicate, *last,
    )[0]  # fmt: skip


def levels_of(call: Call) -> Tensor:
    """The map of levels that says the same as indices."""
    if not call.indices:
        return call.plan
    blocks = -(-call.k.shape[2] // call.block_k)
    chosen = call.plan.long()
    found = chosen.new_zeros(*chosen.shape[:3], blocks + 1)
    found.scatter_(3, torch.where(chosen < 0, blocks, chosen), 1)
    return found[..., :blocks]


def _reference(call: Call) -> Tensor:
    return block_sparse_reference(
        call.q,
        call.k,
        call.v,
        levels_of(call),
        block_q=call.block_q,
        block_k=call.block_k,
        causal=call.causal,
        scale=call.scale,
        key_mask=call.key_mask,
        key_bias=call.key_bias,
        window=call.window,
        tail="replicate" if call.replicate else "exact",
    )


FORMS = (
    *triton.FORMS,
    Form(
        "native",
        "native",
        lambda call: native.unavailable(call.q, call.k),
        lambda call: attend(call, block_sparse_native, pools=True, scales=True),
    ),
    Form("eager", "lists", lambda call: None, lambda call: attend(call, block_sparse)),
    Form("reference", "reference", lambda call: None, _reference, auto=False),
)
