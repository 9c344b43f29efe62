"""What the chunked forms share: a call cut into chunks, and products of decays applied to it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from regard.ops.linear.decays import Run, run_decays


class Chunks:
    """A call flattened to N = B Hk independent sequences, with G query rows per key, cut up."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, chunk: int):
        (B, H, _, F), T = q.shape, k.shape[2]
        self.N, self.G, self.T, self.chunk = B * k.shape[1], H // k.shape[1], T, chunk
        self.q = q.reshape(self.N, self.G, q.shape[2], F)
        self.k, self.v = k.reshape(self.N, T, F), v.reshape(self.N, T, v.shape[3])
        m = min(T, chunk)
        # One decay for all tokens, an expanded tensor: then all chunks have the same products.
        self.constant = log_decay is not None and T > 1 and log_decay.stride(2) == 0
        if log_decay is not None:
            kept = log_decay[:, :, :m] if self.constant else log_decay
            log_decay = kept.reshape(self.N, kept.shape[2])
        self.log_decay = log_decay
        self.runs: dict[int, Run] = {}
        self.earlier = torch.ones(m, m, dtype=torch.bool, device=q.device).tril()

    def spans(self, *, backwards: bool = False) -> Iterator[tuple[int, int]]:
        starts = range(0, self.T, self.chunk)
        for start in reversed(starts) if backwards else starts:
            yield start, min(start + self.chunk, self.T)

    def rows(self, x: Tensor, i: int, j: int) -> Tensor:
        """Query-side x [N, G, T, c] of tokens [i, j) as [N, G m, c]."""
        return x[:, :, i:j].reshape(self.N, self.G * (j - i), x.shape[3])

    def run(self, i: int, j: int) -> Run | None:
        if self.log_decay is None:
            return None
        if not self.constant:
            earlier = self.earlier[: j - i, : j - i]
            return run_decays(self.log_decay[:, i:j], earlier, self.k.dtype)
        if j - i not in self.runs:
            earlier = self.earlier[: j - i, : j - i]
            run = run_decays(self.log_decay[:, : j - i], earlier, self.k.dtype)
            self.runs[j - i] = run
        return self.runs[j - i]

    def scale_rows(self, rows: Tensor, run: Run | None) -> Tensor:
        """Query rows [N, G m, c] times the decay since the chunk began; a new tensor or `rows`."""
        if run is None:
            return rows
        m = rows.shape[1] // self.G
        grouped = rows.view(self.N, self.G, m, rows.shape[2]) * run.entering[:, None]
        return grouped.masked_fill_(~run.seen_entering[:, None], 0.0).view_as(rows)

    def cut(self, scores: Tensor, run: Run | None) -> Tensor:
        """Products [N, G m, m] as [N, G, m, m], in place: exact 0 where the query sees no key."""
        scores = scores.view(self.N, self.G, scores.shape[2], scores.shape[2])
        if run is None:
            return scores.tril_()
        return scores.masked_fill_(~run.seen_inside[:, None], 0.0)


def to_end(k: Tensor, run: Run | None) -> Tensor:
    """Keys [N, m, c] times the decay until the chunk ends."""
    return k if run is None else (k * run.leaving).masked_fill_(~run.seen_leaving, 0.0)


def through(state: Tensor, run: Run | None) -> Tensor:
    """The state [N, F, E] times the decay over the chunk."""
    return state if run is None else (state * run.whole).masked_fill_(~run.seen_whole, 0.0)


def decay_shape(log_decay: Tensor | None, wanted: bool) -> tuple[int, ...]:
    """The shape of the decay's gradient: empty where none is wanted or there is no decay."""
    return tuple(log_decay.shape) if wanted and log_decay is not None else (0,)


def decay_gradient(inside: Tensor, entering: Tensor, leaving: Tensor, whole: Tensor) -> Tensor:
    """Step l of a chunk decays what goes from a token before l to one at l or after: their sum.

    inside [N, t, j], entering [N, t], leaving [N, j], whole [N] are the parts of <o, do> and
    <S, dS> that pass from j to t, from before the chunk to t, from j to after the chunk, and
    through it. Sums of terms of their own, no differences: nothing cancels, and nothing that
    belongs to later tokens only comes near an earlier step.
    """
    crossing = entering.flip(1).cumsum(1).flip(1) + whole[:, None]
    crossing[:, 1:] += leaving.cumsum(1)[:, :-1]
    crossing[:, 1:] += inside.cumsum(2)[:, 1:, :-1].tril().sum(1)
    return crossing
