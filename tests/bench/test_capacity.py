"""What mechanisms hold without training: more keys than channels only where nothing is summed."""

from __future__ import annotations

import torch

import regard
from regard.bench import capacity


def test_softmax_holds_all_and_a_sum_few() -> None:
    assert capacity.capacity("softmax", dim=16) == capacity.COUNTS[-1]
    held = {name: capacity.capacity(name, dim=16) for name in ("linear", "lightning", "mesa")}
    assert held["linear"] < 16 <= held["mesa"]
    assert held["lightning"] <= held["mesa"] < capacity.COUNTS[-1]


def test_shares_fall_with_the_count() -> None:
    shares = [capacity.recalled("delta", count, dim=16) for count in (4, 64, 256)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1.0
    assert shares[-1] < capacity.ENOUGH


def test_state_sizes() -> None:
    assert capacity.state_size("gated_delta", dim=8) == 64
    assert capacity.state_size("linear", dim=8) == 72
    assert capacity.state_size("rat", dim=8, options={"chunk_length": 4}) is None
    assert capacity.state_size("local_linear") is None


def test_gates_are_what_the_ops_take() -> None:
    keys = torch.ones(1, 2, 3, 4)
    for name in ("delta", "gated_delta", "rat"):
        operands = {operand.name for operand in regard.mechanisms[name].operands}
        assert all(set(gates) == operands for gates in capacity._gates(name, keys))
