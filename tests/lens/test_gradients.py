"""Attribution by gradients: captum against a backward pass by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from lens.examples import tiny_whisper
from regard.lens.forced import ForcedDecoding
from regard.lens.gradients import METHODS, gradient_saliency

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def whisper():
    return tiny_whisper()[0]


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor]:
    return tiny_whisper()[1]


@pytest.mark.requires("captum")
@pytest.mark.parametrize("of", ["input", "encoder"])
def test_gradients(whisper, inputs, of: str, tmp_path) -> None:
    shape = (5, 8, 40) if of == "input" else (5, 20)
    for method in METHODS:
        found = gradient_saliency(whisper, *inputs, method=method, of=of, steps=2)
        assert found.values.shape == shape
        assert (found.values >= 0).all()
        assert found.values.sum() > 0
        assert (found.method, found.of) == (method, of)
    forced = ForcedDecoding(whisper, *inputs)
    with torch.no_grad():
        memory = forced.encode(forced.inputs)
    start = (memory if of == "encoder" else forced.inputs).clone().requires_grad_()
    out = forced.decode(start if of == "encoder" else forced.encode(start))
    wanted = torch.autograd.grad(out[0, 1, inputs[1][0, 2]], start)[0][0].abs()
    wanted = wanted.sum(-1) if of == "encoder" else wanted
    found = gradient_saliency(whisper, *inputs, method="gradient", of=of)
    np.testing.assert_allclose(found.values[1], wanted.numpy(), atol=1e-6)
    found.picture(tmp_path / "gradient.png")
    assert (tmp_path / "gradient.png").stat().st_size > 1000
    assert json.loads(found.to_json())["method"] == "gradient"


@pytest.mark.requires("captum")
def test_integrated_gradients_add_up(whisper, inputs) -> None:
    """Signed attributions along a line sum to the change; sizes can only sum to more."""
    forced = ForcedDecoding(whisper, *inputs)
    with torch.no_grad():
        here = forced.decode(forced.encode(forced.inputs))[0]
        there = forced.decode(forced.encode(0 * forced.inputs))[0]
    said = torch.cat([inputs[1][0, 1:], here[-1:].argmax(-1)])
    change = (here - there).gather(1, said[:, None])[:, 0].abs().numpy()
    found = gradient_saliency(whisper, *inputs, method="integrated_gradients", steps=32)
    assert (found.values.sum((1, 2)) >= change - 1e-4).all()


@pytest.mark.requires("captum")
def test_bad_gradients(whisper, inputs) -> None:
    with pytest.raises(ValueError, match="method"):
        gradient_saliency(whisper, *inputs, method="deeplift")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of must be"):
        gradient_saliency(whisper, *inputs, of="decoder")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps"):
        gradient_saliency(whisper, *inputs, steps=0)
