"""Maps, rollout, entropy and sinks: by hand, and on tiny models."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from regard.lens.entropy import attention_entropy, entropies
from regard.lens.maps import attention_maps, rollout
from regard.lens.sinks import (
    column_means,
    find_sinks,
    massive_activations,
    sink_dimensions,
    sinks,
)

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=16, initializer_range=0.4,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 31, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_maps_are_the_models_own(bert, batch, tmp_path) -> None:
    found = attention_maps(bert, batch)
    bert.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = torch.stack(bert(**batch, output_attentions=True).attentions)
    bert.set_attn_implementation("sdpa")
    np.testing.assert_allclose(found.weights, wanted.numpy(), atol=1e-6)
    assert found.layers == (0, 1, 2)
    assert attention_maps(bert, batch, layers=[2]).weights.shape == (1, 2, 2, 7, 7)
    found.picture(tmp_path / "maps.png")
    assert (tmp_path / "maps.png").is_file()
    assert json.loads(found.to_json())["layers"] == [0, 1, 2]
    with pytest.raises(ValueError, match="layers"):
        attention_maps(bert, batch, layers=[3])


def test_rollout_by_hand(tmp_path) -> None:
    first = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    second = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    weights = torch.stack([first, second])[:, None, None]
    mixed = [(torch.eye(2) + w) / 2 for w in (first, second)]
    found = rollout(weights)
    np.testing.assert_allclose(found.shares[0], (mixed[1] @ mixed[0]).numpy())
    np.testing.assert_allclose(found.shares.sum(-1), 1)
    np.testing.assert_allclose(rollout(weights, keep=1).shares[0], np.eye(2))
    np.testing.assert_allclose(rollout(weights, keep=0).shares[0], (second @ first).numpy())
    # Without the smaller weight of each row, row 1 of the first layer keeps one of two equals.
    sharp = rollout(weights[:1], keep=0, discard=0.5).shares[0]
    assert sorted(sharp.max(-1)) == [1.0, 1.0]
    found.picture(tmp_path / "rollout.png")
    with pytest.raises(ValueError, match="between 0 and 1"):
        rollout(weights, keep=2)
    with pytest.raises(ValueError, match="self-attention"):
        rollout(torch.zeros(1, 1, 1, 2, 3))


@pytest.mark.parametrize("heads", ["mean", "max", "min"])
def test_rollout_of_a_model_sums_to_one(bert, batch, heads: str) -> None:
    maps = attention_maps(bert, batch).weights
    shares = rollout(torch.from_numpy(maps), heads=heads).shares
    np.testing.assert_allclose(shares.sum(-1), 1)
    assert (shares[1, :4, 4:] == 0).all()  # nothing arrives from padding


def test_entropy_by_hand() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4])
    wanted = torch.tensor([0, math.log(2), math.log(4)])
    torch.testing.assert_close(attention_entropy(rows), wanted)
    visible = torch.tensor([[True, False, False, False], [True, True, False, False], [True] * 4])
    relative = attention_entropy(rows, visible=visible, relative=True)
    assert relative.tolist() == pytest.approx([0, 1, 1])
    with pytest.raises(ValueError, match="visible must be"):
        attention_entropy(rows, visible=visible[:2], relative=True)


def test_padding_changes_no_entropy(bert, batch, tmp_path) -> None:
    together = entropies(bert, batch)
    one = {name: values[:1] for name, values in batch.items()}
    two = {name: values[1:, :4] for name, values in batch.items()}
    alone = [entropies(bert, inputs) for inputs in (one, two)]
    wanted = (7 * alone[0].mean + 4 * alone[1].mean) / 11
    np.testing.assert_allclose(together.mean, wanted, atol=1e-5)
    assert (together.relative <= 1 + 1e-6).all()
    together.picture(tmp_path / "entropy.png")


def test_columns_and_sinks_by_hand() -> None:
    weights = torch.tensor([[1.0, 0, 0], [0.7, 0.3, 0], [0.6, 0.05, 0.35]])
    visible = torch.ones(3, 3, dtype=torch.bool).tril()
    means = column_means(weights, visible=visible)
    torch.testing.assert_close(means, torch.tensor([2.3 / 3, 0.175, 0.35]))
    assert find_sinks(weights, theta=0.2, visible=visible).tolist() == [True, False, True]
    # alpha / S = 0.5
    assert find_sinks(weights, theta=None, alpha=1.5, visible=visible).tolist() == [True, 0, 0]
    assert not find_sinks(weights, theta=1.1, visible=visible).any()
    with pytest.raises(ValueError, match="one number and one None"):
        find_sinks(weights, alpha=5.0)
    assert column_means(weights, visible=torch.zeros(3, 3, dtype=torch.bool)).tolist() == [0, 0, 0]


def test_planted_dimensions_are_found() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 3, 9, 64)
    hidden[:, :, 0, [5, 40]] = 60.0
    hidden[0, 0, 0, 7] = 80.0  # in one layer and input only
    assert sorted(sink_dimensions(hidden)) == [5, 40]
    assert sink_dimensions(hidden, token=4) == []
    moved = torch.randn(4, 3, 9, 64)
    for row, token in enumerate((2, 8, 0)):
        moved[:, row, token, 11] = -60.0
    assert sink_dimensions(moved, token=torch.tensor([2, 8, 0])) == [11]
    massive = massive_activations(hidden[1], least=50, ratio=50)
    assert massive.nonzero()[:, 2].unique().tolist() == [5, 40]
    assert not massive_activations(hidden[1]).any()


def test_sinks_of_a_model_ignore_padding(bert, batch, tmp_path) -> None:
    found = sinks(bert, batch, theta=0.2)
    maps = attention_maps(bert, batch).weights
    np.testing.assert_allclose(found.received[:, 0], maps[:, 0].mean(-2), atol=1e-6)
    np.testing.assert_allclose(
        found.received[:, 1, :, :4], maps[:, 1, :, :4, :4].mean(-2), atol=1e-6
    )
    assert (found.received[:, 1, :, 4:] == 0).all()
    assert not found.sink[:, 1, :, 4:].any()
    one = {name: values[1:, :4] for name, values in batch.items()}
    np.testing.assert_allclose(
        sinks(bert, one, theta=0.2).received, found.received[:, 1:, :, :4], atol=1e-5
    )
    mass = maps * found.sink[:, :, :, None]
    rows = np.stack([mass[:, 0].sum(-1).sum(-1), mass[:, 1, :, :4].sum(-1).sum(-1)]).sum(0) / 11
    np.testing.assert_allclose(found.mass, rows, atol=1e-5)
    assert not sinks(bert, batch, theta=0.0, spare_first=True).sink[..., 0].any()
    found.picture(tmp_path / "sinks.png")
    assert len(json.loads(found.to_json())["names"]) == 3


@pytest.mark.slow
@pytest.mark.requires("resource:minilm")
def test_minilm_has_sinks() -> None:
    from regard.testing import resources

    model, tokenizer = resources.minilm()
    inputs = tokenizer(["The cat sat on the mat, and then it slept."], return_tensors="pt")
    found = sinks(model, dict(inputs), alpha=3.0, theta=None)
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    heaviest = {tokens[i] for i in found.received[:, 0].mean(1).argmax(-1)}
    assert heaviest & {"[CLS]", "[SEP]", "."}
    assert found.mass.max() > 0.5
