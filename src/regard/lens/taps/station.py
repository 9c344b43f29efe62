"""Where taps stand: one station per attention module, whatever the kind of model.

A station is set up by the first tap on its module and taken down with the last. It runs the
model's own attention, then the edits of all taps, then their readers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regard.lens.taps.call import Attention, Kind, describe

OUTSIDE_GRAPHS = "a tap of regard stands outside compiled graphs"
Reader = Callable[[Attention], None]
Editor = Callable[[Tensor, Attention], Tensor | None]
Heads = Sequence[int] | Mapping[int, Sequence[int]] | None


@dataclass(frozen=True)
class Point:
    """A place where a tap can stand: one layer of attention.

    Attributes:
        name: path of the module in the model.
        tower: what precedes the layer's number in the path, such as "model.layers".
        layer: number in its tower (of the first use, where a module serves several layers).
        kind: "self" or "cross".
        heads: query heads, where the module says so.
        repeats: layers that the module serves, one after the other (ALBERT), else 1.
    """

    name: str
    tower: str
    layer: int
    kind: Kind
    heads: int | None
    repeats: int = 1


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
    """

    pre: Editor | None = None
    post: Editor | None = None
    output: Editor | None = None
    heads: Heads = None
    queries: slice = field(default_factory=lambda: slice(None))  # (a slice has no hash)

    def __post_init__(self) -> None:
        rows_of(self.queries, 1)

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


@dataclass(eq=False)
class Listener:
    """A tap as its stations know it."""

    read: Reader | None
    edit: Edit | None
    layers: frozenset[int] | None

    def hears(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers


class Station:
    """One attention module with the taps on it; a back end says how to get in and out."""

    def __init__(self, module: nn.Module, point: Point, block: nn.Module | None) -> None:
        self.module, self.point, self.block = module, point, block
        self.listeners: list[Listener] = []
        self.here = threading.local()  # what is known of the call in progress
        self._handles: list[Any] = []

    # -- for a back end ----------------------------------------------------------------------

    def install(self) -> None:
        """Reach into the module."""
        raise NotImplementedError

    def remove(self) -> None:
        """Leave the module as it was."""
        raise NotImplementedError

    def __reduce__(self) -> Any:
        raise RuntimeError(
            f"tap: {self.point.name} is being copied while a tap is open on it; close it first"
        )

    # -- taps coming and going ---------------------------------------------------------------

    def add(self, listener: Listener) -> None:
        if not self.listeners:
            try:
                self._watch()
                self.install()
            except BaseException:
                self._leave()
                raise
        self.listeners.append(listener)

    def drop(self, listener: Listener) -> None:
        self.listeners.remove(listener)
        if not self.listeners:
            self._leave()

    def _leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.here = threading.local()
        self.remove()

    def _watch(self) -> None:
        if self.block is not None:
            hook = self.block.register_forward_pre_hook(self._see_block, with_kwargs=True)
            self._handles.append(hook)

    def _see_block(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        given = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        self.here.hidden = given if isinstance(given, Tensor) else None

    # -- a call ------------------------------------------------------------------------------

    def listening(self, layer: int) -> list[Listener]:
        return [listener for listener in self.listeners if listener.hears(layer)]

    def layer_now(self) -> int:
        """Number of the layer of this call; counts the uses of a module that serves several."""
        if self.point.repeats == 1:
            return self.point.layer
        self.here.count = getattr(self.here, "count", -1) + 1
        return self.point.layer + self.here.count % self.point.repeats

    def hand_over(self, attention: Attention, listeners: Sequence[Listener]) -> None:
        """All edits in the order in which their taps were opened, then all readers."""
        attention.hidden = getattr(self.here, "hidden", None)
        if attention.offset == 0 or attention.kind == "cross":
            self.here.prompt = attention.q.shape[2]
        attention.prompt = getattr(self.here, "prompt", 0)
        edits = [listener.edit for listener in listeners if listener.edit is not None]
        if edits:
            apply_edits(attention, edits)
        for listener in listeners:
            if listener.read is not None:
                listener.read(attention)
        self.here.hidden = None


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
            heads = edit.heads_in(attention)
            rows = rows_of(edit.queries, attention.q.shape[2])
            if function is None or not heads or not len(rows):
                continue
            inside = [self.heads.index(head) for head in heads]
            whole = heads == self.heads and rows == self.rows
            first, last = rows.start - self.rows.start, rows.stop - self.rows.start
            part = self.value if whole else self.value[:, inside, first:last]
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
            if whole:
                self.value = new
            else:
                self.value = self.value.clone()
                self.value[:, inside, first:last] = new.to(self.value.dtype)
            self.touched = True


def apply_edits(attention: Attention, edits: Sequence[Edit]) -> None:
    """Run the edits on one call; changes `attention.output` and its weights where they say so."""
    before = attention.heads, attention.rows
    try:
        weighing = [edit for edit in edits if edit.pre is not None or edit.post is not None]
        heads, rows = _reach(weighing, attention)
        if heads and len(rows):
            plain = attention.scores_of(heads, rows)
            scores = _Stage(heads, rows, plain)
            scores.run("pre", weighing, attention)
            if scores.touched:
                scores.value = _masked(scores.value, attention, heads, rows)
            before_post = attention.weigh(scores.value, heads)
            weights = _Stage(heads, rows, before_post)
            weights.run("post", weighing, attention)
            if scores.touched or weights.touched:
                attention.changed = (heads, rows, weights.value)
                kept = torch.nn.functional.dropout(weights.value, attention.dropout)
                new = attention.mix(kept if attention.dropout else weights.value, heads)
                # Rows that came back as they were keep the model's own numbers.
                other = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=new.device)
                for stage, start in ((scores, plain), (weights, before_post)):
                    if stage.touched:
                        other = other | (stage.value != start).any(-1, keepdim=True)
                own = _part(attention.output, heads, rows)
                _write(attention, heads, rows, torch.where(other, new, own))
        closing = [edit for edit in edits if edit.output is not None]
        heads, rows = _reach(closing, attention)
        if heads and len(rows):
            output = _Stage(heads, rows, _part(attention.output, heads, rows))
            output.run("output", closing, attention)
            if output.touched:
                _write(attention, heads, rows, output.value)
    finally:
        attention.heads, attention.rows = before


def _masked(scores: Tensor, attention: Attention, heads: list[int], rows: range) -> Tensor:
    """Masked scores again where an edit has changed them: nobody sees more than before."""
    if attention.mask is None and attention.diagonal is None:
        return scores
    visible = attention.visible_of(rows)
    visible = visible if visible.shape[1] == 1 else visible[:, heads]
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min)


def rows_of(queries: slice, count: int) -> range:
    """The rows of a slice, as a range; its step must be 1."""
    if queries.step not in (None, 1):
        raise ValueError(f"tap: edit.queries {queries}: its step must be 1")
    return range(count)[queries]


def _reach(edits: Sequence[Edit], attention: Attention) -> tuple[list[int], range]:
    heads = sorted({head for edit in edits for head in edit.heads_in(attention)})
    rows = [rows_of(edit.queries, attention.q.shape[2]) for edit in edits]
    rows = [r for r in rows if len(r)]
    if not rows:
        return heads, range(0)
    return heads, range(min(r.start for r in rows), max(r.stop for r in rows))


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


STATIONS: WeakKeyDictionary[nn.Module, Station] = WeakKeyDictionary()
LOCK = threading.RLock()
