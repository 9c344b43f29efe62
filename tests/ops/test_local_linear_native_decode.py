"""A few query rows against a cache in plain C, on every instruction set that runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from ops.samples import of_kind, tensors
from regard.core.budgets import relative_error
from regard.native.loader import limited_to
from regard.ops import local_linear_attention, parallax_attention, softmax_attention
from regard.ops.local_linear import native
from regard.ops.local_linear.native import decode
from regard.ops.local_linear.reference import local_linear_attention_reference

ISAS = regard.native.instruction_sets()
CASES = {
    "plain": {},
    "absolute ridge": {"ridge_mode": "absolute", "ridge": 0.5, "scale": 0.2},
    "no intercept": {"intercept": False},
    "window": {"window": (20, -1)},
    "ridge and scale per head": {
        "ridge": torch.tensor([0.3, 1.0, 2.0, 0.7]), "scale": torch.tensor([0.1, 0.3, 0.2, 0.5]),
    },
    "gaussian": {"kernel": "gaussian", "ridge": 0.3, "scale": 0.05},
    "not causal": {"causal": False},
}  # fmt: skip


def key_side(S: int, heads: int, seed: int = 1) -> dict[str, Tensor]:
    """A mask, a bias and a decay that forgets once."""
    generator = torch.Generator().manual_seed(seed)
    decay = -0.1 * torch.rand(2, heads, S, generator=generator)
    decay[:, :, S // 4] = -torch.inf
    return {
        "key_mask": torch.rand(2, S, generator=generator) > 0.3,
        "key_bias": torch.randn(2, heads, S, generator=generator),
        "log_decay": decay,
    }


def exact(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The reference in float64."""
    wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for n, x in options.items()}  # fmt: skip
    return local_linear_attention_reference(q.double(), k.double(), v.double(), **wide)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(isa: str, solver: str, case: str):
    options: dict[str, Any] = {"causal": True, **CASES[case]}
    for D, Dv in ((16, 8), (5, 19)):
        q, k, v = tensors(T=2, S=75, D=D, Dv=Dv, dtype=torch.float32)
        assert decode.serves(q, k)
        with limited_to(isa):
            out = local_linear_attention(
                q, k, v, **options, solver=solver, tol=1e-6, impl="native"
            )
        assert relative_error(out, exact(q, k, v, **options)) < 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_operands_of_the_keys(isa: str, heads: int):
    q, k, v = tensors(T=2, S=75, D=16, dtype=torch.float32)
    operands = key_side(75, heads)
    expected = exact(q, k, v, causal=True, **operands)
    hidden = ~operands["key_mask"][:, None, :, None]
    k, v = k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.inf)
    with limited_to(isa):
        for solver in ("cg", "direct"):
            out = local_linear_attention(
                q, k, v, causal=True, **operands, solver=solver, tol=1e-6, impl="native"
            )
            assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("isa", ISAS)
def test_other_probes(isa: str):
    q, k, v = tensors(T=2, S=75, D=16, dtype=torch.float32)
    operands, r = key_side(75, 4), 0.3 * q.flip(3)
    wide = [x.double() for x in (q, r, k, v)]
    expected = parallax_attention(*wide, causal=True, **operands, impl="reference")
    plain = softmax_attention(wide[0], *wide[2:], causal=True, **operands, impl="reference")
    with limited_to(isa):
        out = parallax_attention(q, r, k, v, causal=True, **operands, impl="native")
        assert relative_error(out, expected) < 1e-5
        # What torch's own kernel refuses, a bias on keys, comes here.
        out = softmax_attention(q, k, v, causal=True, **operands, impl="native")
        assert relative_error(out, plain) < 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_caches_of_16_bits(isa: str, dtype: torch.dtype):
    for D in (32, 11):
        q, k, v = tensors(T=1, S=70, D=D, dtype=dtype)
        k[0, 0, 3] *= 1e-6  # below the normal numbers of float16
        with limited_to(isa):
            out = local_linear_attention(q, k, v, causal=True, tol=1e-6, impl="native")
        assert out.dtype == dtype
        expected = exact(q, k, v, causal=True)
        assert relative_error(out, expected.to(dtype)) < torch.finfo(dtype).eps / 4


@pytest.mark.skipif(not ISAS, reason="no native library")
@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_prefill_and_steps_equal_the_parallel_call(solver: str):
    q, k, v = tensors(T=40, S=40, D=16, dtype=torch.float32)
    options: dict[str, Any] = {"causal": True, "solver": solver, "tol": 1e-6, "impl": "native"}
    operands = key_side(40, 2)

    def call(t0: int, t1: int, state: Any = None) -> Any:
        new = {n: x[..., t0:t1] for n, x in operands.items()}
        cut = [x[:, :, t0:t1] for x in (q, k, v)]
        return local_linear_attention(*cut, **options, **new, state=state, return_state=True)

    whole, _ = call(0, 40)
    out, state = call(0, 30)
    pieces = [out]
    for t0, t1 in ((30, 31), (31, 33), (33, 34), (34, 35), (35, 40)):
        out, state = call(t0, t1, state)
        pieces.append(out)
    assert relative_error(torch.cat(pieces, 2), whole) < 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", [{"solver": "cg", "tol": 1e-6}, {"solver": "direct"}], ids=str)
def test_a_common_offset_costs_nothing(isa: str, options: dict[str, Any]):
    options = {"causal": True, "ridge": 0.1, **options}
    q, k, v = of_kind("offset", 120, 64)
    expected = local_linear_attention(q.double(), k.double(), v.double(), **options)
    with limited_to(isa), torch.no_grad():
        rows = [
            local_linear_attention(q[:, :, t - 1 : t], k[:, :, :t], v[:, :, :t], **options)
            for t in range(1, 121)
        ]
    assert relative_error(torch.cat(rows, 2), expected) < 1e-5


@pytest.mark.skipif(not ISAS, reason="no native library")
def test_a_step_goes_to_c_unless_somebody_looks_on(monkeypatch: pytest.MonkeyPatch):
    q, k, v = tensors(T=1, S=50, D=16, dtype=torch.float32)
    options: dict[str, Any] = {"causal": True, "ridge": 0.2, "return_aux": True, "impl": "native"}
    tracked = q.clone().requires_grad_()
    through_torch, aux = local_linear_attention(tracked, k, v, **options)
    assert through_torch.requires_grad

    def never(*arguments: Any) -> None:
        raise AssertionError("not needed")

    monkeypatch.setattr(native, "local_linear_native_fwd", never)
    out, direct_aux = local_linear_attention(q, k, v, **options)
    assert torch.equal(out, through_torch)
    assert all(torch.equal(a, b) for a, b in zip(aux, direct_aux, strict=True))
    with torch.no_grad():
        assert torch.equal(local_linear_attention(tracked, k, v, **options)[0], out)
    with pytest.raises(AssertionError, match="not needed"):
        local_linear_attention(tracked, k, v, **options)
    with pytest.raises(AssertionError, match="not needed"):
        torch.vmap(lambda x: local_linear_attention(x, k, v, **options)[0])(q[None])


@pytest.mark.skipif(not ISAS, reason="no native library")
def test_long_caches_and_threads():
    """Sums of several chunks; neither threads nor the layout of the cache change a bit."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 1, 2, 64), (1, 1, 33_000, 64), (1, 1, 33_000, 8))
    q, k, v = (torch.randn(s, generator=generator) for s in shapes)
    k[:, :, 20_000] = 40 * q[:, :, 1] / 8  # outweighs all that came before
    options: dict[str, Any] = {"causal": True, "tol": 1e-6, "impl": "native"}
    assert k.numel() >= decode.LEAST_WORK
    strided = [torch.stack([x, x], -2)[..., 0, :] for x in (k, v)]
    assert not strided[0].is_contiguous()
    for solver in ("cg", "direct"):
        out = local_linear_attention(q, k, v, **options, solver=solver)
        expected = exact(q, k, v, causal=True)
        assert relative_error(out, expected) < 1e-5
        assert torch.equal(local_linear_attention(q, *strided, **options, solver=solver), out)
        try:
            torch.set_num_threads(3)
            threaded = local_linear_attention(q, k, v, **options, solver=solver)
        finally:
            torch.set_num_threads(1)
        assert torch.equal(threaded, out)


@pytest.mark.parametrize("isa", ISAS)
def test_later_keys_change_nothing(isa: str):
    q, k, v = tensors(H=2, T=4, S=40, D=16, dtype=torch.float32)
    for solver in ("cg", "direct"):
        results = []
        for later in (1.0, 1e4, 1e30, 3e38):
            keys, values = k.clone(), v.clone()
            keys[:, :, 38:] *= 0
            keys[:, :, 38:] += later
            values[:, :, 38:] = -later
            with limited_to(isa):
                out = local_linear_attention(
                    q, keys, values, causal=True, solver=solver, impl="native"
                )
            results.append(out[:, :, :2])
        assert all(torch.equal(x, results[0]) for x in results[1:])


@pytest.mark.parametrize("isa", ISAS)
def test_rows_mind_only_themselves(isa: str):
    """A hard row is solved again in float64; no other changes a bit, NaN stays where it is."""
    q, k, v = tensors(H=2, T=2, S=60, D=16, dtype=torch.float32)
    options: dict[str, Any] = {"ridge": 0.01, "solver": "cg", "impl": "native"}
    with limited_to(isa):
        before = local_linear_attention(q, k, v, **options)
        q[0, 0, 0] *= 300
        q[1, 1, 1] = torch.nan
        after, aux = local_linear_attention(q, k, v, **options, max_iters=20, return_aux=True)
    assert aux.iterations[0, 0, 0] == 0, "solved directly"
    assert relative_error(after[0, 0], exact(q, k, v, ridge=0.01)[0, 0]) < 1e-4
    assert after[1, 1, 1].isnan().all()
    others = torch.ones(2, 2, 2, dtype=torch.bool)
    others[0, 0, 0] = others[1, 1, 1] = False
    assert torch.equal(after[others], before[others])


@pytest.mark.skipif(not ISAS, reason="no native library")
def test_rows_without_keys():
    q, k, v = tensors(T=2, S=1, D=4, dtype=torch.float32)
    out, aux = local_linear_attention(q, k, v, causal=True, return_aux=True, impl="native")
    assert torch.equal(out[:, :, 0], torch.zeros_like(out[:, :, 0]))
    assert (aux.lse[:, :, 0] == -torch.inf).all()
    assert torch.equal(out[:, :, 1], v[:, :, 0].repeat_interleave(2, 1))
    mask = torch.zeros(2, 1, dtype=torch.bool)
    assert not local_linear_attention(q, k, v, key_mask=mask, impl="native").any()
