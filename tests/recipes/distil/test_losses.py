"""Losses and diagnostics of attention transfer as functions of weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from ops.hedgehog_samples import close, golden, heads_of
from regard.recipes.distil import (
    TransferLoss,
    entropy,
    kullback_leibler,
    monotonicity,
    output_error,
    softmax_weights,
    top_agreement,
    total_loss,
    weight_cross_entropy,
)


def weights(*shape: int, seed: int = 0, sharp: float = 1.0) -> torch.Tensor:
    make = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(shape, generator=make, dtype=torch.float64)).softmax(-1)


@pytest.mark.parametrize("name", ["linear_softmaxdim", "hybrid_sliding", "hybrid_terraced"])
def test_the_teacher_and_the_losses_of_the_authors(name):
    tensors, config = golden(name)
    q, k, v = heads_of(tensors, config)
    teacher = softmax_weights(q, k, causal=True)
    close(teacher, tensors["out.attn_teacher"], 1e-5)
    close(
        teacher @ v.repeat_interleave(q.shape[1] // v.shape[1], 1),
        tensors["out.head_out_teacher"], 5e-5,
    )  # fmt: skip
    xent = weight_cross_entropy(tensors["out.attn_student"], tensors["out.attn_teacher"])
    mse = output_error(tensors["out.head_out_student"], tensors["out.head_out_teacher"])
    torch.testing.assert_close(xent, tensors["out.loss_xent"], rtol=1e-5, atol=0)
    torch.testing.assert_close(mse, tensors["out.loss_mse"], rtol=1e-5, atol=0)
    total = total_loss([TransferLoss(xent, mse)])
    torch.testing.assert_close(total, tensors["out.loss_total"], rtol=1e-5, atol=0)


def test_cross_entropy_takes_the_row_sum_out():
    student, teacher = weights(2, 3, 5, 7), weights(2, 3, 5, 7, seed=1)
    plain = -(teacher * student.log()).sum(-1).mean()
    torch.testing.assert_close(weight_cross_entropy(student, teacher), plain)
    dead = torch.full_like(student, 1e-14)  # features at their clamp: the row sums to nothing
    uniform = weight_cross_entropy(dead, teacher)
    torch.testing.assert_close(uniform, torch.tensor(math.log(7), dtype=torch.float64))
    as_trained = cross_entropy(
        student.clamp(min=1e-12).log().flatten(0, 2), teacher.flatten(0, 2), reduction="mean"
    )
    torch.testing.assert_close(weight_cross_entropy(student, teacher), as_trained)


def test_padded_queries_do_not_count():
    student, teacher = weights(2, 3, 5, 7), weights(2, 3, 5, 7, seed=1)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2:] = False
    for loss in (weight_cross_entropy, output_error):
        parts = [loss(student[:1], teacher[:1]), loss(student[1:, :, :2], teacher[1:, :, :2])]
        expected = (5 * parts[0] + 2 * parts[1]) / 7
        torch.testing.assert_close(loss(student, teacher, mask), expected)
        spoilt = student.clone()
        spoilt[1, :, 2:] = 0.5
        torch.testing.assert_close(loss(spoilt, teacher, mask), expected)


def test_the_total_leaves_out_what_was_not_computed():
    one = torch.tensor(2.0)
    assert total_loss([TransferLoss(None, one), TransferLoss(None, 3 * one)], mse=10.0) == 40.0
    assert total_loss([TransferLoss(one, one)], xent=3.0, mse=0.0) == 6.0


def test_entropy_of_known_rows():
    flat = torch.full((1, 1, 9, 9), 1.0).tril()
    flat = flat / flat.sum(-1, keepdim=True)
    expected = (math.log(8) + math.log(9)) / 2  # rows that see at least eight keys
    assert abs(float(entropy(flat)) - expected) < 1e-6
    assert float(entropy(torch.eye(9)[None, None], least_keys=1)) == 0.0


def test_divergence_is_nought_between_equals():
    a, p = weights(1, 2, 6, 12), weights(1, 2, 6, 12, seed=2)
    assert abs(float(kullback_leibler(a, a))) < 1e-12
    expected = (a * (a / p).log()).sum(-1).mean()
    torch.testing.assert_close(kullback_leibler(a, p), expected)
    torch.testing.assert_close(
        kullback_leibler(a, p), weight_cross_entropy(p, a) - entropy(a), rtol=1e-9, atol=0
    )


def test_monotonicity_is_spearmans():
    make = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 4, 10, generator=make, dtype=torch.float64)
    y = torch.randn(1, 1, 4, 10, generator=make, dtype=torch.float64)
    ranks = [z.argsort(-1).argsort(-1).double() for z in (x, y)]
    centred = [r - r.mean(-1, keepdim=True) for r in ranks]
    expected = torch.nn.functional.cosine_similarity(*centred, dim=-1).mean()
    torch.testing.assert_close(monotonicity(x, y), expected)
    ties = torch.tensor([[1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 5.0, 6.0]])[None, None]
    assert abs(float(monotonicity(ties, ties)) - 1) < 1e-6
    seen = torch.ones(10, 10, dtype=torch.bool).tril()
    z = torch.randn(1, 1, 10, 10, generator=make)
    spoilt = z.masked_fill(~seen, 1e9)
    torch.testing.assert_close(monotonicity(spoilt, z.exp(), seen), torch.tensor(1.0))


def test_agreement_is_of_the_largest():
    a = weights(1, 1, 50, 9, sharp=2.0)
    assert float(top_agreement(a, a**3)) == 1.0
    assert float(top_agreement(a, a.flip(-1))) < 0.5
