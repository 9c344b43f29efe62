"""What all mechanisms with the engine's state have in common: one function, however computed.

The recurrence, chunks, the quadratic product (one chunk, or the reference) and every compiled
form that can serve; any split with the state carried over; packed as separate.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import regard
from regard.core.budgets import budget, relative_error

LENGTHS = (1, 2, 63, 64, 65, 200)
MECHANISMS = {
    "linear": ("log_decay",),
    "lightning": ("log_decay",),
    "delta": ("beta",),
    "gated_delta": ("beta", "log_decay"),
}
FAMILY = [(name, tuple(needs)) for name, needs in MECHANISMS.items()] + [("linear", ())]


def sample(T: int, needs: tuple[str, ...], dtype: torch.dtype, B: int = 2) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(T)
    q, k = (torch.randn(B, heads, T, 8, generator=make) for heads in (4, 2))
    call = {"q": q, "k": k, "v": torch.randn(B, 2, T, 5, generator=make)}
    steps = -torch.rand(B, 2, T, generator=make)
    steps[torch.rand(B, 2, T, generator=make) < 0.03] = -torch.inf
    operands = {"log_decay": steps, "beta": torch.rand(B, 2, T, generator=make)}
    call |= {name: operands[name] for name in needs}
    return {name: tensor.to(dtype) for name, tensor in call.items()}


def cut(call: dict[str, Tensor], i: int, j: int) -> dict[str, Tensor]:
    return {name: tensor[:, :, i:j] for name, tensor in call.items()}


def run(name: str, call: dict[str, Tensor], **options):
    return regard.mechanisms[name].op(**call, **options)


def forms(name: str, call: dict[str, Tensor]):
    """What a call may be asked for: every implementation that can serve it, and chunk sizes."""
    available = regard.explain(regard.mechanisms[name].op, **call, causal=True).available
    T = call["q"].shape[2]
    return [{"impl": impl} for impl in available] + [{"chunk_size": size} for size in (16, T)]


def token_by_token(name: str, call: dict[str, Tensor], **options) -> Tensor:
    rows, state = [], None
    for t in range(call["q"].shape[2]):
        row, state = run(name, cut(call, t, t + 1), state=state, return_state=True, **options)
        rows.append(row)
    return torch.cat(rows, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "needs"), FAMILY)
@pytest.mark.parametrize("T", LENGTHS)
def test_one_function_however_computed(name, needs, T, dtype):
    call = sample(T, needs, dtype)
    expected = run(name, call, causal=True, impl="reference")
    for form in forms(name, call):
        out = run(name, call, causal=True, **form)
        assert relative_error(out, expected) < budget(dtype), form
    walked = token_by_token(name, call, causal=True)
    assert relative_error(walked, expected) < budget(dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "needs"), FAMILY)
def test_one_function_over_a_thousand_tokens(name, needs):
    for dtype in (torch.float64, torch.float32):
        test_one_function_however_computed(name, needs, 1000, dtype)


@pytest.mark.parametrize(("name", "needs"), FAMILY)
@pytest.mark.parametrize("causal", [False, True])
def test_any_split_carries_on(name, needs, causal):
    call = sample(130, needs, torch.float64)
    whole, last = run(name, call, causal=causal, return_state=True)
    for form in forms(name, call)[:-1]:
        for at in (0, 1, 63, 64, 65, 129, 130):
            first, state = run(name, cut(call, 0, at), causal=True, return_state=True)
            rest = {"causal": causal, "state": state, "return_state": True} | form
            second, end = run(name, cut(call, at, 130), **rest)
            expected = whole[:, :, at:]
            assert relative_error(second, expected) < budget(torch.float64), (at, form)
            if causal:
                assert relative_error(first, whole[:, :, :at]) < budget(torch.float64)
            for part in last.tensors:
                assert relative_error(end[part], last[part]) < budget(torch.float64)


@pytest.mark.parametrize(("name", "needs"), FAMILY)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_separate(name, needs, causal):
    call, ends = sample(150, needs, torch.float64, B=1), [0, 1, 64, 64, 150]
    for form in forms(name, call)[:-1]:
        packed = run(name, call, causal=causal, cu_seqlens=torch.tensor(ends).int(), **form)
        rows = [run(name, cut(call, i, j), causal=causal, **form) for i, j in pairwise(ends)]
        assert relative_error(packed, torch.cat(rows, 2)) < budget(torch.float64)
