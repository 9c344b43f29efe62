"""Pyramid sparse attention as a module: in the place of softmax attention in a video model."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.core.checks import check_integer, check_qkv, reject, words
from regard.ops.block_sparse import BlockPlan
from regard.ops.pyramid_sparse import pyramid_attention, pyramid_levels
from regard.ops.pyramid_sparse.order import (
    gilbert_order,
    inverse,
    semantic_order,
    tile_order,
    with_text,
)
from regard.ops.pyramid_sparse.presets import PRESETS, PyramidConfig

_FIRST, _LATER = 50, 2  # rounds of k-means: at the first call, and from the centres of the last


class PyramidSparseAttention(nn.Module):
    """Rearranges the tokens, finds the levels, attends, and puts the tokens back.

        o = P_q^-1 pyramid_attention(P_q q, P_k k, P_k v, pyramid_levels(P_q q, P_k k))

    Args:
        config: a `PyramidConfig`, or the name of a published one (`PRESETS`).
        grid: of the tokens, (frames, height, width), the last fastest; q and k then hold
            config.text tokens and the cells of the grid. Needed to rearrange along a curve or
            in tiles. Cross attention rearranges what has the length of the grid.

    Called with q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv] it returns [B, H, T, Dv].
    `step` is that of a diffusion run: before config.dense_steps everything is attended to.
    `density` is the work of the last call over that of dense attention; `plan` its `BlockPlan`.
    It has no parameters. Clusters start from those of the call before, if the shapes are its.

    Precision, cost: those of `pyramid_levels` and `pyramid_attention`; an order costs
    O(T (D + Dv)), clusters O(T clusters D) per round.
    Source: arXiv 2512.04025.
    Raises: TypeError, ValueError naming the argument.

    >>> layer = PyramidSparseAttention("cogvideox1.5-5b", grid=(4, 6, 10))
    >>> q, k, v = torch.randn(3, 1, 2, 226 + 240, 16)
    >>> layer(q, k, v).shape, layer.density < 0.35
    (torch.Size([1, 2, 466, 16]), True)
    """

    def __init__(self, config: PyramidConfig | str, grid: tuple[int, ...] = ()) -> None:
        super().__init__()
        name = "PyramidSparseAttention"
        if isinstance(config, str):
            if config not in PRESETS:
                listed = ", ".join(map(repr, PRESETS))
                raise reject(name, "config", f"one of {listed}", config)
            config = PRESETS[config]
        if not isinstance(config, PyramidConfig):
            raise reject(name, "config", "a PyramidConfig or the name of one", config,
                         kind=TypeError)  # fmt: skip
        self.config, self.grid = config, tuple(grid)
        curve = config.rearrange in ("gilbert", "hybrid", "tile")
        if curve and not self.grid:
            raise reject(name, "grid", f'given with rearrange="{config.rearrange}"', grid)
        self.order: Tensor | None = None
        if curve:
            tiles = config.rearrange == "tile"
            order = tile_order(self.grid, config.tile_shape) if tiles else gilbert_order(self.grid)
            self.order = with_text(order, config.text, behind=not tiles)
        self.plan: BlockPlan | None = None
        self._density = 1.0
        self._centres: dict[str, Tensor] = {}

    @property
    def density(self) -> float:
        """The work of the last call as a share of that of dense attention."""
        return self._density

    def forward(
        self,
        q: Float[Tensor, "b h t d"],
        k: Float[Tensor, "b hk s d"],
        v: Float[Tensor, "b hk s dv"],
        *,
        step: int | None = None,
        scale: float | None = None,
    ) -> Float[Tensor, "b h t dv"]:
        name, config = "PyramidSparseAttention", self.config
        sizes = check_qkv(name, q, k, v)
        if step is not None:
            check_integer(name, "step", step, least=0)
        if step is not None and step < config.dense_steps:
            self.plan, self._density = None, 1.0
            blocks = -(-sizes.T // config.block_q), -(-sizes.S // config.block_k)
            levels = torch.ones(1, 1, *blocks, dtype=torch.int8, device=q.device)
            return self._attend(q, k, v, levels, scale)
        order_q, order_k = self._orders(q, k)
        queries, keys, values = _taken(q, order_q), _taken(k, order_k), _taken(v, order_k)
        generator = None
        if config.seed is not None:
            generator = torch.Generator().manual_seed(config.seed)
        text = -(-config.text // config.block_k) if config.protect_text else 0
        in_front = (
            config.rearrange in ("none", "tile")
            and not config.causal
            and config.compat != "official"
        )
        levels = pyramid_levels(
            queries, keys, ratios=config.ratios, mode=config.mode, importance=config.importance,
            block_q=config.block_q, block_k=config.block_k, causal=config.causal, scale=scale,
            similarity_caps=config.similarity_caps, tile=config.tile, generator=generator,
            protected_blocks=0 if in_front else text,
            compat=config.compat,
        )  # fmt: skip
        if in_front:
            levels[..., :text] = 1
        self.plan = BlockPlan(
            levels, sizes.T, sizes.S, config.block_q, config.block_k, grid=self.grid
        )
        self._density = self.plan.density(config.causal)
        out = self._attend(queries, keys, values, levels, scale)
        return out if order_q is None else _taken(out, inverse(order_q))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, levels: Tensor, scale: float | None
    ) -> Tensor:
        config = self.config
        return pyramid_attention(
            q, k, v, levels, block_q=config.block_q, block_k=config.block_k,
            causal=config.causal, scale=scale,
        )  # fmt: skip

    def _orders(self, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Orders [L] or [B, heads, L] of queries and keys."""
        kind = self.config.rearrange
        along = (None, None) if self.order is None else (self._along(q), self._along(k))
        if kind not in ("semantic", "hybrid"):
            return along
        order_k = self._clusters("k", k, self.config.clusters[1])
        if kind == "hybrid":
            return along[0], order_k
        return self._clusters("q", q, self.config.clusters[0]), order_k

    def _along(self, x: Tensor) -> Tensor | None:
        order = self.order
        assert order is not None
        if x.shape[2] == len(order):
            return order.to(x.device)
        if not self.config.text:
            return None  # cross attention to something without a grid
        tokens = f"{self.config.text} tokens of text and the cells of the grid {self.grid}"
        raise reject("PyramidSparseAttention", "q, k", f"of {tokens}",
                     words(f"{x.shape[2]} tokens"))  # fmt: skip

    def _clusters(self, name: str, x: Tensor, count: int) -> Tensor:
        text = self.config.text
        cells = x[:, :, text:]
        shape = (*x.shape[:2], min(count, cells.shape[2]), x.shape[3])
        centres = self._centres.get(name)
        if centres is not None and (centres.shape != shape or centres.device != x.device):
            centres = None
        rounds = _FIRST if centres is None else _LATER
        with torch.no_grad():
            order, found = semantic_order(cells, count, steps=rounds, centres=centres)
        self._centres[name] = found
        behind = torch.arange(text, device=x.device).expand(*x.shape[:2], -1)
        return torch.cat([order + text, behind], 2)

    def extra_repr(self) -> str:
        config = self.config
        return f"mode={config.mode!r}, rearrange={config.rearrange!r}, grid={self.grid}"


def _taken(x: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return x
    if order.dim() == 1:
        return x[:, :, order]
    return x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3]))
