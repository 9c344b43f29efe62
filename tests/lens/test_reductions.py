"""Streaming sums equal those of the whole maps."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import tiny_models as tiny
from regard.lens import reductions
from regard.lens.reductions import Reduce
from regard.lens.tap import Attention, Edit, tap
from tensor_sizes import Largest

IDS = torch.tensor([[0, 0, 0, 11, 28, 10, 17, 14, 26], [9, 5, 33, 41, 12, 50, 7, 8, 60]])
REAL = (IDS != 0).long()


@pytest.mark.parametrize("block", [2, 64])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_sums_of_a_padded_batch(block: int, implementation: str) -> None:
    model = tiny.decoder("Llama", implementation)
    summary = Reduce(top=3, distance=True, bins=(0, 1, 3), block=block)
    with tap(model, read=summary):
        model(IDS, attention_mask=REAL)
    model.set_attn_implementation("eager")
    maps = model(IDS, attention_mask=REAL, output_attentions=True).attentions
    real = REAL.bool()
    for part, weights in zip(summary.result(), maps, strict=True):
        rows = (weights * real[:, None, :, None]).double()
        assert part.queries == 15
        entropy = torch.special.entr(rows).sum((0, 2, 3)) / 15
        assert torch.allclose(part.entropy.double(), entropy, atol=1e-5)
        seers = torch.stack([torch.arange(9).flip(0) + 1, torch.arange(9).flip(0) + 1])
        received = rows.sum(2) / torch.where(real, seers, 1)[:, None]
        assert torch.allclose(part.received.double(), received, atol=1e-5)
        apart = (torch.arange(9)[:, None] - torch.arange(9)).abs()
        assert torch.allclose(part.distance.double(), (rows * apart).sum((0, 2, 3)) / 15)
        profile = [
            (rows * inside).sum((0, 2, 3)) / 15
            for inside in (apart < 1, (apart >= 1) & (apart < 3), apart >= 3)
        ]
        assert torch.allclose(part.profile.double(), torch.stack(profile, 1), atol=1e-5)
        assert torch.allclose(part.top_weights[1], weights[1].topk(3).values, atol=1e-6)
        assert part.top.shape == (2, 4, 9, 3)


@pytest.mark.parametrize("weights", [1, 4 * 9 * 9, 2 * 4 * 9 * 9])  # up to the whole batch
@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_the_batch_in_parts(
    weights: int, edited: bool, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reductions, "WEIGHTS", weights)
    model = tiny.decoder("Llama", implementation)
    blunt = Edit(pre=lambda scores, _: scores / 2, heads=[1], queries=slice(3, None))
    parts, whole = (Reduce(top=3, distance=True, rollout=[-1], block=b) for b in (None, 64))
    edit = tap(model, edit=blunt) if edited else nullcontext()
    with edit, tap(model, read=parts), tap(model, read=whole):
        model(IDS, attention_mask=REAL)
    for a, b in zip(parts.result(), whole.result(), strict=True):
        for name in ("entropy", "received", "top_weights", "distance", "profile"):
            assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-6)
        assert a.queries == b.queries
    assert torch.allclose(parts.rollout(), whole.rollout(), atol=1e-6)


@torch.no_grad()
def test_cached_generation_adds_up() -> None:
    model, ids = tiny.decoder("Llama", "sdpa"), IDS[1:]
    grown, whole = Reduce(distance=True), Reduce(distance=True)
    with tap(model, read=grown):
        text = model.generate(ids, max_new_tokens=4, do_sample=False)
    with tap(model, read=whole):
        model(text[:, :-1])
    for a, b in zip(grown.result(), whole.result(), strict=True):
        assert a.queries == b.queries == 12
        assert torch.allclose(a.entropy, b.entropy, atol=1e-5)
        assert torch.allclose(a.distance, b.distance, atol=1e-4)
        seen = torch.arange(12, 0, -1)
        assert torch.allclose(a.received * 1.0, b.received, atol=1e-5), seen


@torch.no_grad()
def test_rollout_is_a_row_of_the_product() -> None:
    model = tiny.vit("Dinov2", "eager")
    pixels = torch.randn(2, 3, 28, 28)
    summary = Reduce(rollout=[0], block=4)
    with tap(model, read=summary):
        maps = model(pixels, output_attentions=True).attentions
    for part, weights in zip(summary.result(), maps, strict=True):
        entropy = torch.special.entr(weights).sum(-1).mean((0, 2))
        assert torch.allclose(part.entropy, entropy, atol=1e-5)
    model.set_attn_implementation("sdpa")  # where scores are at hand beside the weights
    fused = Reduce()
    with tap(model, read=fused):
        model(pixels)
    for part, other in zip(summary.result(), fused.result(), strict=True):
        assert torch.allclose(part.entropy, other.entropy, atol=1e-5)
        assert torch.allclose(part.received, other.received, atol=1e-6)
    product = torch.eye(17).expand(2, -1, -1)
    for weights in maps:
        product = (0.5 * torch.eye(17) + 0.5 * weights.mean(1)) @ product
    assert torch.allclose(summary.rollout(), product[:, :1], atol=1e-6)
    with tap(model, read=summary):  # again, from the start
        model(pixels[:1])
    assert torch.allclose(summary.rollout(), product[:1, :1], atol=1e-6)
    whisper, features = tiny.whisper("sdpa"), torch.randn(1, 8, 40)
    with tap(whisper, read=summary):
        whisper(input_features=features, decoder_input_ids=torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="choose one tower"):
        summary.rollout()
    with pytest.raises(ValueError, match="was not asked for"):
        Reduce().rollout()


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_no_map_of_queries_and_keys_is_ever_made(padded: bool) -> None:
    model = tiny.decoder("Llama", "sdpa", max_position_embeddings=600)
    T, heads, block = 600, 4, 8
    ids, mask = torch.randint(1, 70, (1, T)), torch.ones(1, T, dtype=torch.long)
    if padded:
        mask[:, :5] = 0
    summary, seen = Reduce(top=2, distance=True, block=block), Largest()

    def read(attention: Attention) -> None:
        with seen:
            summary(attention)

    with tap(model, read=read):
        model.model(ids, attention_mask=mask)
    # A block with the rows of its distances side by side; T x T is 360 000 numbers.
    most = heads * block * (T + block + 1)
    if padded:  # one pass over the model's own mask [1, 1, T, T] of bools, in pieces
        most = max(most, 128 * T)
    assert heads * block * T <= seen.numbers <= most


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="must rise, from 0"):
        Reduce(bins=(1, 2))
    with pytest.raises(ValueError, match="top -1"):
        Reduce(top=-1)
