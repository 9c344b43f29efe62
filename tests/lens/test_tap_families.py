"""Every family of models under taps: padded batches, caches and beams, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapt.transformers.models_and_inputs import DECODERS, KINDS, case, output
from adapt.transformers.test_swap import decode, stepwise
from regard.lens.reductions import Reduce
from regard.lens.tap import Attention, Edit, tap

CACHED = (*DECODERS, "whisper", "llava")


def looking(model: Any) -> tuple[tap, Reduce, list[float]]:
    """A tap that looks at all that there is, and what it notes."""
    summary, sums = Reduce(top=2, distance=True), []

    def read(attention: Attention) -> None:
        weights, seen = attention.weights.float(), attention.query_mask
        rows = weights.sum(-1).amax(1)[seen]  # (1, less where a sink takes its share)
        sums.append(float((rows - 1).clamp_min(0).max()))
        assert attention.scores.shape == weights.shape
        assert torch.isfinite(attention.output.mT.amax((1, 2))[seen]).all()
        summary(attention)

    return tap(model, read=read), summary, sums


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_batches(kind: str, side: str) -> None:
    model, inputs = case(kind, side)
    before = output(model, inputs)
    look, summary, sums = looking(model)
    with look:
        assert torch.equal(output(model, inputs), before)
    assert sums
    assert max(sums) < 1e-5
    for part in summary.result():
        assert part.entropy is not None
        assert torch.isfinite(part.entropy).all()
    with tap(model, edit=Edit(post=lambda w, _: w.clone(), by_rows=True)):
        assert torch.equal(output(model, inputs), before)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", CACHED)
def test_cached_steps(kind: str, side: str) -> None:
    model, inputs = case(kind, side)
    before = stepwise(model, inputs)
    look, _, sums = looking(model)
    with look:
        assert torch.equal(stepwise(model, inputs), before)
    assert max(sums) < 1e-5


@pytest.mark.parametrize("kind", CACHED)
def test_beams(kind: str) -> None:
    model, inputs = case(kind, "left")
    inputs = {n: x for n, x in inputs.items() if not n.startswith("decoder")}
    before = decode(model, inputs, num_beams=3)
    look, _, sums = looking(model)
    with look:
        assert torch.equal(decode(model, inputs, num_beams=3), before)
    assert max(sums) < 1e-5
