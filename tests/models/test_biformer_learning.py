"""What routing is for: regions that are far apart and belong together find each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from regard.models.biformer import BiFormer, BiFormerConfig

COLOURS = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0], [-2.0, -2.0, -2.0]])


def images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A coloured square on the left and one on the right: are they of one colour?"""

    def draw(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=generator)

    x = 0.1 * torch.randn(count, 3, 32, 32, generator=generator)
    same, left, rows = draw(2, count).bool(), draw(4, count), 4 * draw(7, count, 2)
    right = (left + torch.where(same, 0, 1 + draw(3, count))) % 4
    for n in range(count):
        for column, colour, row in ((0, left[n], rows[n, 0]), (28, right[n], rows[n, 1])):
            x[n, :, row : row + 4, column : column + 4] += COLOURS[colour][:, None, None]
    return x, same.long()


def accuracy() -> float:
    torch.manual_seed(0)
    model = BiFormer(
        BiFormerConfig(
            dims=(32, 32), depths=(1, 1), mlp_ratios=(2, 2), topks=(1, 1), n_win=4, head_dim=16,
            side_dwconv=3, classes=2,
        )
    )  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(250):
        x, target = images(64, generator)
        loss = cross_entropy(model(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, target = images(1000, generator)
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == target).float().mean().item()


@pytest.mark.slow
def test_routed_regions_beat_windows_of_the_same_work(monkeypatch):
    routed = accuracy()

    def own(q: Tensor, k: Tensor, topk: int, **masks: Tensor | None) -> Tensor:
        return torch.arange(q.shape[2]).view(1, 1, -1, 1).expand(len(q), 1, -1, topk)

    monkeypatch.setattr("regard.mixers.routed.region_route", own)
    windowed = accuracy()
    assert routed > windowed + 0.15, (routed, windowed)
