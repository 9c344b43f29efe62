"""What the tests of both Hedgehog ops share: the authors' layers, and maps as required operands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from regard.mixers import rotate

GOLDEN = Path(__file__).parents[1] / "golden/hedgehog"


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and the configuration of a layer."""
    config = json.loads((GOLDEN / f"{name}.json").read_text())["config"]
    return load_file(GOLDEN / f"{name}.safetensors"), config


def heads_of(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[Tensor]:
    """q, k after rotary positions, and v, of their layer."""
    x = tensors["in.hidden_states"]
    q, k, v = (
        (x @ tensors[f"state.{n}_proj.weight"].mT).unflatten(2, (-1, config["head_dim"]))
        for n in "qkv"
    )
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    at = torch.arange(x.shape[1])[None]
    return [rotate(q, at), rotate(k, at), v]


def maps_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The feature maps, as leaves."""
    return {
        f"map_{side}": tensors[f"state.feature_map_{side}.mlp.layer"].clone().requires_grad_()
        for side in "qk"
    }


def losses_of(
    out: Tensor, weights: Tensor, tensors: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, squared error, and their total, against their teacher."""
    from regard.recipes.distil import (
        TransferLoss,
        output_error,
        total_loss,
        weight_cross_entropy,
    )

    xent = weight_cross_entropy(weights, tensors["out.attn_teacher"])
    mse = output_error(out, tensors["out.head_out_teacher"])
    return xent, mse, total_loss([TransferLoss(xent, mse)])


def close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0.0)


def close_gradient(actual: Tensor, expected: Tensor, rtol: float = 1e-3) -> None:
    """Relative to its size; one that vanishes (a bias that a softmax takes out) absolutely."""
    assert float((actual - expected).norm()) < rtol * max(1e-4, float(expected.norm()))


def inputs(
    T: int = 30, S: int | None = None, *, H: int = 4, Hk: int = 2, D: int = 6, Dv: int = 5,
    F: int = 7, dtype: torch.dtype = torch.float64, seed: int = 0, key_maps: int | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:  # fmt: skip
    """q, k, v and maps of queries and keys, all leaves."""
    make = torch.Generator().manual_seed(seed)
    S, heads = T if S is None else S, Hk if key_maps is None else key_maps

    def leaf(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=make, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    q, k, v = leaf(2, H, T, D), leaf(2, Hk, S, D), leaf(2, Hk, S, Dv)
    return [q, k, v], {"map_q": leaf(H, D, F), "map_k": leaf(heads, D, F)}


def gradients(out: Tensor, *tensors: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out).sin()
    total = (out * weight).sum()
    return list(torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True))
