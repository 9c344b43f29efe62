"""The attention layer: projections around any mechanism that has a card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.core import checks
from regard.core.cache import KVCache
from regard.core.card import Card
from regard.core.group import StateGroup
from regard.core.state import FixedState, State
from regard.mixers import arguments
from regard.mixers.convolution import ShortConvolution
from regard.mixers.norms import RMSNorm
from regard.mixers.operands import Operands
from regard.mixers.positions import positions, rotate


class Attention(nn.Module):
    """Self- and cross-attention with any mechanism: x -> x.

        q = W_q x,   k = W_k m,   v = W_v m,   m = memory, or x itself
        y = W_o (sigmoid(W_g x) * op(q, k, v, operands, options))

    with, in this order and where asked for: a short convolution with SiLU over q, k and v; RMS
    norm of every head of q and k with a learned gain; rotary positions; the gate. What a
    mechanism wants beside q, k and v is made from its card: an operand of a query or a key is
    a linear map of the token, one of a head is a parameter, each linked into its domain; a probe
    (Parallax's r) has the norm and the positions of the query.

    Args:
        dim: C, the size of a token (of x and of memory).
        heads: H, query heads.
        kv_heads: Hk, key and value heads, of which H is a multiple; None: H.
        mechanism: the name of a card (see `regard.mechanisms`), or a card.
        causal: of self-attention: a token sees those before it and itself. Of cross-attention:
            the promise that no output depends on later tokens of x; memory is seen whole.
        head_dim: D, of queries, keys and values; None: C / H.
        qk_norm: RMS norm over D of queries and keys, one learned gain [D] each for all heads.
        rope: rotary positions; a number is their base (True: 10000). Self-attention only.
        short_conv: tokens that the short convolution sees, 0: none. It looks back only, also
            where the attention looks both ways. Self-attention only.
        output_gate: multiplies the attention's output by a gate, before W_o.
        dropout: probability of dropping an element of the output.
        options: arguments of the op, such as `{"window": (256, 0)}`; plain values, as a tensor
            would not follow the module to another device.

    A masked token does not exist: it is seen by nobody, takes up no position and no place in
    the convolution, whatever it contains, and its own output is 0. Only a `window` among the
    options counts places, not real tokens: with one, padding belongs on the left.

    Precision: that of the op; learned operands and gates of forgetting are float32 at least.
    Cost: O((T + S) C H D), and that of the op.
    Limits: no position in cross-attention. With a short convolution a state cannot be cropped.
    Raises: TypeError, ValueError naming the argument: a pattern that the mechanism does not
        serve, an option or input that its op does not have, shapes that do not fit.

    >>> layer = Attention(32, 4, kv_heads=2, mechanism="local_linear", causal=True, rope=True)
    >>> x = torch.randn(2, 6, 32)
    >>> whole = layer(x)
    >>> first, state = layer(x[:, :5], return_state=True)
    >>> torch.allclose(layer(x[:, 5:], state=state), whole[:, 5:], atol=1e-4)
    True
    """

    # What a subclass may do in its own way.
    LEARNED: tuple[str, ...] = ()  # arguments of the op that `learned` gives
    CONVOLVED: ClassVar[tuple[str, ...]] = ("q", "k", "v")  # by the short convolution
    GATE: ClassVar[Callable[[Tensor], Tensor]] = torch.sigmoid

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        mechanism: str | Card = "softmax",
        causal: bool = False,
        head_dim: int | None = None,
        qk_norm: bool = False,
        rope: bool | float = False,
        short_conv: int = 0,
        output_gate: bool = False,
        dropout: float = 0.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        arguments.check_sizes(op, dim, heads, kv_heads, head_dim)
        flags = {"causal": causal, "qk_norm": qk_norm, "output_gate": output_gate}
        for name, flag in flags.items():
            checks.check_flag(op, name, flag)
        checks.check_integer(op, "short_conv", short_conv, least=0)
        self.dim, self.heads, self.causal = dim, heads, causal
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.rope_base = arguments.rope_base(op, rope, self.head_dim)
        self.card = arguments.find_card(op, mechanism, causal)
        self.options = arguments.check_options(op, options, self.card, self.LEARNED)
        self.takes = arguments.taken(self.card)
        width, kv_width = heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, width, bias=False)
        self.k_proj = nn.Linear(dim, kv_width, bias=False)
        self.v_proj = nn.Linear(dim, kv_width, bias=False)
        self.o_proj = nn.Linear(width, dim, bias=False)
        self.g_proj = nn.Linear(dim, width, bias=False) if output_gate else None
        self.q_norm: nn.Module | None = RMSNorm(self.head_dim) if qk_norm else None
        self.k_norm: nn.Module | None = RMSNorm(self.head_dim) if qk_norm else None
        self.o_norm: nn.Module | None = None  # of every head of the output, by a subclass
        channels = sum(width if name == "q" else kv_width for name in self.CONVOLVED)
        self.short_conv = ShortConvolution(channels, short_conv) if short_conv else None
        sizes = {"h": heads, "hk": self.kv_heads, "d": self.head_dim, "dv": self.head_dim}
        self.operands = Operands(op, tuple(self.card.operands), dim, sizes, norm=qk_norm)
        self.dropout = nn.Dropout(arguments.check_dropout(op, dropout))

    def extra_repr(self) -> str:
        shown = f"{self.dim}, {self.heads}, kv_heads={self.kv_heads}, "
        shown += f"mechanism={self.card.name!r}, causal={self.causal}, head_dim={self.head_dim}"
        if self.rope_base is not None:
            shown += f", rope={self.rope_base:g}"
        return shown + (f", options={self.options}" if self.options else "")

    # -- the call ----------------------------------------------------------------------------

    def forward(
        self,
        x: Float[Tensor, "b t c"],
        memory: Float[Tensor, "b s c"] | None = None,
        *,
        key_mask: Bool[Tensor, "b s"] | None = None,
        cu_seqlens: Int[Tensor, " n"] | None = None,
        cu_seqlens_k: Int[Tensor, " n"] | None = None,
        state: StateGroup | None = None,
        return_state: bool = False,
    ) -> Any:
        """y [B, T, C], or (y, state).

        Args:
            x: tokens [B, T, C].
            memory: [B, S, C] for cross-attention. With the state of a cross-attention, new
                memory behind the old; None: the memory that the state remembers.
            key_mask: bool, True = real: of memory [B, S], or of x [B, T] where there is none.
            cu_seqlens, cu_seqlens_k: int32 offsets of packed sequences (B = 1), of x and,
                where they differ, of memory.
            state: of the tokens so far, to go on from.
            return_state: also return the state after this call.
        """
        cross = arguments.check_call(self, x, memory, state)
        if cross and memory is None:
            memory = x.new_zeros(x.shape[0], 0, self.dim)
        source = x if memory is None else memory
        inputs = {"key_mask": key_mask, "cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
        arguments.check_inputs(self, x, source, inputs, state, return_state)
        if key_mask is not None:
            source = torch.where(key_mask[..., None], source, 0.0)
            x = x if cross else source
        parts = {"q": self.q_proj(x), "k": self.k_proj(source), "v": self.v_proj(source)}
        convolved = None
        if self.short_conv is not None:
            past = state["short_conv"]["inputs"] if state is not None else None
            chosen = [parts[name] for name in self.CONVOLVED]
            joined, convolved = self.short_conv(
                torch.cat(chosen, 2), key_mask=key_mask, cu_seqlens=cu_seqlens, past=past
            )
            pieces = joined.split([part.shape[2] for part in chosen], 2)
            parts |= dict(zip(self.CONVOLVED, pieces, strict=True))
        q, k, v = (
            part.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for part in parts.values()
        )
        operands = self.operands(x, source)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_base is not None:
            at = positions(x.shape[1], key_mask, cu_seqlens, x.device) + self._tokens_before(state)
            q, k = rotate(q, at, self.rope_base), rotate(k, at, self.rope_base)
            for name in self.operands.probes:
                operands[name] = rotate(operands[name], at, self.rope_base)
        given = {**self.options, **operands, **self.learned()}
        given |= {name: value for name, value in inputs.items() if value is not None}
        if state is not None:
            given["state"] = state["attention"]
        if return_state:
            given["return_state"] = True
        result = self.card.op(q=q, k=k, v=v, causal=self.causal and not cross, **given)
        out, after = result if return_state else (result, None)
        y = self._project(out, x, None if cross else key_mask)
        if after is None:
            return y
        return y, self._remember(after, convolved, key_mask, state, source, cross)

    def learned(self) -> dict[str, Tensor]:
        """Arguments of the op that a subclass keeps as parameters; their names are `LEARNED`."""
        return {}

    def _project(self, out: Tensor, x: Tensor, key_mask: Tensor | None) -> Tensor:
        if self.o_norm is not None:
            out = self.o_norm(out)
        out = out.transpose(1, 2).flatten(2)
        if self.g_proj is not None:
            out = out * type(self).GATE(self.g_proj(x))
        y = self.dropout(self.o_proj(out))
        return y if key_mask is None else torch.where(key_mask[..., None], y, 0.0)

    # -- the state ---------------------------------------------------------------------------

    def _tokens_before(self, state: StateGroup | None) -> int | Tensor:
        """Real tokens in the state: one number, or one per row [B, 1]."""
        if state is None:
            return 0
        if "real_tokens" in state.parts:
            return state["real_tokens"]["count"][:, None]
        cache = state["attention"]
        return cache.length if cache.key_mask is None else cache.key_mask.sum(1, keepdim=True)

    def _remember(
        self,
        after: State,
        convolved: Tensor | None,
        key_mask: Tensor | None,
        state: StateGroup | None,
        source: Tensor,
        cross: bool,
    ) -> StateGroup:
        length = after.length
        parts: dict[str, State] = {"attention": after}
        if convolved is not None:
            parts["short_conv"] = FixedState("short_conv", length, {"inputs": convolved})
        if self.rope_base is not None and not isinstance(after, KVCache):  # a cache can count
            B, T, _ = source.shape
            new = source.new_full((B,), T, dtype=torch.int64)
            if key_mask is not None:
                new = key_mask.sum(1)
            old = state["real_tokens"]["count"] if state is not None else 0
            parts["real_tokens"] = FixedState("real_tokens", length, {"count": new + old})
        return StateGroup(arguments.KINDS[cross], length, parts)
