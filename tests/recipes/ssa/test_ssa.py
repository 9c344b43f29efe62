"""Training for two streams at once: the authors' model, its losses, its gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy

from golden_files import parts, settings
from regard.core.budgets import relative_error
from regard.mixers import rotate
from regard.models import Decoder, DecoderConfig, MixerConfig
from regard.models.decoder.ssa import KEYS, ssa
from regard.models.decoder.ssa import settings as arguments
from regard.ops import block_topk, softmax_attention
from regard.recipes.ssa import aligned, set_budget, ssa_step


def official() -> tuple[Decoder, dict[str, dict[str, torch.Tensor]]]:
    file = parts("ssa/model_ssa")
    model = Decoder(ssa(**arguments(settings("ssa/model_ssa"))))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(KEYS.to_ours("test", file["state"], shapes))
    return model, file


def test_official_logits_and_cached_decoding() -> None:
    model, file = official()
    tokens = file["in"]["input_ids"]
    for mode in ("sparse", "full"):
        set_budget(model, mode=mode)
        with torch.no_grad():
            logits = model(tokens)
            assert torch.allclose(logits, file["out"][f"logits_{mode}"], atol=2e-4)
            part, state = model(tokens[:, :7], return_state=True)
            found = [part]
            for t in range(7, tokens.shape[1]):
                part, state = model(tokens[:, t : t + 1], state=state, return_state=True)
                found.append(part)
        assert torch.allclose(torch.cat(found, 1), logits, atol=1e-4)


@pytest.mark.parametrize("carry", ["sparse", "full"])
def test_official_losses_and_gradients(carry: str) -> None:
    model, file = official()
    step = ssa_step(model, file["in"]["input_ids"], p_full=float(carry == "full"))
    assert step.carry == carry
    assert abs(float(step.alignment.detach() - file["out"][f"align_loss_{carry}"])) < 1e-4
    assert abs(float(step.total.detach() - file["out"][f"train_loss_{carry}"])) < 1e-4
    step.total.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    theirs = KEYS.to_theirs(ours)
    for name, gradient in file[f"grad_{carry}"].items():
        assert relative_error(theirs[name], gradient) < 1e-3, name


def test_the_official_keys_go_both_ways() -> None:
    model, file = official()
    back = KEYS.to_theirs(model.state_dict())
    assert set(file["state"]) <= set(back)
    assert all(torch.equal(back[name], tensor) for name, tensor in file["state"].items())


def test_the_published_size() -> None:
    with torch.device("meta"):
        model = Decoder(ssa())
    assert sum(p.numel() for p in model.parameters()) == 1_213_794_304


def test_outside_of_the_context_layers_are_as_before() -> None:
    model, file = official()
    tokens = file["in"]["input_ids"]
    before = model(tokens)
    with aligned(model, "full") as losses:
        model(tokens)
        assert len(losses) == 2

    def broken() -> None:
        with aligned(model, "full"):
            raise RuntimeError("in the middle of a step")

    with pytest.raises(RuntimeError, match="middle"):
        broken()
    assert torch.equal(model(tokens), before)
    with pytest.raises(ValueError, match="model must be one with SSAAttention"):
        ssa_step(torch.nn.Linear(2, 2), tokens, loss=lambda model, batch: batch.sum())


# -- what training with both streams is for ------------------------------------------------------

LENGTH, PAIRS, ASKED, NOISE, BLOCK, COUNT = 64, 6, 10, 32, 4, 4
SIZES = {"heads": 2, "kv_heads": 1, "head_dim": 24, "block": BLOCK, "count": COUNT, "rope": 1e4}


def batch(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Six pairs of a key and a value, then noise in which keys come again; labels: the values."""
    keys = torch.rand(rows, 16, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(16, 32, (rows, PAIRS), generator=generator)
    tokens = torch.randint(NOISE, 48, (rows, LENGTH), generator=generator)
    tokens[:, : 2 * PAIRS] = torch.stack([keys, values], 2).flatten(1)
    first = 2 * PAIRS + 1
    places = torch.rand(rows, LENGTH - first, generator=generator).argsort(1)[:, :ASKED] + first
    which = torch.randint(PAIRS, (rows, ASKED), generator=generator)
    tokens.scatter_(1, places, keys.gather(1, which))
    labels = torch.full((rows, LENGTH), -100).scatter_(1, places, values.gather(1, which))
    return tokens, labels


def task(model: Decoder, rows: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return cross_entropy(model(rows[0]).flatten(0, 1), rows[1].flatten())


def train(kind: str, steps: int) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(
        (MixerConfig("ssa", SIZES),), vocabulary=48, dim=48, layers=2, mlp_dim=96, init_std=0.083
    )
    model = Decoder(config)
    torch.nn.init.normal_(model.embed.weight)
    generator = torch.Generator().manual_seed(1)
    batches = [batch(64, generator) for _ in range(60)]
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        rows = batches[step % len(batches)]
        if kind == "ssa":
            loss = ssa_step(model, rows, loss=task, generator=generator).total
        else:
            set_budget(model, mode=kind)
            loss = task(model, rows)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


@torch.no_grad()
def loss_of(model: Decoder, mode: str, count: int = COUNT) -> float:
    set_budget(model, mode=mode, count=count)
    return float(task(model, batch(256, torch.Generator().manual_seed(9))))


@torch.no_grad()
def mass_outside(model: Decoder) -> float:
    """Of full attention, what lies in blocks that the sparse stream would not look at."""
    set_budget(model, mode="full", count=COUNT)
    found: list[torch.Tensor] = []

    def look(layer, given) -> None:
        x = given[0]
        at = torch.arange(x.shape[1])[None]
        q, k = (
            rotate(project(x).unflatten(2, (-1, 24)).transpose(1, 2), at, 1e4)
            for project in (layer.q_proj, layer.k_proj)
        )
        weights = softmax_attention(q, k, torch.eye(LENGTH).expand(len(x), 1, -1, -1), causal=True)
        chosen = block_topk(q, k, block=BLOCK, count=COUNT)
        seen = torch.zeros(*chosen.shape[:3], LENGTH // BLOCK + 1)
        seen.scatter_(3, torch.where(chosen < 0, LENGTH // BLOCK, chosen), 1.0)
        seen = seen[..., :-1].repeat_interleave(BLOCK, 3)
        found.append((weights * (1 - seen)).sum(3)[:, :, 16:].mean())

    hooks = [block.mixer.register_forward_pre_hook(look) for block in model.layers]
    model(batch(32, torch.Generator().manual_seed(9))[0])
    for hook in hooks:
        hook.remove()
    return float(torch.stack(found).mean())


@pytest.mark.slow
def test_learning_with_both_streams() -> None:
    """One model has learned for both streams, gains by every block, and has become sparser."""
    both, full = (train(kind, 500) for kind in ("ssa", "full"))
    budget = [loss_of(both, "sparse", count) for count in (1, 2, 4, 8, 16)]
    losses = [loss_of(model, "full") for model in (both, full)]
    outside = [mass_outside(model) for model in (both, full)]
    assert all(more <= less for less, more in pairwise(budget)), budget
    assert max(losses) < 0.05, losses  # nothing learned: 2.8
    assert outside[0] < outside[1], outside
