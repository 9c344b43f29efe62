"""One call of an attention layer, as a tap hands it to readers and editors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Kind = Literal["self", "cross"]
MASK_BLOCK = 128  # queries looked at together where only a summary of a mask is wanted


@dataclass(eq=False)
class Attention:
    """What one layer of attention does in one call.

        scores = softcap(scale q kᵀ) + bias + mask,   weights = softmax(scores),
        output = weights v

    `scores` and `weights` are formed when they are asked for, in float32 at least and rounded to
    the dtype of q (an eager model's own weights are taken where it made them). A row that sees
    nothing, such as the query of a padded token, has whatever the model gives it: see
    `query_mask`.

    Attributes:
        layer: number of the layer in its tower, as the tap numbers them.
        name: path of the module in the model.
        kind: "self" or "cross".
        module: the layer's module.
        q: queries [B, H, T, D] as they enter the scores (after norms and positions).
        k, v: keys [B, Hk, S, D] and values [B, Hk, S, Dv], the cached ones included; query head h
            reads key head h // (H / Hk).
        scale: factor of q kᵀ.
        mask: [B or 1, 1 or H, T or 1, S], True = visible, or added to the scores; or None.
        diagonal: query i sees keys up to i + diagonal (a causal mask of which there is no
            tensor), or None. Both hold, see `visible`.
        bias: position bias, added to the scores [B or 1, H, T, S]; or None.
        softcap: scores x become softcap * tanh(x / softcap) before the mask; or None.
        sinks: [H], one more score per head that takes weight and has no value; or None.
        output: [B, H, T, Dv], what the model goes on with. Readers see it after all edits.
        offset: tokens that came before the first query (self-attention with a cache), else 0.
        prompt: tokens of the last call that started from nothing.
        hidden: what entered the block that holds the layer, [B, T, C], where that is known.
        heads: heads that an edit is given, or all.
        rows: positions among the T queries that an edit is given, or all.
        softmax: None, or why there are no weights here (another mechanism computes).
    """

    layer: int
    name: str
    kind: Kind
    module: nn.Module
    q: Float[Tensor, "b h t d"]
    k: Float[Tensor, "b hk s d"]
    v: Float[Tensor, "b hk s dv"]
    scale: float | Tensor
    output: Float[Tensor, "b h t dv"]
    mask: Tensor | None = None
    diagonal: int | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    offset: int = 0
    prompt: int = 0
    hidden: Tensor | None = None
    softmax: str | None = None
    heads: list[int] = field(default_factory=list)
    rows: range = range(0)
    # What the model formed itself: weights [B, H, T, S], and scores where nothing else tells.
    given: Tensor | None = None
    formed: Tensor | None = None
    # The heads and rows that edits have changed, and a function from rows to their weights.
    changed: tuple[list[int], range, Callable[[range], Tensor]] | None = None

    def __post_init__(self) -> None:
        self.heads = list(range(self.q.shape[1]))
        self.rows = range(self.q.shape[2])

    # -- who sees whom -----------------------------------------------------------------------

    @property
    def causal(self) -> bool:
        """Whether no query of this call sees a later one."""
        T, S = self.q.shape[2], self.k.shape[2]
        if self.kind == "cross" or T > S:
            return False
        start = min(self.offset, S - T)
        if self.diagonal is not None and self.diagonal <= start:
            return True
        if self.mask is None:
            return T == 1
        later = torch.ones(T, T, dtype=torch.bool, device=self.q.device).triu(1)
        return not bool((self.visible[..., start : start + T] & later).any())

    @property
    def visible(self) -> Bool[Tensor, "b h t s"]:
        """True where a query sees a key, [B or 1, 1 or H, T, S]."""
        return self.visible_of(range(self.q.shape[2]))

    def visible_of(self, rows: range) -> Bool[Tensor, "b h t s"]:
        """The same for some of the queries."""
        S, device = self.k.shape[2], self.q.device
        seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        if self.mask is not None:
            part = self.mask[..., :S]
            part = part if part.shape[2] == 1 else part[:, :, rows.start : rows.stop]
            seen = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
        if self.diagonal is not None:
            seen = seen & self._band(rows)
        return seen.expand(-1, -1, len(rows), S)

    def _band(self, rows: range) -> Bool[Tensor, "t s"]:
        at = torch.arange(rows.start, rows.stop, device=self.q.device)
        keys = torch.arange(self.k.shape[2], device=self.q.device)
        return keys <= at[:, None] + (self.diagonal or 0)

    @property
    def key_mask(self) -> Bool[Tensor, "b s"]:
        """True for keys that some query of this call sees: no padding, no empty place."""
        T = self.q.shape[2]
        if self.mask is None:  # the last query sees what any sees
            seen = self.visible_of(range(T - 1, T))[:, 0, 0]
        else:
            blocks = (self.visible_of(rows) for rows in blocks_of(T, MASK_BLOCK))
            seen = torch.stack([block.any(2).any(1) for block in blocks]).any(0)
        return seen.expand(self.q.shape[0], -1)

    @property
    def query_mask(self) -> Bool[Tensor, "b t"]:
        """True for queries of real tokens (in self-attention: those whose own key is real)."""
        T = self.q.shape[2]
        if self.kind == "cross" or self.mask is None:
            return torch.ones(self.q.shape[0], T, dtype=torch.bool, device=self.q.device)
        S = self.k.shape[2]
        start = max(0, min(self.offset, S - T))
        return self.key_mask[:, start : start + T]

    # -- scores and weights ------------------------------------------------------------------

    @property
    def scores(self) -> Float[Tensor, "b h t s"]:
        """Scores before the softmax, of all heads and queries, as the model makes them."""
        return self.scores_of()

    @property
    def weights(self) -> Float[Tensor, "b h t s"]:
        """Weights of all heads and queries, edits included."""
        return self.weights_of()

    def scores_of(
        self,
        heads: Sequence[int] | None = None,
        rows: range | None = None,
        keys: Tensor | None = None,
    ) -> Float[Tensor, "b h t s"]:
        """Scores of some heads and queries, without edits; `keys` as laid out by `blocks`."""
        if self.softmax is not None:
            raise ValueError(f"{self.name}: no scores or weights: {self.softmax}")
        q, scale = self.q, self.scale
        chosen = list(range(q.shape[1])) if heads is None else list(heads)
        rows = range(q.shape[2]) if rows is None else rows
        if self.formed is not None:
            return self.formed[:, chosen, rows.start : rows.stop]
        whole, all_heads = len(rows) == q.shape[2], len(chosen) == q.shape[1]
        q = q if all_heads else q[:, chosen]
        q = q if whole else q[:, :, rows.start : rows.stop]
        if isinstance(scale, Tensor) and scale.ndim:
            scale = scale[chosen, None, None]
        if keys is None:
            own = self._of_heads(self.k, chosen)
            if q.shape[2] == 1 and q.device.type == "cpu":  # a third of the time, the same sums
                scores = torch.matmul(own, q.transpose(2, 3)).transpose(2, 3) * scale
            else:
                scores = torch.matmul(q, own.transpose(2, 3)) * scale
        else:  # the queries of a group side by side, so that keys need not be repeated
            B, H, T, D = q.shape
            folded = q.reshape(B, keys.shape[1], -1, D)
            scores = torch.matmul(folded, keys.transpose(2, 3)).view(B, H, T, -1).mul_(scale)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        for added in (self.bias, self.mask):
            if added is None:
                continue
            added = added[..., : self.k.shape[2]]
            added = added if added.shape[1] == 1 or all_heads else added[:, chosen]
            added = added if added.shape[2] == 1 or whole else added[:, :, rows.start : rows.stop]
            if added.dtype == torch.bool:
                scores = scores.masked_fill(~added, torch.finfo(scores.dtype).min)
            else:
                scores = scores + added
        if self.diagonal is not None:
            scores = scores.masked_fill(~self._band(rows), torch.finfo(scores.dtype).min)
        return scores

    def weights_of(
        self,
        heads: Sequence[int] | None = None,
        rows: range | None = None,
        keys: Tensor | None = None,
    ) -> Float[Tensor, "b h t s"]:
        """Weights of some heads and queries, edits included."""
        chosen = list(range(self.q.shape[1])) if heads is None else list(heads)
        rows = range(self.q.shape[2]) if rows is None else rows
        if self.given is not None:
            given = self.given if len(chosen) == self.q.shape[1] else self.given[:, chosen]
            weights = given[:, :, rows.start : rows.stop]
        else:
            weights = self.weigh(self.scores_of(chosen, rows, keys), chosen)
        if self.changed is None:
            return weights
        edited, changed_rows, weights_now = self.changed
        both = [head for head in chosen if head in edited]
        first, last = max(rows.start, changed_rows.start), min(rows.stop, changed_rows.stop)
        if not both or first >= last:
            return weights
        weights = weights.clone()
        place = [chosen.index(head) for head in both]
        source = [edited.index(head) for head in both]
        part = weights_now(range(first, last))[:, source]
        weights[:, place, first - rows.start : last - rows.start] = part
        return weights

    def blocks(
        self, size: int = 32, heads: Sequence[int] | None = None
    ) -> Iterator[tuple[range, Float[Tensor, "b h t s"]]]:
        """(rows, weights of these rows), a block of queries at a time.

        The same weights to rounding: products are taken in another order than `weights` takes
        them. Treat a block as read-only.
        """
        keys = self.k.contiguous() if heads is None and self._is_formed_here else None
        for rows in blocks_of(self.q.shape[2], size):
            yield rows, self.weights_of(heads, rows, keys)

    def open_blocks(
        self, size: int = 32
    ) -> Iterator[tuple[range, Float[Tensor, "b h t s"], Float[Tensor, "b h t s"] | None]]:
        """The blocks with their scores, where those are plain: nothing masked, edited or given."""
        if not self.is_plain or self.mask is not None or self.diagonal is not None:
            for rows, weights in self.blocks(size):
                yield rows, weights, None
            return
        for rows, scores in self.score_blocks(size):
            yield rows, self.weigh(scores, range(scores.shape[1])), scores

    def score_blocks(self, size: int = 32) -> Iterator[tuple[range, Float[Tensor, "b h t s"]]]:
        """(rows, scores of these rows) of all heads, without edits, as `blocks`."""
        keys = self.k.contiguous() if self.formed is None else None
        for rows in blocks_of(self.q.shape[2], size):
            yield rows, self.scores_of(None, rows, keys)

    @property
    def is_plain(self) -> bool:
        """Whether weights are the softmax of scores that are formed here, and nothing else."""
        return self._is_formed_here and self.changed is None and self.sinks is None

    def of_batch(self, chosen: range) -> Attention:
        """The same call for some elements of the batch."""
        changed = None
        if self.changed is not None:
            heads, rows, weights_now = self.changed
            changed = heads, rows, lambda rows: part(weights_now(rows))

        def part(x: Any) -> Any:
            everyone = not isinstance(x, Tensor) or len(x) == 1
            return x if everyone else x[chosen.start : chosen.stop]

        names = ("q", "k", "v", "output", "mask", "bias", "hidden", "given", "formed")
        return replace(self, changed=changed, **{name: part(getattr(self, name)) for name in names})

    @property
    def _is_formed_here(self) -> bool:
        return self.given is None and self.formed is None

    def weigh(self, scores: Tensor, heads: Sequence[int]) -> Tensor:
        """Softmax over the keys, with the layer's sinks, in the arithmetic of eager models."""
        wide = torch.float32 if scores.dtype in (torch.float16, torch.bfloat16) else scores.dtype
        if self.sinks is None:
            return torch.softmax(scores, -1, dtype=wide).to(self.q.dtype)
        sinks = self.sinks[list(heads)].reshape(1, -1, 1, 1).to(scores.dtype)
        both = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], -1)
        both = both - both.max(-1, keepdim=True).values
        return torch.softmax(both, -1, dtype=both.dtype)[..., :-1].to(self.q.dtype)

    def mix(self, weights: Tensor, heads: Sequence[int]) -> Float[Tensor, "b h t dv"]:
        """weights v for some heads."""
        return torch.matmul(weights, self._of_heads(self.v, list(heads)))

    def _of_heads(self, keys: Tensor, heads: list[int]) -> Tensor:
        """Keys or values [B, h, S, D] that these query heads read."""
        group = self.q.shape[1] // keys.shape[1]
        wanted = [head // group for head in heads]
        if wanted == list(range(keys.shape[1])):
            return keys
        return keys[:, wanted]


def blocks_of(count: int, size: int) -> Iterator[range]:
    """Ranges that cover `count` rows, `size` at a time."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def describe(value: Any) -> str:
    """A value for an error message: its shape, if it is a tensor."""
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
