"""What attention weights say, summed up while the model runs: no T × S map is ever kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.lens.taps.call import Attention, Kind

BINS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass
class LayerSummary:
    """One layer's sums over all calls seen; `Reduce` says what they mean.

    Attributes:
        layer, name, kind: as in `Attention`.
        entropy: [H], mean over queries of -Σ_j w_ij ln w_ij, in nats.
        received: [B, H, S], mean weight that a key got from the queries that could see it.
        top: indices [B, H, T, k] of the keys with most weight, of the last call, and
        top_weights: [B, H, T, k], their weights in falling order.
        distance: [H], mean of Σ_j w_ij |i - j|, in tokens.
        profile: [H, len(bins)], share of weight by |i - j|: bin n counts distances from bins[n]
            up to bins[n + 1], the last without end.
        queries: real queries counted, over the batch and all calls.
    """

    layer: int
    name: str
    kind: Kind
    entropy: Float[Tensor, " h"] | None = None
    received: Float[Tensor, "b h s"] | None = None
    top: Int[Tensor, "b h t k"] | None = None
    top_weights: Float[Tensor, "b h t k"] | None = None
    distance: Float[Tensor, " h"] | None = None
    profile: Float[Tensor, "h n"] | None = None
    queries: int = 0


@dataclass
class _Sums:
    attention: tuple[int, str, Kind]
    values: dict[str, Tensor] = field(default_factory=dict)
    queries: int = 0


class Reduce:
    """A reader for `tap` that sums up weights in blocks of queries as they pass.

        entropy_h  = mean_i -Σ_j w_ij ln w_ij            received_j = Σ_i w_ij / #{i sees j}
        distance_h = mean_i Σ_j w_ij |i - j|             rollout    = Π_l (keep I + (1 - keep) W_l)

    with means over the real queries of the batch and of all calls. Padding counts nowhere.

    Args:
        entropy: sum up entropies.
        received: sum up what every key receives; grows with the keys during cached generation.
        top: how many of the most attended keys to keep per query, of the last call; 0: none.
        distance: mean distance and the profile over `bins` (self-attention only).
        bins: edges of the distances, rising from 0.
        rollout: follow attention through the layers: None, or the queries to start from, such as
            [0] for a class token. Exact only with whole maps in one order, so it keeps, per
            layer, the mean over heads [B, T, S]; see `rollout()`.
        residual: share `keep` of every layer's input in its output, for the rollout.
        block: queries per block; changes nothing but memory.

    Cost: one product of queries and keys and a few passes over a block's weights, per layer;
    O(B H block S) memory at a time (a rollout: O(B T S) per layer).
    Raises: ValueError for bins that do not rise from 0, or what no call can give.

    >>> from regard.lens.tap import tap
    >>> from regard.mixers import Attention as Layer
    >>> layer, summary = Layer(8, 2, causal=True), Reduce()
    >>> with tap(layer, read=summary):
    ...     _ = layer(torch.randn(1, 5, 8))
    >>> [part] = summary.result()
    >>> part.entropy.shape, part.received.shape, part.queries
    (torch.Size([2]), torch.Size([1, 2, 5]), 5)
    """

    def __init__(
        self,
        *,
        entropy: bool = True,
        received: bool = True,
        top: int = 0,
        distance: bool = False,
        bins: Sequence[int] = BINS,
        rollout: Sequence[int] | None = None,
        residual: float = 0.5,
        block: int = 32,
    ) -> None:
        if list(bins) != sorted(set(bins)) or not bins or bins[0] != 0:
            raise ValueError(f"Reduce: bins {tuple(bins)}: must rise, from 0")
        if top < 0 or block < 1 or not 0 <= residual <= 1:
            raise ValueError(
                f"Reduce: top {top}, block {block}, residual {residual}: "
                "must be at least 0, at least 1, and in [0, 1]"
            )
        self.entropy, self.received, self.top, self.distance = entropy, received, top, distance
        self.bins, self.block, self.residual = tuple(bins), block, residual
        self.rollout_from = rollout
        self._sums: dict[str, _Sums] = {}
        self._maps: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forget everything seen."""
        self._sums, self._maps = {}, {}

    # -- reading -----------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, attention: Attention) -> None:
        """Take in one call of a layer."""
        key = f"{attention.name}#{attention.layer}"
        which = (attention.layer, attention.name, attention.kind)
        sums = self._sums.setdefault(key, _Sums(which))
        values = sums.values
        B, H, T, _ = attention.q.shape
        S = attention.k.shape[2]
        padded = attention.mask is not None
        real = attention.query_mask if padded else None
        sums.queries += B * T if real is None else int(real.sum())
        got = torch.zeros(B, H, S, device=attention.q.device) if self.received else None
        distances = self.distance and attention.kind == "self"
        tops = []
        for rows, weights in attention.blocks(self.block):
            weights = weights.float()
            if real is not None:
                weights = weights * real[:, None, rows.start : rows.stop, None]
            if self.entropy:
                # xlogy and entr are slow; a floor in the logarithm changes nothing where w = 0.
                logs = weights.clamp_min(torch.finfo(torch.float32).tiny).log_()
                dots = torch.linalg.vecdot(weights.flatten(2), logs.flatten(2))
                _add(values, "entropy", -dots.sum(0))
            if got is not None:
                got += weights.sum(2)
            if distances:
                self._distances(values, weights, rows, attention)
            if self.top:
                tops.append(weights.topk(min(self.top, S), -1))
            if self.rollout_from is not None:
                tops_map = weights.mean(1)
                self._map(key, tops_map, rows.start)
        if got is not None:
            _grow(values, "received", got)
            _grow(values, "seen", _seers(attention, real))
        if tops:
            values["top"] = torch.cat([part.indices for part in tops], 2)
            values["top_weights"] = torch.cat([part.values for part in tops], 2)

    def _distances(
        self, values: dict[str, Tensor], weights: Tensor, rows: range, attention: Attention
    ) -> None:
        S = weights.shape[-1]
        start = min(attention.offset, S - attention.q.shape[2])
        at = torch.arange(start + rows.start, start + rows.stop, device=weights.device)
        apart = (at[:, None] - torch.arange(S, device=weights.device)).abs()
        by_head = weights.sum(0)
        _add(values, "distance", torch.einsum("hts,ts->h", by_head, apart.float()))
        edges = torch.tensor(self.bins, device=weights.device)
        which = (torch.bucketize(apart, edges, right=True) - 1).flatten()
        profile = weights.new_zeros(weights.shape[1], len(self.bins))
        _add(values, "profile", profile.index_add_(1, which, by_head.flatten(1)))

    def _map(self, key: str, part: Tensor, start: int) -> None:
        if start == 0:
            self._maps[key] = part
        else:
            self._maps[key] = torch.cat([self._maps[key], part], 1)

    # -- results -----------------------------------------------------------------------------

    def result(self) -> list[LayerSummary]:
        """What was seen so far, by layer, in the order in which the layers ran."""
        found = []
        for sums in self._sums.values():
            values, n = sums.values, max(sums.queries, 1)
            summary = LayerSummary(*sums.attention, queries=sums.queries)
            for name in ("entropy", "distance", "profile"):
                if name in values:
                    setattr(summary, name, values[name] / n)
            if "received" in values:
                summary.received = values["received"] / values["seen"].clamp_min(1)
            summary.top, summary.top_weights = values.get("top"), values.get("top_weights")
            found.append(summary)
        return found

    def rollout(self) -> Float[Tensor, "b n s"]:
        """Attention followed through the layers from the chosen queries to the first input.

        From the last layer down, r <- keep r + (1 - keep) r W_l with W_l the mean over heads:
        rows of the product of all layers (Abnar and Zuidema, arXiv 2005.00928), without forming
        it.
        """
        if self.rollout_from is None:
            raise ValueError("Reduce: rollout: was not asked for (rollout=[queries to start from])")
        if not self._maps:
            raise ValueError("Reduce: rollout: no attention was seen")
        maps = list(self._maps.values())
        shapes = {tuple(part.shape[1:]) for part in maps}
        if len(shapes) > 1 or len(set(shapes.pop())) > 1:
            raise ValueError("Reduce: rollout: needs square maps of one size; choose one tower")
        T = maps[0].shape[1]
        wrong = [i for i in self.rollout_from if not -T <= i < T]
        if wrong:
            raise ValueError(f"Reduce: rollout: queries {wrong}: there are {T}")
        chosen = torch.tensor([i % T for i in self.rollout_from], device=maps[0].device)
        path = torch.nn.functional.one_hot(chosen, T).to(maps[0].dtype)
        path = path.expand(maps[0].shape[0], -1, -1)
        for weights in reversed(maps):
            path = self.residual * path + (1 - self.residual) * path @ weights
        return path


def _add(values: dict[str, Tensor], name: str, part: Tensor) -> None:
    values[name] = values[name] + part if name in values else part


def _grow(values: dict[str, Tensor], name: str, part: Tensor) -> None:
    """Add tensors whose last axis gets longer from call to call; a new batch starts again."""
    old = values.get(name)
    if old is None or old.shape[:-1] != part.shape[:-1] or old.shape[-1] > part.shape[-1]:
        values[name] = part
        return
    part = part.clone()
    part[..., : old.shape[-1]] += old
    values[name] = part


def _seers(attention: Attention, real: Tensor | None) -> Float[Tensor, "b 1 s"]:
    """How many real queries see a key."""
    B, _, T, _ = attention.q.shape
    if real is None:
        return torch.full((B, 1, attention.k.shape[2]), float(T), device=attention.q.device)
    seen = attention.visible & real[:, None, :, None]
    return seen.sum(2)[:, :1].float().expand(B, -1, -1)
