"""The Wan transformer: its published names and sizes, and the equations of its pieces."""

from __future__ import annotations

import math

import pytest
import torch

import regard
from golden_files import parts, settings
from regard.core.budgets import relative_error
from regard.models import published
from regard.models.wan import Wan, WanConfig

FILE = "freeswim/dual_nocache"
TINY = {
    "heads": 2, "head_dim": 12, "layers": 2, "mlp_dim": 24, "channels": 4, "channels_out": 4,
    "text_dim": 10, "freq_dim": 16,
}  # fmt: skip


def test_the_published_names_and_settings() -> None:
    variant = published["wan_1_3b"]
    assert variant.settings is not None
    config = variant.config(**variant.settings(settings(FILE)))
    assert config == WanConfig(**TINY)
    state = parts(FILE)["state"]
    model = Wan(config)
    assert {name: t.shape for name, t in model.state_dict().items()} == {
        name: t.shape for name, t in state.items()
    }
    model.load_state_dict(
        variant.keys.to_ours("test", state, {n: t.shape for n, t in state.items()})
    )
    assert set(variant.keys.to_theirs(model.state_dict())) == set(state)


@pytest.mark.parametrize(
    ("name", "count"), [("wan_1_3b", 1_418_996_800), ("wan_14b", 14_288_491_584)]
)
def test_the_published_sizes(name: str, count: int) -> None:
    model = regard.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    "change", [{"qk_norm": None}, {"cross_attn_norm": False}, {"image_dim": 1280}]
)
def test_another_model_is_refused(change: dict) -> None:
    variant = published["wan_1_3b"]
    assert variant.settings is not None
    with pytest.raises(ValueError, match=next(iter(change))):
        variant.settings({**settings(FILE), **change})


def test_rotary_positions_depend_on_distances_only() -> None:
    """Scores of turned queries and keys, moved together along any axis, stay what they are."""
    from regard.models.wan.model import _turn

    model = Wan(WanConfig(**TINY))
    angles = model.angles((3, 4, 5), torch.device("cpu")).unflatten(0, (3, 4, 5))
    q, k = torch.randn(2, 1, 1, 1, 12, dtype=torch.float64)
    for axis in range(3):
        first, second, third = ([1, 1, 1] for _ in range(3))
        second[axis], third[axis] = 2, 0
        near = _turn(q, angles[tuple(first)][None]) @ _turn(k, angles[tuple(second)][None]).mT
        moved = _turn(q, angles[tuple(third)][None]) @ _turn(k, angles[tuple(first)][None]).mT
        assert relative_error(near, moved) < 1e-12
        assert relative_error(near, q @ k.mT) > 1e-4
    assert math.isclose(float(angles[1, 0, 0, 0]), 1.0)


def test_one_row_of_time_and_prompt_serves_the_batch() -> None:
    torch.manual_seed(0)
    model = Wan(WanConfig(**TINY))
    x, text = torch.randn(3, 4, 2, 4, 6), torch.randn(1, 5, 10)
    time = torch.tensor([300.0])
    with torch.no_grad():
        out = model(x, time, text)
        assert torch.allclose(out, model(x, time.expand(3), text.expand(3, -1, -1)), atol=1e-6)
    assert out.shape == x.shape
    with pytest.raises(ValueError, match="latents must be"):
        model(x[..., :5], time, text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 5}, "head_dim must be even"),
        ({"head_dim": 4}, "head_dim must be at least 6"),
        ({"patch": (1, 2)}, "patch must be"),
        ({"layers": 0}, "layers must be"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WanConfig(**{**TINY, **change})


def test_saved_and_read_again(tmp_path) -> None:
    model = Wan(WanConfig(**TINY))
    model.save_pretrained(tmp_path)
    again = Wan.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
