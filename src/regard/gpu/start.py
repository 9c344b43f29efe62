"""Starting a kernel with less of Python's time than Triton takes to find what it compiled.

Triton looks at every argument of every start: what type it has, whether it is 1 or a multiple
of 16, which options there are. For sixty arguments that takes longer than a short kernel. Here
the same facts make one key, and what was compiled for it is started directly. Arguments that
several kernels share are looked at once (`Shared`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from regard.gpu.availability import compiled, interpreting


class Shared(NamedTuple):
    """Arguments of several kernels, and what Triton would ask about them."""

    arguments: dict[str, Any]
    facts: tuple[Any, ...]

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> Shared:
        return cls(arguments, tuple(map(_fact, arguments, arguments.values())))


_NOTHING = Shared({}, ())
_compiled: dict[tuple[Any, ...], Any] = {}
_names: dict[Any, tuple[str, ...]] = {}


def start(
    kernel: Any,
    programs: int,
    arguments: dict[str, Any],
    shared: Shared = _NOTHING,
    warps: int = 4,
    stages: int = 1,
    registers: int | None = None,
) -> Any:
    """Starts `programs` programs of a kernel, by the names of its arguments and of shared ones.

    Returns what was compiled for it; None where it is interpreted.
    """
    grid, merged = (programs, 1, 1), {**shared.arguments, **arguments}
    if interpreting():
        kernel[grid](**merged, **compiled(warps, stages, registers))
        return None
    names = argument_names(kernel)
    device = torch.cuda.current_device() if torch.cuda.is_available() else -1
    facts = tuple(map(_fact, arguments, arguments.values()))
    key = (kernel.fn, device, warps, stages, registers, shared.facts, *arguments, facts)
    found = _compiled.get(key)
    if found is None:
        chosen = {name: merged[name] for name in names}
        found = kernel[grid](**chosen, **compiled(warps, stages, registers))
        if found is not None:  # None: nothing is started, somebody only looks
            _compiled[key] = found
        return found
    found[grid](*[merged[name] for name in names])
    return found


def argument_names(kernel: Any) -> tuple[str, ...]:
    """The names of a kernel's arguments, in its order."""
    names = _names.get(kernel.fn)
    if names is None:
        for parameter in kernel.params:  # what `_fact` goes by
            assert parameter.is_constexpr == _constant(parameter.name), parameter.name
        names = _names[kernel.fn] = tuple(parameter.name for parameter in kernel.params)
    return names


def _constant(name: str) -> bool:
    """Constants of a kernel have names in capitals; two sizes that are none have them too."""
    return name[0].isupper() and name not in ("T", "S")


def _fact(name: str, value: Any) -> Any:
    """What decides between two translations of a kernel: never less than Triton asks."""
    kind = type(value)
    if _constant(name):
        return value
    if kind is torch.Tensor:
        return value.dtype, value.data_ptr() % 16 == 0
    if kind is int:
        return value == 1, value % 16 == 0, -(1 << 31) <= value < 1 << 31
    if kind is float:
        return float
    if hasattr(value, "block_shape"):
        return value.base.dtype, tuple(value.block_shape)
    return value
