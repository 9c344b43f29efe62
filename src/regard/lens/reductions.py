"""What attention weights say, summed up while the model runs: no T × S map is ever kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.core.accumulate import add_rows
from regard.lens.largest import largest
from regard.lens.taps.call import MASK_BLOCK, Attention, Kind, blocks_of

WEIGHTS, LEAST_ROWS = 1 << 18, 16  # of a block, where nobody says how many rows
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
            [0] for a class token; see `rollout()`. The one sum that is a map: the product of the
            layers so far, [B, T, T].
        residual: share `keep` of every layer's input in its output, for the rollout.
        block: queries per block; changes nothing but memory and time. None: what suits a cache.

    Cost: one product of queries and keys and a few passes over a block's weights, per layer;
    O(B H block S) memory at a time. A rollout adds a product of B maps T x T per layer and keeps
    one such map, of no head and no layer.
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
        block: int | None = None,
    ) -> None:
        if list(bins) != sorted(set(bins)) or not bins or bins[0] != 0:
            raise ValueError(f"Reduce: bins {tuple(bins)}: must rise, from 0")
        if top < 0 or (block or 1) < 1 or not 0 <= residual <= 1:
            raise ValueError(
                f"Reduce: top {top}, block {block}, residual {residual}: "
                "must be at least 0, at least 1, and in [0, 1]"
            )
        self.entropy, self.received, self.top, self.distance = entropy, received, top, distance
        self.bins, self.block, self.residual = tuple(bins), block, residual
        self.rollout_from = rollout
        self._sums: dict[str, _Sums] = {}
        self._path: _Path | None = None

    def reset(self) -> None:
        """Forget everything seen."""
        self._sums, self._path = {}, None

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
        padded, device = attention.mask is not None, attention.q.device
        real = attention.query_mask if padded else None
        sums.queries += B * T if real is None else int(real.sum())
        got = torch.zeros(B, H, S, device=device) if self.received else None
        shares = None  # of weight by key - query, from -T on
        if self.distance and attention.kind == "self":
            shares = torch.zeros(H, T + S, device=device)
        path = self._path_through(key, attention)
        if self.top:
            heaviest = torch.empty(B, H, T, min(self.top, S), device=device)
            places = torch.empty_like(heaviest, dtype=torch.int32)
            values |= {"top": places, "top_weights": heaviest}
        for some, rows, weights, scores in self._blocks(attention):
            weights, queries = weights.float(), slice(rows.start, rows.stop)
            if real is not None:
                weights = weights * real[some, None, queries, None]
            if self.entropy:
                _add(values, "entropy", _entropies(weights, scores).sum(0))
            if got is not None:
                got[some] += weights.sum(2)
            if shares is not None:
                left, over = T - rows.stop, weights[0] if len(weights) == 1 else weights.sum(0)
                shares[:, left : left + len(rows) + S] += _by_distance(over)
            if self.top:
                found = largest(weights, heaviest.shape[-1])
                heaviest[some, :, queries], places[some, :, queries] = found
            if path is not None:
                path.map[some, queries] = weights.mean(1)
        if shares is not None:
            self._distances(values, shares, attention)
        if got is not None:
            _grow(values, "received", got)
            _grow(values, "seen", _seers(attention, real))

    def _blocks(self, attention: Attention) -> Iterator[tuple[slice, range, Tensor, Tensor | None]]:
        """(elements of the batch, rows, their weights, their scores), as much as suits a cache."""
        B, H, T, _ = attention.q.shape
        S = attention.k.shape[2]
        together = max(1, WEIGHTS // max(H * T * S, 1))
        if self.block or attention.changed is not None:  # edits are for the whole batch
            together = B
        for part in blocks_of(B, together):
            block = max(LEAST_ROWS, WEIGHTS // max(len(part) * H * S, 1) // 8 * 8)
            call = attention if len(part) == B else attention.of_batch(part)
            for rows, weights, scores in call.open_blocks(self.block or block):
                yield slice(part.start, part.stop), rows, weights, scores

    def _distances(self, values: dict[str, Tensor], shares: Tensor, attention: Attention) -> None:
        T, S = attention.q.shape[2], attention.k.shape[2]
        first = min(attention.offset, S - T)  # the first query's place among the keys
        apart = (torch.arange(T + S, device=shares.device) - T - first).abs()
        _add(values, "distance", shares @ apart.to(shares.dtype))
        edges = torch.tensor(self.bins, device=shares.device)
        which = torch.bucketize(apart, edges, right=True) - 1
        profile = shares.new_zeros(shares.shape[0], len(self.bins))
        add_rows(profile.mT, which, shares.mT)
        _add(values, "profile", profile)

    def _path_through(self, key: str, attention: Attention) -> _Path | None:
        """The product of the layers, ready for one more; a layer seen again starts a new one."""
        if self.rollout_from is None:
            return None
        path = self._path
        if path is None or key in path.layers:
            path = self._path = _Path(attention)
        path.next_layer(key, attention, self.residual)
        return path if path.trouble is None else None

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
            if "top" in values:
                summary.top, summary.top_weights = values["top"].long(), values["top_weights"]
            found.append(summary)
        return found

    def rollout(self) -> Float[Tensor, "b n s"]:
        """Attention followed through the layers from the chosen queries to the first input.

        Rows of Π_l (keep I + (1 - keep) W_l), the last layer on the left, with W_l the mean over
        heads (Abnar and Zuidema, arXiv 2005.00928); of the last run of the model.
        """
        if self.rollout_from is None:
            raise ValueError("Reduce: rollout: was not asked for (rollout=[queries to start from])")
        path = self._path
        if path is None:
            raise ValueError("Reduce: rollout: no attention was seen")
        if path.trouble is not None:
            raise ValueError(f"Reduce: rollout: {path.trouble}")
        T = path.map.shape[1]
        if wrong := [i for i in self.rollout_from if not -T <= i < T]:
            raise ValueError(f"Reduce: rollout: queries {wrong}: there are {T}")
        return path.through(self.residual, [i % T for i in self.rollout_from])


class _Path:
    """The product of the maps of the layers so far, over the mean of their heads.

    A layer's map is multiplied in when the next one comes: then all of it at once, and of the
    last one only the rows that are wanted.
    """

    def __init__(self, attention: Attention) -> None:
        B, _, T, _ = attention.q.shape
        self.layers: list[str] = []
        self.trouble: str | None = None
        self.map = torch.empty(B, T, T, device=attention.q.device)  # of the layer at hand
        self.before: Tensor | None = None  # the product of the layers before it

    def next_layer(self, key: str, attention: Attention, keep: float) -> None:
        """Make room for another layer's map."""
        B, _, T, _ = attention.q.shape
        if (B, T, attention.k.shape[2]) != (*self.map.shape[:2], self.map.shape[1]):
            self.trouble = "needs square maps of one size; choose one tower"
            return
        if self.layers:
            first = self.before is None
            self.before = self.through(keep)
            if first:  # this is the map itself
                self.map = torch.empty_like(self.map)
        self.layers.append(key)

    def through(self, keep: float, rows: list[int] | None = None) -> Float[Tensor, "b n s"]:
        """Rows of the product, the layer at hand included; None: all."""
        whole = self.map if rows is None else self.map[:, rows]
        if self.before is not None:
            past = self.before if rows is None else self.before[:, rows]
            return torch.baddbmm(past, whole, self.before, beta=keep, alpha=1 - keep)
        whole = whole.mul_(1 - keep)
        if rows is None:
            whole.diagonal(dim1=1, dim2=2).add_(keep)
        else:
            whole[:, range(len(rows)), rows] += keep
        return whole


def _entropies(
    weights: Float[Tensor, "b h t s"], scores: Float[Tensor, "b h t s"] | None
) -> Float[Tensor, "b h"]:
    """Sums over queries of -Σ_j w_ij ln w_ij."""
    if scores is None or scores.dtype != weights.dtype:
        # xlogy and entr are slow; a floor in the logarithm changes nothing where w = 0.
        logs = weights.clamp_min(torch.finfo(torch.float32).tiny).log_()
        return -torch.linalg.vecdot(weights.flatten(2), logs.flatten(2))
    # ln w_ij = s_ij - z_i, one logarithm per row: z_i = max s - ln max w.
    z = scores.amax(-1) - weights.amax(-1).log_()
    return (z - torch.linalg.vecdot(weights, scores)).sum(-1)


def _by_distance(weights: Float[Tensor, "h t s"]) -> Float[Tensor, "h n"]:
    """Sums along the diagonals: column n holds key - query = n - t, n from 0 to t + s - 1.

    Rows t + s apart in memory, read as rows of t + s + 1, are each shifted by one more.
    """
    H, T, S = weights.shape
    lines = weights.new_zeros(H, T * (T + S + 1))
    lines[:, : T * (T + S)].view(H, T, T + S)[..., T:] = weights
    return lines.view(H, T, T + S + 1)[..., : T + S].sum(1)


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
    S, device = attention.k.shape[2], attention.q.device
    seen = torch.zeros(B, 1, S, device=device)
    if real is None:
        first = torch.arange(S, device=device) - (attention.diagonal or 0)  # to see the key
        counts = T - first.clamp(0, T) if attention.diagonal is not None else T
        return seen + counts
    for rows in blocks_of(T, MASK_BLOCK):
        visible = attention.visible_of(rows)[:, :1] & real[:, None, rows.start : rows.stop, None]
        seen += visible.sum(2)
    return seen
