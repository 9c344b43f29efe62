"""How strongly patches attend to their neighbours: attention by distance on an image's grid."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.core.accumulate import add_rows
from regard.lens.records import Record, drawing

Hops = Literal["chebyshev", "manhattan"]
HOPS = ("chebyshev", "manhattan")


@dataclass(frozen=True)
class StrengthProfile(Record):
    """Attention of L layers and H heads by distance k = 0 ... K - 1, averaged over images.

    strength_mean_k [L, H, K]: mean weight of a pair of patches k hops apart; 1/T for uniform
    weights, so `strength_mean_k * tokens` is the ratio to them. strength_mass_k [L, H, K]: what a
    patch gives to all patches k hops away; with patches_to_prefix it sums to 1.
    strength_mass_k_patchnorm: the same after rows were divided by what they give to patches.
    mean_attention_distance_patches [L, H]: Euclidean, in patches, of those rows. entropy_nats
    [L, H]: mean over all T rows of -sum A ln A. cls_to_cls, cls_to_patches, patches_to_cls
    [L, H]: weight between the first token and the patches; patches_to_prefix counts registers too
    (all NaN, or 0, without prefix tokens). offsets [L, H, 2 rows - 1, 2 columns - 1]: mean weight
    by displacement (row, column) of the key, the query in the centre. content_dependence [L, H]:
    mean over pairs of std over images / mean: 0 for a fixed pattern of positions (NaN for one
    image).
    """

    grid: tuple[int, int]
    prefix: int
    tokens: int
    images: int
    hops: str
    strength_mean_k: NDArray[np.float64]
    strength_mass_k: NDArray[np.float64]
    strength_mass_k_patchnorm: NDArray[np.float64]
    mean_attention_distance_patches: NDArray[np.float64]
    entropy_nats: NDArray[np.float64]
    cls_to_patches: NDArray[np.float64]
    cls_to_cls: NDArray[np.float64]
    patches_to_cls: NDArray[np.float64]
    patches_to_prefix: NDArray[np.float64]
    offsets: NDArray[np.float64]
    content_dependence: NDArray[np.float64]

    def normalised_entropy(self) -> NDArray[np.float64]:
        """Entropy divided by ln T: 1 for uniform rows."""
        return self.entropy_nats / np.log(self.tokens)

    def layer_trend(self) -> NDArray[np.float64]:
        """Mean over heads of strength_mass_k_patchnorm, [L, K]."""
        return self.strength_mass_k_patchnorm.mean(1)

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Profiles of the layers, and the distance of every head against its layer."""
        layers, heads = self.entropy_nats.shape
        with drawing(path, (8.5, 3.2), 1, 2) as axes:
            left, right = axes.flat
            colours = _colours(layers)
            for number, profile in enumerate(self.layer_trend()):
                left.plot(profile, color=colours[number], label=f"layer {number}")
            left.set_xlabel(f"distance k, {self.hops} hops")
            left.set_ylabel("weight on patches at k")
            left.legend(fontsize=6, ncols=2)
            place = np.repeat(np.arange(layers), heads)
            right.scatter(place, self.mean_attention_distance_patches.ravel(), s=12)
            right.set_xlabel("layer")
            right.set_ylabel("mean distance, patches")


def _colours(count: int) -> list[tuple[float, ...]]:
    import matplotlib

    return [tuple(c) for c in matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count))]


class StrengthAccumulator:
    """Adds up a profile image by image: memory does not grow with their number.

    `add(layer, weights [B, H, T, T])` in any order; `profile()` at any time. The sums that stay are
    [H, T, T] twice per layer (for content_dependence and offsets) and small ones per head.
    """

    def __init__(
        self, grid: int | tuple[int, int], prefix: int = 1, hops: Hops = "chebyshev"
    ) -> None:
        if hops not in HOPS:
            raise ValueError(f"strength_profile: hops must be one of {HOPS}, got {hops!r}")
        self.grid = (grid, grid) if isinstance(grid, int) else (int(grid[0]), int(grid[1]))
        if min(self.grid) < 1 or prefix < 0:
            raise ValueError(
                f"strength_profile: grid must be positive and prefix at least 0, "
                f"got {grid} and {prefix}"
            )
        self.prefix, self.hops = prefix, hops
        self.tokens = prefix + self.grid[0] * self.grid[1]
        self._layers: dict[int, _Sums] = {}

    def add(self, layer: int, weights: Float[Tensor, "b h t t"]) -> None:
        """The weights of one layer for some images, every row summing to one."""
        if weights.ndim != 4 or weights.shape[-2:] != (self.tokens, self.tokens):
            raise ValueError(
                f"strength_profile: weights must be [B, H, {self.tokens}, {self.tokens}] (grid "
                f"{self.grid[0]} x {self.grid[1]}, {self.prefix} prefix tokens), got "
                f"{tuple(weights.shape)}"
            )
        if layer not in self._layers:
            self._layers[layer] = _Sums(self.grid, self.prefix, self.hops, weights.device)
        self._layers[layer].add(weights.detach())

    def profile(self) -> StrengthProfile:
        """The profile of what was added.

        Raises:
            ValueError: nothing was added, or some layers saw more images than others.
        """
        counts = {sums.count for sums in self._layers.values()}
        if len(counts) != 1:
            raise ValueError(
                "strength_profile: every layer needs the same images, got "
                f"{ {layer: sums.count for layer, sums in sorted(self._layers.items())} }"
            )
        parts = [self._layers[layer].means() for layer in sorted(self._layers)]
        arrays = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        return StrengthProfile(
            self.grid, self.prefix, self.tokens, counts.pop(), self.hops, **arrays
        )


class _Sums:
    """Sums over images for one layer, in float64."""

    def __init__(self, grid: tuple[int, int], prefix: int, hops: str, device: torch.device) -> None:
        self.grid, self.prefix, self.count = grid, prefix, 0
        apart, euclid, offset = (part.to(device) for part in distances(grid, hops))
        self.euclid = euclid
        self.at = torch.nn.functional.one_hot(apart.flatten()).double()  # [N N, K]
        self.offset = offset.flatten()
        self.totals: dict[str, Tensor] = {}
        self.total: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, weights: Tensor) -> None:
        weights = weights.double()
        p, N = self.prefix, len(self.euclid)
        patches = weights[..., p:, p:]
        given = patches.sum(-1, keepdim=True)
        normed = patches / given.clamp_min(torch.finfo(torch.float64).tiny)
        sums = {
            "strength_mass_k": patches.flatten(2) @ self.at / N,
            "strength_mass_k_patchnorm": normed.flatten(2) @ self.at / N,
            "mean_attention_distance_patches": (normed * self.euclid).sum((-1, -2)) / N,
            "entropy_nats": -torch.xlogy(weights, weights).sum(-1).mean(-1),
            "patches_to_prefix": weights[..., p:, :p].sum(-1).mean(-1),
        }
        if p:
            sums["cls_to_patches"] = weights[..., 0, p:].sum(-1)
            sums["cls_to_cls"] = weights[..., 0, 0]
            sums["patches_to_cls"] = weights[..., p:, 0].mean(-1)
        for name, values in sums.items():
            self.totals[name] = self.totals.get(name, 0) + values.sum(0)
        total, squares = weights.sum(0), weights.square().sum(0)
        self.total = total if self.total is None else self.total + total
        self.squares = squares if self.squares is None else self.squares + squares
        self.count += len(weights)

    def means(self) -> dict[str, NDArray[np.float64]]:
        assert self.total is not None
        assert self.squares is not None
        found = {name: total / self.count for name, total in self.totals.items()}
        heads, N = len(self.total), len(self.euclid)
        for name in ("cls_to_patches", "cls_to_cls", "patches_to_cls"):
            found.setdefault(name, self.total.new_full((heads,), float("nan")))
        pairs = self.at.sum(0)
        found["strength_mean_k"] = found["strength_mass_k"] * N / pairs
        mean = self.total / self.count
        rows, columns = self.grid
        size = (2 * rows - 1) * (2 * columns - 1)
        places = mean[:, self.prefix :, self.prefix :].flatten(1)
        number = torch.bincount(self.offset, minlength=size)
        offsets = places.new_zeros(heads, size)
        add_rows(offsets.mT, self.offset, places.mT)
        offsets = offsets / number
        found["offsets"] = offsets.unflatten(1, (2 * rows - 1, 2 * columns - 1))
        deviation = (self.squares / self.count - mean.square()).clamp_min(0).sqrt()
        # Rounding of the difference of squares is no dependence on content.
        deviation = torch.where(deviation > 1e-7 * mean, deviation, 0)
        ratio = torch.where(mean > 0, deviation / mean.clamp_min(1e-300), 0)
        alone = torch.full_like(found["entropy_nats"], float("nan"))
        found["content_dependence"] = alone if self.count == 1 else ratio.mean((-1, -2))
        return {name: values.cpu().numpy() for name, values in found.items()}


def distances(grid: tuple[int, int], hops: str = "chebyshev") -> tuple[Tensor, Tensor, Tensor]:
    """Between every two patches [N, N]: hops, Euclidean distance, and the number of the offset.

    Offset (dr, dc), from query to key, has the number
    (dr + rows - 1) (2 columns - 1) + dc + columns - 1.

    >>> distances((1, 3))[0].tolist()
    [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
    """
    rows, columns = grid
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2)
    step = place[None] - place[:, None]  # key minus query
    apart = step.abs().amax(-1) if hops == "chebyshev" else step.abs().sum(-1)
    number = (step[..., 0] + rows - 1) * (2 * columns - 1) + step[..., 1] + columns - 1
    return apart, step.double().norm(dim=-1), number


def strength_profile(
    weights: Float[Tensor, "n l h t t"],
    grid: int | tuple[int, int],
    prefix: int = 1,
    *,
    hops: Hops = "chebyshev",
) -> StrengthProfile:
    """Attention by distance on the grid, for weights that are at hand.

    With N patches, k the hops between two of them (ring for Chebyshev, diamond for Manhattan) and
    Ap the weights between patches:

        mass_k = 1/N sum_i sum_{j: k(i, j) = k} Ap_ij        mean_k = N mass_k / number of pairs

    averaged over images, never over patterns before an entropy. See `StrengthProfile`.

    Args:
        weights: [N, L, H, T, T], rows are queries and sum to one.
        grid: patches per side, or (rows, columns).
        prefix: tokens before the patches: class, distillation and register tokens.
        hops: "chebyshev" or "manhattan".

    Precision: float64. Source: spatial strength by k-hop neighbours, Li et al., arXiv 2303.13731;
    the definitions here are as written above. Limits: one grid for all queries (no windows).

    Raises:
        ValueError: shapes that do not fit the grid, an unknown kind of hops.

    >>> uniform = torch.full((1, 1, 1, 10, 10), 0.1)
    >>> found = strength_profile(uniform, 3)
    >>> found.strength_mean_k.round(6).tolist(), float(found.entropy_nats.round(6)[0, 0])
    ([[[0.1, 0.1, 0.1]]], 2.302585)
    """
    sums = StrengthAccumulator(grid, prefix, hops)
    if weights.ndim != 5:
        raise ValueError(
            f"strength_profile: weights must be [N, L, H, T, T], got {tuple(weights.shape)}"
        )
    for layer, part in enumerate(weights.unbind(1)):
        sums.add(layer, part)
    return sums.profile()


def strength_of_model(
    model: nn.Module,
    batches: Tensor | Iterable[Tensor],
    grid: int | tuple[int, int],
    prefix: int = 1,
    *,
    hops: Hops = "chebyshev",
) -> StrengthProfile:
    """The profile of a vision model over any number of images, in constant memory.

    The weights of one layer and batch exist at a time (see `regard.lens.tap`).

    Raises:
        ValueError: as in `strength_profile`, or the model has no layers that can be tapped.
    """
    from regard.lens.tap import tap

    sums = StrengthAccumulator(grid, prefix, hops)
    with (
        tap(model, read=lambda attention: sums.add(attention.layer, attention.weights)),
        torch.no_grad(),
    ):
        for batch in [batches] if isinstance(batches, Tensor) else batches:
            model(batch)
    return sums.profile()
