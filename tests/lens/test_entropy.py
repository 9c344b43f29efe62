"""Entropy of attention: by hand, and on tiny models."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import tiny_models as tiny
from lens.examples import padded_batch, tiny_bert
from regard.lens.entropy import attention_entropy, entropies
from regard.lens.maps import attention_maps
from regard.lens.reductions import Reduce
from regard.lens.tap import tap
from regard.mixers import Attention as Layer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bert():
    return tiny_bert()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return padded_batch()


def test_entropy_by_hand() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4])
    wanted = torch.tensor([0, math.log(2), math.log(4)])
    torch.testing.assert_close(attention_entropy(rows), wanted)
    torch.testing.assert_close(attention_entropy(rows[1]), wanted[1])
    visible = torch.tensor([[True, False, False, False], [True, True, False, False], [True] * 4])
    relative = attention_entropy(rows, visible=visible, relative=True)
    assert relative.tolist() == pytest.approx([0, 1, 1])
    with pytest.raises(ValueError, match="visible must be"):
        attention_entropy(rows, visible=visible[:2], relative=True)


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_a_decoder_sees_what_came_before(kind: str) -> None:
    model = tiny.decoder(kind, "sdpa")
    ids = torch.randint(1, 31, (1, 6))
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], 1)  # on the left
    mask = (padded > 0).long()
    alone, inside = (
        entropies(model, inputs)
        for inputs in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask})
    )
    np.testing.assert_allclose(inside.mean, alone.mean, atol=1e-5)
    np.testing.assert_allclose(inside.relative, alone.relative, atol=1e-5)
    maps = attention_maps(model, {"input_ids": ids}).weights[:, 0]
    rows = torch.special.entr(torch.from_numpy(maps)).sum(-1)  # [L, H, T]
    np.testing.assert_allclose(alone.mean, rows.mean(-1).numpy(), atol=1e-5)
    counts = torch.arange(1, 7).clamp(min=2, max=6 if kind == "Llama" else 4).log()
    np.testing.assert_allclose(alone.relative, (rows / counts).mean(-1).numpy(), atol=1e-5)
    assert entropies(model, {"input_ids": ids}, layers=1).mean.shape == (1, 4)
    summed = Reduce()
    with tap(model, read=summed), torch.no_grad():
        model(input_ids=padded, attention_mask=mask)
    streamed = np.stack([part.entropy for part in summed.result()])
    np.testing.assert_allclose(inside.mean, streamed, atol=1e-5)


def test_layers_of_several_sizes_are_refused() -> None:
    model = nn.Sequential(Layer(8, 2), Layer(8, 4))
    with pytest.raises(ValueError, match=r"entropies: model must be layers of one size"):
        entropies(model, torch.randn(1, 3, 8))
    assert entropies(model, torch.randn(1, 3, 8), layers=[1]).mean.shape == (1, 4)


def test_padding_changes_no_entropy(bert, batch, tmp_path) -> None:
    together = entropies(bert, batch)
    one = {name: values[:1] for name, values in batch.items()}
    two = {name: values[1:, :4] for name, values in batch.items()}
    alone = [entropies(bert, inputs) for inputs in (one, two)]
    wanted = (7 * alone[0].mean + 4 * alone[1].mean) / 11
    np.testing.assert_allclose(together.mean, wanted, atol=1e-5)
    assert (together.relative <= 1 + 1e-6).all()
    together.picture(tmp_path / "entropy.png")
    assert (tmp_path / "entropy.png").stat().st_size > 1000
    assert len(json.loads(together.to_json())["names"]) == 3
