"""The Triton forward of the engine, interpreted in float32, against the eager form in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu.interpreter import interpreted
from regard.core.budgets import relative_error
from regard.core.decay import decay_sums
from regard.ops import local_linear_attention, parallax_attention, softmax_attention
from regard.ops.local_linear import blockwise, triton
from regard.ops.local_linear.call import SINGLE, Call
from regard.ops.local_linear.layout import Inputs
from regard.ops.local_linear.registered import Options
from regard.ops.local_linear.solve import Solver

pytestmark = pytest.mark.requires("triton")

FORWARD = "regard.ops.local_linear.triton:run_forward"
OP = "regard.ops:local_linear_attention"
TIGHT = Options(False, 1e-6, 1e-6, 0, 0, "auto")
# Of a relative residual of 1e-6 and float32 products; g is multiplied by the slope of the fit.
BUDGET = 1e-5


def sample(
    heads: int = 2, key_heads: int = 1, T: int = 33, S: int = 33, D: int = 16, Dv: int = 16,
    batch: int = 1, seed: int = 0, ridge: float = 3.0, mask: bool = False, bias: bool = False,
    decay: str = "", probe: bool = False, causal: bool = True,
    window: tuple[int, int] = (-1, -1), absolute: bool = False, intercept: bool = True,
    average: bool = False,
) -> Inputs:  # fmt: skip
    """What the operator receives; masked keys and values are junk."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = draw(batch, heads, T, D), draw(batch, key_heads, S, D), draw(batch, key_heads, S, Dv)
    key_mask, sums = None, None
    if mask:
        key_mask = torch.rand(batch, S, generator=generator) > 0.3
        key_mask[:, :3] = False
        k = torch.where(key_mask[:, None, :, None], k, torch.nan)
        v = torch.where(key_mask[:, None, :, None], v, torch.inf)
    if decay:
        steps = -torch.rand(batch, heads, S, generator=generator)
        if decay == "forgets":
            steps[:, :, S // 2] = -torch.inf
        sums = decay_sums(steps, key_mask)
    return Inputs(
        q, k + 1, v, torch.full((1, 1, 1), ridge), torch.full((1, 1), D**-0.5), key_mask,
        draw(batch, key_heads, S) if bias else None, sums, causal, window, absolute, intercept,
        probe=0.3 * draw(batch, heads, T, D) if probe else None, average=average,
    )  # fmt: skip


def exact(inputs: Inputs) -> blockwise.Result:
    wide = replace(inputs, wide=True)
    if inputs.average:
        nothing = torch.zeros(inputs.q.shape, dtype=torch.float64)
        return blockwise.forward_given(replace(wide, probe=nothing), nothing, 0)
    if inputs.probe is not None:
        return blockwise.forward_given(wide, inputs.probe, 0)
    return blockwise.forward(wide, Solver(True, 1e-12, 200), 0)


def check(inputs: Inputs, options: Options = TIGHT) -> blockwise.Result:
    got = blockwise.Result(*interpreted(FORWARD, inputs, options)[:5])
    expected = exact(inputs)
    seen = expected.lse.isfinite()
    assert torch.equal(got.lse.isfinite(), seen)
    assert relative_error(got.lse[seen], expected.lse[seen]) < 1e-6
    assert relative_error(got.slope, expected.slope) < BUDGET
    assert relative_error(got.out, expected.out) < BUDGET
    assert not got.out[~seen].any()
    solved = inputs.probe is None and not inputs.average
    assert bool(got.residual.max() <= options.tol)
    assert bool((got.iterations > 0).any()) == solved
    return got


CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "noncausal": {"causal": False},
    "cross": {"causal": False, "T": 20, "S": 70},
    "more queries": {"T": 70, "S": 33},
    "more keys": {"T": 33, "S": 80},
    "one": {"T": 9, "S": 1},  # one key: nine queries, eight of which see nothing
    "window": {"T": 100, "S": 100, "window": (20, 0)},
    "window both ways": {"T": 40, "S": 50, "window": (7, 3), "causal": False, "heads": 1},
    "mask": {"T": 70, "S": 70, "mask": True, "batch": 2},
    "mask, noncausal": {"mask": True, "causal": False, "batch": 2},
    "bias": {"bias": True},
    "bias, mask, decay": {"bias": True, "mask": True, "decay": "forgets", "T": 35, "S": 50},
    "decay": {"decay": "smooth", "T": 100, "S": 100},
    "decay that forgets": {"decay": "forgets", "T": 100, "S": 100},
    "decay, noncausal": {"decay": "smooth", "causal": False, "T": 20},
    "absolute ridge": {"absolute": True, "ridge": 20.0, "heads": 1},
    "no intercept": {"intercept": False},
    "no intercept, noncausal": {"intercept": False, "causal": False},
    "odd channels": {"D": 24, "Dv": 40},
    "few channels": {"D": 3, "Dv": 5},
    "wide": {"D": 128, "Dv": 64, "T": 20, "S": 20},
    "small ridge": {"ridge": 0.1, "T": 64, "S": 64},
    "grouped": {"heads": 6, "key_heads": 2, "batch": 2},
    "average": {"average": True, "Dv": 9},
    "average, window and mask": {"average": True, "window": (20, 0), "T": 90, "S": 90,
                                 "mask": True},
    "given": {"probe": True, "Dv": 9},
    "given, window and decay": {"probe": True, "window": (20, 0), "decay": "forgets", "T": 40,
                                "S": 90},
    "given, noncausal": {"probe": True, "causal": False},
}  # fmt: skip
FAST = ("window both ways", "bias, mask, decay", "absolute ridge", "average",
        "given, window and decay")  # fmt: skip


@pytest.mark.parametrize("name", FAST)
def test_equals_the_eager_form(name: str) -> None:
    check(sample(**CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in FAST])
def test_equals_the_eager_form_slow(name: str) -> None:
    check(sample(**CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 31, 32, 64, 127, 200])
def test_any_length(length: int) -> None:
    check(sample(heads=1, T=length, S=length, seed=length))


@pytest.mark.parametrize("huge", [1e30, pytest.param(1e4, marks=pytest.mark.slow)])
def test_later_keys_change_no_bit(huge: float) -> None:
    inputs = sample(heads=1, T=36, S=36)
    loose = replace(TIGHT, tol=1e-2, max_iters=20)
    before = interpreted(FORWARD, inputs, loose)
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, :, 30:], v[:, :, 30:] = huge, -huge
    after = interpreted(FORWARD, replace(inputs, k=k, v=v), loose)
    for x, y in zip(before[:5], after[:5], strict=True):
        assert torch.equal(x[:, :, :30], y[:, :, :30])


def test_a_row_minds_only_itself() -> None:
    inputs = sample(heads=4, key_heads=2, batch=2, T=10, S=20, mask=True)
    loose = replace(TIGHT, tol=1e-3)
    whole = interpreted(FORWARD, inputs, loose)
    assert inputs.key_mask is not None
    part = replace(
        inputs, q=inputs.q[1:, 2:], k=inputs.k[1:, 1:], v=inputs.v[1:, 1:],
        key_mask=inputs.key_mask[1:],
    )  # fmt: skip
    for x, y in zip(whole, interpreted(FORWARD, part, loose), strict=True):
        assert torch.equal(x[1:, 2:], y)


@pytest.mark.parametrize(
    "options", [{"mask": True, "window": (9, 0), "bias": True}], ids=["masked"]
)
def test_rows_that_fail_are_solved_again(options: dict[str, Any]) -> None:
    inputs = sample(heads=1, T=20, S=40, **options)
    check(inputs, replace(TIGHT, max_iters=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"decay": "forgets"}, {"absolute": True, "Dv": 5}, {"intercept": False, "causal": False}],
    ids=str,
)
def test_rows_that_fail_are_solved_again_slow(options: dict[str, Any]) -> None:
    check(sample(T=40, S=40, **options), replace(TIGHT, max_iters=2))


def test_zero_tolerance_makes_all_iterations_and_asks_for_nothing() -> None:
    *_, iterations, residual, top, total, mean = interpreted(
        FORWARD, sample(), replace(TIGHT, tol=0.0, max_iters=3)
    )
    assert bool((iterations[:, :, 1:] == 3).all())
    assert bool((residual[:, :, 4:] > 1e-3).all())
    assert top.shape == total.shape == iterations.shape
    assert mean.shape == (*iterations.shape, 16)


def test_singular_to_rounding_gives_the_local_average() -> None:
    """Two equal keys and a ridge that float64 loses beside them."""
    inputs = sample(T=33, S=33, heads=1, ridge=1e-30)
    k = inputs.k.clone()
    k[:, :, 1:] = k[:, :, :1]
    k[:, :, 1:, 0] += 1e6 * torch.arange(32)
    out, slope, _, _, residual, *_ = interpreted(FORWARD, replace(inputs, k=k), TIGHT)
    assert bool(out.isfinite().all())
    lost = residual == 1
    assert not slope[lost].any()


@pytest.mark.slow
def test_the_public_function() -> None:
    inputs = sample(heads=4, key_heads=2, batch=2, mask=True)
    inputs = replace(inputs, k=inputs.k.nan_to_num(), v=inputs.v.nan_to_num(posinf=0.0))
    named = {"causal": True, "key_mask": inputs.key_mask, "tol": 1e-6, "ridge": 0.5}
    got = interpreted(OP, inputs.q, inputs.k, inputs.v, **named, impl="triton")
    wide = (x.double() for x in (inputs.q, inputs.k, inputs.v))
    expected = local_linear_attention(*wide, **named, impl="eager")  # type: ignore[arg-type]
    assert relative_error(got, expected) < BUDGET


@pytest.mark.slow
def test_softmax_and_parallax() -> None:
    inputs = sample(heads=4, key_heads=2, batch=2, T=20, S=40, mask=True, Dv=8)
    q, k, v = inputs.q, inputs.k.nan_to_num(), inputs.v.nan_to_num(posinf=0.0)
    named: dict[str, Any] = {"causal": True, "key_mask": inputs.key_mask}
    got = interpreted("regard.ops:softmax_attention", q, k, v, **named, impl="triton")
    assert relative_error(got, softmax_attention(q, k, v, **named, impl="reference")) < BUDGET
    r = 0.3 * q.flip(2)
    got = interpreted("regard.ops:parallax_attention", q, r, k, v, **named, impl="triton")
    assert relative_error(got, parallax_attention(q, r, k, v, **named, impl="reference")) < BUDGET


def served(dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[Call, bool]:
    """What the registered op would be given for a call, and whether to solve directly."""
    options = dict(options)
    sizes = {"H": 2, "T": 64, "S": 64, "D": 16}
    sizes |= {name: options.pop(name) for name in sizes.keys() & options.keys()}
    H, T, S, D = (sizes[name] for name in "HTSD")
    q, k = (torch.zeros(1, H, n, D, dtype=dtype) for n in (T, S))
    known = {
        "causal": False, "ridge": 1.0, "ridge_mode": "relative", "scale": None, "key_mask": None,
        "key_bias": None, "log_decay": None, "window": None, "tol": 1.5e-3,
        "tol_backward": 1.5e-5,
    }  # fmt: skip
    found: list[tuple[Call, bool]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "run", lambda _op, call, direct: found.append((call, direct)))
        triton.serve(Call(q, k, k, **{**known, **options}))
    return found[0]


@pytest.mark.parametrize(
    ("options", "few"),
    [
        ({"S": 256, "T": 256}, True),
        ({"S": 257, "T": 64}, False),
        ({"S": 256, "T": 300}, False),  # long enough to take more time than its launches
        ({"S": 300, "T": 300, "window": (100, 20)}, True),
        ({"S": 300, "T": 300, "window": (100, -1)}, False),
        ({"S": 300, "T": 10, "window": (100, -1)}, True),
        ({"D": 64}, False),
        ({"D": 64, "intercept": False}, True),
        ({"D": 64, "ridge_mode": "absolute"}, True),
        ({"D": 64, "dtype": torch.float16}, True),
        ({"D": 64, "S": 129, "dtype": torch.float16}, False),
        ({"S": 300, "T": 300, "window": (100, -1), "causal": True}, True),
        ({"precision": "fast"}, False),
        ({"precision": "high"}, True),
        ({"average": True}, False),
        ({"probe": torch.zeros(1, 2, 64, 16)}, False),
        ({"dtype": torch.float32}, False),
    ],
)
def test_calls_of_few_keys_are_computed_as_float32_ones(options: dict[str, Any], few: bool) -> None:
    call, direct = served(**options)
    assert (call.precision == SINGLE) == few
    if few:
        assert (call.tol, call.tol_backward, direct) == (1e-4, 1e-6, False)
    elif options.get("dtype") is None:
        assert call.tol == (1e-2 if call.precision == "fast" else 1.5e-3)
        assert direct == (call.q.shape[3] <= 16)


def test_tolerances_that_are_given_hold_in_calls_of_few_keys() -> None:
    call, _ = served(tol=1e-2, tol_backward=1e-3, given=("tol", "tol_backward"))
    assert (call.tol, call.tol_backward) == (1e-2, 1e-3)
    assert served(tol=1e-2, given=("tol",))[0].tol_backward == 1e-4
    call, direct = served(tol=1e-2, given=("tol", "solver"), solver="direct")
    assert call.tol == 1e-4
    assert not direct


def as_on_a_device(*operands: Tensor, **options: Any) -> Tensor:
    """For `interpreted`: 16-bit inputs with the operands that they have on a device."""
    from regard.ops.local_linear.triton import prepare

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "interpreting", lambda: False)
        return local_linear_attention(*operands, impl="triton", **options)


@pytest.mark.parametrize("options", [{"ridge": 0.1}, {"ridge_mode": "absolute", "scale": 0.2}])
def test_few_keys_cost_no_more_than_rounding_the_inputs(options: dict[str, Any]) -> None:
    """Nine keys of eight channels: with products rounded to 16 bits twice to ten times as much."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(1, 4, 12, 8), draw(1, 2, 9, 8), draw(1, 2, 9, 8)
    options = {**options, "log_decay": -draw(1, 2, 9).abs(), "causal": True, "window": (3, 0)}
    half = [x.half() for x in (q, k, v)]
    exact, rounded = (
        local_linear_attention(*x, **options, impl="reference")
        for x in ((q, k, v), [x.double() for x in half])
    )
    options["log_decay"] = options["log_decay"].float()
    got = interpreted("ops.test_local_linear_triton:as_on_a_device", *half, **options)
    allowed = 1.5 * relative_error(rounded, exact) + relative_error(exact.half(), exact)
    assert relative_error(got, exact) <= allowed


def test_refuses_in_words() -> None:
    q = torch.randn(1, 1, 4, 8)
    for dtype, why in ((torch.float32, "needs a GPU"), (torch.float64, "not float64")):
        x = q.to(dtype)
        with pytest.raises(ValueError, match=why):
            local_linear_attention(x, x, x, impl="triton")
    for options, why in (
        ({"solver": "direct"}, "directly up to a head size"),
        ({"covariance_block": 32}, "block-diagonal"),
        ({"block_size": 16}, "sizes of its tiles"),
    ):
        x = torch.randn(1, 1, 4, 64)
        with pytest.raises(ValueError, match=why):
            interpreted(OP, x, x, x, impl="triton", **options)
    x = torch.randn(1, 1, 4, 160)
    with pytest.raises(ValueError, match="at most 128 channels"):
        interpreted(OP, x, x, x, impl="triton")


def test_the_forms_say_where_they_are_verified() -> None:
    assert [form.auto for form in triton.FORMS] == [True, False]
