"""The native form of the linear engine, on every instruction set that this machine runs."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import regard
from regard.core.budgets import relative_error
from regard.native import function, instruction_sets, limited_to
from regard.ops.delta import delta_attention
from regard.ops.gated_delta import gated_delta_attention
from regard.ops.linear import linear_attention
from regard.ops.linear.features import unit
from regard.ops.linear.native import again
from regard.ops.linear.native.library import Call
from regard.ops.linear.native.unit import unit as native_unit
from regard.ops.linear.native.walk import walk

ISAS = instruction_sets()
INF = float("inf")
TOLERANCE = 3e-6  # of float32 results and gradients against float64; found: below 1e-6

pytestmark = pytest.mark.skipif(not ISAS, reason="no native library here")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    with limited_to(request.param):
        yield request.param


class Case(NamedTuple):
    """Sizes and kinds of one call of the walk."""

    F: int
    E: int
    T: int
    decay: str | None = None  # "token" | "channel" | "extreme token" | "extreme channel"
    delta: bool = False
    normaliser: int = 0  # 0 | 1: the sum | 2: a clamp
    group: int = 1
    past: bool = True


CASES = (
    Case(1, 1, 5),
    Case(7, 1, 9, "token", normaliser=1),
    Case(1, 7, 64, "extreme channel"),
    Case(16, 16, 130, "extreme token", delta=True, group=2),
    Case(20, 16, 63, "channel", normaliser=2, group=3),
    Case(16, 20, 150, "extreme token", normaliser=1),
    Case(64, 64, 70, "token", delta=True, past=False),
    Case(64, 64, 150, "token", normaliser=1, group=2),
    Case(80, 64, 33, "extreme channel", delta=True),
    Case(64, 80, 40, delta=True, group=2),
    Case(128, 64, 34, None, normaliser=2, past=False),
    Case(130, 130, 21, "extreme token"),
    Case(24, 130, 300, "extreme channel", normaliser=1),
    Case(33, 9, 1, "token", delta=True),
)


def operands(case: Case, *, B: int = 2, Hk: int = 2, seed: int = 0) -> list[Tensor | None]:
    """q, k, v, log_decay, beta, S, z in float32."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make)

    q, k = normal(B, Hk * case.group, case.T, case.F), normal(B, Hk, case.T, case.F)
    v, log_decay, beta = normal(B, Hk, case.T, case.E), None, None
    if case.normaliser:
        q, k = q.abs(), k.abs()
    if case.decay is not None:
        shape = k.shape if "channel" in case.decay else k.shape[:3]
        log_decay = -torch.rand(shape, generator=make)
        if "extreme" in case.decay:
            kind = torch.rand(shape, generator=make)
            log_decay[kind < 0.4] = 0.0
            log_decay[kind < 0.3] = -40.0
            log_decay[kind < 0.15] = -120.0
            log_decay[kind < 0.1] = -INF
    if case.delta:
        k, beta = torch.nn.functional.normalize(k, dim=3), torch.rand(B, Hk, case.T, generator=make)
    S = normal(B, Hk, case.F, case.E) if case.past else None
    z = normal(B, Hk, case.F).abs() if case.past and case.normaliser else None
    return [q, k, v, log_decay, beta, S, z]


def equations(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    S: Tensor | None, z: Tensor | None, normaliser: int, minimum: float, epsilon: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The recurrence token by token: out, S and, with a normaliser, z."""
    (B, H, T, F), (_, Hk, _, E) = q.shape, v.shape
    S = q.new_zeros(B, Hk, F, E) if S is None else S
    z = q.new_zeros(B, Hk, F) if z is None else z
    rows = []
    for t in range(T):
        if log_decay is not None:
            step = log_decay[:, :, t]
            forgets = step < -1000
            factor = torch.where(forgets, 0.0, step.masked_fill(forgets, 0.0).exp())
            factor = factor if factor.dim() == 3 else factor[..., None]
            S, z = S * factor[..., None], z * factor
        value = v[:, :, t]
        if beta is not None:
            value = beta[:, :, t, None] * (value - (k[:, :, t, None] @ S)[:, :, 0])
        S, z = S + k[:, :, t, :, None] * value[:, :, None], z + k[:, :, t]
        query = q[:, :, t].reshape(B, Hk, H // Hk, F)
        row, weight = query @ S, query @ z[..., None] + epsilon
        if normaliser == 1:
            row = row / weight
        elif normaliser == 2:
            row = row / weight.clamp(min=minimum)
        rows.append(row.reshape(B, H, 1, E))
    return (torch.cat(rows, 2), S, z) if normaliser else (torch.cat(rows, 2), S)


def solved(run: Any, given: list[Tensor | None], *options: Any) -> tuple[list[Tensor], ...]:
    """Results, and gradients of all operands that there are."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in given]
    results = [x for x in run(*leaves, *options) if x.requires_grad and x.numel()]
    weights = [torch.linspace(-1, 2, x.numel()).sin().view_as(x).to(x.dtype) for x in results]
    wanted = [x for x in leaves if x is not None]
    found = torch.autograd.grad(results, wanted, weights, allow_unused=True)
    return results, [
        torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)
    ]


def agree(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert x.isfinite().all()
        assert relative_error(x, y) < TOLERANCE or (x - y).abs().max() < 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(isa: str, case: Case):
    given = operands(case)
    options = (case.normaliser, 9.0, 0.25 if case.normaliser == 1 else 0.0)
    exact = [None if x is None else x.double() for x in given]
    for found, expected in zip(
        solved(walk, given, *options), solved(equations, exact, *options), strict=True
    ):
        agree(found, expected)


@pytest.mark.parametrize("cut", [1, 2, 7, 64, 99])
@pytest.mark.parametrize("delta", [False, True])
def test_any_split_carries_on(isa: str, cut: int, delta: bool):
    q, k, v, log_decay, beta, S, _ = operands(Case(20, 33, 100, "extreme token", delta))
    whole = walk(q, k, v, log_decay, beta, S, None, 0, 0.0, 0.0)
    first, last = slice(None, cut), slice(cut, None)

    def part(tokens: slice, S: Tensor | None) -> Any:
        cuts = [None if x is None else x[:, :, tokens] for x in (q, k, v, log_decay, beta)]
        return walk(*cuts, S, None, 0, 0.0, 0.0)

    one = part(first, S)
    two = part(last, one.S)
    assert relative_error(torch.cat([one.out, two.out], 2), whole.out) < 1e-6
    assert relative_error(two.S, whole.S) < 1e-6


def test_products_of_decays_stay_exact(isa: str):
    """A constant decay that rounds is not wrong by its last digit at every token."""
    T, step = 30_000, -1e-5
    k, v = torch.zeros(1, 1, T, 1), torch.ones(1, 1, T, 1)
    k[:, :, 0] = 1.0
    out = walk(
        torch.ones_like(k), k, v, torch.full((1, 1, T), step), None, None, None, 0, 0.0, 0.0
    ).out
    exact = math.exp(float(torch.tensor(step)) * (T - 1))
    assert abs(out[0, 0, -1, 0].item() / exact - 1) < 2e-4  # rounding of the state itself remains


def test_all_of_nothing_but_forgetting(isa: str):
    q, k, v, _, _, S, _ = operands(Case(7, 5, 11))
    forgets = torch.full((2, 2, 11), -INF)
    found, gradients = solved(walk, [q, k, v, forgets, None, S, None], 0, 0.0, 0.0)
    assert relative_error(found[0], (q * k).sum(3, keepdim=True) * v) < 1e-6
    assert not gradients[3].any()
    assert torch.equal(found[1], k[:, :, -1, :, None] * v[:, :, -1, None])


@pytest.mark.parametrize("case", [Case(16, 16, 50, "token"), Case(9, 20, 50, "channel")], ids=str)
def test_what_later_keys_hold_changes_no_bit(isa: str, case: Case):
    """Even where the state overflows: gradients of a loss on earlier rows are what they were."""
    results = []
    for junk in (0.0, 1e4, 3e38):
        given = operands(case)
        for x in given[1:3]:
            x[:, :, 30:] = junk
        leaves = [None if x is None else x.requires_grad_() for x in given]
        out = walk(*leaves, case.normaliser, 0.0, 0.0).out[:, :, :30]
        wanted = [x for x in leaves if x is not None]
        results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    for found in results[1:]:
        for x, y in zip(found, results[0], strict=True):
            assert torch.equal(x, y)


def test_the_same_again_and_with_more_threads(isa: str):
    given = operands(Case(64, 80, 1100, "token", delta=True), B=1, Hk=3)
    once = solved(walk, given, 0, 0.0, 0.0)
    again = solved(walk, given, 0, 0.0, 0.0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        threaded = solved(walk, given, 0, 0.0, 0.0)
    finally:
        torch.set_num_threads(before)
    for other in (again, threaded):
        for found, expected in zip(other, once, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_strided_operands(isa: str):
    q, k, v, log_decay, _, _, _ = operands(Case(16, 20, 40, "token"))
    expected = walk(q, k, v, log_decay, None, None, None, 0, 0.0, 0.0).out
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    turned[2] = turned[2].mT.contiguous().mT
    found = walk(*turned, log_decay, None, None, None, 0, 0.0, 0.0).out
    assert torch.equal(found, expected)


@pytest.mark.parametrize("delta", [False, True])
def test_registered_op(delta: bool):
    case = Case(5, 6, 9, "token", delta, 0 if delta else 1)
    given = [None if x is None else x.requires_grad_() for x in operands(case)]
    torch.library.opcheck(
        torch.ops.regard.linear_native_fwd.default, (*given, case.normaliser, 0.0, 0.0)
    )


def test_registered_unit_rows():
    x = torch.randn(2, 3, 5, 7).requires_grad_()
    torch.library.opcheck(torch.ops.regard.linear_unit_native_fwd.default, (x,))


def test_mapped_over_a_further_axis():
    q, k, v, log_decay, _, _, _ = operands(Case(5, 6, 9, "token"), B=3)

    def attend(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        return linear_attention(q, k, v, causal=True, log_decay=log_decay, impl="native")

    once = attend(q, k, v, log_decay)
    mapped = torch.vmap(attend)(*(x[:, None] for x in (q, k, v, log_decay)))
    assert relative_error(mapped[:, 0], once) < 1e-6


def step_calls() -> dict[str, Any]:
    return {
        "linear": lambda q, k, v, a, beta, **more: linear_attention(
            q, k, v, causal=True, log_decay=a, **more
        ),
        "identity": lambda q, k, v, a, beta, **more: linear_attention(
            q, k, v, causal=True, log_decay=a, feature_map="identity", normalise=False, scale=0.3,
            **more,
        ),
        "delta": lambda q, k, v, a, beta, **more: delta_attention(
            q, k, v, beta=beta, causal=True, **more
        ),
        "gated_delta": lambda q, k, v, a, beta, **more: gated_delta_attention(
            q, k, v, beta=beta, log_decay=a, causal=True, **more
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", step_calls())
@pytest.mark.parametrize("group", [1, 3])
def test_decoding_step_by_step(isa: str, name: str, group: int):
    """Steps that C takes directly, those of the op under autograd, and the whole sequence."""
    q, k, v, log_decay, _, _, _ = operands(Case(20, 37, 12, "extreme token", group=group))
    beta, attend = torch.rand(2, 2, 12, generator=torch.Generator().manual_seed(1)), step_calls()
    attend = attend[name]
    exact = [x.double() for x in (q, k, v, log_decay, beta)]
    expected = attend(*exact, impl="reference")
    state, rows = None, []
    again.known.clear()
    for t in range(12):
        one = [x[:, :, t : t + 1] for x in (q, k, v, log_decay, beta)]
        if state is not None:
            past = {key: x.clone() for key, x in state.tensors.items()}
            traced = one[0].clone().requires_grad_()
            slow, other = attend(traced, *one[1:], state=state, return_state=True)
        row, following = attend(*one, state=state, return_state=True)
        if state is not None:
            assert slow.requires_grad
            assert relative_error(row, slow) < 1e-6
            for key, x in past.items():
                assert torch.equal(x, state[key])  # an older state stays as it was
                assert relative_error(following[key], other[key]) < 1e-6
        assert following.length == t + 1
        rows.append(row)
        state = following
    assert len(again.known) == 2  # without a past and with one
    assert relative_error(torch.cat(rows, 2), expected) < TOLERANCE


def test_a_step_that_was_checked_once_is_checked_again_when_it_changes(isa: str):
    q, k, v, log_decay, _, _, _ = operands(Case(8, 8, 1, "token"))
    attend = step_calls()["linear"]
    state = attend(q, k, v, log_decay, None, return_state=True)[1]
    for _ in range(2):
        attend(q, k, v, log_decay, None, state=state)
    with pytest.raises(ValueError, match="log_decay"):
        attend(q, k, v, log_decay[:1], None, state=state)
    with pytest.raises(TypeError, match="must be"):
        attend(q.tolist(), k, v, log_decay, None, state=state)
    with pytest.raises(ValueError, match="impl"):
        attend(q, k, v, log_decay, None, state=state, impl="fastest")
    with pytest.raises(ValueError, match="state"):
        delta_attention(q, k, v, beta=log_decay.exp(), causal=True, state=state)
    choice = regard.explain(linear_attention, q, k, v, causal=True, state=state)
    assert choice.impl == "native" if hasattr(choice, "impl") else "native" in str(choice)


@pytest.mark.parametrize("width", [1, 7, 16, 64, 130])
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e20, 3e37, 1e-36])
def test_unit_rows(isa: str, width: int, size: float):
    """No square overflows or vanishes, and a row of zeros is left as it is."""
    make = torch.Generator().manual_seed(width)
    x = (torch.randn(2, 3, 5, width, generator=make) * size).clamp(-3e38, 3e38)
    weight = torch.randn(x.shape, generator=make) * min(size, 1.0)
    x[0, 0, 0] = 0.0
    single, double = x.clone().requires_grad_(), x.double().requires_grad_()
    found, expected = native_unit(single), unit(double)
    assert (found - expected).abs().max() < 3e-7
    (gradient,) = torch.autograd.grad(found, single, weight)
    (exact,) = torch.autograd.grad(expected, double, weight.double())
    assert (gradient - exact).norm() < 1e-6 * weight.double().norm() / size


def test_what_it_refuses():
    q, k, v, *_ = operands(Case(8, 8, 6))
    with pytest.raises(ValueError, match="chunk_size"):
        linear_attention(q, k, v, causal=True, chunk_size=4, impl="native")
    with pytest.raises(ValueError, match="not causal"):  # two products, but of what it can map
        linear_attention(q, k, v, log_decay=-torch.ones(v.shape[:3]), impl="native")
    with pytest.raises(ValueError, match="float32"):
        linear_attention(q.double(), k.double(), v.double(), causal=True, impl="native")


def test_structures_agree(isa: str):
    size = function("test", "linear_call_size", isa)
    size.restype = ctypes.c_int64
    assert size() == ctypes.sizeof(Call)


@pytest.mark.slow
def test_memory_of_a_long_sequence():
    """Forward and backward of 65536 tokens stay under twelve times the size of q."""
    code = """
import resource, torch
from regard.ops.linear.native.unit import unit as native_unit
from regard.ops.linear.native.walk import walk
torch.set_num_threads(1)
make = lambda *shape: torch.randn(shape).requires_grad_()
def run(T):
    q, k, v = make(1, 1, T, 64), make(1, 1, T, 64), make(1, 1, T, 64)
    log_decay = (-torch.rand(1, 1, T)).requires_grad_()
    walk(q, k, v, log_decay, None, None, None, 0, 0.0, 0.0).out.sum().backward()
run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(65536)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (65536 * 64 * 4))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(found.stdout) < 12


@pytest.mark.parametrize("low", [-60.0, -75.0, -86.0, -89.0])
def test_weights_near_the_end_of_the_range_still_divide(isa: str, low: float):
    """Sums of weights down to 1e-38, whose inverse may be no float32, in a walk and in a step."""
    q, k, v = torch.randn(3, 1, 2, 70, 8, generator=torch.Generator().manual_seed(0))
    q = 0.5 * q + low
    exact = linear_attention(q, k, v, causal=True, impl="reference")
    walked = linear_attention(q, k, v, causal=True, impl="native")
    before = (x[:, :, :-1] for x in (q, k, v))
    _, state = linear_attention(*before, causal=True, return_state=True)
    last = (x[:, :, -1:] for x in (q, k, v))
    with torch.inference_mode():
        step = linear_attention(*last, causal=True, state=state, impl="native")
    assert relative_error(walked, exact) < 1e-5
    assert relative_error(step, exact[:, :, -1:]) < 1e-5
