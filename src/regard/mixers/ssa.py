"""The layer of SSA: one set of weights for full attention and attention to selected blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from regard.core import checks
from regard.core.cache import KVCache
from regard.core.checks import Sizes, reject, words
from regard.core.group import StateGroup
from regard.core.packed import check_packed
from regard.core.precision import compute_dtype
from regard.mixers.arguments import CARDS, KINDS, check_dropout, check_sizes, rope_base
from regard.mixers.positions import positions, rotate
from regard.ops.selected import block_topk_attention, nsa_attention
from regard.ops.softmax import softmax_attention

STREAMS = ("sparse", "full")
COMPRESSED, SELECTED, WINDOW = range(3)  # the gates of a head, in this order


class AlignmentLoss(nn.Module):
    """How far the outputs of two streams are apart; each is drawn towards the other.

        loss = smooth_l1(full, stop(sparse)) + smooth_l1(stop(full), sparse)

    the mean over all elements. The first term makes full attention sparser, the second keeps
    sparse attention near it.
    """

    def forward(
        self,
        full: Float[Tensor, "b t c"],
        sparse: Float[Tensor, "b t c"],
        key_mask: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, ""]:
        """Without the tokens that `key_mask` calls masked."""
        wide = compute_dtype(full.dtype)
        full, sparse = full.to(wide), sparse.to(wide)
        if key_mask is not None:
            full, sparse = full[key_mask], sparse[key_mask]
        if not full.numel():
            return 0.0 * (full.sum() + sparse.sum())
        return smooth_l1_loss(full, sparse.detach()) + smooth_l1_loss(full.detach(), sparse)


class Streams(NamedTuple):
    """What a layer does meanwhile: carry one stream on, and note how far the other is."""

    carry: str
    losses: list[Tensor]


class SSAAttention(nn.Module):
    """Causal self-attention that serves a model dense or sparse, with any budget: x -> x.

        o = g * attention(q, k, v),   g = sigmoid(W_g x),   y = W_o o

    where attention is `block_topk_attention` ("sparse") or softmax attention ("full"), with the
    same weights and the same gate, one number per head. "both" computes both and returns y of
    one with the `AlignmentLoss` of their o. With `nsa` the sparse stream is `nsa_attention`, whose
    three branches have a gate each.

    Args:
        dim: C, the size of a token.
        heads, kv_heads: H query heads, Hk key heads (None: H), each group of which shares its
            choice of blocks.
        block, count: keys in a block, and blocks per query. Plain attributes: a trained layer may
            be given another budget.
        mode: "sparse" or "full", where a call does not say it. An attribute too.
        nsa: compressed and window branches beside the selected one.
        window: tokens of the window branch.
        causal: only True. head_dim: None: C / H. rope: base of the rotary positions, or False.
        dropout: of elements of y.

    Shapes, masks, states: as of `Attention`. The state dict has the authors' names:
    `q_proj.weight`, `k_proj.weight`, `v_proj.weight`, `o_proj.weight` and `g_proj.weight`
    [3 H, C], for every head the gates of the compressed, selected and window branch, of which
    only the second has a use without `nsa`.

    Precision: gates and losses in float32 at least; otherwise that of the op.
    Cost: O(T C H D) and that of the op; "both" that of the two.
    Source: Shen et al. 2025, arXiv 2511.20102; matched to 1e-5 with the authors' model.
    Limits: with `nsa` no padding and no packed sequences.
    Raises: TypeError, ValueError naming the argument.

    >>> layer = SSAAttention(32, 4, kv_heads=2, block=4, count=2)
    >>> x = torch.randn(2, 20, 32)
    >>> y, loss = layer(x, mode="both")
    >>> torch.equal(y, layer(x)), torch.equal(y, layer(x, mode="full"))
    (True, False)
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        block: int = 16,
        count: int = 16,
        mode: str = "sparse",
        nsa: bool = False,
        window: int = 0,
        causal: bool = True,
        head_dim: int | None = None,
        rope: bool | float = 500000.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_sizes(op, dim, heads, kv_heads, head_dim)
        checks.check_integer(op, "block", block)
        checks.check_integer(op, "count", count)
        checks.check_choice(op, "mode", mode, STREAMS)
        checks.check_flag(op, "nsa", nsa)
        checks.check_integer(op, "window", window, least=1 if nsa else 0)
        if window and not nsa:
            raise reject(op, "window", "0 without nsa", window)
        checks.check_flag(op, "causal", causal)
        if not causal:
            raise reject(op, "causal", "True: a query's own block is its last", causal)
        self.dim, self.heads, self.causal = dim, heads, causal
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.block, self.count, self.mode = block, count, mode
        self.nsa, self.window = nsa, window
        self.rope_base = rope_base(op, rope, self.head_dim)
        self.card = CARDS["selected"]
        width, kv_width = heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, width, bias=False)
        self.k_proj = nn.Linear(dim, kv_width, bias=False)
        self.v_proj = nn.Linear(dim, kv_width, bias=False)
        self.o_proj = nn.Linear(width, dim, bias=False)
        self.g_proj = nn.Linear(dim, 3 * heads, bias=False)
        self.alignment = AlignmentLoss()
        self.dropout = nn.Dropout(check_dropout(op, dropout))
        self.streams: Streams | None = None  # set by `regard.recipes.ssa.aligned`

    def extra_repr(self) -> str:
        shown = f"{self.dim}, {self.heads}, kv_heads={self.kv_heads}, block={self.block}, "
        shown += f"count={self.count}, mode={self.mode!r}, head_dim={self.head_dim}"
        return shown + (f", nsa=True, window={self.window}" if self.nsa else "")

    def forward(
        self,
        x: Float[Tensor, "b t c"],
        *,
        mode: str | None = None,
        carry: str = "sparse",
        key_mask: Bool[Tensor, "b t"] | None = None,
        cu_seqlens: Int[Tensor, " n"] | None = None,
        state: StateGroup | None = None,
        return_state: bool = False,
    ) -> Any:
        """y [B, T, C], or (y, state), or with mode="both" (y, loss).

        Args:
            x: tokens [B, T, C].
            mode: "sparse", "full" or "both"; None: the layer's own.
            carry: with "both", whose output y is.
            key_mask: bool [B, T], True = real.
            cu_seqlens: int32 offsets of packed sequences (B = 1).
            state: of the tokens so far, to go on from; either mode may go on.
            return_state: also return the state after this call.
        """
        self._check(x, mode, carry, key_mask, cu_seqlens, state, return_state)
        noted = self.streams if mode is None and state is None and not return_state else None
        chosen = mode or ("both" if noted is not None else self.mode)
        source = x if key_mask is None else torch.where(key_mask[..., None], x, 0.0)
        parts = (self.q_proj(source), self.k_proj(source), self.v_proj(source))
        q, k, v = (part.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        if self.rope_base is not None:
            at = positions(x.shape[1], key_mask, cu_seqlens, x.device) + _tokens_before(state)
            q, k = (rotate(tensor, at, self.rope_base) for tensor in (q, k))
        gates = torch.sigmoid(self.g_proj(source).to(compute_dtype(x.dtype)))
        gates = gates.unflatten(2, (self.heads, 3)).transpose(1, 2)
        past = None if state is None else state["attention"]
        given = {"key_mask": key_mask, "cu_seqlens": cu_seqlens}
        if chosen != "both":
            out, after = self._stream(chosen, q, k, v, gates, past, return_state, given)
            y = self._project(out, key_mask)
            if after is None:
                return y
            return y, StateGroup(KINDS[False], after.length, {"attention": after})
        outs = {name: self._stream(name, q, k, v, gates, None, False, given)[0] for name in STREAMS}
        loss = self.alignment(outs["full"], outs["sparse"], key_mask)
        y = self._project(outs[carry if noted is None else noted.carry], key_mask)
        if noted is None:
            return y, loss
        noted.losses.append(loss)
        return y

    def _stream(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, past: KVCache | None,
        return_state: bool, given: dict[str, Any],
    ) -> tuple[Tensor, KVCache | None]:  # fmt: skip
        """o [B, T, H D] of one stream, gated, and the cache if it is asked for."""
        sizes: dict[str, Any] = {"block": self.block, "count": self.count}
        if name == "sparse" and self.nsa:
            cache = None
            if past is not None or return_state:
                cache = KVCache.extend(type(self).__name__, past, k, v)
                k, v = cache.k, cache.v
            out = nsa_attention(
                q, k, v, **sizes, window=self.window, gate_selected=gates[..., SELECTED],
                gate_compressed=gates[..., COMPRESSED], gate_window=gates[..., WINDOW],
            )  # fmt: skip
            return out.transpose(1, 2).flatten(2), cache if return_state else None
        given = {**given, "state": past, "return_state": return_state}
        if name == "sparse":
            result = block_topk_attention(q, k, v, **sizes, **given)
        else:
            result = softmax_attention(q, k, v, causal=True, **given)
        out, cache = result if return_state else (result, None)
        out = (out * gates[..., SELECTED, None]).to(v.dtype)
        return out.transpose(1, 2).flatten(2), cache

    def _project(self, out: Tensor, key_mask: Tensor | None) -> Tensor:
        y = self.dropout(self.o_proj(out))
        return y if key_mask is None else torch.where(key_mask[..., None], y, 0.0)

    def _check(
        self, x: Any, mode: Any, carry: Any, key_mask: Any, cu_seqlens: Any, state: Any,
        return_state: Any,
    ) -> None:  # fmt: skip
        """Metadata only."""
        op = type(self).__name__
        if not isinstance(x, Tensor):
            raise reject(op, "x", "a torch.Tensor", x, kind=TypeError)
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise reject(op, "x", f"of shape [batch, length, {self.dim}]", x)
        if mode is not None:
            checks.check_choice(op, "mode", mode, (*STREAMS, "both"))
        checks.check_choice(op, "carry", carry, STREAMS)
        checks.check_flag(op, "return_state", return_state)
        checks.check_state(op, state, StateGroup)
        if mode == "both" and (state is not None or return_state):
            name = "return_state" if state is None else "state"
            raise reject(op, name, "left out with mode='both'", words("given"))
        if state is not None and (state.name != KINDS[False] or set(state.parts) != {"attention"}):
            accepted = f"one of {op}"
            raise reject(op, "state", accepted, words(f"one of {state.name} with other parts"))
        for name, value in {"key_mask": key_mask, "cu_seqlens": cu_seqlens}.items():
            if self.nsa and value is not None:
                raise reject(op, name, "None with nsa", value)
        B, T, _ = x.shape
        sizes = Sizes(B, 1, 1, T, T, self.dim, self.dim)
        checks.check_key_mask(op, key_mask, sizes, x)
        check_packed(op, cu_seqlens, None, sizes, state)
        if state is not None and len(state["attention"].k) != B:
            held = len(state["attention"].k)
            raise reject(op, "state", f"of x's batch size {B}", words(f"one of {held}"))


def _tokens_before(state: StateGroup | None) -> int | Tensor:
    if state is None:
        return 0
    cache = state["attention"]
    return cache.length if cache.key_mask is None else cache.key_mask.sum(1, keepdim=True)
