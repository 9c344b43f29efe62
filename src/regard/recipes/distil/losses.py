"""What a student's attention is to learn from its teacher's: the losses of attention transfer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.core.checks import check_flag, check_key_mask, check_qkv, check_scale
from regard.core.precision import compute_dtype, without_autocast
from regard.core.visibility import Visibility

LEAST = 1e-12  # below which a weight has no logarithm


class TransferLoss(NamedTuple):
    """The losses of one layer; None: not computed."""

    xent: Tensor | None
    mse: Tensor | None


def softmax_weights(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    *,
    causal: bool = False,
    key_mask: Bool[Tensor, "b s"] | None = None,
    scale: float | Tensor | None = None,
) -> Float[Tensor, "b h t s"]:
    """The teacher's weights: softmax over the keys that a query sees of scale q . k.

    scale: None is D ** -0.5. In float32 at least. A query that sees no key has a row of zeros.

    >>> a = softmax_weights(torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 4), causal=True)
    >>> a[0, 0, 0].tolist()
    [1.0, 0.0, 0.0]
    """
    op = "softmax_weights"
    sizes = check_qkv(op, q, k, k)
    check_flag(op, "causal", causal)
    check_key_mask(op, key_mask, sizes, q)
    check_scale(op, scale, sizes, q)
    (B, H, T, D), (_, Hk, S, _), dtype = q.shape, k.shape, compute_dtype(q.dtype)
    if key_mask is not None:
        k = k.masked_fill(~key_mask[:, None, :, None], 0.0)
    with without_autocast(q):
        rows = q.to(dtype).reshape(B, Hk, H // Hk * T, D)
        scores = (rows @ k.to(dtype).mT).view(B, H, T, S)
        factor = D**-0.5 if scale is None else scale
        scores = scores * (factor.reshape(-1, 1, 1) if isinstance(factor, Tensor) else factor)
        sees = Visibility(T, S, causal, key_mask=key_mask, device=q.device)
        mask = sees.tile((0, T), (0, S), dtype).mask
        if mask is None:
            return scores.softmax(-1)
        weights = scores.masked_fill(~mask, torch.finfo(dtype).min).softmax(-1)
        return weights.masked_fill(~mask, 0.0)


def weight_cross_entropy(
    student: Float[Tensor, "b h t s"],
    teacher: Float[Tensor, "b h t s"],
    query_mask: Bool[Tensor, "b t"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of the student's rows of weights under the teacher's, a mean over rows.

        - sum_j a_ij log softmax_j(log max(p_ij, 1e-12))

    The softmax divides by the row's sum, over hidden keys too: it does nothing where rows sum
    to 1, but tells a row whose features are all at their clamp, and sums to nearly 0, to grow.
    Rows of padded queries (False in `query_mask`) do not count.
    """
    logits = student.clamp(min=LEAST).log()
    return _mean_of_rows(-(teacher * logits.log_softmax(-1)).sum(-1), query_mask)


def output_error(
    student: Float[Tensor, "b h t e"],
    teacher: Float[Tensor, "b h t e"],
    query_mask: Bool[Tensor, "b t"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error of the outputs of all heads, before the projection that joins them.

    Rows of padded queries (False in `query_mask`) do not count.
    """
    return _mean_of_rows((student - teacher).square().mean(-1), query_mask)


def total_loss(
    losses: Iterable[TransferLoss], *, xent: float = 1.0, mse: float = 1000.0
) -> Float[Tensor, ""]:
    """xent times the mean over layers of one loss, plus mse times that of the other.

    >>> one, two = torch.tensor(1.0), torch.tensor(2.0)
    >>> total_loss([TransferLoss(one, one), TransferLoss(two, one)], mse=10.0)
    tensor(11.5000)
    """
    layers = list(losses)
    total = torch.zeros(())
    for factor, name in ((xent, "xent"), (mse, "mse")):
        found = [loss for layer in layers if (loss := getattr(layer, name)) is not None]
        if factor and found:
            total = total.to(found[0].device) + factor * torch.stack(found).mean()
    return total


def _mean_of_rows(rows: Tensor, query_mask: Tensor | None) -> Tensor:
    """rows [B, H, T] -> their mean, without padded queries."""
    if query_mask is None:
        return rows.mean()
    real = query_mask[:, None].expand(rows.shape)
    return rows.masked_fill(~real, 0.0).sum() / real.sum().clamp(min=1)
