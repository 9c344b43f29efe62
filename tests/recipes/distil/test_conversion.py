"""What a conversion loses and what distillation brings back, on a character model."""

from __future__ import annotations

import pytest
import torch

from recipes.distil.tiny_model import converted, teacher, validation_loss
from regard.ops import hedgehog_weights
from regard.recipes.distil import (
    entropy,
    kullback_leibler,
    monotonicity,
    softmax_weights,
    weight_cross_entropy,
)

pytestmark = pytest.mark.slow


def test_the_order_of_conversions():
    """Two minutes of CPU time; the table is printed with `-s`."""
    softmax = validation_loss(teacher())
    cases = {
        "softmax_dim": {}, "not distilled": {"distil": False}, "outputs only": {"xent": 0.0},
        "t2r": {"features": "t2r"}, "elu": {"features": "elu", "distil": False},
        "window of 16": {"window": 16},
    }  # fmt: skip
    found = {name: converted(**options) for name, options in cases.items()}
    print(f"\nsoftmax: {softmax:.3f}")
    for name, row in found.items():
        print(name, {measure: round(value, 3) for measure, value in row.items()})
    end = {name: row["finetuned"] for name, row in found.items()}
    assert end["window of 16"] < end["softmax_dim"] < end["t2r"] < end["elu"]
    assert end["softmax_dim"] < end["not distilled"]
    assert end["window of 16"] - softmax < 0.05
    hedgehog = found["softmax_dim"]
    recovered = hedgehog["zero_shot"] - hedgehog["distilled"]
    assert recovered >= 0.5 * (hedgehog["zero_shot"] - softmax)
    assert hedgehog["xent_after"] < hedgehog["xent_before"]


def test_a_distilled_map_is_sharper_than_elu():
    """On normal queries and keys of standard deviation 3, unseen ones for the measures."""
    make = torch.Generator().manual_seed(0)
    D, n = 16, 64

    def sample(batch):
        return (3 * torch.randn(batch, 1, n, D, generator=make) for _ in range(2))

    maps = {f"map_{side}": torch.eye(D, 32)[None].clone().requires_grad_() for side in "qk"}
    adam = torch.optim.AdamW(maps.values(), lr=1e-2, weight_decay=0.0)
    for _ in range(300):
        q, k = sample(4)
        loss = weight_cross_entropy(
            hedgehog_weights(q, k, causal=True, **maps), softmax_weights(q, k, causal=True)
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
    q, k = sample(16)
    teacher = softmax_weights(q, k, causal=True)
    with torch.no_grad():
        students = {
            "distilled": hedgehog_weights(q, k, causal=True, **maps),
            "identity": hedgehog_weights(q, k, causal=True),
            "elu": hedgehog_weights(q, k, causal=True, activation="pos_elu"),
            "relu": hedgehog_weights(q, k, causal=True, activation="relu"),
        }
    sharpness = {name: float(entropy(p)) for name, p in students.items()}
    distance = {name: float(kullback_leibler(teacher, p)) for name, p in students.items()}
    order = {
        name: float(monotonicity(teacher.clamp(min=1e-30).log(), p, p > 0))
        for name, p in students.items()
    }
    print(f"\nentropy: teacher {float(entropy(teacher)):.3f}, {sharpness}")
    print(f"divergence: {distance}\nmonotonicity: {order}")
    assert float(entropy(teacher)) < sharpness["distilled"] < sharpness["elu"]
    assert sharpness["distilled"] < sharpness["relu"]
    assert distance["distilled"] < min(distance["identity"], distance["elu"], distance["relu"])
    assert order["distilled"] > order["elu"]
