"""The layer of Parallax: softmax attention corrected by a learned probe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from regard.core.checks import check_flag, check_number, reject
from regard.mixers.attention import Attention
from regard.mixers.norms import RMSNorm
from regard.mixers.operands import TokenOperand


class Parallax(Attention):
    """Self- and cross-attention with a probe r beside the query, as Parallax has it.

        q = W_q x,   r = W_r x,   k = W_k m,   v = W_v m,   y = W_o op(q, r, k, v)

    around `regard.ops.parallax_attention`; m is memory, or x itself. With `qk_norm`, q, r and k
    have an RMS norm of every head, each with a gain of its own; then rotary positions.

    Nothing bounds r, and only q . k is divided by sqrt(D). At the start r . k of normalised
    heads has a standard deviation of sqrt(D), so that the correction outweighs the attention it
    corrects; `probe_start` of D ** -0.5 or less begins near softmax attention.

    Args: as of `Attention`, and
        bias: of q, r, k and v.
        probe_start: where the gain of r's norm starts (the authors': 1); needs `qk_norm`.
        norm_eps: of the norms.
        options: of the op; the authors' window of W keys is `{"window": (W - 1, 0)}`.

    Shapes, masks, states: as of `Attention`, whose state dict it has: `operands.r.weight`,
    `operands.r.norm.weight` beside those of q.

    Precision, cost: those of the op, and O(T C H D).
    Source: Zuo et al., "Parallax: Parameterized Local Linear Attention for Language Modeling",
        2026, arXiv 2605.29157; the layer is that of flash-linear-attention, matched to 1e-5,
        outputs and gradients.

    >>> import torch
    >>> layer = Parallax(32, 4, kv_heads=2, causal=True)
    >>> layer(torch.randn(1, 5, 32)).shape
    torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        causal: bool = False,
        head_dim: int | None = None,
        qk_norm: bool = True,
        rope: bool | float = False,
        bias: bool = False,
        probe_start: float = 1.0,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        op = type(self).__name__
        check_flag(op, "bias", bias)
        check_number(op, "probe_start", probe_start, least=0.0)
        check_number(op, "norm_eps", norm_eps, above=0.0)
        super().__init__(
            dim, heads, kv_heads, "parallax", causal, head_dim,
            qk_norm=qk_norm, rope=rope, dropout=dropout, options=options,
        )  # fmt: skip
        if probe_start != 1 and not qk_norm:
            raise reject(op, "probe_start", "1 without qk_norm", probe_start)
        r = self.operands["r"]
        assert isinstance(r, TokenOperand)
        if qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(self.head_dim, norm_eps) for _ in range(2))
            r.norm = RMSNorm(self.head_dim, norm_eps, probe_start)
        if bias:
            r.bias = nn.Parameter(r.weight.new_zeros(r.out_features))
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(self, name, nn.Linear(dim, getattr(self, name).out_features))
