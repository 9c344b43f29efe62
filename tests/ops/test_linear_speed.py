"""Times of the linear family beside softmax attention, and how they grow: one thread, CPU time.

A lower bound, which a busy machine holds too; `benchmarks/linear.py` has the figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.nn.functional import normalize, scaled_dot_product_attention

from ops.samples import megabytes_over_inputs
from regard.models.l2vit.model import LGABlock
from regard.ops.inline import inline_attention
from regard.ops.lightning import lightning_attention
from regard.ops.mesa import mesa_attention
from regard.ops.rat import rat_attention
from regard.ops.relu_linear import relu_linear_attention

pytestmark = pytest.mark.slow

DECAY = -torch.tensor([0.25, 0.0625, 0.015625, 0.00390625]).view(1, 4, 1)


def least(function: Callable[[], object], runs: int) -> float:
    """Seconds of CPU time, the least of several runs."""
    best = float("inf")
    for _ in range(runs):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


def operands(T: int) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(T)
    return [torch.randn(1, 4, T, 64, generator=make) for _ in range(3)]


def lightning(q, k, v):
    return lightning_attention(q, k, v, causal=True, log_decay=DECAY.expand(1, 4, q.shape[2]))


def rat(q, k, v, *, chunk_length):
    return rat_attention(q, k, v, gate=k.sigmoid(), chunk_length=chunk_length, causal=True)


@pytest.mark.parametrize(
    ("op", "causal", "times", "growth"),
    [
        pytest.param(lightning, True, (2.5, 8, 25), 4.6, id="lightning"),
        pytest.param(inline_attention, False, (8, 25, 100), 4.6, id="inline"),
        pytest.param(relu_linear_attention, False, (8, 15, 50), 4.8, id="relu_linear"),
        pytest.param(partial(rat, chunk_length=16), True, (3, 6, 6), None, id="rat 16"),
        pytest.param(partial(rat, chunk_length=64), True, (3, 6, 10), None, id="rat 64"),
    ],
)
def test_is_as_many_times_as_fast_as_softmax(op, causal, times, growth):
    found = {}
    with torch.inference_mode():
        for T, must in zip((1024, 4096, 16384), times, strict=True):
            q, k, v = operands(T)
            softmax = partial(scaled_dot_product_attention, q, k, v, is_causal=causal)
            ours, theirs = partial(op, q, k, v), least(softmax, 2)
            found[T] = least(ours, 15)
            assert theirs / found[T] >= must, f"T={T}: {theirs / found[T]:.1f} times as fast"
        if growth is not None:  # in turns: the long one leaves nothing of the short one in a cache
            calls = [partial(op, *operands(T)) for T in (4096, 16384)]
            short, long = map(min, zip(*([least(f, 1) for f in calls] for _ in range(15)),
                                       strict=True))  # fmt: skip
            assert long / short < growth


@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_mesa_grows_with_the_length(solver):
    """From 2048 to 8192 tokens by 3 to 5.5 times, for an iteration count that does not change."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 8192, 32, generator=make) for _ in range(3))
    q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    options = {"causal": True, "solver": solver, "log_decay": torch.full((1, 2, 8192), -0.02)}
    if solver == "cg":
        options |= {"tol": 0.0, "max_iters": 15}

    def cut(n: int) -> Callable[[], object]:
        given = {**options, "log_decay": options["log_decay"][:, :, :n]}
        return partial(mesa_attention, q[:, :, :n], k[:, :, :n], v[:, :, :n], **given)

    with torch.inference_mode():
        short, long = map(min, zip(*([least(cut(n), 1) for n in (2048, 8192)] for _ in range(7)),
                                   strict=True))  # fmt: skip
    assert 3 < long / short < 5.5


def test_a_token_of_lightning_takes_as_long_behind_any_past():
    make = torch.Generator().manual_seed(0)
    token = [torch.randn(1, 8, 1, 64, generator=make) for _ in range(3)]
    decay, states = torch.full((1, 8, 1), -1e-3), []
    for length in (100, 100_000):
        q, k, v = (torch.randn(1, 8, length, 64, generator=make) for _ in range(3))
        _, state = lightning_attention(
            q, k, v, causal=True, log_decay=decay.expand(1, 8, length), return_state=True
        )
        states.append(state)

    def seconds(state) -> float:
        def steps() -> None:
            for _ in range(50):
                lightning_attention(
                    *token, causal=True, log_decay=decay, state=state, return_state=True
                )

        return least(steps, 15)

    with torch.inference_mode():
        ratios = [seconds(states[1]) / seconds(states[0]) for _ in range(3)]
    assert min(ratios) < 1.2


def test_a_block_of_l2vit_takes_time_in_proportion_to_the_map():
    block = LGABlock(64, heads=2).eval()
    with torch.inference_mode():
        small, large = (
            least(partial(block, torch.randn(1, side, side, 64)), 7) for side in (32, 64)
        )
    assert large / small <= 4.8


def test_rat_over_16k_tokens_makes_no_square():
    grown = megabytes_over_inputs(
        "regard.ops:rat_attention", 16384, again=True,
        options="causal=True, chunk_length=16, gate=given[1].sigmoid()",
    )  # fmt: skip
    assert grown < 200
