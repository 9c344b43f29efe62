"""FreeSwim on a small scale: a model of 16 x 16 pictures with one disc each draws 32 x 32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.models.wan import Wan
from regard.steer.freeswim import DualPath, entropy_scale, flow_sigmas, resize, upscale
from steer import tiny_dit as tiny

GRID, HALF = (1, 16, 16), 4  # tokens of 2 x 2 pixels; those of training // 2
SCALE = entropy_scale(tiny.CONFIG.head_dim, trained=64)


def drawn(model: Wan, text: Tensor, start: Tensor, sigmas: Tensor, dual: DualPath | None) -> Tensor:
    """Pictures, always from the same noise."""
    return upscale(
        lambda x, time: model(x, time, text.repeat(len(x) // len(text), 1, 1)), start, sigmas,
        dual=dual, generator=torch.Generator().manual_seed(7),
    )  # fmt: skip


def test_measures_of_pictures() -> None:
    made = torch.Generator().manual_seed(0)
    text = tiny.prompts(8, made)
    clean = tiny.pictures(text, made)
    share = tiny.disc_share(clean, text)
    assert torch.allclose(share, share.round(), atol=1e-5)
    assert tiny.components(share).tolist() == [1] * 8
    assert abs(float(tiny.sharpness(share)) - 1) < 1e-5
    apart = torch.nn.functional.pad(share, (1, 1))
    assert tiny.components(apart.repeat(1, 1, 2)).tolist() == [2] * 8
    speck = torch.zeros(1, 16, 16)
    speck[0, 2:4, 2:4] = 1
    assert tiny.components(speck).tolist() == [0]
    assert tiny.components(speck, least=4).tolist() == [1]
    soft = tiny.disc_share(resize(clean, (32, 32)), text)
    assert tiny.sharpness(soft) < 0.6  # bilinear: an edge is two steps wide or more


@pytest.mark.slow
def test_the_full_path_composes_what_the_window_path_draws() -> None:
    """About 70 s. How many discs there are and how sharp: docs/steering/freeswim.md."""
    model = tiny.trained(seed=0, steps=1100)
    made = torch.Generator().manual_seed(99)
    text = tiny.prompts(32, made)
    sigmas = flow_sigmas(20, tiny.SHIFT)
    small = drawn(model, text, torch.zeros(32, 3, 1, 16, 16), sigmas, None)
    # It has learned its task: one disc in (nearly) every picture of the size of training.
    assert tiny.components(tiny.disc_share(small, text)).eq(1).float().mean() > 0.9
    large = resize(small, (32, 32))
    window = DualPath(model, GRID, HALF, scale=SCALE, guided_steps=0)
    dual = DualPath(model, GRID, HALF, scale=SCALE)
    for start, levels in (
        (torch.zeros_like(large), sigmas),
        (large, flow_sigmas(28, tiny.SHIFT, strength=0.7)),
    ):
        full, alone, both = (
            tiny.disc_share(drawn(model, text, start, levels, paths), text)
            for paths in (None, window, dual)
        )
        agreed = [((full > 0.5) == (other > 0.5)).float().mean() for other in (both, alone)]
        assert agreed[0] > agreed[1], agreed
        assert not torch.allclose(full, both, atol=1e-2)
        assert tiny.sharpness(both) > tiny.sharpness(tiny.disc_share(large, text))
