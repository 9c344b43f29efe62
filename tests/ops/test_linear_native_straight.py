"""Whole panels of a walk, which keep a decay as a number of its own, beside those that do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.core.budgets import relative_error
from regard.native import instruction_sets, limited_to
from regard.ops.gated_delta import gated_delta_attention
from regard.ops.lightning import lightning_attention

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="no native library here")

T, D, E = 203, 24, 64  # whole panels on every instruction set


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest):
    with limited_to(request.param):
        yield request.param


def operands() -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(5)
    q, k = torch.randn(2, 1, 2, T, D, generator=make)
    v = torch.randn(1, 2, T, E, generator=make)
    return q, k, v, torch.rand(1, 2, T, generator=make)


def decays(name: str) -> Tensor:
    make = torch.Generator().manual_seed(7)
    uniform = torch.rand(1, 2, T, generator=make)
    found = {
        "none": torch.zeros(1, 2, T), "slow": -0.05 * uniform, "fast": -3.0 * uniform,
        "steep": -40.0 * uniform, "grows": 0.04 * uniform, "both": 2.0 * uniform - 1.0,
        "constant": torch.full((1, 2, T), -1e-4),
    }  # fmt: skip
    if name in found:
        return found[name]
    log_decay = found["slow"]
    log_decay[uniform > 0.9] = -torch.inf
    if name == "often":
        log_decay[:, :, 50:70] = -torch.inf
    return log_decay


NAMES = (
    "none", "slow", "fast", "steep", "grows", "both", "constant", "sometimes -inf", "often",
)  # fmt: skip


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_against_float64_and_ragged_panels(isa: str, name: str, delta: bool):
    q, k, v, beta = operands()
    log_decay = decays(name)

    def run(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, **more):
        given = {"log_decay": a, "causal": True, "return_state": True, **more}
        if delta:
            return gated_delta_attention(q, k, v, beta=b, **given)
        return lightning_attention(q, k, v, **given)

    exact, last = run(*(x.double() for x in (q, k, v, log_decay, beta)), impl="reference")
    out, state = run(q, k, v, log_decay, beta, impl="native")
    assert relative_error(out, exact) < 2e-6
    assert relative_error(state["S"], last["S"]) < 2e-6
    # Columns do not know of each other: those of a panel that is not whole take the other way.
    for width in (1, 3):
        ragged, other = run(q, k, v[..., :width], log_decay, beta, impl="native")
        assert relative_error(ragged, out[..., :width]) < 1e-6
        assert relative_error(other["S"], state["S"][..., :width]) < 1e-6
    split = 77
    parts = [x[:, :, :split] for x in (q, k, v, log_decay, beta)]
    rest = [x[:, :, split:] for x in (q, k, v, log_decay, beta)]
    first, past = run(*parts, impl="native")
    second, after = run(*rest, state=past, impl="native")
    assert relative_error(torch.cat([first, second], 2), out) < 1e-6
    assert relative_error(after["S"], state["S"]) < 1e-6


@pytest.mark.parametrize("what", ["infinite", "NaN"])
def test_what_is_forgotten_may_be_anything(isa: str, what: str):
    q, k, v, _ = operands()
    log_decay = decays("slow")
    log_decay[:, :, 100] = -torch.inf
    v[:, :, 60] = torch.inf if what == "infinite" else torch.nan
    out = lightning_attention(q, k, v, log_decay=log_decay, causal=True, impl="native")
    assert not out[:, :, 60:100].isfinite().any()
    clean = lightning_attention(
        q[:, :, 100:], k[:, :, 100:], v[:, :, 100:], causal=True, impl="native",
        log_decay=log_decay[:, :, 100:],
    )  # fmt: skip
    assert relative_error(out[:, :, 100:], clean) < 1e-6
