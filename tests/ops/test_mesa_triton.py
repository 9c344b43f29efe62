"""The Triton form of Mesa, interpreted in float32, against the direct solve in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gpu.interpreter import interpreted
from regard.core.budgets import budget, relative_error
from regard.core.state import FixedState
from regard.ops import mesa_attention

pytestmark = pytest.mark.requires("triton")

OP = "regard.ops:mesa_attention"
VALUE, GRADIENT = budget(torch.float32), budget(torch.float32, "gradient")
KERNELS = {"causal": True, "solver": "cg", "tol": 1e-6, "impl": "triton"}


def sample(
    T: int = 70, S: int | None = None, heads: int = 2, key_heads: int = 1, D: int = 16,
    Dv: int = 16, batch: int = 1, decay: str = "", beta: bool = True, ridge: str = "number",
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Arguments by name: unit queries and keys."""
    generator = torch.Generator().manual_seed(seed)
    S = T if S is None else S

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def unit(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x, dim=-1)

    found: dict[str, Any] = {
        "q": unit(draw(batch, heads, T, D)), "k": unit(draw(batch, key_heads, S, D)),
        "v": draw(batch, key_heads, S, Dv),
        "ridge": 0.5 if ridge == "number" else 0.3 + torch.rand(heads, D, generator=generator),
    }  # fmt: skip
    if beta:
        found["beta"] = torch.rand(batch, key_heads, S, generator=generator)
    if decay:
        found["log_decay"] = -0.1 * torch.rand(batch, key_heads, S, generator=generator)
    if decay == "extreme":
        found["log_decay"][:, :, S // 3] = -torch.inf
        found["log_decay"][:, :, S // 2] = -40.0
        found["log_decay"][:, :, -1:] = 0.0
    return found


def wide(operands: dict[str, Any]) -> dict[str, Any]:
    return {n: x.double() if isinstance(x, Tensor) else x for n, x in operands.items()}


def exact(operands: dict[str, Any], **options: Any) -> Any:
    return mesa_attention(**wide(operands), causal=True, solver="direct", impl="eager", **options)


def check(operands: dict[str, Any]) -> None:
    operands = {n: x.requires_grad_() if isinstance(x, Tensor) else x for n, x in operands.items()}
    doubles = wide(operands)
    expected = exact(doubles)
    cotangent = torch.linspace(-1, 2, expected.numel()).view_as(expected).sin()
    out, got = interpreted("gpu.interpreter:gradients", OP, operands, KERNELS, cotangent)
    assert relative_error(out, expected) < VALUE
    tensors = [x for x in doubles.values() if isinstance(x, Tensor)]
    wanted = torch.autograd.grad(expected, tensors, cotangent.double())
    for x, y in zip(got.values(), wanted, strict=True):
        assert relative_error(x, y) < GRADIENT


CASES: dict[str, dict[str, Any]] = {
    "grouped, extreme decays, a ridge per channel": {"decay": "extreme", "ridge": "channels"},
    "no decay, no beta": {"beta": False, "heads": 1},
    "odd channels": {"D": 9, "Dv": 40, "decay": "soft", "T": 66, "heads": 1},
    "in a batch": {"batch": 2, "heads": 4, "key_heads": 2, "decay": "soft"},
    "long": {"T": 200, "decay": "extreme", "heads": 1},
    "wide": {"D": 128, "Dv": 64, "T": 65, "heads": 1},
    "more keys": {"T": 20, "S": 90, "decay": "soft"},
    "more queries": {"T": 70, "S": 20},
    "one": {"T": 1},
}
FAST = ("grouped, extreme decays, a ridge per channel", "one")


@pytest.mark.parametrize("name", FAST)
def test_value_and_gradients(name: str) -> None:
    check(sample(**CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in FAST])
def test_value_and_gradients_slow(name: str) -> None:
    check(sample(**CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("T", [2, 63, 64, 65, 128, 256])
def test_any_length(T: int) -> None:
    check(sample(T, heads=1, decay="soft", seed=T))


def test_a_state_and_masked_keys() -> None:
    operands = sample(T=30, S=40, batch=2, decay="soft")
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) > 0.3
    for name in ("k", "v"):
        operands[name] = torch.where(mask[:, None, :, None], operands[name], torch.nan)
    square = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    held = {"Hkk": square @ square.mT / 16, "Hkv": square}
    options = {"key_mask": mask, "return_state": True}
    out, after = interpreted(
        OP, **operands, **KERNELS, **options, state=FixedState("mesa", 5, held)
    )
    doubles = FixedState("mesa", 5, {name: x.double() for name, x in held.items()})
    expected, wanted = exact(operands, **options, state=doubles)
    assert relative_error(out, expected) < VALUE
    for name in held:
        assert relative_error(after[name], wanted[name]) < VALUE


def steps(operands: dict[str, Any], tol: float, limit: int) -> Tensor:
    """For the interpreter's process: how many steps each tile made."""
    from regard.ops.mesa.triton import mesa

    q, k, v, beta = (operands[name] for name in ("q", "k", "v", "beta"))
    square = q.new_zeros(1, 1, 16, 16)
    ridge = q.new_full((1, 1, 16), operands["ridge"])
    return mesa(q, k, v, beta, None, square, square, ridge, tol, tol, limit)[4]


def test_it_stops_when_all_rows_have() -> None:
    operands = sample(T=100, heads=1)
    path = "ops.test_mesa_triton:steps"
    loose, tight, all_of_them = (
        interpreted(path, operands, tol, limit) for tol, limit in ((1e-1, 0), (1e-5, 0), (0.0, 30))
    )
    assert 0 < int(loose.max()) < int(tight.max()) < 25
    assert all_of_them.tolist() == [[[30, 30]]]


def test_later_keys_change_no_bit() -> None:
    operands = sample(T=60, heads=1)
    options = {**KERNELS, "tol": 0.0, "max_iters": 3}
    before = interpreted(OP, **operands, **options)
    for name in ("k", "v"):
        operands[name] = operands[name].clone()
        operands[name][:, :, 40:] = 1e30
    after = interpreted(OP, **operands, **options)
    assert torch.equal(before[:, :, :40], after[:, :, :40])
    assert bool(after.isfinite().all())  # a query whose sums overflow gives 0


def test_what_is_refused() -> None:
    operands = sample(T=5)
    with pytest.raises(ValueError, match="needs a GPU"):
        mesa_attention(**operands, **KERNELS)
    reasons = {
        "not causal": {"causal": False}, "conjugate gradients, not 'direct'": {"solver": "direct"},
        "not 'official'": {"compat": "official", "solver": "auto", "tol": None},
        "64 tokens": {"chunk_size": 32},
    }  # fmt: skip
    for words, options in reasons.items():
        with pytest.raises(ValueError, match=words):
            interpreted(OP, **operands, **{**KERNELS, **options})
