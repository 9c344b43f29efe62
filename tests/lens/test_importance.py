"""Head importance: against golden numbers, planted heads, identities, and the whole loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lens.timm_like import VisionTransformer
from lens.tiny_vit import golden_model, golden_numbers
from regard.lens.curves import interaction, pruning_curve
from regard.lens.importance import METRICS, bootstrap, changes, head_importance, kendall
from regard.lens.layers import attention_layers
from regard.lens.pruning import Pruner, head_gates
from regard.ops.local_linear import gemm


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Tensor]]:
    return golden_numbers()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return golden_model()


@pytest.fixture
def sample(golden: dict[str, dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    return golden["in"]["images"], golden["in"]["labels"]


def untouched(model: nn.Module) -> bool:
    return not any(
        "forward" in part.__dict__ or part._forward_hooks or part._forward_pre_hooks
        for part in model.modules()
    )


def test_golden_logits(model: nn.Module, golden: dict[str, dict[str, Tensor]]) -> None:
    with Pruner(model) as pruner:
        whole = pruner.record(golden["in"]["images"])
        torch.testing.assert_close(whole.logits, golden["out"]["logits"], rtol=0, atol=5e-5)
        for layer in range(3):
            gates = torch.ones(3, 3, 3)
            gates[:, layer] -= torch.eye(3)
            pruned = pruner.run(gates).logits
            wanted = golden["out"]["pruned_logits"][layer]
            torch.testing.assert_close(pruned, wanted, rtol=0, atol=5e-5)
    assert untouched(model)


@pytest.mark.parametrize("copies", [None, 1, 2])
def test_golden_metrics(
    model: nn.Module,
    sample: tuple[Tensor, Tensor],
    golden: dict[str, dict[str, Tensor]],
    copies: int | None,
) -> None:
    found = head_importance(model, *sample, copies=copies)
    assert tuple(found.metrics) == METRICS
    for name, values in found.metrics.items():
        wanted = golden["out"][f"importance.{name}"].numpy()
        np.testing.assert_allclose(values, wanted, rtol=2e-3, atol=5e-5, err_msg=name)
        assert (found.low[name] <= values + 1e-12).all()
        assert (found.high[name] >= values - 1e-12).all()
    np.testing.assert_array_equal(found.predicted, golden["out"]["logits"].argmax(-1).numpy())


def test_batches_give_the_same(model: nn.Module, sample: tuple[Tensor, Tensor]) -> None:
    images, labels = sample
    whole = head_importance(model, images, labels)
    split = head_importance(model, zip(images.split(5), labels.split(5), strict=True))
    for name in METRICS:
        np.testing.assert_allclose(split.per_image[name], whole.per_image[name], atol=1e-5)


@pytest.mark.parametrize("ablation", ["zero", "mean", "uniform"])
@pytest.mark.parametrize("unit", ["head", "layer", "all_but_head"])
def test_prefixes_change_nothing(
    model: nn.Module, sample: tuple[Tensor, Tensor], ablation: Any, unit: Any
) -> None:
    kept = head_importance(model, *sample, ablation=ablation, unit=unit)
    whole = head_importance(model, *sample, ablation=ablation, unit=unit, prefix=False, copies=1)
    assert kept.metrics["jsd"].shape == (3, 1 if unit == "layer" else 3)
    for name in METRICS:
        np.testing.assert_allclose(kept.per_image[name], whole.per_image[name], atol=2e-5)
    # One head at a time every product has the shapes of the whole run: not one bit differs.
    alone = head_importance(model, *sample, ablation=ablation, unit=unit, copies=1)
    for name in METRICS:
        np.testing.assert_array_equal(alone.per_image[name], whole.per_image[name])


def test_what_is_the_same_without_a_head_is_not_run(
    model: nn.Module, sample: tuple[Tensor, Tensor]
) -> None:
    """Neither earlier layers, nor queries, keys and values of the pruned one."""
    ran: list[int] = []
    handles = [
        block.attn.qkv.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(model.blocks)  # type: ignore[arg-type]
    ]
    try:
        head_importance(model, *sample, metrics=["jsd"])
        assert ran == [0, 1, 2, *(1, 2), *(2,)]
        ran.clear()
        head_importance(model, *sample, metrics=["jsd"], copies=1)
        assert ran == [0, 1, 2, *(0, 1, 2) * 3, *(1, 2) * 3, *(2,) * 3]
        ran.clear()
        head_importance(model, *sample, metrics=["jsd"], prefix=False, copies=1)
        assert ran == [0, 1, 2] * (1 + 9)
    finally:
        for handle in handles:
            handle.remove()


def test_prefixes_save_more_than_half_of_twelve_layers() -> None:
    """Counted, not timed: multiplications with kept prefixes and without; same answers."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 16, "patch_size": 4, "num_classes": 3}
    deep = VisionTransformer(embed_dim=12, depth=12, num_heads=3, **options).eval()
    images, labels = torch.randn(2, 3, 16, 16), torch.arange(2)
    found, products = [], []
    for more in ({"prefix": False}, {"copies": 1}, {}):
        with FlopCounterMode(display=False) as counter:
            found.append(head_importance(deep, images, labels, metrics=["jsd"], **more))
        products.append(counter.get_total_flops())
        np.testing.assert_allclose(found[-1].per_image["jsd"], found[0].per_image["jsd"], atol=1e-6)
    assert products[0] / products[1] > 1.7
    assert products[0] / products[2] > 2.0


class Pooled(nn.Module):
    """The golden model with a classifier that reads other tokens than the first."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.vit, self.pool = golden_model(), pool
        self.head, self.vit.head = self.vit.head, nn.Identity()
        self.vit.forward = self.tokens  # type: ignore[method-assign]

    def tokens(self, images: Tensor) -> Tensor:
        patches = self.vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
        first = self.vit.cls_token.expand(len(images), -1, -1)
        x = torch.cat([first, patches], 1) + self.vit.pos_embed
        return self.vit.norm(self.vit.blocks(x))

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.head, self.vit(images))


POOLS: dict[str, tuple[Any, slice | None]] = {
    "class token": (lambda head, x: head(x[:, 0]), slice(0, 1)),
    "last token": (lambda head, x: head(x[:, -1]), slice(-1, None)),
    "two tokens": (lambda head, x: head(x[:, 0]) + head(x[:, 1]), slice(0, 2)),
    "mean": (lambda head, x: head(x.mean(1)), None),
    "maximum": (lambda head, x: head(x.amax(1)), None),
    "all scored": (lambda head, x: head(x)[:, 0], None),  # the embedding holds every token
}


@pytest.mark.parametrize("pool", POOLS)
def test_of_the_last_block_only_tokens_that_are_read(
    sample: tuple[Tensor, Tensor], pool: str
) -> None:
    function, read = POOLS[pool]
    pooled = Pooled(function).eval()
    with Pruner(pooled) as pruner:
        pruner.record(sample[0])
        assert pruner.read == read
    for ablation in ("zero", "uniform"):
        kept = head_importance(pooled, *sample, ablation=ablation)
        whole = head_importance(pooled, *sample, ablation=ablation, prefix=False, copies=1)
        for name in METRICS:
            np.testing.assert_allclose(kept.per_image[name], whole.per_image[name], atol=2e-5)
    assert untouched(pooled.vit.blocks)


def test_runs_in_any_order_know_nothing_of_each_other(sample: tuple[Tensor, Tensor]) -> None:
    """What an earlier run computed with other heads pruned is not taken for the recorded."""
    gates = torch.ones(2, 1, 3, 3)
    gates[0, 0, 0, 1] = gates[1, 0, 1, 2] = 0
    with Pruner(golden_model(), ablation="uniform") as pruner:
        pruner.record(sample[0])
        first = pruner.run(gates[1]).logits
        pruner.run(gates[0])
        assert torch.equal(pruner.run(gates[1]).logits, first)


def test_products_of_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large enough that a CPU with AVX-512 takes oneDNN: equal to rounding."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 16, "patch_size": 2, "num_classes": 5}
    wide = VisionTransformer(embed_dim=96, depth=2, num_heads=3, **options).eval()
    sample = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    calls: list[int] = []
    times = gemm.times
    monkeypatch.setattr(gemm, "times", lambda *a: calls.append(1) or times(*a))
    ours = head_importance(wide, *sample)
    assert bool(calls) == gemm.available()
    calls.clear()
    monkeypatch.setattr(gemm, "available", lambda: False)
    plain = head_importance(wide, *sample)
    assert not calls
    for name in METRICS:
        np.testing.assert_allclose(ours.per_image[name], plain.per_image[name], atol=2e-5)


def test_gates_of_one_change_no_bit_and_zero_is_no_value(
    model: nn.Module, sample: tuple[Tensor, Tensor]
) -> None:
    with torch.no_grad():
        before = model(sample[0])
        with head_gates(model) as gates:
            assert torch.equal(model(sample[0]), before)
            gates[1, 2] = 0
            pruned = model(sample[0])
        assert torch.equal(model(sample[0]), before)
        other = golden_model()
        rows = slice(2 * 24 + 16, 2 * 24 + 24)  # the values of the last head
        for parameter in other.blocks[1].attn.qkv.parameters():
            parameter[rows] = 0
        torch.testing.assert_close(pruned, other(sample[0]), rtol=0, atol=1e-6)
    assert untouched(model)


def test_uniform_is_the_mean_of_values(model: nn.Module, sample: tuple[Tensor, Tensor]) -> None:
    """Queries of zero make every weight 1/T."""
    other = golden_model()
    with torch.no_grad(), Pruner(model, ablation="uniform") as pruner:
        for parameter in other.blocks[0].attn.qkv.parameters():
            parameter[8:16] = 0
        pruner.record(sample[0])
        gates = torch.ones(1, 3, 3)
        gates[0, 0, 1] = 0
        torch.testing.assert_close(pruner.run(gates).logits[0], other(sample[0]))


def test_mean_ablation_of_one_image_changes_nothing(
    model: nn.Module, sample: tuple[Tensor, Tensor]
) -> None:
    found = head_importance(model, sample[0][:1], sample[1][:1], ablation="mean")
    for name in set(METRICS) - {"grad_sensitivity"}:
        np.testing.assert_allclose(found.metrics[name], 0, atol=1e-5)


class OneHead(nn.Module):
    """Logits that see the output of head 2 of layer 1 only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        options: dict[str, Any] = {"img_size": 16, "patch_size": 4, "mlp_ratio": 1.0}
        self.vit = VisionTransformer(embed_dim=24, depth=3, num_heads=3, num_classes=4, **options)
        self.head = self.vit.head
        with torch.no_grad():
            for block in self.vit.blocks:
                block.mlp.fc2.weight.zero_()
                block.mlp.fc2.bias.zero_()
                block.attn.proj.weight.zero_()
                block.attn.proj.bias.zero_()
            self.vit.blocks[1].attn.proj.weight[:, 16:] = 3 * torch.randn(24, 8)
            self.vit.blocks[1].attn.qkv.weight[64:] = torch.randn(8, 24)
            self.head.weight.normal_()

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images)


def test_a_planted_head_comes_first() -> None:
    planted = OneHead().eval()
    images = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = planted(images).argmax(-1)
    found = head_importance(planted, images, labels)
    for name, values in found.metrics.items():
        assert np.unravel_index(values.argmax(), values.shape) == (1, 2), name
        others = np.delete(values.ravel(), 5)
        assert values[1, 2] > 1e-3 + others.max(), name
    assert found.order()[-1] == (1, 2)
    assert found.mean_rank()[1, 2] == 1


def test_transformers_models_and_masks() -> None:
    """Padded text: the mask of every image goes with its copies."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = transformers.BertConfig(vocab_size=20, intermediate_size=32, num_labels=4, **sizes)
    for attention in ("sdpa", "eager"):
        text = transformers.BertForSequenceClassification(config).eval()
        text.set_attn_implementation(attention)
        mask = torch.ones(5, 7, dtype=torch.long)
        mask[0, 4:], mask[3, 2:] = 0, 0
        batch = {"input_ids": torch.randint(0, 20, (5, 7)), "attention_mask": mask}
        labels = torch.arange(5) % 4
        kept = head_importance(text, batch, labels)
        whole = head_importance(text, batch, labels, prefix=False, copies=1)
        alone = head_importance(
            text, {k: v[3:4, :2] for k, v in batch.items()}, labels[3:4], metrics=["jsd"]
        )
        for name in METRICS:
            np.testing.assert_allclose(kept.per_image[name], whole.per_image[name], atol=1e-5)
        np.testing.assert_allclose(kept.per_image["jsd"][3], alone.per_image["jsd"][0], atol=1e-6)


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "DeiT"])
def test_transformers_vision(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    more: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_labels": 5}
    if kind != "Dinov2":
        more["intermediate_size"] = 32
    config = getattr(transformers, f"{kind}Config")(**sizes, **more)
    vision = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    kept = head_importance(vision, images, labels)
    whole = head_importance(vision, images, labels, prefix=False, copies=1)
    for name in METRICS:
        np.testing.assert_allclose(kept.per_image[name], whole.per_image[name], atol=1e-5)
    assert kept.metrics["cls_l2"].min() > 0
    assert untouched(vision)


def test_after_an_error_nothing_remains(model: nn.Module, sample: tuple[Tensor, Tensor]) -> None:
    def broken(output: Tensor) -> Tensor:
        broken.calls += 1  # type: ignore[attr-defined]
        if broken.calls > 3:  # type: ignore[attr-defined]
            raise RuntimeError("in the middle")
        return output

    broken.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="in the middle"):
        head_importance(model, *sample, readout=broken)
    assert untouched(model)


def test_statistics() -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 5, (3, 12)).astype(float)
    for i in range(3):
        for j in range(3):
            wanted = kendalltau(values[i], values[j]).statistic
            assert kendall(values)[i, j] == pytest.approx(wanted)
    sample = random.normal(size=(400, 2))
    low, high = bootstrap(sample, 2000, 0.95, 1)
    half = 1.96 * sample.std(0) / 20
    np.testing.assert_allclose((high - low) / 2, half, rtol=0.1)
    again = bootstrap(sample, 2000, 0.95, 1)
    np.testing.assert_array_equal(low, again[0])


def test_extremes_of_the_metrics() -> None:
    sure = torch.tensor([[200.0, 0.0, 0.0]])
    found = changes(sure, torch.tensor([[0.0, 200.0, 100.0]]), torch.tensor([0]))
    wanted = {"prob_drop": 1, "acc_drop": 1, "jsd": 1, "flip_rate": 1, "rank_change": 2}
    for name, value in wanted.items():
        assert found[name][0] == pytest.approx(value), name
    assert found["loss_increase"][0] == pytest.approx(200)
    same = changes(sure, sure, torch.tensor([0]))
    assert all(float(values[0]) == 0 for values in same.values())


def test_classes_tables_and_files(
    model: nn.Module, sample: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    found = head_importance(model, *sample)
    counts = np.bincount(found.labels)
    by_class = [found.of_class(int(c))["prob_drop"] * counts[c] for c in np.unique(found.labels)]
    np.testing.assert_allclose(np.sum(by_class, 0) / 12, found.metrics["prob_drop"], atol=1e-12)
    agreement = found.agreement(["jsd", "cls_l2"])
    assert agreement.shape == (2, 2)
    assert agreement[0, 0] == pytest.approx(1)
    assert json.loads(found.to_json())["metrics"]["jsd"][0][0] > 0
    found.picture(tmp_path / "importance.svg")
    curve = pruning_curve(model, *sample, order=found.order())
    curve.picture(tmp_path / "curve.png")
    assert (tmp_path / "importance.svg").read_text().startswith("<?xml")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no image has the label 17"):
        found.of_class(17)


def test_curves(model: nn.Module, sample: tuple[Tensor, Tensor]) -> None:
    found = head_importance(model, *sample)
    order = [(2, 1), (0, 0)]
    curve = pruning_curve(model, *sample, order=order)
    np.testing.assert_array_equal(curve.removed, [0, 1, 2])
    whole = (found.predicted == found.labels).mean()
    assert curve.accuracy[0] == pytest.approx(whole)
    assert whole - curve.accuracy[1] == pytest.approx(found.metrics["acc_drop"][2, 1])
    assert curve.loss[1] - curve.loss[0] == pytest.approx(
        found.metrics["loss_increase"][2, 1], abs=1e-6
    )
    both = interaction(model, *sample, pairs=[((2, 1), (0, 0))])
    drops = found.metrics["loss_increase"]
    wanted = curve.loss[2] - curve.loss[0] - drops[2, 1] - drops[0, 0]
    assert both[0] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metrics": ["jds"]}, r"metrics must be of .* got \['jds'\]"),
        ({"metrics": []}, "metrics must be of"),
        ({"ablation": "none"}, "ablation must be one of .* got 'none'"),
        ({"unit": "block"}, "unit must be one of .* got 'block'"),
        ({"head": "clasifier"}, "has no module 'clasifier'"),
        ({"readout": lambda output: output[0]}, r"logits must have the shape \[B, C\]"),
        ({"labels": torch.arange(12)}, "labels must be from 0 to 5, got 0 to 11"),
        ({"labels": torch.zeros(11).long()}, "labels must be class indices"),
        ({"labels": torch.zeros(12)}, "labels must be class indices"),
        ({"labels": None}, "labels"),
    ],
)
def test_wrong_arguments(
    model: nn.Module, sample: tuple[Tensor, Tensor], options: dict[str, Any], words: str
) -> None:
    arguments = {"labels": sample[1], **options}
    with pytest.raises(ValueError, match=f"head_importance: .*{words}"):
        head_importance(model, sample[0], **arguments)


def test_wrong_models_and_heads(model: nn.Module, sample: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="training mode"):
        Pruner(golden_model().train())
    with pytest.raises(ValueError, match="has no layer of attention"):
        attention_layers(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no head 3 of layer 0; the model has layers 0 to 2"):
        pruning_curve(model, *sample, order=[(0, 3)])
    with pytest.raises(ValueError, match="named twice"):
        interaction(model, *sample, pairs=[((0, 1), (0, 1))])
    with pytest.raises(ValueError, match="removed must be from 0 to 1"):
        pruning_curve(model, *sample, order=[(0, 1)], removed=[2])
    transformers = pytest.importorskip("transformers")
    shared = transformers.AlbertConfig(
        hidden_size=12, embedding_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="runs 2 layers with 1 modules"):
        attention_layers(transformers.AlbertModel(shared))
    headless = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        )
    ).eval()
    images, labels = torch.randn(2, 3, 8, 8), torch.zeros(2).long()
    with pytest.raises(ValueError, match="without logits; pass readout"):
        head_importance(headless, images, labels)
    pool = {"readout": lambda output: output.last_hidden_state[:, 0]}
    with pytest.raises(ValueError, match="shows an embedding: name it by head="):
        head_importance(headless, images, labels, **pool)
    found = head_importance(headless, images, labels, metrics=["jsd"], **pool)
    assert found.metrics["jsd"].shape == (1, 2)


@pytest.mark.slow
def test_digits() -> None:
    """A small ViT on real digits: an order by importance keeps accuracy longer than chance."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = torch.tensor(digits.images).float()[:, None] / 8 - 1
    images = nn.functional.interpolate(images, scale_factor=2)
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    mixed = torch.randperm(len(labels))  # writers come one after the other in the file
    images, labels = images[mixed], labels[mixed]
    options: dict[str, Any] = {"img_size": 16, "patch_size": 4, "channels": 1, "num_classes": 10}
    vit = VisionTransformer(embed_dim=48, depth=4, num_heads=4, mlp_ratio=2.0, **options)
    optimiser = torch.optim.AdamW(vit.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 30)
    for _ in range(30):
        for rows in torch.randperm(1400).split(64):
            loss = nn.functional.cross_entropy(vit(images[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    vit.eval()
    test = images[1400:], labels[1400:]
    found = head_importance(vit, *test)
    assert (found.predicted == found.labels).mean() > 0.9
    pair = (found.metrics[name].ravel() for name in ("grad_sensitivity", "loss_increase"))
    assert spearmanr(*pair).statistic > 0.5
    # The order comes from other images than those the curve is measured on.
    order = head_importance(vit, images[:400], labels[:400]).order("loss_increase")
    ours = pruning_curve(vit, *test, order=order).area()
    random = np.random.default_rng(0)
    chance = [
        pruning_curve(vit, *test, order=[order[i] for i in random.permutation(16)]).area()
        for _ in range(5)
    ]
    assert ours > max(chance)
