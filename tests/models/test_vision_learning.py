"""What small vision models learn with and without locality: the published order, in seconds each.

Images of handwritten digits, 8 x 8, are 64 tokens, a grey value each with a learned position.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from regard.mixers import LocalResidual2d
from regard.models.l2vit import LGABlock
from regard.models.vision import Block
from regard.models.vision.classifier import average
from regard.ops import inline_attention, relu_linear_attention, softmax_attention

SIDE, DIM, HEADS, LAYERS, EPOCHS, TRAINED = 8, 32, 2, 2, 8, 1200


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain ReLU linear attention: divided by the sum of weights."""
    return relu_linear_attention(q, k, v, minimum=0.0, temperature=1.0)


OPS = {"inline": inline_attention, "linear": divided, "softmax": softmax_attention}


class Mixed(nn.Module):
    """The layer of InLine around any op, with its local residual or without."""

    def __init__(self, kind: str, local: bool) -> None:
        super().__init__()
        self.op = OPS[kind]
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.residual = LocalResidual2d(DIM, HEADS) if local else None

    def forward(self, x: Tensor) -> Tensor:
        B, h, w, C = x.shape
        qkv = self.qkv(x).view(B, h * w, 3, HEADS, C // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = self.op(q, k, v).transpose(1, 2).reshape(x.shape)
        if self.residual is not None:
            image = v.transpose(2, 3).reshape(B, C, h, w)
            out = out + self.residual(image, average(x)).permute(0, 2, 3, 1)
        return self.proj(out)


class Plain(nn.Module):
    """Linear global attention as L2ViT has it, without anything that knows neighbours."""

    def __init__(self, concentrated: bool) -> None:
        super().__init__()
        self.block = LGABlock(DIM, HEADS, 2.0, enhanced=concentrated)
        self.block.cpe = nn.ModuleList([nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Small(nn.Module):
    """A grey value per token and its position, blocks, the mean token, a linear head."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(1, DIM), nn.Sequential(*blocks)
        self.position = nn.Parameter(0.02 * torch.randn(SIDE, SIDE, DIM))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(average(self.norm(self.blocks(self.embed(image) + self.position))))


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """All of scikit-learn's digits [n, 8, 8, 1] in a fixed random order, and what they are."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, :, :, None]
    return (images - 4.9) / 6.0, torch.tensor(data.target)[order]


@functools.cache
def accuracy(kind: str, local: bool, seed: int = 0) -> float:
    """Of the digits that were not trained on, after the same steps for everybody."""
    torch.manual_seed(seed)
    if kind == "l2vit":
        blocks: list[nn.Module] = [Plain(local) for _ in range(LAYERS)]
    else:
        blocks = [Block(DIM, Mixed(kind, local), 2.0, 0.0, 1e-5) for _ in range(LAYERS)]
    model, (images, targets) = Small(blocks), digits()
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAINED).split(50):
            loss = cross_entropy(model(images[batch]), targets[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval()
    with torch.no_grad():
        guesses = model(images[TRAINED:]).argmax(1)
    return float((guesses == targets[TRAINED:]).float().mean())


@pytest.mark.slow
@pytest.mark.requires("sklearn")
def test_the_local_residual_is_what_linear_attention_lacks():
    found = {(kind, local): accuracy(kind, local) for kind in OPS for local in (False, True)}
    assert found["inline", True] > found["linear", True] - 0.02
    assert found["inline", True] > 0.85
    for kind in ("inline", "linear"):
        assert found[kind, True] > found[kind, False] + 0.2, found
    assert abs(found["inline", False] - found["linear", False]) < 0.15, found


@pytest.mark.slow
@pytest.mark.requires("sklearn")
def test_local_concentration_is_worth_more_than_ten_points():
    assert accuracy("l2vit", True) > accuracy("l2vit", False) + 0.1
    assert accuracy("l2vit", True) > 0.85
