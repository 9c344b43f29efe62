"""The Triton form of the delta rule, interpreted in float32, against the eager one in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gpu.interpreter import interpreted
from regard.core.budgets import budget, relative_error
from regard.core.state import FixedState
from regard.ops import delta_attention, gated_delta_attention
from regard.ops.linear.chunked_delta import chunked_delta
from regard.ops.linear.features import unit
from regard.ops.linear.problem import IDENTITY, Feature, Problem
from regard.ops.linear.triton_delta import refuse

pytestmark = pytest.mark.requires("triton")

REGISTERED = "regard.ops.linear.triton_delta.registered"
SCALE = 0.3
VALUE, GRADIENT = budget(torch.float32), budget(torch.float32, "gradient")
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def sample(
    T: int = 70, heads: int = 2, key_heads: int = 1, F: int = 16, E: int = 16, batch: int = 1,
    decay: str = "", length: float = 1.0, reads: bool = True, begun: bool = True, seed: int = 0,
) -> Operands:  # fmt: skip
    """q, k, v, beta, log_decay and the state before; keys of about this length."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    k = draw(batch, key_heads, T, F) * F**-0.5 * length
    log_decay = None
    if decay:
        log_decay = -0.1 * torch.rand(batch, key_heads, T, generator=generator)
    if decay == "extreme" and log_decay is not None:
        log_decay[:, :, T // 3] = -torch.inf
        log_decay[:, :, T // 2] = -40.0
        log_decay[:, :, T // 2 + 1 :: 5] = 0.0
        log_decay[:, :, -1:] = -500.0
    return (
        draw(batch, heads, T if reads else 0, F), k, draw(batch, key_heads, T, E),
        torch.rand(batch, key_heads, T, generator=generator), log_decay,
        draw(batch, key_heads, F, E) if begun else None,
    )  # fmt: skip


def run_both(operands: Operands, normalise: bool) -> tuple[list[Tensor], list[Tensor]]:
    """For the interpreter's process: results and gradients of the operator, against weights."""
    from regard.ops.linear.triton_delta.registered import delta

    fresh = [x if x is None else x.detach().requires_grad_() for x in operands]
    results = delta(*fresh, SCALE, normalise)
    wanted = [x for x in fresh if x is not None]
    return [x.detach() for x in results], list(
        torch.autograd.grad(results, wanted, [weights(x) for x in results])
    )


def weights(x: Tensor) -> Tensor:
    return torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x).sin()


def exact(operands: Operands, normalise: bool) -> tuple[list[Tensor], list[Tensor]]:
    wide = [x if x is None else x.double().requires_grad_() for x in operands]
    q, k, v, beta, log_decay, state = wide
    assert q is not None
    assert k is not None
    if state is None:
        state = torch.zeros(*k.shape[:2], k.shape[3], operands[2].shape[3], dtype=torch.float64)
    results = chunked_delta(q * SCALE, unit(k) if normalise else k, v, beta, log_decay, state)
    wanted = [x for x in wide if x is not None]
    found = torch.autograd.grad(results, wanted, [weights(x) for x in results])
    return list(results), list(found)


def check(operands: Operands, normalise: bool = True) -> None:
    got, gradients = interpreted("ops.test_linear_triton_delta:run_both", operands, normalise)
    expected, wanted = exact(operands, normalise)
    for x, y in zip(got, expected, strict=True):
        assert relative_error(x, y) < VALUE
    for x, y in zip(gradients, wanted, strict=True):
        assert relative_error(x, y) < GRADIENT


CASES: dict[str, dict[str, Any]] = {
    "grouped, extreme decays": {"T": 70, "decay": "extreme"},
    "no decay, from nothing": {"heads": 1, "begun": False},
    "decay, odd channels": {"decay": "soft", "F": 9, "E": 40, "heads": 1},
    "groups in a batch": {"heads": 4, "key_heads": 2, "batch": 2, "decay": "soft"},
    "long": {"T": 200, "decay": "extreme", "heads": 1},
    "wide": {"F": 128, "E": 64, "T": 65, "heads": 1},
    "encode": {"reads": False, "decay": "soft"},
    "few tokens": {"T": 3, "decay": "extreme"},
    "few tokens, from nothing": {"T": 4, "decay": "soft", "begun": False},
}
FAST = ("grouped, extreme decays", "no decay, from nothing", "few tokens", "encode")


@pytest.mark.parametrize("name", FAST)
def test_value_and_gradients(name: str) -> None:
    check(sample(**CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in FAST])
def test_value_and_gradients_slow(name: str) -> None:
    check(sample(**CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 2, 5, 16, 17, 63, 64, 65, 128, 256])
def test_any_length(T: int) -> None:
    check(sample(T, heads=1, decay="soft", seed=T))


def test_keys_as_they_are() -> None:
    check(sample(heads=1, length=0.8), normalise=False)


@pytest.mark.slow
def test_keys_that_are_nearly_the_same() -> None:
    """The system is then as far from the identity as it can be."""
    q, k, v, beta, decay, state = sample(T=100, heads=1)
    check((q, k[:, :, :1] + 0.01 * k, v, beta * 0 + 1, decay, state))


def test_later_tokens_change_no_bit() -> None:
    q, k, v, beta, decay, state = sample(T=60, heads=1, length=0.5)
    name = f"{REGISTERED}:run_forward"
    before, _ = interpreted(name, q, k, v, beta, decay, state, SCALE, False)
    k, v = k.clone(), v.clone()
    k[:, :, 40:], v[:, :, 40:] = 1e30, -1e30
    after, _ = interpreted(name, q, k, v, beta, decay, state, SCALE, False)
    assert torch.equal(before[:, :, :40], after[:, :, :40])
    assert bool(after[:, :, 42:].isnan().all())


def test_what_overflowed_is_forgotten() -> None:
    q, k, v, beta, decay, state = sample(T=140, heads=1, decay="soft", length=0.5)
    assert decay is not None
    k[:, :, 10:20] = 1e25
    decay[:, :, 30] = -torch.inf
    operands = q, k, v, beta, decay, state
    out, last = interpreted(f"{REGISTERED}:run_forward", *operands, SCALE, False)
    assert bool(out[:, :, 12:30].isnan().all())
    rest = tuple(x if x is state else x[:, :, 30:] for x in operands)
    expected, _ = exact(rest, False)  # type: ignore[arg-type]
    assert relative_error(out[:, :, 30:], expected[0]) < VALUE
    assert relative_error(last, expected[1]) < VALUE


def test_gradients_do_not_meet_what_overflowed_later() -> None:
    operands = sample(T=70, heads=1, length=0.5)
    q, k, v, beta, decay, state = operands
    k = k.clone()
    k[:, :, 50:] = 1e25
    d_out = torch.zeros(1, 1, 70, 16)
    d_out[:, :, :40] = 1.0
    name, rest = f"{REGISTERED}:run_backward", (torch.zeros_like(state), q)
    got = interpreted(name, d_out, *rest, k, v, beta, decay, state, SCALE, False, False)
    want = interpreted(name, d_out, *rest, operands[1], *operands[2:], SCALE, False, False)
    for x, y in zip(got[:4], want[:4], strict=True):
        assert relative_error(x[:, :, :40], y[:, :, :40]) < VALUE


def test_a_row_minds_only_itself() -> None:
    operands = sample(T=40, heads=4, key_heads=2, batch=2, decay="soft")
    name = f"{REGISTERED}:run_forward"
    out, last = interpreted(name, *operands, SCALE, True)
    part = [x if x is None else x[1:, x.shape[1] // 2 :] for x in operands]
    out_1, last_1 = interpreted(name, *part, SCALE, True)
    assert torch.equal(out[1:, 2:], out_1)
    assert torch.equal(last[1:, 1:], last_1)


def call(name: str, operands: dict[str, Any], **options: Any) -> Any:
    """For the interpreter's process: a public function."""
    found = {"delta": delta_attention, "gated": gated_delta_attention}[name]
    return found(**operands, **options)


@pytest.mark.parametrize("gated", [False, True])
def test_the_public_functions(gated: bool) -> None:
    """Masked keys, more keys than queries, a scale per head, a state in and out."""
    q, k, v, beta, log_decay, state = sample(T=30, heads=4, key_heads=2, batch=2, decay="soft")
    mask = torch.rand(2, 30, generator=torch.Generator().manual_seed(1)) > 0.3
    k, v = (torch.where(mask[:, None, :, None], x, torch.nan) for x in (k, v))
    name, own = ("gated", {"log_decay": log_decay}) if gated else ("delta", {})
    held = FixedState("gated_delta" if gated else "delta", 7, {"S": state})
    operands = {"q": q[:, :, 10:], "k": k, "v": v, "beta": beta, **own}
    options = {"key_mask": mask, "scale": torch.tensor([0.2, 0.3, 0.4, 0.5]), "return_state": True}
    for causal in (True, False):
        given = {**options, "state": held, "causal": causal}
        path = "ops.test_linear_triton_delta:call"
        out, after = interpreted(path, name, operands, impl="triton", **given)
        expected, wanted = call(name, operands, impl="eager", **given)
        assert relative_error(out, expected) < VALUE
        assert relative_error(after["S"], wanted["S"]) < VALUE
        assert after.length == 37


def test_packed_sequences_are_separate() -> None:
    q, k, v, beta, *_ = sample(T=40, heads=2)
    operands = {"q": q, "k": k, "v": v, "beta": beta}
    given = {"cu_seqlens": torch.tensor([0, 15, 15, 40], dtype=torch.int32), "causal": True}
    path = "ops.test_linear_triton_delta:call"
    out = interpreted(path, "delta", operands, impl="triton", **given)
    assert relative_error(out, delta_attention(**operands, **given)) < VALUE


def test_what_is_refused() -> None:
    q, k, v, beta, *_ = sample(T=5)
    problem = Problem(q, k, v, causal=True, beta=beta)
    assert "needs a GPU" in (refuse(problem) or "")
    assert "for the delta rule" in (refuse(problem._replace(beta=None)) or "")
    assert "normaliser" in (refuse(problem._replace(normaliser="sum")) or "")
    other = Feature("elu", torch.nn.functional.elu)
    assert "not elu" in (refuse(problem._replace(key_map=other)) or "")
    assert "of elu" in (refuse(problem._replace(query_map=other)) or "")
    assert problem.key_map is IDENTITY


def refusal(*shape: int, chunk: int | None = None) -> str | None:
    """For the interpreter's process."""
    x = torch.zeros(1, 1, *shape)
    return refuse(Problem(x, x, x, causal=True, beta=x[..., 0], chunk=chunk))


def test_what_is_refused_by_size() -> None:
    path = "ops.test_linear_triton_delta:refusal"
    assert interpreted(path, 5, 16) is None
    assert "at most 128" in interpreted(path, 5, 129)
    assert "64 tokens" in interpreted(path, 5, 16, chunk=32)
