"""The autoencoder of attention maps, its clusters and their names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lens.pattern_families import FAMILIES, families
from regard.lens.patterns import (
    PatternAutoencoder,
    PatternSample,
    fit_autoencoder,
    prepared,
    summarise_patterns,
)
from regard.lens.templates import templates

pytest.importorskip("sklearn")


def test_planted_heads_make_pure_clusters(tmp_path: Path) -> None:
    """Two layers of two heads, each with its own pattern; every cluster is one head."""
    names = ("previous_column", "ring_2", "cls_sink", "uniform")
    known = templates((4, 4), 1)
    random = torch.Generator().manual_seed(0)
    maps, heads = [], []
    for _ in range(12):
        for number, name in enumerate(names):
            rows = known[name] + 0.02 * torch.rand(17, 17, generator=random)
            maps.append(rows / rows.sum(-1, keepdim=True))
            heads.append(divmod(number, 2))
    # How many clusters there are is found as well.
    found = summarise_patterns(torch.stack(maps), 4, 1, heads=heads, epochs=60, size=16, width=4)
    assert found.distribution.shape == (2, 2, 4)
    np.testing.assert_array_equal(found.purity, 1)
    assert len(set(found.dominant.ravel().tolist())) == 4
    assert found.embedding.shape == (48, 2)
    by_head = [found.names[found.dominant[divmod(n, 2)]] for n in range(4)]
    assert by_head == list(names)
    found.picture(tmp_path / "patterns.png")
    assert json.loads(found.to_json())["names"] == found.names


def test_a_sample_of_a_stream() -> None:
    """While there is room the same summary; beyond that constant memory, no favourites."""
    maps, _ = families(4, 4)
    weights = maps.reshape(4, 7, 16, 16)
    sample = PatternSample(4, 0, size=16, most=28)
    for image, part in enumerate(weights):
        sample.add(image, 0, part)
    options = {"clusters": 3, "epochs": 2, "width": 4, "embed": "pca"}
    heads = [(0, head) for _ in range(4) for head in range(7)]
    wanted = summarise_patterns(maps, 4, 0, heads=heads, size=16, **options)  # type: ignore[arg-type]
    found = sample.summary(**options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.cluster, wanted.cluster)
    np.testing.assert_allclose(found.distribution, wanted.distribution)
    assert found.names == wanted.names
    assert sample.places[-1].tolist() == [3, 0, 6]
    few = PatternSample(2, 1, size=16, most=100)
    part = torch.rand(4, 5, 5).softmax(-1)
    for image in range(1000):
        few.add(image, image % 3, part)
    assert few.seen == 4000
    assert few.small.shape == (100, 16, 16)
    assert 380 < few.places[:, 0].mean() < 620, "early and late images alike"
    with pytest.raises(ValueError, match="PatternSample.summary: clusters must be from 2 to 27"):
        sample.summary(clusters=40)
    with pytest.raises(ValueError, match="most must be at least 1"):
        PatternSample(4, most=0)
    with pytest.raises(ValueError, match="template_scores: weights must be"):
        few.add(0, 0, torch.rand(1, 4, 4))


def test_seeded() -> None:
    maps, _ = families(3, 4)
    before = torch.random.get_rng_state()
    _, first = fit_autoencoder(maps, size=16, width=3, epochs=2, seed=4)
    _, again = fit_autoencoder(maps, size=16, width=3, epochs=2, seed=4)
    _, other = fit_autoencoder(maps, size=16, width=3, epochs=2, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(first.latents, again.latents)
    assert not np.array_equal(first.latents, other.latents)
    assert first.held.sum() == 4


def test_prepared_maps() -> None:
    maps = torch.eye(8)[None]
    assert prepared(maps, 16).shape == (1, 1, 16, 16)
    small = prepared(torch.ones(1, 32, 32), 16, "log")
    torch.testing.assert_close(small, torch.full_like(small, np.log(2)))
    assert float(prepared(maps, 16, "sqrt").max()) == pytest.approx(np.sqrt(8))
    assert float(prepared(2 * maps, 16, "none").max()) == pytest.approx(8)
    assert float(prepared(maps / 2, 16, "none", normalise=False).max()) == pytest.approx(4)


def test_wrong_arguments() -> None:
    maps, _ = families(2, 4)
    with pytest.raises(ValueError, match="size must be a multiple of 16"):
        PatternAutoencoder(40)
    with pytest.raises(ValueError, match="at least 10 maps"):
        fit_autoencoder(maps[:9])
    with pytest.raises(ValueError, match="scale must be one of"):
        prepared(maps, 16, "square")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"maps must be \[M, N, N\]"):
        prepared(maps[0], 16)
    with pytest.raises(ValueError, match="clusters must be from 2 to 13, got"):
        summarise_patterns(maps, 4, 0, clusters=14)
    with pytest.raises(ValueError, match="embed must be"):
        summarise_patterns(maps, 4, 0, embed="umap")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of 14 maps, got 1"):
        summarise_patterns(maps, 4, 0, clusters=2, heads=[(0, 0)])


@pytest.mark.slow
def test_seven_families() -> None:
    """Clusters are families; four numbers say more than four principal components."""
    from sklearn.metrics import adjusted_rand_score

    maps, labels = families(200)
    found = summarise_patterns(maps, 8, 0, clusters=7, size=32, width=4, epochs=30, embed="pca")
    assert adjusted_rand_score(labels, found.cluster) > 0.9
    assert found.autoencoder.held_out_error < found.autoencoder.pca_error
    named = {found.cluster[n]: FAMILIES[labels[n]] for n in found.medoids}
    exact = [found.names[cluster] == family for cluster, family in named.items()]
    assert sum(exact) >= 6, "a soft ring between 2 and 3 may be named for either"
