"""Starting a kernel with less of Python's time than Triton takes to find what it compiled.

Triton looks at every argument of every start: what type it has, whether it is 1 or a multiple
of 16, which options there are. For sixty arguments that takes longer than a short kernel. Here
the same facts make one key, and what was compiled for it is started directly. Arguments that
several kernels share are looked at once (`Shared`).

The first call of an op waits for its kernels to be translated. Most of that time is spent in other
programs and without Python's lock, so `together` has them all translated at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

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
# What a kernel that was not translated yet meets: None translates it on the spot.
_meets: ContextVar[Callable[..., Any] | None] = ContextVar("meets", default=None)
MOST_AT_ONCE = 8  # kernels that are translated at the same time
Result = TypeVar("Result")


class _Missing(Exception):
    """A kernel was not translated yet."""


def together(run: Callable[[], Result]) -> Result:
    """`run()`, after all of the kernels that it lacks were translated at once.

    `run` starts kernels on memory that it allocates, and waits for no result of theirs: it is
    called a second time without starting any, to learn which ones there are, and a third time.
    Nothing of the kind happens where all are known, and while a graph is recorded.
    """
    cuda = torch.cuda.is_available()
    if interpreting() or not cuda or torch.cuda.is_current_stream_capturing():
        return run()
    token = _meets.set(_stop)
    try:
        return run()
    except _Missing:
        pass
    finally:
        _meets.reset(token)
    found: dict[Any, Future[Any]] = {}
    with ThreadPoolExecutor(min(MOST_AT_ONCE, max(2, os.cpu_count() or 1))) as pool:

        def note(key: Any, kernel: Any, chosen: dict[str, Any], options: dict[str, Any]) -> None:
            if key not in found:
                device = torch.cuda.current_device()
                found[key] = pool.submit(_translate, kernel, device, chosen, options)

        token = _meets.set(note)
        try:
            run()
        finally:
            _meets.reset(token)
    for translated in found.values():  # all are done
        if translated.exception() is None:
            _load(translated.result())
    return run()  # whatever could not be translated says so here


def _stop(*_: Any) -> None:
    raise _Missing


def _translate(kernel: Any, device: int, chosen: dict[str, Any], options: dict[str, Any]) -> Any:
    """Translates a kernel, and its launcher in C, which stays in Triton's cache of files."""
    with torch.cuda.device(device):
        found = kernel.warmup(grid=(1, 1, 1), **chosen, **options)
        if hasattr(found, "src"):
            from triton.runtime import driver

            active: Any = driver.active
            active.launcher_cls(found.src, found.metadata)
    return found


def _load(found: Any) -> None:
    """Loads what was translated: one at a time, while nothing else is loaded.

    Up to Triton 3.6 all launchers are modules of one name. Python puts the functions of one that
    was loaded before into the module that has this name now: between its loading and its reading
    by another thread, that may be the launcher of another kernel.
    """
    load = getattr(found, "_init_handles", None)
    if load is not None:
        load()


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
    meets = _meets.get()
    if found is None:
        chosen, options = {name: merged[name] for name in names}, compiled(warps, stages, registers)
        if meets is not None:
            return meets(key, kernel, chosen, options)
        found = kernel[grid](**chosen, **options)
        if found is not None:  # None: nothing is started, somebody only looks
            _compiled[key] = found
        return found
    if meets is None or meets is _stop:  # else somebody only looks
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
