"""The layers of RAT: attention over gated chunks, and the recurrent network that it grows into."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.core import checks
from regard.core.checks import Sizes, reject, words
from regard.core.group import StateGroup
from regard.core.packed import check_packed
from regard.core.precision import compute_dtype
from regard.mixers.arguments import CARDS, KINDS, check_dropout, check_sizes, rope_base
from regard.mixers.norms import RMSNorm
from regard.ops.rat import rat_attention


class GatedRNN(nn.Module):
    """A gated average of the past per channel: the recurrent end of RAT.

        z, v, g = split(W_in x),   f = sigmoid(g + gate_bias)
        h_t = f_t h_{t-1} + (1 - f_t) v_t,   y = W_out (sigmoid(z) * h)

    Args:
        dim: C, the size of a token and of the state.
        longest: gates start with mean memories from 1 to `longest` - 1 tokens: gate_bias is the
            logarithm of a uniform number ("chrono"). The authors take the length of training.
        residual: the layer as published, x + y(norm(x)) with an RMS norm of the input
            (`input_norm.weight`); else y(x), and the model around adds both.
        norm_eps: of that norm.
        dropout: probability of dropping an element of y.
        causal: only True.

    A masked token does not exist, whatever it contains; its own output is 0 (with `residual`,
    what came in). The state dict has `in_proj.weight` [3 C, C], `gate_bias` [C],
    `out_proj.weight` [C, C] and, with `residual`, `input_norm.weight` [C]: the authors' names.

    Precision: gates in float32 at least; otherwise that of the op.
    Cost: O(T C^2) for the projections, O(T C) for the recurrence.
    Source: Wei et al. 2025, arXiv 2507.04416, the RNN that RAT is compared with; the authors'
        model of it is matched to 1e-5.
    Raises: TypeError, ValueError naming the argument.

    >>> layer = GatedRNN(32)
    >>> x = torch.randn(2, 9, 32)
    >>> first, state = layer(x[:, :4], return_state=True)
    >>> torch.allclose(layer(x[:, 4:], state=state), layer(x)[:, 4:], atol=1e-5)
    True
    """

    def __init__(
        self,
        dim: int,
        longest: int = 4096,
        causal: bool = True,
        residual: bool = False,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        op = type(self).__name__
        checks.check_integer(op, "dim", dim)
        checks.check_integer(op, "longest", longest)
        super().__init__()
        self._set_up(dim, 3 * dim, causal, residual, norm_eps, dropout)
        self.longest = longest
        self.reset_parameters()

    def _set_up(
        self, dim: int, width: int, causal: bool, residual: bool, norm_eps: float, dropout: float
    ) -> None:
        """What both layers have."""
        op = type(self).__name__
        checks.check_flag(op, "causal", causal)
        if not causal:
            raise reject(op, "causal", "True: it is a recurrence along the tokens", causal)
        checks.check_flag(op, "residual", residual)
        checks.check_number(op, "norm_eps", norm_eps, above=0.0)
        self.dim, self.causal, self.residual = dim, causal, residual
        self.card = CARDS["rat"]
        self.input_norm = RMSNorm(dim, norm_eps) if residual else None
        self.in_proj = nn.Linear(dim, width, bias=False)
        self.gate_bias = nn.Parameter(torch.empty(dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(check_dropout(op, dropout))

    def reset_parameters(self) -> None:
        """Gates that keep for 1 to `longest` - 1 tokens; with `longest` at 1 or 2, for 1."""
        with torch.no_grad():
            self.gate_bias.uniform_(1.0, max(self.longest - 1.0, 1.0)).log_()

    def extra_repr(self) -> str:
        return f"{self.dim}, longest={self.longest}, residual={self.residual}"

    def forward(
        self,
        x: Float[Tensor, "b t c"],
        *,
        key_mask: Bool[Tensor, "b t"] | None = None,
        cu_seqlens: Int[Tensor, " n"] | None = None,
        state: StateGroup | None = None,
        return_state: bool = False,
    ) -> Any:
        """y [B, T, C], or (y, state).

        Args:
            x: tokens [B, T, C].
            key_mask: bool [B, T], True = real.
            cu_seqlens: int32 offsets of packed sequences (B = 1).
            state: of the tokens so far, to go on from.
            return_state: also return the state after this call.
        """
        self._check(x, key_mask, cu_seqlens, state, return_state)
        source = x if key_mask is None else torch.where(key_mask[..., None], x, 0.0)
        if self.input_norm is not None:
            source = self.input_norm(source)
        given: dict[str, Any] = {"key_mask": key_mask, "cu_seqlens": cu_seqlens}
        if state is not None:
            given["state"] = state["attention"]
        z, result = self._mix(source, {**given, "return_state": return_state})
        out, after = result if return_state else (result, None)
        y = self.dropout(self.out_proj(torch.sigmoid(z) * out.transpose(1, 2).flatten(2)))
        if key_mask is not None:
            y = torch.where(key_mask[..., None], y, 0.0)
        y = x + y if self.residual else y
        if after is None:
            return y
        return y, StateGroup(KINDS[False], after.length, {"attention": after})

    def _mix(self, x: Tensor, given: dict[str, Any]) -> tuple[Tensor, Any]:
        """The output gate before its sigmoid, and what the op returns."""
        z, v, gate = self.in_proj(x).chunk(3, 2)
        v, gate = v[:, None], self._gate(gate)[:, None]
        return z, rat_attention(v, v, v, gate, chunk_length=None, **given)

    def _gate(self, raw: Tensor) -> Tensor:
        wide = compute_dtype(raw.dtype)
        return torch.sigmoid(raw.to(wide) + self.gate_bias.to(wide))

    def _check(self, x: Any, key_mask: Any, cu_seqlens: Any, state: Any, return_state: Any) -> None:
        """Metadata only; shapes within the state are the op's affair."""
        op = type(self).__name__
        if not isinstance(x, Tensor):
            raise reject(op, "x", "a torch.Tensor", x, kind=TypeError)
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise reject(op, "x", f"of shape [batch, length, {self.dim}]", x)
        checks.check_flag(op, "return_state", return_state)
        checks.check_state(op, state, StateGroup)
        if state is not None and (state.name != KINDS[False] or set(state.parts) != {"attention"}):
            accepted = f"one of {op}"
            raise reject(op, "state", accepted, words(f"one of {state.name} with other parts"))
        B, T, _ = x.shape
        sizes = Sizes(B, 1, 1, T, T, self.dim, self.dim)
        checks.check_key_mask(op, key_mask, sizes, x)
        check_packed(op, cu_seqlens, None, sizes, state)
        if state is not None:
            held = len(state["attention"]["v"])
            if held != B:
                raise reject(op, "state", f"of x's batch size {B}", words(f"one of {held}"))


class Rat(GatedRNN):
    """A gated recurrence inside of chunks and softmax attention over them, as in RAT.

        z, v, g, q, k = split(W_in x),   f = sigmoid(g + gate_bias)
        y = W_out (sigmoid(z) * op(q, k, v, f))

    around `regard.ops.rat_attention`. q and k are projected for `groups` groups only: head h has
    those of group h mod `groups` (they are tiled); its keys are its own all the same, since every
    channel of every head has a gate of its own.

    Args:
        dim: C, the size of a token.
        heads: H, a divisor of C.
        chunk_length: tokens averaged into one key; 1 is attention, and the longer, the nearer to
            `GatedRNN`.
        groups: of queries and keys, a divisor of H.
        rope: rotary positions by the number of the chunk; a number is their base (True: 10000),
            False is without.
        residual, norm_eps, dropout, causal: as of `GatedRNN`.

    Shapes, masks, states: as of `GatedRNN`. The state dict has `in_proj.weight`
    [3 C + 2 groups C / H, C], `gate_bias` [C], `out_proj.weight` [C, C] and, with `residual`,
    `input_norm.weight` [C]: the authors' names. Gates start with memories from 1 to
    `chunk_length` - 1 tokens.

    Precision: gates in float32 at least; otherwise that of the op.
    Cost: O(T C^2) for the projections, and that of the op.
    Source: Wei et al., "RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based
        Sequence Modeling", 2025, arXiv 2507.04416; the authors' layer is matched to 1e-5, its
        gradients to 1e-4.
    Raises: TypeError, ValueError naming the argument.

    >>> layer = Rat(32, 4, chunk_length=4)
    >>> x = torch.randn(2, 9, 32)
    >>> first, state = layer(x[:, :3], return_state=True)
    >>> torch.allclose(layer(x[:, 3:], state=state), layer(x)[:, 3:], atol=1e-5)
    True
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        chunk_length: int = 16,
        groups: int = 2,
        causal: bool = True,
        rope: bool | float = 10000.0,
        residual: bool = False,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        op = type(self).__name__
        check_sizes(op, dim, heads, None, None)
        checks.check_integer(op, "chunk_length", chunk_length)
        checks.check_integer(op, "groups", groups)
        if heads % groups:
            raise reject(op, "groups", f"a divisor of heads, {heads}", groups)
        nn.Module.__init__(self)
        self.heads, self.head_dim, self.groups = heads, dim // heads, groups
        self.rope_base = rope_base(op, rope, self.head_dim)
        self.longest = self.chunk_length = chunk_length
        width = 3 * dim + 2 * groups * self.head_dim
        self._set_up(dim, width, causal, residual, norm_eps, dropout)
        self.reset_parameters()

    def extra_repr(self) -> str:
        shown = f"{self.dim}, {self.heads}, chunk_length={self.chunk_length}, "
        return shown + f"groups={self.groups}, rope={self.rope_base}, residual={self.residual}"

    def _mix(self, x: Tensor, given: dict[str, Any]) -> tuple[Tensor, Any]:
        shared = self.groups * self.head_dim
        z, v, gate, q, k = self.in_proj(x).split([self.dim] * 3 + [shared] * 2, 2)
        tiles = self.heads // self.groups
        v, gate = (self._heads(x) for x in (v, self._gate(gate)))
        q, k = (self._heads(x).repeat(1, tiles, 1, 1) for x in (q, k))
        rope = False if self.rope_base is None else self.rope_base
        return z, rat_attention(q, k, v, gate, chunk_length=self.chunk_length, rope=rope, **given)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)
