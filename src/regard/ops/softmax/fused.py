"""torch's fused kernels as one operator, with a backward in which unused rows stay unused.

torch's backward kernels compute each weight again as exp(score - lse). Where scores are so large
that their rounding exceeds 88 (beyond 1e8 or so in float32) that is inf, even in a row on which
nothing depends, and 0 times inf then spoils the gradients of keys that other rows share: a later
row would leak into an earlier one. Here rows with a zero gradient get lse = inf, so that their
weights are exactly 0. (The public function offers no way to do so, nor to choose a kernel that
does not fall back on a T x S matrix.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.core.library import define
from regard.core.precision import compute_dtype

aten = torch.ops.aten


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    bias = _as_bias(mask, q, k)
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
    elif _takes_flash(q, mask):
        out, lse, *_ = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )
    else:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, True, 0.0, causal, scale=scale
        )
    # One kernel rounds the length of lse up to 32.
    return _lay_out(out), lse[..., : q.shape[2]].contiguous()


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad, out, bias = grad.contiguous(), _lay_out(out), _as_bias(mask, q, k)
    lse = lse.masked_fill((grad == 0).all(-1), torch.inf)
    if q.device.type == "cpu":
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
    elif _takes_flash(q, mask):
        seed, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), lse.new_zeros(())
        gradients = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed,
            unused, scale=scale,
        )  # fmt: skip
    else:
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        gradients = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, bias, out, lse, seed, seed, 0.0, [True, True, True, False], causal,
            scale=scale,
        )[:3]  # fmt: skip
    return tuple(gradient.contiguous() for gradient in gradients)  # type: ignore[return-value]


def _lay_out(out: Tensor) -> Tensor:
    """Contiguous as [B, T, H, Dv] on CUDA: a backward kernel there takes it for granted."""
    if out.device.type != "cuda":
        return out.contiguous()
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _takes_flash(q: Tensor, mask: Tensor | None) -> bool:
    return mask is None and q.dtype != torch.float32


def _as_bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as kernels take it: 0 or -inf in q's dtype; on CUDA with rows of a multiple of 8."""
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)
    if q.device.type == "cpu":
        return bias
    bias = torch.nn.functional.pad(bias, (0, -mask.shape[3] % 8))[..., : mask.shape[3]]
    return bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    rows = q.shape[:3]
    out = _lay_out(q.new_empty(*rows, v.shape[3]))
    return out, q.new_empty(rows, dtype=compute_dtype(q.dtype))


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, mask, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:
    gradients = 3 * (None,)
    if grad is not None:
        gradients = fused_backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return (*gradients, None, None, None)


fused_backward = define(
    "softmax_fused_bwd",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse,"
    " bool causal, float scale) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)

fused = define(
    "softmax_fused_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    backward=_differentiate,
    setup_context=_setup_context,
)
