"""Several states that advance together: the pieces of one layer, or the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from regard.core.checks import reject
from regard.core.state import State, state_kinds


@dataclass(frozen=True, eq=False)
class StateGroup(State):
    """Named states of one length. What a state can do, a group does to each of its parts.

    A part that cannot (a state of fixed size keeps no past to crop) refuses for the whole.

    >>> import torch
    >>> from regard.core.state import FixedState
    >>> part = FixedState("linear", 7, {"S": torch.zeros(2, 4, 8, 8)})
    >>> group = StateGroup("layer", 7, {"attention": part})
    >>> group.select(torch.tensor([1]))["attention"]["S"].shape
    torch.Size([1, 4, 8, 8])
    """

    name: str
    length: int
    parts: Mapping[str, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, part in self.parts.items():
            if part.length != self.length or "." in name:
                accepted = f"states of length {self.length}, named without a dot"
                raise reject("StateGroup", "parts", accepted, {name: part.length})
        object.__setattr__(self, "parts", MappingProxyType(dict(self.parts)))

    def __reduce__(self) -> tuple[Any, ...]:  # a MappingProxyType cannot be pickled
        return StateGroup, (self.name, self.length, dict(self.parts))

    def __repr__(self) -> str:
        kinds = {name: type(part).__name__ for name, part in self.parts.items()}
        return f"StateGroup({self.name!r}, length={self.length}, {kinds})"

    def __getitem__(self, name: str) -> Any:
        return self.parts[name]

    def _with(self, function: Callable[[State], State], length: int | None = None) -> StateGroup:
        changed = {name: function(part) for name, part in self.parts.items()}
        return StateGroup(self.name, self.length if length is None else length, changed)

    def fork(self) -> StateGroup:
        """The same past, to be continued on its own."""
        return self._with(lambda part: part.fork())

    def crop(self, length: int) -> StateGroup:
        """Every part after its first `length` tokens; `ValueError` if one kept no past."""
        return self._with(lambda part: part.crop(length), length)

    def select(self, index: Tensor) -> StateGroup:
        """The batch rows `index` of every part, in that order."""
        return self._with(lambda part: part.select(index))

    def map(self, function: Callable[[Tensor], Tensor]) -> StateGroup:
        """`function` on every tensor, as each part does it."""
        return self._with(lambda part: part.map(function))

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, parts = {}, {}
        for name, part in self.parts.items():
            own, data = part._pack()
            tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
            parts[name] = {"kind": type(part).__name__, "data": data}
        return tensors, {"name": self.name, "length": self.length, "parts": parts}

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], data: dict[str, Any]) -> StateGroup:
        own: dict[str, dict[str, Tensor]] = {name: {} for name in data["parts"]}
        for key, tensor in tensors.items():
            name, _, rest = key.partition(".")
            own[name][rest] = tensor
        kinds = state_kinds()
        parts = {
            name: kinds[part["kind"]]._unpack(own[name], part["data"])
            for name, part in data["parts"].items()
        }
        return cls(str(data["name"]), int(data["length"]), parts)
