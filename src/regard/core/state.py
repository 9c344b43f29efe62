"""States of constant size, and what every state can do: fork, crop, select, map, save, load."""

from __future__ import annotations

import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from regard.core.checks import reject

FORMAT = "regard.state/1"


class State(ABC):
    """What an op returns with `return_state=True` and takes as `state=`; never changed in place."""

    length: int

    @abstractmethod
    def fork(self) -> State:
        """A state with the same past that may be continued on its own."""

    @abstractmethod
    def crop(self, length: int) -> State:
        """The state after the first `length` tokens; `ValueError` if that past was not kept."""

    @abstractmethod
    def select(self, index: Tensor) -> State:
        """The batch rows `index` (int64), in that order: beam reordering, or dropping rows."""

    @abstractmethod
    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """`function` on every tensor (`.to(device)`, `.to(dtype)`, `.detach()`), structure kept.

        Sums and masks follow to another device but keep their dtype and every digit.
        """

    @abstractmethod
    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain data from which `_unpack` builds the state again."""

    @classmethod
    @abstractmethod
    def _unpack(cls, tensors: dict[str, Tensor], data: dict[str, Any]) -> State:
        """The inverse of `_pack`."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        from safetensors.torch import save

        tensors, data = self._pack()
        header = {"format": FORMAT, "kind": type(self).__name__, "data": json.dumps(data)}
        content = save({name: t.detach().contiguous() for name, t in tensors.items()}, header)
        write_atomically(Path(path), content)


def check_rows(op: str, index: Any) -> None:
    """`index` names batch rows: an int64 or int32 tensor of one dimension."""
    integral = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    if not integral or index.dim() != 1:
        raise reject(op, "index", "an int64 tensor [rows]", index, kind=TypeError)


def keep_dtype(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`function(tensor)` without its change of dtype: a sum or a position is never rounded."""
    moved = function(tensor)
    if moved.dtype == tensor.dtype:
        return moved
    kept = tensor.to(moved.device)
    return kept if moved.requires_grad else kept.detach()


def state_kinds() -> dict[str, type[State]]:
    """The states that a file may hold, by the name of their class."""
    from regard.core.cache import KVCache
    from regard.core.group import StateGroup

    return {"KVCache": KVCache, "FixedState": FixedState, "StateGroup": StateGroup}


def load_state(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> State:
    """Reads what `State.save` wrote; a file of anything else is refused with the reason."""
    from safetensors import SafetensorError, safe_open

    kinds = state_kinds()
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"load_state: {path} is not a safetensors file ({error})") from error
    if header.get("format") != FORMAT:
        found = header.get("format", "no format")
        raise ValueError(f"load_state: {path} must be a {FORMAT} file, got {found}")
    if header.get("kind") not in kinds:
        accepted = f"one of {', '.join(kinds)}"
        raise ValueError(f"load_state: {path} must hold {accepted}, got {header.get('kind')!r}")
    try:
        return kinds[header["kind"]]._unpack(tensors, json.loads(header["data"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load_state: {path} is damaged ({error!r})") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside `path` and renames, so that a reader never sees half a file."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):  # interrupted after the rename: the file is whole
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@dataclass(frozen=True, eq=False)
class FixedState(State):
    """A state whose size does not grow: named tensors with the batch in front, and a token count.

    Accumulators are float32 (float64 for float64 inputs). An op never writes into a state it
    was given, so a state may be continued any number of times.

    >>> state = FixedState("linear", 7, {"S": torch.zeros(2, 4, 8, 8)})
    >>> state.select(torch.tensor([1]))["S"].shape
    torch.Size([1, 4, 8, 8])
    """

    mechanism: str
    length: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    def __reduce__(self) -> tuple[Any, ...]:  # a MappingProxyType cannot be pickled
        return FixedState, (self.mechanism, self.length, dict(self.tensors))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def _with(self, function: Callable[[Tensor], Tensor]) -> FixedState:
        changed = {name: function(tensor) for name, tensor in self.tensors.items()}
        return FixedState(self.mechanism, self.length, changed)

    def fork(self) -> FixedState:
        """The state itself: nothing ever writes into it."""
        return self

    def crop(self, length: int) -> FixedState:
        """Only `crop(state.length)` is possible: a fixed-size state does not keep its past."""
        if length != self.length:
            raise ValueError(
                f"{self.mechanism}: crop({length}) needs the past, and a state of fixed size keeps "
                f"only its sum over {self.length} tokens; keep the state of that moment instead"
            )
        return self

    def select(self, index: Tensor) -> FixedState:
        """The batch rows `index`, in that order."""
        check_rows(f"{self.mechanism} state.select", index)
        return self._with(lambda t: t.index_select(0, index.to(t.device)))

    def map(self, function: Callable[[Tensor], Tensor]) -> FixedState:
        """`function` on every tensor; accumulators keep their dtype."""
        return self._with(lambda t: keep_dtype(function, t))

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return dict(self.tensors), {"mechanism": self.mechanism, "length": self.length}

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], data: dict[str, Any]) -> FixedState:
        return cls(str(data["mechanism"]), int(data["length"]), tensors)
