"""An upgrade starts as the same function, changes only what it may, and can be resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models as tiny
from regard.adapt import transformers as adapt
from regard.recipes import Optimiser
from regard.recipes.upgrade import equal_ridge, mean_loss, upgrade


def setting() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    made = torch.Generator().manual_seed(0)
    tokens = [torch.randint(1, 70, (2, 12), generator=made) for _ in range(4)]
    return tiny.decoder("Llama"), [{"input_ids": x, "labels": x} for x in tokens]


def test_starts_as_the_same_function() -> None:
    model, batches = setting()
    with torch.no_grad():
        before = model(**batches[0]).logits
    done = upgrade(model, batches, steps=0, validation=batches)
    assert done.ridge == 1e5  # at 1e4 a logit moves by 2e-3
    with torch.no_grad():
        assert (model(**batches[0]).logits - before).abs().max() < 1e-3
    assert done.start == done.end
    assert done.start == pytest.approx(mean_loss(model, batches))


@pytest.mark.parametrize(
    ("mechanism", "learn"), [("local_linear", ("ridge", "bandwidth")), ("softmax", ["temperature"])]
)
def test_only_the_parts_learn(mechanism: str, learn: tuple[str, ...]) -> None:
    model, batches = setting()
    weights = copy.deepcopy(model.state_dict())
    model.model.embed_tokens.weight.requires_grad_(False)
    done = upgrade(model, batches, steps=25, mechanism=mechanism, learn=learn, validation=batches)
    assert done.end < done.start
    for name, value in model.state_dict().items():
        assert ".regard." in name or torch.equal(value, weights[name])
    assert len(done.rows()) == 3 * 4 * len(learn)
    assert any(abs(value - 1) > 0.05 for *_, name, value in done.rows() if name == "scale")
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.requires_grad
    again = upgrade(model, batches, steps=1, mechanism=mechanism, learn=learn)
    assert again.heads != done.heads  # went on from there


def test_then_everything() -> None:
    model, batches = setting()
    weights = copy.deepcopy(model.state_dict())
    upgrade(model, batches, steps=2, everything=2)
    assert not torch.equal(model.lm_head.weight, weights["lm_head.weight"])


def test_the_same_bits_whether_it_stopped_or_not(tmp_path: Path) -> None:
    def run(everything: int, checkpoint: Path | None) -> tuple[Any, Any]:
        model, batches = setting()
        return model, upgrade(
            model, batches, steps=3, everything=everything, seed=4, checkpoint=checkpoint,
            checkpoint_every=2,
        )  # fmt: skip

    whole, told = run(3, None)
    for everything in (0, 1, 3):
        model, again = run(everything, tmp_path / "run.pt")
    assert again.losses == told.losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    model, batches = setting()
    with pytest.raises(ValueError, match="checkpoint must be of a run with seed 5"):
        upgrade(model, batches, steps=3, everything=3, seed=5, checkpoint=tmp_path / "run.pt")


def test_other_losses_and_drawn_batches() -> None:
    model, _ = setting()

    def draw(made: torch.Generator) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(1, 70, (2, 6), generator=made)}

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return model(**batch).logits.square().mean()

    done = upgrade(model, draw, steps=2, loss=loss, optimiser=Optimiser(0.01))
    assert done.steps == 2
    assert done.end is None


def test_the_ridge_is_found_without_a_trace() -> None:
    model, batches = setting()
    before = model(**batches[0]).logits
    assert equal_ridge(model, batches[0]) == 1e5
    assert equal_ridge(model, batches[0], layers=[0]) in (1e4, 1e5)
    assert adapt.report(model).swapped == (None,) * 3
    assert torch.equal(model(**batches[0]).logits, before)
    with pytest.raises(ValueError, match="does not call the model itself"):
        equal_ridge(model, batches[0], loss=lambda m, b: m.model(b["input_ids"])[0].mean())
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(1e6)
            layer.self_attn.q_proj.weight.div_(1e6)
    with pytest.raises(ValueError, match="at 1e8 the outputs are still"):
        equal_ridge(model, batches[0])
    assert adapt.report(model).swapped == (None,) * 3
    done = upgrade(model, batches, steps=0, ridge=3.0)
    assert done.ridge == 3.0
    assert done.rows()[0][3] == pytest.approx(3.0)


def test_errors_are_named() -> None:
    model, batches = setting()
    for options, words in (
        ({"batches": []}, "batches must be a sequence"),
        ({"steps": -1}, "steps must be an int"),
        ({"mechanism": "softmax", "learn": ()}, "learn must be of something"),
        ({"checkpoint": "/nowhere/x.pt"}, "folder that exists"),
        ({"batches": [{"input_ids": batches[0]["input_ids"]}]}, "with labels"),
    ):
        model, batches = setting()
        with pytest.raises((ValueError, TypeError), match=words):
            upgrade(model, **{"batches": batches, **options})
    model, batches = setting()
    with pytest.raises(FloatingPointError, match="nan at step 1"):
        upgrade(model, batches, steps=2, loss=lambda m, b: m(**b).loss * float("nan"))
    assert adapt.report(model).swapped == ("local_linear",) * 3
