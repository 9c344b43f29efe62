"""Where taps stand: one station per attention module, whatever the kind of model.

A station is set up by the first tap on its module and taken down with the last. It runs the
model's own attention, then the edits of all taps, then their readers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from regard.lens.taps.call import Attention, Kind
from regard.lens.taps.edits import Edit, apply_edits

OUTSIDE_GRAPHS = "a tap of regard stands outside compiled graphs"
Reader = Callable[[Attention], None]


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


STATIONS: WeakKeyDictionary[nn.Module, Station] = WeakKeyDictionary()
LOCK = threading.RLock()
