"""The Triton backward, interpreted, against autograd through the equations in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gpu.interpreter import gradients, interpreted
from gpu.stale import stale_memory
from regard.core.budgets import relative_error
from regard.ops import local_linear_attention, parallax_attention, softmax_attention
from regard.ops.local_linear.backward import Wanted
from regard.ops.local_linear.layout import Inputs
from regard.ops.local_linear.registered import Options
from regard.ops.local_linear.triton import table

pytestmark = pytest.mark.requires("triton")
slow = pytest.mark.slow

BUDGET = 1e-4  # of a float32 gradient
HALF_BUDGET = 5e-3  # where products have 16-bit operands


def sample(
    heads: int = 2, key_heads: int = 1, T: int = 37, S: int = 37, D: int = 16, Dv: int = 16,
    batch: int = 1, seed: int = 0,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """q, k, v that want a gradient, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    operands = {
        "q": draw(batch, heads, T, D), "k": draw(batch, key_heads, S, D),
        "v": draw(batch, key_heads, S, Dv),
    }  # fmt: skip
    return {n: x.requires_grad_() for n, x in operands.items()}, draw(batch, heads, T, Dv)


def found_by_kernels(
    path: str, operands: dict[str, Any], options: dict[str, Any], cotangent: Tensor
) -> dict[str, Tensor]:
    _, found = interpreted("gpu.interpreter:gradients", path, operands, options, cotangent)
    return found


def found_by_autograd(
    op: Any, operands: dict[str, Any], options: dict[str, Any], cotangent: Tensor
) -> dict[str, Tensor]:
    wide = {
        n: x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for n, x in operands.items()
    }
    out = op(**wide, **options, impl="reference")
    wanted = {n: x for n, x in wide.items() if isinstance(x, Tensor) and x.requires_grad}
    found = torch.autograd.grad(out, list(wanted.values()), cotangent.double())
    return dict(zip(wanted, found, strict=True))


def check(
    path: str, op: Any, operands: dict[str, Any], options: dict[str, Any], cotangent: Tensor,
    **more: Any,
) -> None:  # fmt: skip
    found = found_by_kernels(path, operands, {**options, "impl": "triton", **more}, cotangent)
    expected = found_by_autograd(op, operands, options, cotangent)
    assert found.keys() == expected.keys()
    errors = {n: relative_error(found[n], expected[n]) for n in found}
    assert max(errors.values()) <= BUDGET, errors


def check_local(
    operands: dict[str, Any], options: dict[str, Any], cotangent: Tensor, tol: float = 1e-6
) -> None:
    path = "regard.ops:local_linear_attention"
    more = {"tol": tol, "tol_backward": 1e-7}
    check(path, local_linear_attention, operands, options, cotangent, **more)


PATTERNS = {
    "causal": ({}, {"causal": True}),
    "noncausal": ({}, {}),
    "cross": ({"T": 21, "S": 50}, {}),
    "continued": ({"T": 21, "S": 50}, {"causal": True}),
    "more queries than keys": ({"T": 50, "S": 21}, {"causal": True}),
    "one key": ({"T": 3, "S": 1}, {}),
    "grouped, Dv != D": ({"heads": 4, "key_heads": 2, "D": 20, "Dv": 33}, {"causal": True}),
    "band": ({"T": 70, "S": 70}, {"window": (9, 4)}),
}


@slow
@pytest.mark.parametrize("name", PATTERNS)
def test_gradients_of_queries_keys_and_values(name: str) -> None:
    sizes, options = PATTERNS[name]
    operands, cotangent = sample(**sizes)
    check_local(operands, {**options, "ridge": 0.5}, cotangent)


@pytest.mark.parametrize(
    ("mode", "intercept"),
    [
        ("relative", True),
        *(pytest.param(*case, marks=slow) for case in
          [("relative", False), ("absolute", True), ("absolute", False)]),
    ],
)  # fmt: skip
def test_gradients_of_every_operand(mode: str, intercept: bool) -> None:
    operands, cotangent = sample(T=18, S=27)
    generator = torch.Generator().manual_seed(1)
    more = {
        "ridge": 0.5 + torch.rand(1, 2, 18, generator=generator),
        "scale": 0.2 + 0.1 * torch.rand(2, generator=generator),
        "key_bias": torch.randn(1, 1, 27, generator=generator),
        "log_decay": -0.2 * torch.rand(1, 2, 27, generator=generator),
    }
    operands |= {n: x.requires_grad_() for n, x in more.items()}
    options = {"causal": True, "ridge_mode": mode, "intercept": intercept}
    check_local(operands, options, cotangent)


@slow
def test_gradients_where_a_decay_forgets() -> None:
    operands, cotangent = sample(T=50, S=50)
    log_decay = -0.1 * torch.rand(1, 2, 50, generator=torch.Generator().manual_seed(2))
    log_decay[0, 1, 20] = -torch.inf
    operands["log_decay"] = log_decay.requires_grad_()
    check_local(operands, {"causal": True, "ridge": 0.5}, cotangent)


@slow
def test_gradients_of_a_gaussian_kernel() -> None:
    operands, cotangent = sample(T=12, S=20)
    operands["ridge"] = torch.tensor(0.5, requires_grad=True)
    options = {"kernel": "gaussian", "ridge_mode": "absolute", "scale": 0.1}
    check_local(operands, options, cotangent)


@slow
def test_g_of_a_loose_forward_is_refined() -> None:
    operands, cotangent = sample()
    check_local(operands, {"causal": True, "ridge": 0.5}, cotangent, tol=1e-2)


def test_masked_keys_and_rows_without_a_gradient_may_hold_anything() -> None:
    operands, cotangent = sample(heads=1, T=30, S=30)
    mask = torch.ones(1, 30, dtype=torch.bool)
    mask[:, 5:17] = False
    clean = {n: x.detach().clone() for n, x in operands.items()}
    cotangent[:, :, 5:17] = 0
    for name in ("k", "v"):
        clean[name][:, :, 5:17] = 0
    clean["q"][:, :, 5:17] = 0
    junk = {n: x.clone() for n, x in clean.items()}
    for x in junk.values():
        x[:, :, 5:17] = torch.nan
    options = {"causal": True, "impl": "triton", "key_mask": mask}
    path = "regard.ops:local_linear_attention"
    for x in (*clean.values(), *junk.values()):
        x.requires_grad_()
    pair = [found_by_kernels(path, given, options, cotangent) for given in (clean, junk)]
    for name in ("q", "k", "v"):
        assert torch.equal(pair[0][name], pair[1][name])
        assert pair[0][name][:, :, 5:17].count_nonzero() == 0


@slow
def test_later_keys_change_no_bit_of_earlier_gradients() -> None:
    operands, cotangent = sample(T=40, S=40)
    cotangent[:, :, 20:] = 0
    other = {n: x.detach().clone() for n, x in operands.items()}
    other["k"][:, :, 20:] = 1e30
    other["v"][:, :, 20:] = -1e30
    options = {"causal": True, "impl": "triton"}
    path = "regard.ops:local_linear_attention"
    one = found_by_kernels(path, operands, options, cotangent)
    two = found_by_kernels(
        path, {n: x.requires_grad_() for n, x in other.items()}, options, cotangent
    )
    for name in ("q", "k", "v"):
        assert torch.equal(one[name][:, :, :20], two[name][:, :, :20])


@slow
@pytest.mark.parametrize("wanted", ["q", "k", "v", "ridge"])
def test_one_gradient_alone_is_that_of_all(wanted: str) -> None:
    operands, cotangent = sample(T=20, S=20)
    operands["ridge"] = torch.tensor(0.7, requires_grad=True)
    options = {"causal": True, "impl": "triton", "tol": 1e-6, "tol_backward": 1e-6}
    path = "regard.ops:local_linear_attention"
    everything = found_by_kernels(path, operands, options, cotangent)
    alone = {n: x.detach().requires_grad_(n == wanted) for n, x in operands.items()}
    found = found_by_kernels(path, alone, options, cotangent)
    assert relative_error(found[wanted], everything[wanted]) <= 1e-5


def test_rows_that_cannot_be_solved_are_solved_again() -> None:
    operands, cotangent = sample(T=33, S=33)
    options = {"causal": True, "ridge": 0.01}
    # Two iterations are too few for most rows: float64 does the others.
    path = "regard.ops:local_linear_attention"
    more = {"tol": 1e-6, "tol_backward": 1e-6, "max_iters": 2}
    check(path, local_linear_attention, operands, options, cotangent, **more)


def test_gradients_of_an_average() -> None:
    """g = 0: softmax attention by the kernels of the engine."""
    operands, cotangent = sample(T=21, S=50)
    q, k, v = (operands[name].detach() for name in "qkv")
    one = torch.ones(1, 1, 1)
    inputs = Inputs(
        q, k, v, one, one[0] * 16**-0.5, None, None, None, causal=True, window=(-1, -1),
        absolute=False, average=True,
    )  # fmt: skip
    options = Options(False, 1e-4, 1e-6, 0, 0, "auto")
    wanted = Wanted(True, True, True, *[False] * 6)
    path = "regard.ops.local_linear.triton"
    _, slope, lse, _, _, *extras = interpreted(f"{path}:run_forward", inputs, options)
    saved = (cotangent, slope, lse, tuple(extras), wanted)
    found = interpreted(f"{path}:run_backward", inputs, options, *saved)
    expected = found_by_autograd(softmax_attention, operands, {"causal": True}, cotangent)
    for name, gradient in zip("qkv", found, strict=False):
        assert relative_error(gradient, expected[name]) <= BUDGET


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=slow)])
def test_gradients_of_parallax(causal: bool) -> None:
    operands, cotangent = sample(heads=4, key_heads=2, T=21, S=50)
    operands["r"] = (0.3 * torch.randn(1, 4, 21, 16)).requires_grad_()
    path, options = "regard.ops:parallax_attention", {"causal": causal}
    check(path, parallax_attention, operands, options, cotangent)


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_every_row_that_the_last_pass_reads_was_written(
    width: int, half: bool, scored: bool
) -> None:
    """Its tiles may stick out of the queries, but not out of the tiles of the passes before."""
    from regard.ops.local_linear.triton.prepare import PAD

    rows = {
        kernel: table.config(kernel, width, half, scored=scored).rows
        for kernel in ("cotangent", "cotangent_two", "queries", "keys")
    }
    assert all(height % rows["keys"] == 0 and PAD % height == 0 for height in rows.values()), rows


def as_on_a_device(
    path: str, operands: dict[str, Any], options: dict[str, Any], cotangent: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """For `interpreted`: output and gradients with tiles and products of a device, in memory that
    was used before."""
    from regard.ops.local_linear.triton import launch, prepare

    def tiles(kernel: str, width: int, *_: Any) -> table.Config:
        return table.config(kernel, width, half=True)._replace(descriptor=False)

    with pytest.MonkeyPatch.context() as patch, stale_memory():
        patch.setattr(launch, "config", tiles)
        patch.setattr(prepare, "operand_dtype", lambda *_: torch.float16)
        return gradients(path, operands, options, cotangent)


AS_ON_A_DEVICE = "ops.test_local_linear_triton_backward:as_on_a_device"


@pytest.mark.parametrize(
    ("name", "T"),
    [("parallax", 31), *(pytest.param(*case, marks=slow) for case in
                         [("parallax", 130), ("local_linear", 31), ("local_linear", 130)])],
)  # fmt: skip
def test_kernels_with_tiles_of_different_heights(name: str, T: int) -> None:
    """Rows beyond the last query, which one of them leaves as memory came, count for nothing.

    With 96 channels the first pass has tiles of 64 queries, the second of 128.
    """
    operands, cotangent = sample(heads=2, key_heads=2, T=T, S=T, D=96, Dv=8)
    options: dict[str, Any] = {"causal": True, "scale": 0.2}
    more: dict[str, Any] = {"impl": "triton"}
    op: Any = parallax_attention
    if name == "parallax":
        generator = torch.Generator().manual_seed(1)
        operands["r"] = (0.3 * torch.randn(1, 2, T, 96, generator=generator)).requires_grad_()
    else:  # whose g is refined, which takes the first pass with two sums
        op, options["ridge"] = local_linear_attention, 0.5
        more |= {"tol": 1e-2, "tol_backward": 1e-7}
    given = (f"regard.ops:{name}_attention", operands, {**options, **more}, cotangent)
    _, found = interpreted(AS_ON_A_DEVICE, *given)
    expected = found_by_autograd(op, operands, options, cotangent)
    errors = {n: relative_error(found[n], expected[n]) for n in expected}
    assert max(errors.values()) <= HALF_BUDGET, errors


@pytest.mark.parametrize("T", [16, 80])  # by the kernels of decoding, and by tiles
def test_a_row_of_parallax_that_sees_one_key_gives_its_value(T: int) -> None:
    """Its weight is 1 for every r, however products round what r makes of it."""
    operands, cotangent = sample(T=T, S=T, D=32)
    generator = torch.Generator().manual_seed(1)
    operands["r"] = (3 * torch.randn(1, 2, T, 32, generator=generator)).requires_grad_()
    halves = {n: x.detach().half() for n, x in operands.items()}
    options = {"window": (0, 0), "impl": "triton"}
    path = "regard.ops:parallax_attention"
    if T == 16:
        out = interpreted(path, **halves, **options)
    else:
        operands = {n: x.float().requires_grad_() for n, x in halves.items()}
        out, _ = interpreted(AS_ON_A_DEVICE, path, operands, options, cotangent)
    assert relative_error(out, halves["v"].expand_as(out)) <= 1e-4
