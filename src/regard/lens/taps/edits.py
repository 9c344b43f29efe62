"""What a tap changes in a call: functions on scores, weights and output, and how they are run.

Functions that look at each row of queries alone are given a block of rows at a time, so that no
map of all queries and keys is made for them; the others are given all their rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.lens.taps.call import Attention, blocks_of, describe

Editor = Callable[[Tensor, Attention], Tensor | None]
Blocks = Iterator[tuple[range, Tensor]]
Heads = Sequence[int] | Mapping[int, Sequence[int]] | None
WEIGHTS, LEAST_ROWS = 1 << 22, 32  # of a block


@dataclass(frozen=True)
class Edit:
    """What to change, at up to three places, in this order.

    Every function is given only its heads and rows (`attention.heads`, `attention.rows`), and
    returns a new tensor of the same shape, or None to leave things as they are. Heads and rows not
    asked for, and rows that come back with the same numbers, keep the model's own output bit for
    bit.

    Attributes:
        pre: (scores [B, h, t, S], attention) -> scores. What was masked stays masked.
        post: (weights [B, h, t, S], attention) -> weights.
        output: (output [B, h, t, Dv], attention) -> output.
        heads: which query heads; by layer as a mapping; None: all.
        queries: which queries of a call, such as `slice(-1, None)` for the last one.
        survey: (blocks, attention), called before `pre` and `post` change anything, with an
            iterator over (rows, weights [B, h, t, S]) that covers all rows, block after block:
            the weights that `post` will be given. For what must be known of all rows beforehand.
        by_rows: `pre` and `post` treat each row alone, whatever others are given with it, and
            may be called once per block of rows: O(block S) memory in place of O(T S).
    """

    pre: Editor | None = None
    post: Editor | None = None
    output: Editor | None = None
    heads: Heads = None
    queries: slice = field(default_factory=lambda: slice(None))  # (a slice has no hash)
    survey: Callable[[Blocks, Attention], None] | None = None
    by_rows: bool = False

    def __post_init__(self) -> None:
        rows_of(self.queries, 1)

    @property
    def weighs(self) -> bool:
        """Whether scores or weights are looked at."""
        return not (self.pre is None and self.post is None and self.survey is None)

    def heads_in(self, attention: Attention) -> list[int]:
        """The heads of this edit in a layer; may be none."""
        H = attention.q.shape[1]
        heads = self.heads
        if isinstance(heads, Mapping):
            heads = heads.get(attention.layer, ())
        chosen = list(range(H)) if heads is None else sorted(set(heads))
        check_heads("tap", chosen, H, attention.name)
        return chosen


def check_heads(operation: str, heads: Sequence[int], count: int, where: str) -> None:
    """ValueError for a head that a layer does not have."""
    wrong = [h for h in heads if not isinstance(h, int) or not 0 <= h < count]
    if wrong:
        raise ValueError(f"{operation}: heads {wrong}: {where} has heads 0 to {count - 1}")


def rows_of(queries: slice, count: int) -> range:
    """The rows of a slice, as a range; its step must be 1."""
    if queries.step not in (None, 1):
        raise ValueError(f"tap: edit.queries {queries}: its step must be 1")
    return range(count)[queries]


def apply_edits(attention: Attention, edits: Sequence[Edit]) -> None:
    """Run the edits on one call; changes `attention.output` and its weights where they say so."""
    before = attention.heads, attention.rows
    try:
        weighing = [edit for edit in edits if edit.weighs]
        heads, rows = _reach(weighing, attention)
        if heads and len(rows):
            _Weighing(attention, weighing, heads, rows).run()
        closing = [edit for edit in edits if edit.output is not None]
        heads, rows = _reach(closing, attention)
        if heads and len(rows):
            output = _Stage(heads, rows, _part(attention.output, heads, rows))
            output.run("output", closing, attention)
            if output.touched:
                _write(attention, heads, rows, output.value)
    finally:
        attention.heads, attention.rows = before


@dataclass(eq=False)
class _Stage:
    """A tensor over heads and rows that several edits pass through."""

    heads: list[int]
    rows: range
    value: Tensor
    touched: bool = False

    def run(self, place: str, edits: Sequence[Edit], attention: Attention) -> None:
        for edit in edits:
            function = getattr(edit, place)
            found = self.part_of(edit, attention)
            if function is None or found is None:
                continue
            heads, rows, part = found
            attention.heads, attention.rows = heads, rows
            new = function(part, attention)
            if new is None:
                continue
            if not isinstance(new, Tensor) or new.shape != part.shape:
                came = describe(new)
                raise ValueError(
                    f"tap: edit.{place} of {attention.name} gave {came}; it must give a tensor of "
                    f"shape {list(part.shape)}, or None"
                )
            if part is self.value:
                self.value = new
            else:
                inside, first, last = self._inside(heads, rows)
                self.value = self.value.clone()
                self.value[:, inside, first:last] = new.to(self.value.dtype)
            self.touched = True

    def part_of(self, edit: Edit, attention: Attention) -> tuple[list[int], range, Tensor] | None:
        """The heads and rows that are an edit's, and their values; None where there are none."""
        heads = edit.heads_in(attention)
        rows = _common(rows_of(edit.queries, attention.q.shape[2]), self.rows)
        if not heads or not len(rows):
            return None
        if heads == self.heads and rows == self.rows:
            return heads, rows, self.value
        inside, first, last = self._inside(heads, rows)
        return heads, rows, self.value[:, inside, first:last]

    def _inside(self, heads: list[int], rows: range) -> tuple[list[int], int, int]:
        start = self.rows.start
        return [self.heads.index(head) for head in heads], rows.start - start, rows.stop - start


class _Weighing:
    """Edits of scores and weights in one call, block of rows by block of rows."""

    def __init__(
        self, attention: Attention, edits: Sequence[Edit], heads: list[int], rows: range
    ) -> None:
        self.attention, self.edits, self.heads, self.rows = attention, edits, heads, rows
        size = len(rows)
        if all(edit.by_rows for edit in edits):
            row = attention.q.shape[0] * len(heads) * attention.k.shape[2]
            size = max(LEAST_ROWS, WEIGHTS // max(row, 1))
        starts = blocks_of(len(rows), size)
        self.blocks = [range(rows.start + b.start, rows.start + b.stop) for b in starts]
        self._last: tuple[range, tuple[Tensor, _Stage, Tensor]] | None = None

    def run(self) -> None:
        """Write the new output, and say how the new weights are to be had."""
        attention = self.attention
        for number, edit in enumerate(self.edits):
            if edit.survey is not None and (heads := edit.heads_in(attention)):
                self._turn_to(heads, rows_of(edit.queries, attention.q.shape[2]))
                edit.survey(self._seen_by(number), attention)
        changed, parts = False, []
        for block in self.blocks:
            plain, scores, unedited = self._scored(block)
            weights = self._weighed(block, len(self.edits))
            own = _part(attention.output, self.heads, block)
            if not scores.touched and not weights.touched:
                parts.append(own)
                continue
            changed = True
            if len(self.blocks) == 1:
                self._keep(weights.value)
            kept = torch.nn.functional.dropout(weights.value, attention.dropout)
            new = attention.mix(kept if attention.dropout else weights.value, self.heads)
            # Rows that came back as they were keep the model's own numbers.
            other = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=new.device)
            for stage, start in ((scores, plain), (weights, unedited)):
                if stage.touched:
                    other = other | (stage.value != start).any(-1, keepdim=True)
            parts.append(torch.where(other, new, own))
        if changed:
            if len(self.blocks) > 1:
                self._keep(None)
            _write(attention, self.heads, self.rows, torch.cat(parts, 2))

    def _turn_to(self, heads: list[int], rows: range) -> None:
        self.attention.heads, self.attention.rows = heads, rows

    def _seen_by(self, number: int) -> Blocks:
        """Blocks of the weights that an edit will be given, after the edits before it."""
        edit = self.edits[number]
        for block in self.blocks:
            weights = self._weighed(block, number)
            if (found := weights.part_of(edit, self.attention)) is not None:
                heads, rows, part = found
                self._turn_to(heads, rows)
                yield rows, part

    def _scored(self, block: range) -> tuple[Tensor, _Stage, Tensor]:
        """Plain scores, those after `pre`, and their weights."""
        if self._last is not None and self._last[0] == block:
            return self._last[1]
        self._last = None  # (two blocks need not be held at once)
        plain = self.attention.scores_of(self.heads, block)
        scores = _Stage(self.heads, block, plain)
        scores.run("pre", self.edits, self.attention)
        if scores.touched:
            scores.value = _masked(scores.value, self.attention, self.heads, block)
        result = plain, scores, self.attention.weigh(scores.value, self.heads)
        self._last = block, result
        return result

    def _weighed(self, block: range, edits: int) -> _Stage:
        """Weights after `post` of the first so many edits."""
        weights = _Stage(self.heads, block, self._scored(block)[2])
        weights.run("post", self.edits[:edits], self.attention)
        return weights

    def _keep(self, weights: Tensor | None) -> None:
        """The changed weights: as they are, or formed again when somebody asks for them."""
        start = self.rows.start

        def rows_again(rows: range) -> Tensor:
            before = self.attention.heads, self.attention.rows
            try:
                blocks = blocks_of(len(rows), max(map(len, self.blocks)))
                again = (range(rows.start + b.start, rows.start + b.stop) for b in blocks)
                return torch.cat([self._weighed(b, len(self.edits)).value for b in again], 2)
            finally:
                self._last = None
                self.attention.heads, self.attention.rows = before

        def rows_kept(rows: range) -> Tensor:
            assert weights is not None
            return weights[:, :, rows.start - start : rows.stop - start]

        self._last = None
        again = rows_again if weights is None else rows_kept
        self.attention.changed = self.heads, self.rows, again


def _masked(scores: Tensor, attention: Attention, heads: list[int], rows: range) -> Tensor:
    """Masked scores again where an edit has changed them: nobody sees more than before."""
    if attention.mask is None and attention.diagonal is None:
        return scores
    visible = attention.visible_of(rows)
    visible = visible if visible.shape[1] == 1 else visible[:, heads]
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min)


def _reach(edits: Sequence[Edit], attention: Attention) -> tuple[list[int], range]:
    heads = sorted({head for edit in edits for head in edit.heads_in(attention)})
    rows = [rows_of(edit.queries, attention.q.shape[2]) for edit in edits]
    rows = [r for r in rows if len(r)]
    if not rows:
        return heads, range(0)
    return heads, range(min(r.start for r in rows), max(r.stop for r in rows))


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _part(output: Tensor, heads: list[int], rows: range) -> Tensor:
    if len(heads) == output.shape[1] and len(rows) == output.shape[2]:
        return output
    return output[:, heads, rows.start : rows.stop]


def _write(attention: Attention, heads: list[int], rows: range, new: Tensor) -> None:
    output = attention.output
    if new.shape == output.shape:
        attention.output = new
        return
    output = output.clone()
    output[:, heads, rows.start : rows.stop] = new.to(output.dtype)
    attention.output = output
