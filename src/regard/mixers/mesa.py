"""The layer of MesaNet: mesa attention with learned decays, strengths and ridge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from regard.core.card import Operand
from regard.core.checks import check_flag, check_number, reject
from regard.mixers.attention import Attention
from regard.mixers.convolution import ShortConvolution
from regard.mixers.norms import RMSNorm, UnitNorm
from regard.mixers.operands import TokenOperand

GATES = (
    Operand("log_decay", "b hk s", "key", "log_decay"),
    Operand("beta", "b hk s", "key", "unit"),
)


class Mesa(Attention):
    """Self- and cross-attention by the best linear map of all pairs so far, as in MesaNet.

        q = unit(silu(conv(W_q x))),   k = unit(silu(conv(W_k m))),   v = W_v m
        log_decay = log sigmoid(w_a . m + b_a),   beta = sigmoid(w_b . m + b_b)   (per head)
        ridge = softplus(log_ridge) + least_ridge      (per head and channel; 1 at the start)
        y = W_o (norm(op(q, k, v)) * silu(W_g x))      (the last factor with `output_gate`)

    around `regard.ops.mesa_attention`; m is memory, or x itself, unit(x) is x of length 1 and
    norm an RMS norm of every head with a learned gain.

    Args: as of `Attention`, and
        short_conv: tokens that the convolution over q and k sees; 0: none (and no SiLU), which
            cross-attention needs.
        conv_bias: a bias in the convolution.
        least_ridge: below which the ridge cannot fall, in [0, 1).
        norm_eps: of the norm of the output.
        options: of the op, without `ridge`, `log_decay` and `beta`.

    Shapes, masks, states: as of `Attention`. The state dict has `q_proj.weight`, `k_proj.weight`,
    `v_proj.weight`, `o_proj.weight`, `o_norm.weight`, `log_ridge` [H, D], and of `short_conv`,
    `operands.log_decay` and `operands.beta` a `.weight` and where there is one a `.bias`. The
    authors decay no weight of `log_ridge`.

    Precision: decays, strengths and the ridge in float32 at least; otherwise that of the op.
    Cost: O(T C H D), and that of the op.
    Source: von Oswald et al., "MesaNet: Sequence Modeling by Locally Optimal Test-Time
        Training", 2025, arXiv 2506.05233; the layer is that of flash-linear-attention, matched
        to 1e-5, outputs and gradients.

    >>> layer = Mesa(32, 2, causal=True)
    >>> layer(torch.randn(1, 5, 32)).shape
    torch.Size([1, 5, 32])
    >>> layer.learned()["ridge"].unique().tolist()
    [1.0]
    """

    LEARNED = ("ridge", "log_decay", "beta")
    CONVOLVED: ClassVar[tuple[str, ...]] = ("q", "k")
    GATE = silu

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        causal: bool = False,
        head_dim: int | None = None,
        short_conv: int = 4,
        conv_bias: bool = False,
        output_gate: bool = False,
        least_ridge: float = 0.25,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        op = type(self).__name__
        check_flag(op, "conv_bias", conv_bias)
        check_number(op, "least_ridge", least_ridge, least=0.0)
        if least_ridge >= 1:
            raise reject(op, "least_ridge", "below 1, where the ridge starts", least_ridge)
        check_number(op, "norm_eps", norm_eps, above=0.0)
        super().__init__(
            dim, heads, kv_heads, "mesa", causal, head_dim,
            short_conv=short_conv, output_gate=output_gate, dropout=dropout, options=options,
        )  # fmt: skip
        if conv_bias:
            if self.short_conv is None:
                raise reject(op, "conv_bias", "False without short_conv", conv_bias)
            channels = len(self.short_conv.weight)
            self.short_conv = ShortConvolution(channels, short_conv, bias=True)
        self.least_ridge = float(least_ridge)
        self.q_norm, self.k_norm = UnitNorm(), UnitNorm()
        self.o_norm = RMSNorm(self.head_dim, norm_eps)
        self.log_ridge = nn.Parameter(torch.empty(heads, self.head_dim))
        for gate in GATES:  # the authors' biases start at 0, also that of the decay
            self.operands[gate.name] = TokenOperand(gate, dim, {"hk": self.kv_heads}, start=0.0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A ridge of 1."""
        nn.init.constant_(self.log_ridge, math.log(math.expm1(1 - self.least_ridge)))

    def learned(self) -> dict[str, Tensor]:
        """The ridge of every head and channel [H, D], float32 at least."""
        free = self.log_ridge
        free = free.to(torch.promote_types(free.dtype, torch.float32))
        return {"ridge": softplus(free) + self.least_ridge}
