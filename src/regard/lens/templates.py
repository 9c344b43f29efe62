"""Names for attention patterns on an image: how much of a map lies where a simple rule points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from regard.lens.records import Record
from regard.lens.strength import distances

SINK = "single_token_sink"


@dataclass(frozen=True)
class TemplateScores(Record):
    """For every map and template: `mass`, the share of the map's weight that lies on the template,
    and `cosine` between the map and the template with rows summing to one. Both [..., M].
    """

    names: list[str]
    mass: NDArray[np.float64]
    cosine: NDArray[np.float64]

    def best(self) -> NDArray[np.str_]:
        """The template of the largest cosine, [...]."""
        return np.array(self.names)[self.cosine.argmax(-1)]


def templates(
    grid: tuple[int, int], prefix: int = 1, foreground: Bool[Tensor, " n"] | None = None
) -> dict[str, Float[Tensor, "t t"]]:
    """Templates [T, T] of zeros and ones, rows are queries; the rows of prefix tokens are empty.

    self; previous_column, next_column, row_above, row_below; ring_2, ring_3 (Chebyshev; ring_1
    is surround); same_row, same_column (without self); uniform; cls_sink (the first token); and
    foreground, if the patches of an object are given.

    >>> templates((1, 3), 0)["previous_column"].tolist()
    [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    rows, columns = grid
    N = rows * columns
    hops, _, _ = distances(grid)
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2)
    down, right = (place[None] - place[:, None]).unbind(-1)  # from query to key
    found = {
        "self": hops == 0,
        "previous_column": (down == 0) & (right == -1),
        "next_column": (down == 0) & (right == 1),
        "row_above": (down == -1) & (right == 0),
        "row_below": (down == 1) & (right == 0),
        "surround": hops == 1,
        "ring_2": hops == 2,
        "ring_3": hops == 3,
        "same_row": (down == 0) & (right != 0),
        "same_column": (down != 0) & (right == 0),
    }
    if foreground is not None:
        if foreground.shape != (N,):
            raise ValueError(
                f"templates: foreground must be one bool per patch [{N}], got "
                f"{tuple(foreground.shape)}"
            )
        found["foreground"] = foreground.bool().expand(N, N)
    made = {name: _with_prefix(part, prefix) for name, part in found.items() if part.any()}
    made["uniform"] = _with_prefix(torch.ones(N, N), prefix)
    made["uniform"][prefix:, :prefix] = 1
    if prefix:
        made["cls_sink"] = torch.zeros(N + prefix, N + prefix)
        made["cls_sink"][prefix:, 0] = 1
    return made


def _with_prefix(patches: Tensor, prefix: int) -> Tensor:
    return torch.nn.functional.pad(patches.float(), (prefix, 0, prefix, 0))


def template_scores(
    weights: Float[Tensor, "*m t t"],
    grid: int | tuple[int, int],
    prefix: int = 1,
    foreground: Bool[Tensor, " n"] | None = None,
) -> TemplateScores:
    """How well each template describes each map; only the rows of patches count.

        mass = sum(A * template) / sum(A)        cosine = <A, R> / |A| |R|, R with rows of sum one

    Besides those of `templates` there is `single_token_sink`: the patch that gets most of this map.

    Args:
        weights: [..., T, T], T = prefix + patches.
        grid: patches per side, or (rows, columns).
        prefix: tokens before the patches.
        foreground: [N] bool, patches of an object.

    Precision: float64. Source: templates after the pattern scores of TransformerLens, extended to
    images; no code of it. Raises ValueError for shapes that do not fit.

    >>> template_scores(torch.eye(9)[None], 3, 0).best().tolist()
    ['self']
    """
    grid = (grid, grid) if isinstance(grid, int) else grid
    T = prefix + grid[0] * grid[1]
    if weights.ndim < 2 or weights.shape[-2:] != (T, T):
        raise ValueError(
            f"template_scores: weights must be [..., {T}, {T}] (grid {grid[0]} x {grid[1]}, "
            f"{prefix} prefix tokens), got {tuple(weights.shape)}"
        )
    lead = weights.shape[:-2]
    maps = weights.detach().double()[..., prefix:, :].reshape(-1, T - prefix, T)
    made = {
        name: part[prefix:].double() for name, part in templates(grid, prefix, foreground).items()
    }
    stack = torch.stack(list(made.values())).to(maps.device)
    unit = stack / stack.sum(-1, keepdim=True).clamp_min(1)
    flat, tiny = maps.flatten(1), torch.finfo(torch.float64).tiny
    total, size = flat.sum(-1, keepdim=True).clamp_min(tiny), flat.norm(dim=-1, keepdim=True)
    mass = flat @ stack.flatten(1).T / total
    cosine = flat @ unit.flatten(1).T / (size * unit.flatten(1).norm(dim=-1)).clamp_min(tiny)
    column = maps[..., prefix:].sum(-2).amax(-1, keepdim=True)
    sink = column / (size * (T - prefix) ** 0.5).clamp_min(tiny)
    mass, cosine = torch.cat([mass, column / total], -1), torch.cat([cosine, sink], -1)
    shape = (*lead, -1)
    return TemplateScores(
        [*made, SINK], mass.reshape(shape).cpu().numpy(), cosine.reshape(shape).cpu().numpy()
    )
