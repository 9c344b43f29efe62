"""The Triton form of block-sparse and window attention, interpreted, against the references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gpu.interpreter import interpreted
from regard.core.budgets import budget, relative_error
from regard.ops import block_sparse_attention, selected_attention, window_attention
from regard.ops.block_sparse import triton
from regard.ops.block_sparse.triton import table

pytestmark = pytest.mark.requires("triton")

LEVELS = torch.tensor([0, 1, 2, 4, 8])
OPS = {
    "levels": block_sparse_attention, "indices": selected_attention, "window": window_attention,
}  # fmt: skip


def arguments(
    kind: str = "levels", batch: int = 1, heads: int = 2, key_heads: int = 2, T: int = 40,
    S: int | None = None, D: int = 16, E: int = 16, block_q: int = 16, block_k: int = 16,
    plans: tuple[int, int] = (1, 1), highest: int = 5, count: int = 3, bias: int = 0,
    mask: bool = False, scales: bool = False, kept: bool = False, seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Those of one call, float32 numbers; masked keys are junk."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    S = T if S is None else S
    q, k, v = draw(batch, heads, T, D), draw(batch, key_heads, S, D), draw(batch, key_heads, S, E)
    nq, blocks = -(-T // block_q), -(-S // block_k)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, **options}
    if kind == "levels":
        given["levels"] = LEVELS[torch.randint(highest, (*plans, nq, blocks), generator=g)]
        given |= {"block_q": block_q, "block_k": block_k}
        if kept:
            given["levels"] = given["levels"] > 0
    elif kind == "indices":
        given["selected"] = torch.randint(-1, blocks, (*plans, nq, count), generator=g)
        given |= {"block_q": block_q, "block": block_k}
    if mask:
        real = torch.rand(batch, S, generator=g) > 0.3
        real[:, :3] = False
        given["key_mask"] = real
        given["k"], given["v"] = (torch.where(real[:, None, :, None], x, torch.nan) for x in (k, v))
    if bias:
        given["key_bias"] = draw(batch, bias, S)
    if scales:
        given["scale"] = draw(heads)
    return {
        n: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in given.items()
    }


def differentiated(case: dict[str, Any], impl: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of a case, and gradients of everything that has one."""
    given = arguments(**case)
    leaves = {
        name: x.requires_grad_()
        for name, x in given.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    out = OPS[case.get("kind", "levels")](**given, impl=impl)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    found = torch.autograd.grad(out, list(leaves.values()), weight)
    return out.detach(), dict(zip(leaves, found, strict=True))


def check(**case: Any) -> None:
    out, grads = interpreted("ops.test_block_sparse_triton:differentiated", case, "triton")
    wanted, expected = differentiated({**case, "dtype": torch.float64}, "reference")
    assert out.dtype == torch.float32
    assert relative_error(out, wanted) <= budget(torch.float32)
    real = arguments(**case).get("key_mask")
    for name, gradient in expected.items():
        found = grads[name]
        if real is not None and name in ("k", "v"):
            hidden = ~real[:, None, :, None]
            assert not found.masked_fill(~hidden, 0.0).any()
            gradient = gradient.masked_fill(hidden, 0.0)
        assert relative_error(found, gradient) <= budget(torch.float32, "gradient") / 10, name


CASES: dict[str, dict[str, Any]] = {
    "kept or not": {"kept": True, "heads": 4, "plans": (1, 4), "causal": True},
    "levels": {"heads": 1, "key_heads": 1, "T": 50},
    "causal, more keys": {"T": 20, "S": 45, "causal": True, "D": 11, "E": 9, "key_heads": 1},
    "causal, more queries": {"T": 45, "S": 20, "causal": True, "scales": True, "plans": (1, 2)},
    "biases and a mask": {
        "batch": 2, "key_heads": 1, "bias": 1, "mask": True, "window": (20, 7), "T": 34,
    },
    "a bias of its own per head": {"key_heads": 1, "bias": 2, "scale": -0.3, "T": 20},
    "blocks larger than tiles": {"heads": 1, "key_heads": 1, "block_q": 64, "block_k": 64, "T": 70},
    "odd blocks": {"heads": 1, "key_heads": 1, "block_q": 24, "block_k": 12, "causal": True},
    "one query": {"T": 1, "S": 150, "causal": True, "mask": True, "key_heads": 1},
    "indices": {"kind": "indices", "block_q": 4, "block_k": 8, "causal": True, "T": 30},
    "selected tokens": {
        "kind": "indices", "block_q": 8, "block_k": 1, "count": 9, "heads": 2, "key_heads": 1,
        "T": 20, "causal": True,
    },
    "a causal window": {"kind": "window", "window": (20, -1), "causal": True, "T": 70},
    "a window, more keys": {"kind": "window", "window": (30, 3), "T": 35, "S": 80, "mask": True},
}  # fmt: skip
SLOW: dict[str, dict[str, Any]] = {
    "everything": {
        "batch": 2, "heads": 4, "T": 70, "S": 90, "bias": 2, "mask": True, "causal": True,
        "plans": (2, 4), "D": 24, "E": 40, "scales": True,
    },
    "shared plans": {"heads": 4, "T": 70, "plans": (1, 2)},
    "tokens as blocks": {"block_q": 1, "block_k": 1, "T": 20, "highest": 2, "causal": True},
    "eights": {"block_q": 8, "block_k": 8, "causal": True},
    "wide heads": {"D": 128, "E": 64, "T": 70, "block_q": 32, "block_k": 64},
    "blocks of 128": {"block_q": 128, "block_k": 128, "T": 200, "causal": True, "heads": 1,
                      "key_heads": 1},
    "a query for each list": {
        "kind": "indices", "block_q": 1, "block_k": 8, "heads": 4, "T": 40, "causal": True,
    },
    "decoding by indices": {
        "kind": "indices", "block_q": 1, "block_k": 16, "T": 1, "S": 200, "count": 9, "heads": 4,
    },
    "a window of every key": {"kind": "window", "T": 70, "heads": 4},
    "a window behind": {"kind": "window", "window": (-1, 3), "T": 50, "mask": True},
    "a window, more queries": {"kind": "window", "window": (5, -1), "T": 60, "S": 33},
    "a window, decoding": {"kind": "window", "window": (60, 0), "T": 2, "S": 130},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str) -> None:
    check(**CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_equals_the_reference_slow(name: str) -> None:
    check(**SLOW[name])


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 7, 15, 16, 17, 31, 33, 65])
def test_any_length(length: int) -> None:
    # Other seeds than `length`: with one pooled row in sight (16) a gradient is 0 but for rounding.
    check(heads=1, key_heads=1, T=length, seed=length + 1, causal=length % 2 == 0)


def test_nothing_to_attend_to() -> None:
    for T, S in ((5, 0), (0, 5)):
        case = {"T": T, "S": S, "heads": 1, "key_heads": 1}
        out, grads = interpreted("ops.test_block_sparse_triton:differentiated", case, "triton")
        assert out.shape == (1, 1, T, 16)
        assert not out.any()
        assert not any(x.any() for x in grads.values())
    case = {"T": 20, "heads": 1, "key_heads": 1, "highest": 1}  # level 0 everywhere
    out, grads = interpreted("ops.test_block_sparse_triton:differentiated", case, "triton")
    assert not out.any()
    assert not any(x.any() for x in grads.values())


def test_later_keys_change_no_bit() -> None:
    case = {"T": 50, "causal": True, "heads": 1, "key_heads": 1, "highest": 5}
    before, after = (
        interpreted("ops.test_block_sparse_triton:of_the_past", case, huge) for huge in (None, 1e15)
    )
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x, y)


def of_the_past(case: dict[str, Any], huge: float | None) -> list[Tensor]:
    """Outputs before token 27 and gradients of them, with `huge` later keys and values."""
    given = arguments(**case)
    if huge is not None:
        given["k"][:, :, 27:], given["v"][:, :, 27:] = huge, -huge
    leaves = [given[name].requires_grad_() for name in ("q", "k", "v")]
    past = block_sparse_attention(**given, impl="triton")[:, :, :27]
    found = torch.autograd.grad(past.square().sum(), leaves)
    return [past.detach(), *(x[:, :, :27] for x in found)]


def test_what_a_plan_may_not_name_is_skipped() -> None:
    case = {"T": 30, "heads": 1, "key_heads": 1, "block_k": 12}
    plain, odd = interpreted("ops.test_block_sparse_triton:with_odd_levels", case)
    assert torch.equal(plain, odd)


def with_odd_levels(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """With levels that blocks of twelve keys have, and with others in place of level 0."""
    given = arguments(**case)
    levels = given.pop("levels") % 8
    odd = torch.where(levels == 0, torch.tensor([[8], [3]]), levels)
    return (
        block_sparse_attention(**given, levels=levels, impl="triton"),
        block_sparse_attention(**given, levels=odd, impl="triton"),
    )


def test_refuses_in_words() -> None:
    q = torch.zeros(1, 1, 4, 16)
    assert "needs a GPU" in (triton.refuse(q, q) or "")
    wide = torch.zeros(1, 1, 4, 160)
    refuse = "regard.ops.block_sparse.triton:refuse"
    assert interpreted(refuse, q, q) is None
    assert "at most 128 channels" in (interpreted(refuse, q, wide) or "")
    for kind, options, words in (
        ("levels", {"tail": "replicate"}, 'tail="exact" only'),
        ("window", {"grid": (5, 8)}, "not of a grid"),
        ("window", {"window": (2, 2), "inward": True}, "inwards"),
        ("window", {"dilation": 2}, "not dilated"),
        ("window", {"tile": (8,)}, "tiles are fixed"),
    ):
        case = {"kind": kind, **options}
        with pytest.raises(ValueError, match=words):
            interpreted("ops.test_block_sparse_triton:differentiated", case, "triton")


def test_auto_takes_it_where_it_is_verified() -> None:
    assert [form.auto for form in triton.FORMS] == [True, False]
    case = {"T": 4, "heads": 1, "key_heads": 1}
    out, _ = interpreted("ops.test_block_sparse_triton:differentiated", case, "auto")
    ours, _ = interpreted("ops.test_block_sparse_triton:differentiated", case, "native")
    assert torch.equal(out, ours)


@pytest.mark.parametrize("name", ["biases and a mask", "indices", "a causal window"])
def test_the_operator_is_what_torch_is_told(name: str) -> None:
    interpreted("ops.test_block_sparse_triton:opcheck", CASES[name])


def opcheck(case: dict[str, Any]) -> None:
    """Schema, fakes and autograd of the operators, in the interpreter's process."""
    from regard.ops.block_sparse.triton.registered import block_sparse_triton

    given = arguments(**{"seed": 3, **case, "T": 9, "S": 9})
    kind, bias = case.get("kind", "levels"), given.get("key_bias")
    plan = given.get("levels", given.get("selected"))
    tensors = [given["q"], given["k"].nan_to_num(), given["v"].nan_to_num(), bias]
    for x in tensors:
        if x is not None:
            x.requires_grad_()
    options = kind == "indices", case.get("block_q", 16), case.get("block_k", 16), -1, 0, 0.25
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(block_sparse_triton, (*tensors, plan, None, *options), test_utils=checks)


def test_a_mapped_axis() -> None:
    mapped, looped = interpreted("ops.test_block_sparse_triton:under_vmap")
    assert torch.equal(mapped, looped)


def under_vmap() -> tuple[Tensor, Tensor]:
    """Two calls by vmap, which share a plan, and one by one."""
    given = arguments(T=20, batch=2, causal=True)
    q, k, v = (torch.stack([given[n], given[n] + 1]) for n in "qkv")
    plan = {n: given[n] for n in ("levels", "block_q", "block_k", "causal")}

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, **plan, impl="triton")

    return torch.func.vmap(one)(q, k, v), torch.stack([one(*x) for x in zip(q, k, v, strict=True)])


@pytest.mark.parametrize("bias", [0, 1])
def test_the_shorter_way_gives_the_same_bits(bias: int) -> None:
    case = {"heads": 1, "key_heads": 1, "T": 20, "bias": bias}
    (seen, watched), (shorter, direct) = interpreted("ops.test_block_sparse_triton:both_ways", case)
    assert seen == ["regard.block_sparse_triton_fwd", "regard.block_sparse_triton_bwd"]
    assert shorter == []
    assert all(torch.equal(a, b) for a, b in zip(watched, direct, strict=True))


def both_ways(case: dict[str, Any]) -> list[tuple[list[str], list[Tensor]]]:
    """Operators that were called, outputs and gradients: while somebody looks on, and without."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from regard.ops.block_sparse.triton import registered

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func.namespace == "regard":
                called.append(func.name().replace("::", "."))
            return func(*args, **(kwargs or {}))

    found: list[tuple[list[str], list[Tensor]]] = []
    called: list[str] = []
    with Watch():
        out, grads = differentiated(case, "triton")
    found.append((called.copy(), [out, *grads.values()]))
    called.clear()
    names = "block_sparse_triton", "_gradient"
    kept = [getattr(registered, name) for name in names]
    try:
        for name in names:
            setattr(registered, name, lambda *given: called.append("by torch"))
        out, grads = differentiated(case, "triton")
    finally:
        for name, op in zip(names, kept, strict=True):
            setattr(registered, name, op)
    found.append((called, [out, *grads.values()]))
    return found


def test_a_second_derivative_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="differentiable once"):
        interpreted("ops.test_block_sparse_triton:twice")


def twice() -> None:
    """The derivative of a gradient."""
    given = arguments(heads=1, key_heads=1, T=8)
    q = given.pop("q").requires_grad_()
    out = block_sparse_attention(q, **given, impl="triton")
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    first.sum().backward()


def test_parts_depend_on_lengths_alone() -> None:
    assert [table.parts(1, S) for S in (0, 1000, 5000, 1 << 20)] == [1, 1, 4, 16]
    assert table.parts(17, 1 << 20) == 1
