"""What attention weights say, summed up while the model runs: no T × S map is ever kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.core.accumulate import add_rows
from regard.lens.largest import largest
from regard.lens.sums import Sums, add_block, serves
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
class _Seen:
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

    Cost: one product of queries and keys per layer and one pass over its scores (on a CPU, of
    float32, in C; else a few passes); O(B H block S) memory at a time. A rollout adds a product
    of B maps T x T per layer and keeps two such maps, of no head.
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
        self._sums: dict[str, _Seen] = {}
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
        seen = self._sums.setdefault(key, _Seen(which))
        B, H, T, _ = attention.q.shape
        S = attention.k.shape[2]
        device = attention.q.device
        real = attention.query_mask if attention.mask is not None else None
        seen.queries += B * T if real is None else int(real.sum())
        sums = Sums(real)
        if self.entropy:
            wide = torch.float64 if device.type == "cpu" else torch.float32  # (MPS has no float64)
            sums.entropy = torch.zeros(H, dtype=wide, device=device)
        if self.received:
            sums.received = torch.zeros(B, H, S, device=device)
        if self.distance and attention.kind == "self":
            sums.shares = torch.zeros(H, T + S, device=device)
        if self.top:
            sums.top = torch.empty(B, H, T, min(self.top, S), device=device)
            sums.places = torch.empty_like(sums.top, dtype=torch.int32)
        if (path := self._path_through(key, attention)) is not None:
            sums.map = path.map
        in_c = serves(attention, self.top)
        for some, call in self._parts(attention):
            (self._sum_in_c if in_c else self._sum_up)(call, sums.of_batch(some))
        values = seen.values
        if sums.entropy is not None:
            _add(values, "entropy", sums.entropy.float())
        if sums.shares is not None:
            self._distances(values, sums.shares, attention)
        if sums.received is not None:
            _grow(values, "received", sums.received)
            _grow(values, "seen", _seers(attention, real))
        if sums.top is not None and sums.places is not None:
            values |= {"top": sums.places, "top_weights": sums.top}

    def _sum_in_c(self, attention: Attention, sums: Sums) -> None:
        for rows, scores in attention.score_blocks(self._rows(attention)):
            add_block(sums, scores, rows, attention.q.shape[2])

    def _sum_up(self, attention: Attention, sums: Sums) -> None:
        S, T = attention.k.shape[2], attention.q.shape[2]
        for rows, weights, scores in attention.open_blocks(self._rows(attention)):
            weights, queries = weights.float(), slice(rows.start, rows.stop)
            if sums.real is not None:
                weights = weights * sums.real[:, None, queries, None]
            if sums.entropy is not None:
                sums.entropy += _entropies(weights, scores).sum(0)
            if sums.received is not None:
                sums.received += weights.sum(2)
            if sums.shares is not None:
                left, over = T - rows.stop, weights[0] if len(weights) == 1 else weights.sum(0)
                sums.shares[:, left : left + len(rows) + S] += _by_distance(over)
            if sums.top is not None and sums.places is not None:
                found = largest(weights, sums.top.shape[3])
                sums.top[:, :, queries], sums.places[:, :, queries] = found
            if sums.map is not None:
                sums.map[:, queries] = weights.mean(1)

    def _parts(self, attention: Attention) -> Iterator[tuple[slice, Attention]]:
        """The call for some elements of the batch at a time, as many as suit a cache."""
        B, H, T, _ = attention.q.shape
        together = max(1, WEIGHTS // max(H * T * attention.k.shape[2], 1))
        if self.block or attention.changed is not None:  # edits are for the whole batch
            together = B
        for part in blocks_of(B, together):
            call = attention if len(part) == B else attention.of_batch(part)
            yield slice(part.start, part.stop), call

    def _rows(self, attention: Attention) -> int:
        B, H = attention.q.shape[:2]
        row = max(B * H * attention.k.shape[2], 1)
        return self.block or max(LEAST_ROWS, WEIGHTS // row // 8 * 8)

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
