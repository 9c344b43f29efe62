"""The attention layer of TransNormerLLM: lightning attention with a decay for every head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from regard.core.checks import check_flag, check_number
from regard.core.precision import compute_dtype
from regard.mixers.attention import Attention
from regard.ops.lightning import constant_log_decay, tnl_layer_slopes


class TnlAttention(Attention):
    """Causal self-attention by lightning attention, as in TransNormerLLM.

        q = silu(W_q x),   k = silu(W_k x),   v = silu(W_v x)
        y = W_o (layernorm(op(q, k, v)) * sigmoid(W_2 W_1 x))

    around `regard.ops.lightning_attention`, with the decays `tnl_layer_slopes(heads, layer,
    layers)`, which are not learned. The norm is over all heads together; W_1 is C -> C / H and
    W_2 back.

    Args:
        dim: C, the size of a token.
        heads: H, which divides C.
        layer, layers: the number of this layer, from 0, and how many there are: the last one
            hardly forgets. One layer has the slopes of ALiBi.
        bias: in all projections.
        norm_eps: of the norm of the output.
        dropout: probability of dropping an element of the output.
        options: of the op, without `log_decay`.

    Shapes, masks, states: as of `Attention`. The state dict has the authors' names: of `q_proj`,
    `k_proj`, `v_proj`, `o_proj`, `norm`, `output_gate.0` and `output_gate.1` a `.weight`, and
    where there is one a `.bias`.

    Precision: that of the op; the norm in float32 at least.
    Cost: O(T C^2), and that of the op.
    Source: Qin et al. 2024, "Various Lengths, Constant Speed: Efficient Language Modeling with
        Lightning Attention", arXiv 2405.17381; the example module of the authors' release (MIT),
        matched to 5e-5, its gradients to 3e-4.

    >>> layer = TnlAttention(32, 2, layer=1, layers=4)
    >>> layer(torch.randn(1, 5, 32)).shape
    torch.Size([1, 5, 32])
    """

    LEARNED = ("log_decay",)

    def __init__(
        self,
        dim: int,
        heads: int,
        layer: int = 0,
        layers: int = 1,
        bias: bool = False,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        op = type(self).__name__
        check_flag(op, "bias", bias)
        check_number(op, "norm_eps", norm_eps, above=0.0)
        super().__init__(dim, heads, None, "lightning", True, dropout=dropout, options=options)
        self.q_proj, self.k_proj, self.v_proj = (_SiLULinear(dim, dim, bias) for _ in range(3))
        self.o_proj = nn.Linear(dim, dim, bias)
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.output_gate = nn.Sequential(
            nn.Linear(dim, self.head_dim, bias), nn.Linear(self.head_dim, dim, bias)
        )
        self.operands = _Decays(tnl_layer_slopes(heads, layer, layers))

    def _project(self, out: Tensor, x: Tensor, key_mask: Tensor | None) -> Tensor:
        out = out.transpose(1, 2).flatten(2)
        wide, norm = out.to(compute_dtype(out.dtype)), self.norm
        gain, shift = norm.weight.to(wide.dtype), norm.bias.to(wide.dtype)
        out = layer_norm(wide, norm.normalized_shape, gain, shift, norm.eps).to(out.dtype)
        y = self.dropout(self.o_proj(out * torch.sigmoid(self.output_gate(x))))
        return y if key_mask is None else torch.where(key_mask[..., None], y, 0.0)


class _SiLULinear(nn.Linear):
    """A linear map with SiLU."""

    def forward(self, input: Tensor) -> Tensor:
        return silu(super().forward(input))


class _Decays(nn.Module):
    """The op's log_decay of every key: one constant for each head."""

    probes: tuple[str, ...] = ()

    def __init__(self, slopes: Tensor) -> None:
        super().__init__()
        self.slopes: Tensor
        self.register_buffer("slopes", slopes.float(), persistent=False)

    def forward(self, x: Tensor, source: Tensor) -> dict[str, Tensor]:
        return {"log_decay": constant_log_decay(-self.slopes, source[:, None])}
