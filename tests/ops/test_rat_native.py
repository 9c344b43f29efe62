"""The native form of RAT, on every instruction set that this machine runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ops.samples import tensors
from regard.core.budgets import budget, relative_error
from regard.native import instruction_sets, limited_to
from regard.ops.rat import rat_attention

ISAS = instruction_sets()

pytestmark = pytest.mark.skipif(not ISAS, reason="no native library here")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    with limited_to(request.param):
        yield request.param


def inputs(T: int, S: int | None = None, *, D: int, B=1, H=2, Hk=1, seed=0) -> list[Tensor]:
    """q, k, v and a gate in float32."""
    S = T if S is None else S
    made = tensors(seed, B=B, H=H, Hk=Hk, T=T, S=S, D=D, Dv=D, dtype=torch.float32)
    gate = torch.rand(made[1].shape, generator=torch.Generator().manual_seed(seed))
    return [*made, gate]


def both(given: list[Tensor], **options: Any) -> None:
    """Output and gradients against the eager form in float64."""
    found = []
    for impl, dtype in (("native", torch.float32), ("eager", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        out = rat_attention(*leaves, **options, impl=impl)
        weight = torch.linspace(-1, 2, out.numel()).view_as(out).sin().to(dtype)
        found.append([out, *torch.autograd.grad(out, leaves, weight)])
    for n, (one, other) in enumerate(zip(*found, strict=True)):
        allowed = budget(torch.float32, "gradient" if n else "value")
        assert relative_error(one, other) < allowed, f"{options}, result {n}"


@pytest.mark.parametrize("D", [1, 7, 16, 65])
@pytest.mark.parametrize("L", [1, 3, 16])
def test_of_any_head_size_and_chunk(isa, D, L):
    for T in (1, 2, 50, 133):
        both(inputs(T, D=D), chunk_length=L)


def test_beyond_a_block_of_keys_and_a_tile_of_queries(isa):
    both(inputs(400, D=24, H=4, Hk=2), chunk_length=2, rope=30.0, scale=0.7)
    both(inputs(70, 300, D=8), chunk_length=3)
    both(inputs(300, 70, D=8), chunk_length=3)


def test_masked_and_continued(isa):
    given = inputs(90, D=12, B=3, H=4, Hk=2)
    mask = torch.rand(3, 90, generator=torch.Generator().manual_seed(1)) < 0.7
    both(given, chunk_length=4, rope=True, key_mask=mask)
    options = {"chunk_length": 4, "rope": True}
    whole = {}
    for impl in ("native", "eager"):
        leaves = [x.clone().requires_grad_() for x in given]
        first, state = rat_attention(
            *(x[:, :, :37] for x in leaves), **options, key_mask=mask[:, :37], impl=impl,
            return_state=True,
        )  # fmt: skip
        second = rat_attention(
            *(x[:, :, 37:] for x in leaves), **options, key_mask=mask[:, 37:], impl=impl,
            state=state,
        )  # fmt: skip
        out = torch.cat([first, second], 2)
        whole[impl] = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    expected = rat_attention(*given, **options, key_mask=mask, impl="eager")
    assert relative_error(whole["native"][0], expected) < budget(torch.float32)
    for one, other in zip(*whole.values(), strict=True):
        assert relative_error(one, other) < budget(torch.float32, "gradient")


def test_strided_rows(isa):
    given = inputs(40, D=16, H=2, Hk=2)
    expected = rat_attention(*given, chunk_length=8, impl="native")
    heads_last = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    assert torch.equal(rat_attention(*heads_last, chunk_length=8, impl="native"), expected)
    every_other = [x.repeat_interleave(2, 3)[..., ::2] for x in given]
    assert torch.equal(rat_attention(*every_other, chunk_length=8, impl="native"), expected)


@pytest.mark.parametrize("B", [1, 3])
def test_threads_change_no_bit(isa, B):
    given = inputs(3000, D=64, B=B, H=4, Hk=2)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            leaves = [x.clone().requires_grad_() for x in given]
            out = rat_attention(*leaves, chunk_length=4, impl="native")
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_future_of_any_size_changes_no_bit(isa):
    given = inputs(150, D=8, H=2, Hk=2)
    expected = rat_attention(*given, chunk_length=4, rope=True, impl="native")
    for value in (1e4, -1e30):
        changed = [x.clone() for x in given]
        for x in changed[:3]:
            x[:, :, 77:] = value
        changed[3][:, :, 77:] = 0.0
        out = rat_attention(*changed, chunk_length=4, rope=True, impl="native")
        assert torch.equal(out[:, :, :77], expected[:, :, :77])


def test_16_bits(isa):
    for dtype in (torch.bfloat16, torch.float16):
        *qkv, gate = inputs(60, D=16)
        out = rat_attention(*(x.to(dtype) for x in qkv), gate, chunk_length=8, impl="native")
        wide = [x.to(dtype).double() for x in qkv]
        expected = rat_attention(*wide, gate.double(), chunk_length=8)
        assert out.dtype == dtype
        assert relative_error(out, expected) < budget(dtype)
