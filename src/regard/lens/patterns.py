"""Which attention patterns there are: an autoencoder of the maps of many heads, and clusters."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.lens.inputs import require
from regard.lens.records import Record, drawing
from regard.lens.templates import template_scores

Scale = Literal["sqrt", "log", "none"]
SCALES = ("sqrt", "log", "none")
CHANNELS = (16, 32, 64, 128)
HELD_OUT = 0.2


class PatternAutoencoder(nn.Module):
    """Maps [M, 1, S, S] to `width` numbers and back; S a multiple of 16.

    Four 3 x 3 convolutions of stride 2 with batch norm and ReLU (16, 32, 64, 128 channels), one
    linear layer to the latent vector, and the mirror of it with transposed convolutions.

    >>> PatternAutoencoder(32, 8).eval()(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 1, 32, 32])
    """

    def __init__(self, size: int = 64, width: int = 32) -> None:
        super().__init__()
        if size < 16 or size % 16 or width < 1:
            raise ValueError(
                "PatternAutoencoder: size must be a multiple of 16 and width positive, got "
                f"{size} and {width}"
            )
        self.size, self.width = size, width
        inner, sizes = size // 16, (1, *CHANNELS)
        down, up = [], []
        for before, after in zip(sizes, CHANNELS, strict=False):
            down += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        for after, before in zip(reversed(sizes[:-1]), reversed(CHANNELS), strict=True):
            up += [nn.ConvTranspose2d(before, after, 4, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        flat = CHANNELS[-1] * inner**2
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(flat, width))
        self.decoder = nn.Sequential(
            nn.Linear(width, flat), nn.Unflatten(1, (CHANNELS[-1], inner, inner)), *up[:-2]
        )

    def forward(self, maps: Float[Tensor, "m 1 s s"]) -> Float[Tensor, "m 1 s s"]:
        return self.decoder(self.encoder(maps))


@dataclass(frozen=True)
class Fitted(Record):
    """What was learned: latent vectors of all maps [M, W], and mean squared errors of maps that
    were learned from and of the fifth that was held out (`held [M]`), both per entry of the scaled
    maps; `pca_error` is that of as many principal components on the same held-out maps.
    """

    latents: NDArray[np.float64]
    error: float
    held_out_error: float
    pca_error: float
    held: NDArray[np.bool_]
    losses: NDArray[np.float64]


def prepared(
    maps: Float[Tensor, "m n n"],
    size: int = 64,
    scale: Scale = "sqrt",
    normalise: bool = True,
) -> Float[Tensor, "m 1 s s"]:
    """Maps as the autoencoder takes them: rows of sum one, times N, scaled, resized by area.

    `sqrt` and `log` (ln(1 + x)) let weak weights be seen beside strong ones. With `normalise=False`
    rows keep their sums: those of a head that looks past the patches stay weak.
    """
    if scale not in SCALES:
        raise ValueError(f"prepared: scale must be one of {SCALES}, got {scale!r}")
    if maps.ndim != 3 or not len(maps):
        raise ValueError(f"prepared: maps must be [M, N, N], got {tuple(maps.shape)}")
    maps = maps.detach().float()
    if normalise:
        maps = maps / maps.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    maps = maps * maps.shape[-1]
    maps = {"sqrt": torch.sqrt, "log": torch.log1p, "none": torch.clone}[scale](maps)
    if maps.shape[-1] < size:
        return nn.functional.interpolate(maps[:, None], (size, size), mode="nearest")
    return nn.functional.adaptive_avg_pool2d(maps[:, None], size)


def fit_autoencoder(
    maps: Float[Tensor, "m n n"],
    *,
    size: int = 64,
    width: int = 32,
    scale: Scale = "sqrt",
    normalise: bool = True,
    epochs: int = 30,
    batch: int = 64,
    rate: float = 1e-3,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[PatternAutoencoder, Fitted]:
    """Learns the autoencoder on attention maps (of patches, or any square ones) by Adam.

    The loss is the mean squared error of scaled maps. Everything follows from `seed` on one machine
    and number of threads; the global random state stays as it was. Cost on one CPU core: about 4 ms
    per map and epoch at size 64.

    Raises:
        ValueError: maps of another shape, fewer than 10, a size that is no multiple of 16.
    """
    inputs = prepared(maps, size, scale, normalise)
    count = len(inputs)
    if count < 10:
        raise ValueError(f"fit_autoencoder: at least 10 maps are needed, got {count}")
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(count, dtype=torch.bool)
    held[torch.randperm(count, generator=generator)[: max(2, int(HELD_OUT * count))]] = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PatternAutoencoder(size, width)
    model.to(inputs.device)
    centre, spread = inputs[~held].mean(), inputs[~held].std().clamp_min(1e-6)
    units = (inputs - centre) / spread
    learned = units[~held]
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    steps = epochs * -(-len(learned) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    losses = []
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for rows in torch.randperm(len(learned), generator=generator).split(batch):
            if len(rows) == 1:
                continue  # batch norm of one map
            some = learned[rows.to(learned.device)]
            loss = nn.functional.mse_loss(model(some), some)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows)
        losses.append(total / len(learned))
        if progress is not None:
            progress(epoch, losses[-1])
    model.eval()
    with torch.no_grad():
        parts = [(model.encoder(some), model(some)) for some in units.split(batch)]
    latents, back = (torch.cat(part) for part in zip(*parts, strict=True))
    errors = (back - units).square().mean((1, 2, 3)).cpu() * float(spread.cpu()) ** 2
    pca = _pca_error(inputs[~held].flatten(1), inputs[held].flatten(1), width)
    return model, Fitted(
        latents.double().cpu().numpy(),
        float(errors[~held].mean()),
        float(errors[held].mean()),
        pca,
        held.numpy(),
        np.array(losses),
    )


def _pca_error(learned: Tensor, other: Tensor, width: int) -> float:
    mean = learned.mean(0)
    size = min(width, *learned.shape)
    _, _, axes = torch.linalg.svd(learned - mean, full_matrices=False)
    axes = axes[:size]
    rest = other - mean
    return float((rest - rest @ axes.T @ axes).square().mean())


@dataclass(frozen=True)
class PatternSummary(Record):
    """Clusters of the maps of many images and heads.

    `cluster [M]` of every map, `embedding [M, 2]` by t-SNE (or principal components), `medoids [K]`
    the map nearest to every cluster's centre, `names [K]` the template that describes it best and
    `fit [K]` its cosine; `silhouette` of the clustering. Where layer and head are known:
    `distribution [L, H, K]` over clusters, `dominant [L, H]` and its share `purity [L, H]` (-1 and
    NaN for a head without maps).
    """

    cluster: NDArray[np.int64]
    embedding: NDArray[np.float64]
    medoids: NDArray[np.int64]
    names: list[str]
    fit: NDArray[np.float64]
    silhouette: float
    distribution: NDArray[np.float64]
    dominant: NDArray[np.int64]
    purity: NDArray[np.float64]
    autoencoder: Fitted

    def picture(self, path: str | os.PathLike[str]) -> None:
        """The maps as points coloured by cluster, and clusters per layer."""
        with drawing(path, (8.5, 3.6), 1, 2) as axes:
            left, right = axes.flat
            for number, name in enumerate(self.names):
                points = self.embedding[self.cluster == number]
                left.scatter(*points.T, s=5, label=f"{number}: {name.replace('_', ' ')}")
            left.legend(fontsize=6)
            left.set_xticks([])
            left.set_yticks([])
            under = np.zeros(len(self.distribution))
            share = np.nan_to_num(self.distribution).mean(1)
            for number in range(len(self.names)):
                right.bar(np.arange(len(share)), share[:, number], bottom=under)
                under += share[:, number]
            right.set_xlabel("layer")
            right.set_ylabel("share of maps")


def summarise_patterns(
    weights: Float[Tensor, "m t t"],
    grid: int | tuple[int, int],
    prefix: int = 1,
    *,
    heads: Sequence[tuple[int, int]] | Int[NDArray[np.int64], "m 2"] | None = None,
    clusters: int | Sequence[int] = (2, 3, 4, 5, 6, 7, 8, 9, 10),
    embed: Literal["tsne", "pca"] = "tsne",
    size: int = 64,
    width: int = 32,
    scale: Scale = "sqrt",
    epochs: int = 30,
    seed: int = 0,
) -> PatternSummary:
    """Finds the patterns in the maps of many (image, head) pairs and names them.

    An autoencoder of the patch part of every map (weights as they are, not made to sum to one
    again: what goes to prefix tokens is missing and shows), k-means of its latent vectors (the
    number of clusters by silhouette if several are offered), the map nearest to each centre, and
    the template that it resembles most (`regard.lens.templates`).

    Args:
        weights: [M, T, T], the map of one head on one image each.
        grid, prefix: as in `strength_profile`.
        heads: (layer, head) of every map, for the tables per head.
        clusters: how many, or the numbers to choose from.
        embed: "tsne" or "pca", for the picture only.
        size, width, scale, epochs, seed: as in `fit_autoencoder`.

    Source: autoencoder summary of attention patterns, Li et al., arXiv 2303.13731; sizes as written
    here. Needs scikit-learn (the extra `sklearn`).

    Raises:
        ValueError: shapes that do not fit, an impossible number of clusters. ImportError: no
            scikit-learn.
    """
    operation = "summarise_patterns"
    require("sklearn", "sklearn")
    if heads is not None and len(heads) != len(weights):
        raise ValueError(
            f"{operation}: heads must name (layer, head) of {len(weights)} maps, got {len(heads)}"
        )
    offered = _offered(clusters, embed, len(weights), operation)
    scores = template_scores(weights, grid, prefix)
    # Rows are shares of everything, prefix tokens included: what little a head that looks at the
    # class token gives to patches is noise, and stays as small as it is.
    shares = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    _, fitted = fit_autoencoder(
        shares[:, prefix:, prefix:],
        size=size,
        width=width,
        scale=scale,
        normalise=False,
        epochs=epochs,
        seed=seed,
    )
    named = (scores.best(), scores.cosine.max(-1))
    return _clustered(fitted, named, heads, offered, embed, seed)


class PatternSample:
    """Keeps the patterns of at most `most` maps of a stream: memory does not grow with images.

    `add(image, layer, weights [H, T, T])` in any order; every map is as likely as any other to be
    kept (reservoir sampling from `seed`). `places [M, 3]` are (image, layer, head) of those kept,
    `small [M, S, S]` their patch parts as the autoencoder takes them. `summary()` is that of
    `summarise_patterns` for them.

    >>> sample = PatternSample(4, 1, most=20)
    >>> for image in range(30):
    ...     sample.add(image, 0, torch.rand(3, 17, 17).softmax(-1))
    >>> sample.places.shape, sample.small.shape
    ((20, 3), (20, 32, 32))
    """

    def __init__(
        self,
        grid: int | tuple[int, int],
        prefix: int = 1,
        *,
        size: int = 32,
        scale: Scale = "sqrt",
        most: int = 1000,
        seed: int = 0,
    ) -> None:
        if most < 1:
            raise ValueError(f"PatternSample: most must be at least 1, got {most}")
        self.grid, self.prefix, self.size = grid, prefix, size
        self.scale: Scale = scale
        self.most, self.seen = most, 0
        self._random = np.random.default_rng(seed)
        self._kept: list[tuple[tuple[int, int, int], Tensor, str, float]] = []

    def add(self, image: int, layer: int, weights: Float[Tensor, "h t t"]) -> None:
        """The maps of all heads of one layer on one image; rows sum to one."""
        scores = template_scores(weights, self.grid, self.prefix)
        names, fits = scores.best(), scores.cosine.max(-1)
        for head, own in enumerate(weights.detach()):
            place = (
                self.seen if self.seen < self.most else int(self._random.integers(self.seen + 1))
            )
            self.seen += 1
            if place >= self.most:
                continue
            part = own[None, self.prefix :, self.prefix :]
            # The autoencoder multiplies by the size again.
            part = prepared(part, self.size, self.scale, normalise=False)[0, 0] / self.size
            made = ((image, layer, head), part.cpu(), str(names[head]), float(fits[head]))
            self._kept[place : place + 1] = [made]

    @property
    def places(self) -> NDArray[np.int64]:
        return np.array([place for place, *_ in self._kept], dtype=np.int64).reshape(-1, 3)

    @property
    def small(self) -> NDArray[np.float32]:
        if not self._kept:
            return np.zeros((0, self.size, self.size), np.float32)
        return torch.stack([part for _, part, *_ in self._kept]).numpy()

    def summary(
        self,
        *,
        clusters: int | Sequence[int] = (2, 3, 4, 5, 6, 7, 8, 9, 10),
        embed: Literal["tsne", "pca"] = "tsne",
        width: int = 32,
        epochs: int = 30,
        seed: int = 0,
    ) -> PatternSummary:
        """Clusters, names and the map of points; options and errors of `summarise_patterns`."""
        offered = _offered(clusters, embed, len(self._kept), "PatternSample.summary")
        _, fitted = fit_autoencoder(
            torch.from_numpy(self.small),
            size=self.size,
            width=width,
            scale="none",
            normalise=False,
            epochs=epochs,
            seed=seed,
        )
        named = (
            np.array([name for *_, name, _ in self._kept]),
            np.array([fit for *_, fit in self._kept]),
        )
        return _clustered(fitted, named, self.places[:, 1:], offered, embed, seed)


def _offered(clusters: int | Sequence[int], embed: str, count: int, operation: str) -> list[int]:
    """The numbers of clusters to choose from, for so many maps."""
    if embed not in ("tsne", "pca"):
        raise ValueError(f"{operation}: embed must be 'tsne' or 'pca', got {embed!r}")
    offered = [clusters] if isinstance(clusters, int) else sorted(set(clusters))
    if not offered or offered[0] < 2 or offered[-1] >= count:
        raise ValueError(f"{operation}: clusters must be from 2 to {count - 1}, got {offered}")
    return offered


def _clustered(
    fitted: Fitted,
    named: tuple[NDArray[np.str_], NDArray[np.float64]],
    heads: Sequence[tuple[int, int]] | NDArray[np.int64] | None,
    offered: Sequence[int],
    embed: str,
    seed: int,
) -> PatternSummary:
    """Clusters of latent vectors; `named` is the best template of every map and its cosine."""
    tools, metrics = require("sklearn.cluster", "sklearn"), require("sklearn.metrics", "sklearn")
    best = (-2.0, None)
    for number in offered:
        found = tools.KMeans(number, n_init=10, random_state=seed).fit(fitted.latents)
        quality = float(metrics.silhouette_score(fitted.latents, found.labels_))
        best = max(best, (quality, found), key=lambda pair: pair[0])
    quality, found = best
    assert found is not None
    labels, centres = found.labels_.astype(np.int64), found.cluster_centers_
    medoids = np.array(
        [
            np.where(labels == k, np.linalg.norm(fitted.latents - centre, axis=1), np.inf).argmin()
            for k, centre in enumerate(centres)
        ]
    )
    names, fits = named
    return PatternSummary(
        labels,
        _embedding(fitted.latents, embed, seed),
        medoids,
        names[medoids].tolist(),
        fits[medoids],
        quality,
        *_per_head(labels, heads, len(centres)),
        fitted,
    )


def _embedding(latents: NDArray[np.float64], embed: str, seed: int) -> NDArray[np.float64]:
    if embed == "pca":
        tools = require("sklearn.decomposition", "sklearn")
        return tools.PCA(2, random_state=seed).fit_transform(latents)
    tools = require("sklearn.manifold", "sklearn")
    perplexity = min(30.0, (len(latents) - 1) / 3)
    made = tools.TSNE(2, init="pca", perplexity=perplexity, random_state=seed)
    return made.fit_transform(latents.astype(np.float32)).astype(np.float64)


def _per_head(
    labels: NDArray[np.int64],
    heads: Sequence[tuple[int, int]] | NDArray[np.int64] | None,
    clusters: int,
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    if heads is None:
        empty = np.zeros((0, 0))
        return np.zeros((0, 0, clusters)), empty.astype(np.int64), empty
    places = np.asarray(heads, dtype=np.int64)
    counts = np.zeros((*(places.max(0) + 1), clusters))
    np.add.at(counts, (places[:, 0], places[:, 1], labels), 1)
    total = counts.sum(-1, keepdims=True)
    share = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    dominant = np.where(total[..., 0] > 0, counts.argmax(-1), -1)
    return share, dominant, share.max(-1)
