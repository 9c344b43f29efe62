"""Modules as timm has them, fused or with weights of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lens.timm_like import VisionTransformer
from regard.lens.tap import Attention, Edit, tap


class Explicit(torch.nn.Module):
    """timm's attention with weights of its own."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = other.num_heads, other.qkv, other.proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, T, C))


@pytest.mark.parametrize("explicit", [False, True])
@torch.no_grad()
def test_modules_as_timm_has_them(explicit: bool) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=4, num_classes=3
    )
    if explicit:
        for block in model.blocks:
            block.attn = Explicit(block.attn)
    images = torch.randn(2, 3, 28, 28)
    before = model(images)
    seen: list[Attention] = []
    with tap(model, read=seen.append):
        assert torch.equal(model(images), before)
    assert [a.layer for a in seen] == [0, 1]
    for a in seen:
        assert a.q.shape == (2, 4, 17, 8)
        assert a.hidden is not None
        assert torch.allclose(a.mix(a.weights, a.heads), a.output, atol=1e-5)
    with tap(model, edit=Edit(output=lambda o, a: 0 * o)):
        assert not torch.allclose(model(images), before)
    assert torch.equal(model(images), before)
    assert all("forward" not in block.attn.__dict__ for block in model.blocks)
