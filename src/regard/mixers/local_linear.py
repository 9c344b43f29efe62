"""The layer of local linear attention: ridge, bandwidth and forgetting are learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from regard.core.card import Operand
from regard.core.checks import check_flag
from regard.mixers.attention import Attention
from regard.mixers.operands import TokenOperand

LEAST_RIDGE = 1e-2


class LocalLinear(Attention):
    """Self- and cross-attention by local linear regression, with a learned fit per head.

        ridge_h = softplus(log_ridge_h) + 0.01      (1 at the start)
        scale_h = exp(log_scale_h)                  (D ** -0.5 at the start)
        log_decay_h = log sigmoid(w_h . m + b_h)    (with `forget_gate`; b = 3 at the start)

    around `regard.ops.local_linear_attention`, on queries and keys of RMS 1 with a learned gain.
    The scale is the inverse of a squared bandwidth: large, a head fits its closest keys. A
    large ridge makes the fit a local average, which is softmax attention.

    Args: as of `Attention`, and
        forget_gate: every key multiplies the weight of older ones by a number below 1 that a
            linear map of its token decides, for each head.
        options: of the op, without `ridge`, `scale` and, with `forget_gate`, `log_decay`.

    Shapes, masks, states: as of `Attention`. The state dict has `q_proj.weight`, `k_proj.weight`,
    `v_proj.weight`, `o_proj.weight`, `q_norm.weight`, `k_norm.weight`, `log_ridge`, `log_scale`,
    and where asked for `g_proj.weight`, `short_conv.weight`, `operands.log_decay.weight`, `.bias`.

    Source: Zuo et al., "Local Linear Attention", 2025, arXiv 2510.01450, which gives the op;
        the layer around it is ours, as no layer was published.

    >>> layer = LocalLinear(32, 2, causal=True, forget_gate=True)
    >>> layer(torch.randn(1, 5, 32)).shape
    torch.Size([1, 5, 32])
    >>> {name: value.tolist() for name, value in layer.learned().items() if name == "ridge"}
    {'ridge': [1.0, 1.0]}
    """

    LEARNED = ("ridge", "scale")

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        causal: bool = False,
        head_dim: int | None = None,
        rope: bool | float = False,
        short_conv: int = 0,
        forget_gate: bool = False,
        output_gate: bool = False,
        dropout: float = 0.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_flag(type(self).__name__, "forget_gate", forget_gate)
        if forget_gate:
            self.LEARNED = (*self.LEARNED, "log_decay")
        super().__init__(
            dim, heads, kv_heads, "local_linear", causal, head_dim,
            qk_norm=True, rope=rope, short_conv=short_conv, output_gate=output_gate,
            dropout=dropout, options=options,
        )  # fmt: skip
        self.log_ridge = nn.Parameter(torch.empty(heads))
        self.log_scale = nn.Parameter(torch.empty(heads))
        if forget_gate:
            gate = Operand("log_decay", "b h s", "key", "log_decay")
            self.operands["log_decay"] = TokenOperand(gate, dim, {"h": heads})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A ridge of 1, and the op's default scale."""
        nn.init.constant_(self.log_ridge, math.log(math.expm1(1 - LEAST_RIDGE)))
        nn.init.constant_(self.log_scale, -0.5 * math.log(self.head_dim))

    def learned(self) -> dict[str, Tensor]:
        """The ridge and the scale of every head [H], float32 at least."""
        ridge, scale = (
            parameter.to(torch.promote_types(parameter.dtype, torch.float32))
            for parameter in (self.log_ridge, self.log_scale)
        )
        return {"ridge": softplus(ridge) + LEAST_RIDGE, "scale": scale.exp()}
