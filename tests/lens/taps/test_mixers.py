"""Layers of ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regard.lens.tap import Attention, tap
from regard.mixers import Attention as Layer


@pytest.mark.parametrize("options", [{}, {"window": (2, 0)}])
@torch.no_grad()
def test_our_own_layers(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = Layer(32, 4, kv_heads=2, causal=True, rope=True, options=options)
    x, mask = torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = False
    before, card = layer(x, key_mask=mask), layer.card
    seen: list[Attention] = []
    with tap(layer, read=seen.append):
        assert torch.equal(layer(x, key_mask=mask), before)
        _, state = layer(x[:, :4], key_mask=mask[:, :4], return_state=True)
        layer(x[:, 4:], key_mask=mask[:, 4:], state=state)
    assert layer.card is card
    whole, _, last = seen
    real = whole.query_mask[:, None, :, None]
    assert torch.equal(whole.query_mask, mask)
    assert torch.allclose(whole.mix(whole.weights, whole.heads) * real, whole.output, atol=1e-5)
    assert last.offset == 4
    assert torch.allclose(last.weights[1], whole.weights[1, :, 4:], atol=1e-5)


@torch.no_grad()
def test_other_mechanisms_have_outputs_but_no_weights() -> None:
    layer = Layer(16, 2, mechanism="local_linear", causal=True)
    seen: list[Attention] = []
    with tap(layer, read=seen.append):
        layer(torch.randn(1, 5, 16))
    assert seen[0].output.shape == (1, 2, 5, 8)
    with pytest.raises(ValueError, match="mechanism is 'local_linear'"):
        _ = seen[0].weights
