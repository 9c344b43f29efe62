"""The decays of published models."""

from __future__ import annotations

import pytest
import torch

from regard.ops.lightning import (
    alibi_slopes,
    constant_log_decay,
    fla_log_decay,
    tnl_layer_slopes,
)


def test_alibi_slopes_of_powers_of_two_and_of_others():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    assert alibi_slopes(6).tolist() == [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    twelve = alibi_slopes(12)
    assert torch.equal(twelve[:8], alibi_slopes(8))
    assert torch.equal(twelve[8:], alibi_slopes(16)[::2][:4])


def test_layer_schedules():
    assert torch.equal(tnl_layer_slopes(4, 0, 1), alibi_slopes(4))
    assert torch.allclose(tnl_layer_slopes(4, 0, 3), alibi_slopes(4) * (1 + 1e-5), rtol=1e-15)
    last = tnl_layer_slopes(4, 2, 3)
    assert torch.allclose(last, alibi_slopes(4) * 1e-5, rtol=1e-10)
    decay = fla_log_decay(4, 2, 6)
    assert torch.allclose(decay, -2.0 * (1 - 2 / 6) * torch.arange(4.0).double(), rtol=1e-15)


def test_a_constant_of_each_head_is_a_view_with_a_gradient():
    steps = torch.tensor([-0.5, -1.0], requires_grad=True)
    decay = constant_log_decay(steps, torch.zeros(3, 2, 7, 4))
    assert decay.shape == (3, 2, 7)
    assert decay.untyped_storage().data_ptr() == steps.untyped_storage().data_ptr()
    decay.sum().backward()
    assert steps.grad.tolist() == [21.0, 21.0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: alibi_slopes(0), ValueError, "heads must be an int of at least 1, got 0"),
        (lambda: tnl_layer_slopes(4, 3, 3), ValueError, "layer must be below layers, 3, got 3"),
        (lambda: fla_log_decay(4, -1, 3), ValueError, "layer must be an int of at least 0"),
        (lambda: constant_log_decay(0.5, torch.zeros(1, 1, 1, 1)), TypeError, "per_head must be"),
        (lambda: constant_log_decay(torch.zeros(2), torch.zeros(2)), ValueError, "like must be"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
