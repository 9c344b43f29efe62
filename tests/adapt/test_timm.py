"""Attention modules of timm's layout take a mechanism and keep their keys."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lens.timm_like import Attention, VisionTransformer
from regard.adapt import timm as adapt
from regard.lens.importance import head_importance
from regard.lens.pruning import Pruner
from regard.lens.tap import tap


class Recent(Attention):
    """With what newer releases of timm have: norms, dropout, a gate, masks."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.scale = (dim // heads) ** -0.5
        self.q_norm, self.k_norm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)
        self.attn_drop, self.norm = nn.Dropout(0.0), nn.LayerNorm(dim)
        self.proj_drop, self.gate = nn.Dropout(0.0), nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        attend = nn.functional.scaled_dot_product_attention
        out = attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        out = self.norm(out.transpose(1, 2).reshape(B, N, C))
        return self.proj(out * self.gate(x).sigmoid())


def vision() -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3}
    model = VisionTransformer(**sizes, num_heads=2, num_classes=5).eval()
    return model, torch.randn(2, 3, 16, 16)


def test_softmax_is_the_model() -> None:
    model, images = vision()
    keys, before = list(model.state_dict()), model(images)
    done = adapt.swap(model, "softmax")
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(images), before, atol=1e-5, rtol=0)
    done.restore()
    assert torch.equal(model(images), before)
    assert type(model.blocks[0].attn) is Attention


def test_norms_and_masks_are_kept() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Recent(16, 2)).eval(), torch.randn(2, 7, 16)
    real = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    real[1, ..., 4:] = False
    bias = torch.randn(2, 2, 7, 7)
    before = [model[0](x, mask) for mask in (None, real, bias)]
    adapt.swap(model, "softmax")
    for mask, wanted in zip((None, real, bias), before, strict=True):
        torch.testing.assert_close(model[0](x, mask), wanted, atol=1e-5, rtol=0)
    adapt.swap(model, "local_linear", ridge=1e6)
    torch.testing.assert_close(model[0](x, real), before[1], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"attn_mask must be None or bool \[2, 1, 1, 7\]"):
        model[0](x, bias)
    adapt.swap(model, "hierarchical_sparse", block=2, budget=4, chunk=2)
    with pytest.raises(ValueError, match="attn_mask must be None: the op"):
        model[0](x, real)


def test_calls_may_be_causal() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Recent(16, 2)).eval(), torch.randn(2, 7, 16)
    before = model[0](x, is_causal=True)
    for mechanism, options in (("softmax", {}), ("local_linear", {"ridge": 1e6})):
        adapt.swap(model, mechanism, **options)
        torch.testing.assert_close(model[0](x, is_causal=True), before, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="attn_mask must be None with is_causal"):
        model[0](x, torch.ones(2, 1, 1, 7, dtype=torch.bool), is_causal=True)
    adapt.swap(model, "hierarchical_sparse", block=2, budget=4, chunk=2)
    with pytest.raises(ValueError, match="serves no causal"):
        model[0](x, is_causal=True)


def test_learned_parts_are_in_the_state_dict() -> None:
    model, images = vision()
    done = adapt.swap(model, "local_linear", [1], ridge=2.0, learn=("ridge", "bandwidth"))
    assert set(done.parameters()) == {
        f"blocks.1.attn.regard.{name}" for name in ("log_ridge", "log_scale")
    }
    model(images).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in done.parameters().values())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        done.parameters()["blocks.1.attn.regard.log_ridge"].fill_(-1.0)
    assert not torch.equal(twin(images), model(images))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(images), model(images))
    adapt.restore(twin)
    assert type(twin.blocks[1].attn) is Attention
    adapt.swap(model, "hedgehog", [2])
    assert model(images).isfinite().all()


def test_report_says_why_not() -> None:
    model, _ = vision()
    found = adapt.report(model)
    assert found.can("linear") == ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn")
    assert "noncausal_self" in str(found.reasons[0]["rat"])
    model.blocks[1].attn.relative_position_bias = nn.Parameter(torch.zeros(2))
    why = adapt.report(model).reasons[1]["softmax"]
    assert why == "the module has more than the layout is known for: relative_position_bias"
    before = [type(block.attn) for block in model.blocks]
    with pytest.raises(ValueError, match=r"blocks\.1\.attn.*relative_position_bias"):
        adapt.swap(model, "softmax")
    assert [type(block.attn) for block in model.blocks] == before


def test_refuses_models_of_another_kind() -> None:
    with pytest.raises(ValueError, match="timm's layout"):
        adapt.swap(nn.Linear(2, 2), "softmax")
    with pytest.raises(ValueError, match="the layer itself"):
        adapt.swap(Attention(8, 2), "softmax")
    adapt.restore(nn.Linear(2, 2))


@pytest.mark.requires("timm")
@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "vit_small_patch14_reg4_dinov2",  # registers, and a scale per channel
        "vit_base_patch16_clip_224",
    ],
)
def test_models_of_timm(name: str) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, depth=2, num_classes=3).eval()
    images = torch.randn(1, 3, *model.patch_embed.img_size)
    # Its head starts at zero, and says nothing.
    keys, before = list(model.state_dict()), model.forward_features(images)
    done = adapt.swap(model, "softmax")
    assert len(done.layers) == 2
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model.forward_features(images), before, atol=1e-5, rtol=0)
    adapt.restore(model)
    assert torch.equal(model.forward_features(images), before)


@pytest.mark.requires("timm")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("eva02_tiny_patch14_224", "q_bias, v_bias, rope"),
        ("beit_base_patch16_224", "relative_position_bias_table"),
        ("vit_srelpos_small_patch16_224", "shared_rel_pos"),
    ],
)
def test_models_of_timm_with_more_than_the_layout(name: str, why: str) -> None:
    import timm

    model = timm.create_model(name, pretrained=False, depth=2, num_classes=3)
    with pytest.raises(ValueError, match=why):
        adapt.swap(model, "softmax")


@pytest.mark.requires("timm")
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("vit_tiny_patch16_224", slice(0, 1)),
        ("deit_tiny_distilled_patch16_224", slice(0, 2)),
        ("eva02_tiny_patch14_224", None),
    ],
)
def test_lenses_on_models_of_timm(name: str, read: slice | None) -> None:
    """Taps change no bit; heads are pruned as by the whole loop."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, depth=2, num_classes=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.05)
        images, labels = torch.randn(2, 3, *model.patch_embed.img_size), torch.tensor([0, 1])
        before, seen = model(images), []
        with tap(model, read=lambda attention: seen.append(attention.weights.sum(-1))):
            assert torch.equal(model(images), before)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], torch.ones_like(seen[0]))
    with Pruner(model) as pruner:
        pruner.record(images)
        assert pruner.read == read
    kept = head_importance(model, images, labels)
    whole = head_importance(model, images, labels, prefix=False, copies=1)
    for metric, values in kept.per_image.items():
        np.testing.assert_allclose(values, whole.per_image[metric], atol=2e-5)
