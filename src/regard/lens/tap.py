"""The one place where attention in somebody else's model is read or edited."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from torch import nn

from regard.lens.taps import functional, mixers, transformers
from regard.lens.taps.call import Attention
from regard.lens.taps.edits import Edit, Heads, check_heads
from regard.lens.taps.station import LOCK, STATIONS, Listener, Point, Reader, Station

__all__ = ["Attention", "Edit", "Point", "points", "tap"]

BACK_ENDS = (
    (transformers.is_tappable, transformers.point_of, transformers.TransformersStation),
    (mixers.is_tappable, mixers.point_of, mixers.MixerStation),
    (functional.is_tappable, functional.point_of, functional.FunctionalStation),
)


def points(model: nn.Module) -> tuple[Point, ...]:
    """The layers of attention of a model where a tap can stand, in the order of its modules.

    Known are modules that use the attention registry of transformers (4.56 and later), this
    library's own `mixers.Attention`, and modules as timm has them (`qkv` and `proj`), whose
    attention is a call of `scaled_dot_product_attention` or an explicit softmax.

    >>> from regard.mixers import Attention as Layer
    >>> points(nn.ModuleList([Layer(8, 2), Layer(8, 2)]))[1]
    Point(name='1', tower='', layer=1, kind='self', heads=2, repeats=1)
    """
    return tuple(point for _, point, _ in _found(model))


class tap:  # noqa: N801 (a context manager, used as a function)
    """Reads, and if asked edits, every call of a model's attention while it is open.

    With `a` the call, an `Attention`:

        scores = softcap(scale q kᵀ) + mask   -> edit.pre
        weights = softmax(scores)             -> edit.post
        output = weights v                    -> edit.output      -> read(a)

    Args:
        model: of transformers, of timm's kind, or built from our mixers; or a part of one.
        read: called with every `Attention`, after all edits of all open taps.
        edit: functions on scores, weights or output, see `Edit`.
        layers: numbers of layers (in their towers); None: all.
        kind: "self" or "cross"; None: both.
        where: a substring of the module's path, such as "language_model"; None: everywhere.
        heads: heads for the edit, as in `Edit`; a mapping from layers to heads also chooses the
            layers.

    Reading leaves the model's outputs as they are, bit for bit: its own attention function runs,
    weights are formed beside it where a reader asks for them. An edit that returns None does
    the same. What an edit changes is computed as eager models do (products in the dtype of q,
    softmax in float32); the other heads and rows keep the model's own numbers. Weights of an
    eager model (`output_attentions`) show the edits.

    Several taps may be open at once, on one model or several, closed in any order and opened
    again: edits run in order of entry, readers after them. Whatever happens inside, an exception
    included, the last tap to leave a module leaves it as it was found.

    Cost: that of what is asked: readers that look at q, k, v and output only cost nothing;
    `weights` is one product and one softmax, O(T S) memory; `Attention.blocks` needs a block's.
    Limits: compiled models run with a tap, but in pieces: it stands outside of compiled graphs,
    so that `fullgraph=True`, export and CUDA graphs raise. Not on models set to flash or flex
    attention, which hand over no usable mask; a model is copied or pickled with its taps closed.

    Raises:
        ValueError: no layer of attention that is known, or none of those asked for; a layer or
            head that is not there; flash or flex attention; an edit that gives another shape.

    >>> import torch
    >>> from regard.mixers import Attention as Layer
    >>> seen = []
    >>> layer = Layer(8, 2)
    >>> with tap(layer, read=lambda a: seen.append(a.weights)):
    ...     _ = layer(torch.randn(1, 3, 8))
    >>> seen[0].shape, torch.allclose(seen[0].sum(-1), torch.ones(1, 2, 3))
    (torch.Size([1, 2, 3, 3]), True)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        read: Reader | None = None,
        edit: Edit | None = None,
        layers: Collection[int] | int | None = None,
        kind: str | None = None,
        where: str | None = None,
        heads: Heads = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"tap: model must be a torch.nn.Module, got {type(model).__name__}")
        if kind not in (None, "self", "cross"):
            raise ValueError(f"tap: kind {kind!r}: must be 'self', 'cross' or None")
        if heads is not None and edit is None:
            raise ValueError("tap: heads are for an edit; a reader takes those it wants")
        if heads is not None and edit is not None:
            edit = replace(edit, heads=heads)
        if edit is not None and isinstance(edit.heads, Mapping) and layers is None:
            layers = [layer for layer, chosen in edit.heads.items() if len(chosen)]
        wanted = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
        found = [
            (module, point, back)
            for module, point, back in _found(model)
            if kind in (None, point.kind) and (where is None or where in point.name)
        ]
        if not found:
            which = f" of kind {kind!r}" if kind else ""
            which += f" with {where!r} in its path" if where else ""
            raise ValueError(
                f"tap: {type(model).__name__} has no layer of attention{which} that is known here "
                "(see regard.lens.tap.points)"
            )
        if wanted is not None:
            there = {n for _, p, _ in found for n in range(p.layer, p.layer + p.repeats)}
            if missing := sorted(wanted - there, key=repr):
                raise ValueError(f"tap: layers {missing}: the model has {_span(there)}")
        self._places = [
            (module, point, back)
            for module, point, back in found
            if wanted is None or wanted & {*range(point.layer, point.layer + point.repeats)}
        ]
        self._check_heads(edit)
        self.model = model
        self.points = tuple(point for _, point, _ in self._places)
        self._listener = Listener(read, edit, None if wanted is None else frozenset(wanted))
        self._open: list[list[Station]] = []

    def _check_heads(self, edit: Edit | None) -> None:
        if edit is None or edit.heads is None:
            return
        for _, point, _ in self._places:
            chosen = edit.heads
            for layer in range(point.layer, point.layer + point.repeats):
                now = chosen.get(layer, ()) if isinstance(chosen, Mapping) else chosen
                if point.heads is not None:
                    check_heads("tap", now, point.heads, f"layer {layer} ({point.name})")

    def __enter__(self) -> Self:
        stations: list[Station] = []
        listener = self._listener
        try:
            with LOCK:
                for module, point, back in self._places:
                    station = STATIONS.get(module)
                    if station is None or not station.listeners:
                        block = _block(self.model, point.name)
                        station = STATIONS[module] = back(module, point, block)
                    station.add(listener)
                    stations.append(station)
        except BaseException:
            self._close(stations)
            raise
        self._open.append(stations)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close(self._open.pop())

    def _close(self, stations: list[Station]) -> None:
        with LOCK:
            for station in stations:
                station.drop(self._listener)
                if not station.listeners:
                    STATIONS.pop(station.module, None)


def _found(model: nn.Module) -> Iterator[tuple[nn.Module, Point, Any]]:
    order = 0
    for name, module in model.named_modules():
        for is_tappable, point_of, station in BACK_ENDS:
            if is_tappable(module):
                yield module, point_of(name, module, order), station
                order += 1
                break


def _block(model: nn.Module, name: str) -> nn.Module | None:
    """The element of a stack that holds the module."""
    number = transformers.stack_number(name)
    return None if number is None else model.get_submodule(name[: number.end()])


def _span(layers: set[int]) -> str:
    return f"layers {min(layers)} to {max(layers)}" if len(layers) > 1 else f"layer {min(layers)}"
