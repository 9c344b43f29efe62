"""The native form of block-sparse attention and of windows, on every instruction set here."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from ops.samples import tensors
from ops.test_window import CASES
from regard.core.budgets import budget, relative_error
from regard.native import function, instruction_sets, limited_to
from regard.ops import (
    block_sparse_attention,
    pyramid_attention,
    selected_attention,
    softmax_attention,
    window_attention,
)
from regard.ops.block_sparse.native.library import Call
from regard.ops.block_sparse.registered import block_sparse_native
from regard.ops.window.native import best_tile, by_step, from_steps
from regard.testing import check

ISAS = instruction_sets()
LEVELS = torch.tensor([0, 1, 2, 4, 8])
INF, NAN = float("inf"), float("nan")

pytestmark = pytest.mark.skipif(not ISAS, reason="no native library here")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    with limited_to(request.param):
        yield request.param


def levels_for(T: int, S: int, block_q: int, block_k: int, heads: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(T)
    shape = (batch, heads, -(-T // block_q), -(-S // block_k))
    return LEVELS[torch.randint(5, shape, generator=generator)]


def agree(call: Any, inputs: tuple[Tensor, ...], other: str = "reference") -> None:
    """Outputs and all gradients of call(*inputs, impl=...), within those of float32."""
    found = []
    for impl in ("native", other):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = call(*leaves, impl=impl)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        found.append((out, *torch.autograd.grad(out, leaves, weight)))
    for ours, theirs in zip(*found, strict=True):
        assert relative_error(ours, theirs) < 2e-5


# -- equal to the equations --------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["exact", "replicate"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("T", "S", "block_q", "block_k", "heads", "D", "Dv"),
    [
        (100, 100, 16, 32, 4, 8, 6), (37, 90, 16, 24, 2, 24, 10), (90, 37, 8, 8, 1, 16, 33),
        (400, 150, 320, 64, 2, 12, 12), (1, 50, 4, 8, 1, 64, 64), (60, 60, 1, 1, 1, 3, 5),
    ],
)  # fmt: skip
def test_every_level_and_operand(isa, T, S, block_q, block_k, heads, D, Dv, causal, tail):
    q, k, v = tensors(T=T, S=S, D=D, Dv=Dv, dtype=torch.float32)
    levels = levels_for(T, S, block_q, block_k, heads)
    levels = torch.where(torch.tensor(block_k) % levels.clamp(min=1) == 0, levels, 1)
    plain = {"block_q": block_q, "block_k": block_k, "causal": causal, "tail": tail}
    agree(lambda *x, impl: block_sparse_attention(*x, levels, impl=impl, **plain), (q, k, v))
    mask = torch.rand(2, S, generator=torch.Generator().manual_seed(1)) > 0.2
    bias = torch.randn(2, (1, 2, 4)[T % 3], S)
    more = {**plain, "window": (30, 5), "scale": 0.4, "key_mask": mask}
    agree(
        lambda *x, impl: block_sparse_attention(
            *x[:3], levels[:1], impl=impl, key_bias=x[3], **more
        ),
        (q, k, v, bias),
    )


@pytest.mark.parametrize(("block", "block_q"), [(8, 1), (1, 1), (16, 10), (1, 16)])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_selected_blocks_and_tokens(isa: str, heads: int, block: int, block_q: int):
    q, k, v = tensors(T=45, S=60, dtype=torch.float32)
    shape = (2, heads, -(-45 // block_q), 7)
    generator = torch.Generator().manual_seed(heads)
    selected = torch.randint(-1, -(-60 // block), shape, generator=generator)
    options = {"block": block, "block_q": block_q, "causal": True}
    agree(lambda *x, impl: selected_attention(*x, selected, impl=impl, **options), (q, k, v))


WINDOWS: list[dict[str, Any]] = [
    *CASES,
    {"window": [(2, 2), (3, 3)], "grid": (17, 23), "inward": True},
    {"window": [(2, 1), (3, 3)], "grid": (17, 23), "dilation": (3, 4)},
    {"window": (20, 3), "dilation": 3},
]


@pytest.mark.parametrize("options", WINDOWS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_every_window(isa: str, options: dict[str, Any], masked: bool):
    T = math.prod(options.get("grid", (60,)))
    qkv = tensors(T=T, S=T, dtype=torch.float32)
    mask = torch.rand(2, T, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    agree(lambda *x, impl: window_attention(*x, key_mask=mask, impl=impl, **options), qkv)
    if "dilation" not in options:
        sides = [5] * len(options.get("grid", (1,)))
        whole, cut = (
            window_attention(*qkv, key_mask=mask, impl="native", **options, **tile)
            for tile in ({}, {"tile": sides})
        )
        assert relative_error(cut, whole) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(isa: str, dtype: torch.dtype):
    q, k, v = (x.to(dtype) for x in tensors(T=70, S=70, D=16, Dv=16))
    levels = levels_for(70, 70, 16, 16, 1)
    options = {"block_q": 16, "block_k": 16, "causal": True}
    out = block_sparse_attention(q, k, v, levels, impl="native", **options)
    expected = block_sparse_attention(
        *(x.double() for x in (q, k, v)), levels, impl="reference", **options
    )
    assert out.dtype == dtype
    assert relative_error(out, expected) < budget(dtype)


def test_scores_that_outgrow_the_first_piece(isa: str):
    q, k, v = tensors(T=200, S=400, D=16, Dv=16, dtype=torch.float32)
    k[:, :, 150:] *= 30.0
    plan = torch.ones(1, 1, 2, 4, dtype=torch.int8)
    options = {"block_q": 128, "block_k": 128}
    out = block_sparse_attention(q, k, v, plan, impl="native", **options)
    expected = softmax_attention(*(x.double() for x in (q, k, v)))
    assert relative_error(out, expected) < 1e-4  # scores of 1000 have so many digits
    assert not out.isnan().any()


# -- a row minds only itself -------------------------------------------------------------------


@pytest.mark.parametrize("block_q", [8, 100])
def test_the_future_changes_not_one_bit(isa: str, block_q: int):
    q, k, v = tensors(T=230, S=230, D=12, Dv=12, dtype=torch.float32)
    levels = levels_for(230, 230, block_q, 16, 2)
    results = []
    for junk in (0.0, 1e30):
        k[:, :, 150:] = v[:, :, 150:] = junk
        results.append(
            block_sparse_attention(
                q, k, v, levels, block_q=block_q, block_k=16, causal=True, impl="native"
            )
        )
    assert torch.equal(results[0][:, :, :150], results[1][:, :, :150])


def test_masked_keys_are_never_read(isa: str):
    q, k, v = tensors(T=110, S=110, D=12, dtype=torch.float32)
    mask = torch.ones(2, 110, dtype=torch.bool)
    mask[0, :60] = mask[1, 100:] = False
    levels = levels_for(110, 110, 16, 16, 1)
    for call in (
        lambda *x: block_sparse_attention(
            *x, levels, block_q=16, block_k=16, key_mask=mask, impl="native"
        ),
        lambda *x: window_attention(*x, window=(40, 3), key_mask=mask, impl="native"),
    ):
        expected = call(q, k, v)
        for junk in (NAN, INF, 1e38):
            dirty = [torch.where(mask[:, None, :, None], x, junk) for x in (k, v)]
            assert torch.equal(call(q, *dirty), expected)


def test_rows_that_no_loss_looks_at_send_nothing(isa: str):
    q, k, v = tensors(T=64, S=64, D=8, Dv=8, dtype=torch.float32)
    q[:, :, 40] = NAN
    leaves = [x.requires_grad_() for x in (q, k, v)]
    levels = torch.ones(1, 1, 4, 4, dtype=torch.int64)
    levels[..., 1, :] = 0  # and those that see nothing give 0
    out = block_sparse_attention(*leaves, levels, block_q=16, block_k=16, impl="native")
    assert not out[:, :, 16:32].any()
    looked_at = torch.ones_like(out)
    looked_at[:, :, 40] = 0
    for gradient in torch.autograd.grad(out, leaves, looked_at):
        assert gradient.isfinite().all()


def both_ways(q: Tensor, k: Tensor, v: Tensor, levels: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(*leaves, levels, block_q=16, block_k=32, impl="native")
    return [out, *torch.autograd.grad(out, leaves, out.detach())]


def test_threads_and_neighbours_change_not_one_bit(isa: str):
    q, k, v = tensors(B=2, H=4, Hk=2, T=700, S=700, D=40, Dv=40, dtype=torch.float32)
    levels = levels_for(700, 700, 16, 32, 2)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(both_ways(q, k, v, levels))
    finally:
        torch.set_num_threads(threads)
    for found in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found, results[0], strict=True))
    alone = both_ways(q[1:], k[1:], v[1:], levels[1:])
    assert all(torch.equal(x, y[1:]) for x, y in zip(alone, results[0], strict=True))
    one = both_ways(q[:, 2:], k[:, 1:], v[:, 1:], levels[:, 1:])
    assert all(torch.equal(x, y[:, -x.shape[1] :]) for x, y in zip(one, results[0], strict=True))


# -- the form ----------------------------------------------------------------------------------


def test_it_is_chosen_on_a_cpu_and_says_why_not():
    q, k, v = tensors(T=32, S=32, dtype=torch.float32)
    plan = torch.ones(1, 1, 1, 1, dtype=torch.int8)
    for op, given in (
        (block_sparse_attention, (q, k, v, plan)),
        (pyramid_attention, (q, k, v, plan)),
        (window_attention, (q, k, v)),
    ):
        assert regard.explain(op, *given).form == "native"
        wide = [x.double() if x.is_floating_point() else x for x in given]
        assert "computes in float32" in str(regard.explain(op, *wide))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int64])
def test_wrong_plans_are_refused(dtype: torch.dtype):
    q, k, v = tensors(T=32, S=32, dtype=torch.float32)
    levels = torch.ones(1, 1, 2, 2, dtype=dtype)
    wrong = [3, 16] + ([256 + 1] if dtype.itemsize > 1 else []) + [-1] * dtype.is_signed
    for level in wrong:
        levels[..., 1, 1] = level
        with pytest.raises(ValueError, match=rf"levels must be in .*, got {level}$"):
            block_sparse_attention(q, k, v, levels, block_q=16, block_k=16, impl="native")
    levels[..., 1, 1] = 4
    with pytest.raises(ValueError, match=r"levels must be in \{0, 1, 2\} .*, got 4"):
        block_sparse_attention(q, k, v, levels, block_q=16, block_k=18, impl="native")
    if dtype in (torch.int16, torch.int64):
        blocks = torch.zeros(1, 1, 32, 1, dtype=dtype)
        for index in (2, -2, 30000) + (((1 << 32) + 1,) if dtype == torch.int64 else ()):
            blocks[..., 3, 0] = index
            with pytest.raises(ValueError, match=r"selected must be in \[-1, 2\)"):
                selected_attention(q, k, v, blocks, block=16, impl="native")


@pytest.mark.parametrize("rows", [1, 3])
def test_a_mapped_axis_is_a_batch(rows: int):
    q, k, v = (torch.stack([x, 2 * x, -x]) for x in tensors(T=40, S=40, dtype=torch.float32))
    plans = torch.stack([levels_for(40, 40, 8, 8, 1, batch=1)] * rows)
    plans[-1] = 1
    for impl in ("native", "eager"):

        def attend(q: Tensor, k: Tensor, v: Tensor, plan: Tensor, impl: str = impl) -> Tensor:
            return block_sparse_attention(q, k, v, plan, block_q=8, block_k=8, impl=impl)

        in_dims = (0, 0, 0, 0 if rows == 3 else None)
        mapped = torch.vmap(attend, in_dims)(q, k, v, plans if rows == 3 else plans[0])
        for i in range(3):
            expected = attend(q[i], k[i], v[i], plans[i % rows])
            assert torch.allclose(mapped[i], expected, atol=1e-6)


def test_the_operator_keeps_torchs_rules():
    q, k, v = (x.requires_grad_() for x in tensors(T=20, S=20, dtype=torch.float32))
    bias = torch.randn(2, 1, 20, requires_grad=True)
    levels = levels_for(20, 20, 5, 5, 1).clamp(max=1)
    arguments = (q, k, v, bias, levels, False, 5, 5, 20, -1, 0, False, 0.5)
    torch.library.opcheck(torch.ops.regard.block_sparse_native_fwd.default, arguments)
    boxes = (q, k, v, bias, [4, 5], [1, 1], [1, 1], True, [2, 2], 0.5)
    torch.library.opcheck(torch.ops.regard.window_native_fwd.default, boxes)
    out, lse = block_sparse_native(*arguments)
    assert out.shape == (2, 4, 20, 3)
    assert lse.shape == (2, 4, 20)


def test_python_and_c_agree_about_a_call(isa: str):
    size = function("test", "block_sparse_call_size", isa)
    size.restype = ctypes.c_int64
    assert size() == ctypes.sizeof(Call)


# -- windows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "dilation"), [((12,), (4,)), ((6, 8), (3, 2)), ((4, 6), (1, 3))])
def test_steps_of_a_dilation_are_rows_of_the_batch(grid: tuple[int, ...], dilation: Any):
    x = torch.randn(2, 3, math.prod(grid), 5)
    split = by_step(x, grid, dilation)
    assert split.shape == (2 * math.prod(dilation), 3, x.shape[2] // math.prod(dilation), 5)
    assert torch.equal(from_steps(split, grid, dilation), x)
    first = x.unflatten(2, grid)[(0, slice(None), *(slice(None, None, d) for d in dilation))]
    assert torch.equal(split[0], first.flatten(1, -2))


def test_tiles_fit_their_windows():
    assert best_tile((64, 64), ((9, 9), (9, 9))) in ((8, 8), (6, 8), (4, 12), (8, 6), (12, 4))
    assert best_tile((3, 4), ((-1, -1), (-1, -1))) == (3, 4)  # one tile sees it all at once
    assert all(side <= 2 for side in best_tile((2, 2, 2), ((1, 1),) * 3))


# -- the contract, below the best instruction set ----------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["block_sparse", "selected", "window", "pyramid_sparse", "paro", "hierarchical_sparse"]
)
def test_the_contract_on_lower_instruction_sets(name: str):
    for lower in ISAS[1:]:
        with limited_to(lower):
            check(regard.mechanisms[name], seed=0).raise_if_failed()
