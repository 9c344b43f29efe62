"""The forms of attention to the most important blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.cache import KVCache
from regard.core.dispatch import Form
from regard.core.precision import compute_dtype
from regard.ops.block_sparse import selected_attention
from regard.ops.selected.reference import block_topk_attention_reference
from regard.ops.selected.selection import (
    Places,
    block_means,
    cached_means,
    choose_blocks,
    group_blocks,
    places,
    tokens_of,
)


@dataclass(frozen=True)
class Call:
    """One checked call; k, v and key_mask are those of all keys, `cache` what holds them."""

    q: Tensor
    k: Tensor
    v: Tensor
    block: int
    count: int
    scale: float | Tensor | None
    key_mask: Tensor | None
    cache: KVCache | None = None

    @property
    def budget(self) -> int:
        """Blocks of a query: a power of two."""
        return 1 << (self.count - 1).bit_length()


def select(call: Call) -> tuple[Tensor, Places]:
    """The blocks [B, Hk, T, n], counted in real keys, and where those are. No gradient."""
    T, S = call.q.shape[2], call.k.shape[2]
    with torch.no_grad():
        where = places(T, S, call.key_mask, call.q.device)
        k = call.k.detach()
        if call.key_mask is not None and where.order is not None:
            means = group_blocks(k, where.order, call.key_mask, call.block)
        elif call.cache is not None and not torch.compiler.is_compiling():
            means = cached_means(call.cache, call.block).detach()
        else:
            means = block_means(k, call.block)
        q = call.q.detach().to(compute_dtype(call.q.dtype))
        scale = call.q.shape[3] ** -0.5 if call.scale is None else call.scale
        if isinstance(scale, Tensor):
            scale = scale.detach().to(q.dtype).reshape(-1, 1, 1)
        return choose_blocks(q * scale, means, where.seen, call.block, call.budget), where


def _eager(call: Call) -> Tensor:
    selected, where = select(call)
    block = call.block
    if where.order is not None and call.key_mask is not None:
        selected, block = tokens_of(selected, where.order, block, call.key_mask), 1
    return selected_attention(
        call.q, call.k, call.v, selected, block=block, causal=True, scale=call.scale,
        key_mask=call.key_mask,
    )  # fmt: skip


def _reference(call: Call) -> Tensor:
    return block_topk_attention_reference(
        call.q, call.k, call.v, block=call.block, count=call.count, scale=call.scale,
        key_mask=call.key_mask,
    )  # fmt: skip


FORMS = (
    Form("eager", "blocks", lambda call: None, _eager),
    Form("reference", "reference", lambda call: None, _reference, auto=False),
)
