"""Sums formed in C equal those of torch, with every set of instructions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import regard
from regard.lens import reductions, sums
from regard.lens.reductions import Reduce
from regard.lens.taps.call import Attention

ISAS = regard.native.instruction_sets()
NAMES = ("entropy", "received", "top_weights", "distance", "profile")


def call(T: int, S: int, seed: int = 0, **more: Any) -> Attention:
    made = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, n, 5, generator=made) for h, n in ((4, T), (2, S), (2, S)))
    options = {"layer": 0, "name": "a", "kind": "self", "module": nn.Identity(), "scale": 1.3}
    return Attention(
        q=q, k=k, v=v, output=v[:, [0, 0, 1, 1], :1].expand(2, 4, T, 5), **options | more
    )


def masks(T: int, S: int) -> dict[str, dict[str, Any]]:
    made = torch.Generator().manual_seed(1)
    seen = torch.rand(2, 1, T, S, generator=made) > 0.3
    seen = seen | torch.ones(T, S, dtype=torch.bool).triu(S - T).tril(S - T)
    real = torch.ones(2, S, dtype=torch.bool)
    real[0, : S // 3] = False
    padded = seen & real[:, None, None]
    least = torch.finfo(torch.float32).min
    return {
        "none": {},
        "causal": {"diagonal": S - T, "offset": S - T},
        "some": {"mask": seen, "offset": S - T},
        "padded": {"mask": padded, "offset": S - T},
        "added": {"mask": torch.zeros(2, 1, T, S).masked_fill(~padded, least), "offset": S - T},
        "infinite": {"mask": torch.zeros(2, 1, T, S).masked_fill(~seen, -math.inf)},
        "softcap": {"softcap": 2.0, "diagonal": S - T},
        "bias": {"bias": torch.randn(1, 4, T, S, generator=made)},
        "cross": {"kind": "cross", "mask": real[:, None, None]},
    }


def summed(attention: Attention, monkeypatch: pytest.MonkeyPatch, in_c: bool) -> Reduce:
    served: list[bool] = []

    def serves(*args: Any) -> bool:
        served.append(in_c and sums.serves(*args))
        return served[-1]

    monkeypatch.setattr(reductions, "serves", serves)
    square = attention.kind == "self" and attention.q.shape[2] == attention.k.shape[2]
    summary = Reduce(top=3, distance=True, bins=(0, 1, 4), rollout=[-1, 0] if square else None)
    summary(attention)
    assert served == [in_c]
    return summary


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("T", "S"), [(9, 9), (33, 33), (5, 40), (1, 19), (70, 70)])
@pytest.mark.parametrize("weights", [1 << 18, 1])
def test_sums_in_c(isa: str, T: int, S: int, weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reductions, "WEIGHTS", weights)  # the whole, or a row of the batch
    for name, options in masks(T, S).items():
        with regard.native.limited_to(isa):
            got = summed(call(T, S, **options), monkeypatch, True)
        wanted = summed(call(T, S, **options), monkeypatch, False)
        [ours], [theirs] = got.result(), wanted.result()
        assert ours.queries == theirs.queries
        for what in NAMES:
            mine, other = getattr(ours, what), getattr(theirs, what)
            assert (mine is None) == (other is None) == (name == "cross" and what in NAMES[3:])
            if mine is not None:
                assert torch.allclose(mine, other, atol=1e-5, rtol=1e-5), (name, what)
        if T == S and name != "cross":
            assert torch.allclose(got.rollout(), wanted.rollout(), atol=1e-6)
        weighed = call(T, S, **options).weights
        at = weighed.gather(-1, ours.top)
        if name not in ("padded", "added"):  # (padded queries have no keys of their own)
            assert torch.allclose(at, ours.top_weights, atol=1e-6)


@pytest.mark.skipif(not ISAS, reason="no native library")
def test_what_c_leaves_to_torch() -> None:
    plain = call(4, 4)
    assert sums.serves(plain, 4)
    assert not sums.serves(plain, 100)
    assert not sums.serves(call(4, 4, sinks=torch.zeros(4)), 4)
    assert not sums.serves(call(4, 4, given=torch.zeros(2, 4, 4, 4)), 4)
    plain.q = plain.q.double()
    assert not sums.serves(plain, 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(sums.THREADS + 1)
        assert not sums.serves(call(4, 4), 4)
    finally:
        torch.set_num_threads(threads)


def test_scores_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = call(4, 4)
    attention.q[0, 1, 2] = math.nan
    for in_c in {False, bool(ISAS)}:
        [part] = summed(attention, monkeypatch, in_c).result()
        assert part.entropy is not None
        assert part.entropy.isnan().tolist() == [False, True, False, False]
