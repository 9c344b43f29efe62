"""Finds, loads and questions the native library; nothing is loaded before it is needed."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from regard.core.checks import check_choice
from regard.native import table

INSTALL = (
    "install GCC or clang and reinstall regard from source "
    "(pip install --no-binary regard regard, or pip install . in a checkout)"
)
REBUILD = "build it again: pip install -e . in the checkout"


class NativeUnavailable(RuntimeError):
    """The native library cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Status:
    """Whether the native library is there: if not, `reason` says why and `remedy` what to do."""

    loaded: bool
    path: Path
    instruction_sets: tuple[str, ...] = ()  # that the build holds and the machine runs, best first
    built: tuple[str, ...] = ()  # that the build holds
    reason: str | None = None
    remedy: str | None = None


@dataclass(frozen=True)
class _Missing:
    reason: str
    remedy: str = INSTALL


@dataclass(frozen=True)
class _Loaded:
    library: ctypes.CDLL
    built: tuple[str, ...]
    usable: tuple[str, ...]


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes torch.compile call a function while tracing and keep its answer.

    As torch.compiler.assume_constant_result does, which imports all of the compiler.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@cache
def path() -> Path:
    """Where the library is, or would be."""
    suffix = ".dll" if os.name == "nt" else ".so"
    return table.PACKAGE / "native" / (table.LIBRARY + suffix)


@cache
def _load(at: Path) -> _Loaded | _Missing:
    """The library, or why there is none. Kept: a process loads it once."""
    if not at.exists():
        return _Missing("regard was built without a C compiler that knows vector types")
    try:
        library = ctypes.CDLL(str(at))
        library.regard_built.restype = library.regard_digest.restype = ctypes.c_char_p
        built = tuple(library.regard_built().decode().split(","))
        digest = library.regard_digest().decode()
    except (OSError, AttributeError) as error:
        return _Missing(f"{at.name} could not be loaded ({error})")
    if digest != table.digest():
        return _Missing(f"{at.name} was built from other sources than these", REBUILD)
    library.regard_runs.argtypes = [ctypes.c_char_p]
    usable = tuple(name for name in built if library.regard_runs(name.encode()))
    if not usable:
        return _Missing(f"this processor runs none of {', '.join(built)}")
    return _Loaded(library, built, usable)


def status() -> Status:
    """Whether the native library is loaded (it is tried now), and if not, why and what to do.

    >>> status().loaded == bool(instruction_sets())
    True
    """
    loaded = _load(path())
    if isinstance(loaded, _Missing):
        return Status(False, path(), reason=loaded.reason, remedy=loaded.remedy)
    return Status(True, path(), loaded.usable, loaded.built)


@_constant
def refusal() -> str | None:
    """Why no native form can run, in the words of `core.dispatch`; None where one can."""
    loaded = _load(path())
    return loaded.reason if isinstance(loaded, _Missing) else None


def no_memory(op: str) -> MemoryError:
    """What to raise where a kernel found no room to work in."""
    return MemoryError(f"{op}: no memory for the work space of the native kernel")


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that both this machine and this build have, best first.

    Empty without the native library: `status` says why.
    """
    loaded = _load(path())
    return () if isinstance(loaded, _Missing) else loaded.usable


def function(op: str, name: str, isa: str | None = None) -> Any:
    """The C function `regard_<name>_<isa>` of the library; its `argtypes` are the caller's to set.

    `op` names the operation in errors. `isa=None` takes the best of `instruction_sets()`; a lower
    one can be forced. Raises `NativeUnavailable` without the library, `ValueError` for a set that
    machine or build lack.
    """
    loaded = _load(path())
    if isinstance(loaded, _Missing):
        raise NativeUnavailable(f"{op}: no native library: {loaded.reason}; {loaded.remedy}")
    if isa is None:
        isa = _chosen.get() or loaded.usable[0]
    check_choice(op, "isa", isa, loaded.usable)
    return getattr(loaded.library, f"regard_{name}_{isa}")


_chosen: ContextVar[str | None] = ContextVar("regard_instruction_set", default=None)


@contextmanager
def limited_to(isa: str) -> Iterator[None]:
    """Inside, native forms use this instruction set instead of the best.

    Raises `NativeUnavailable` without the native library, `ValueError` for a set that machine or
    build lack.

    >>> for isa in instruction_sets():
    ...     with limited_to(isa):
    ...         assert chosen() == isa
    """
    loaded = _load(path())
    if isinstance(loaded, _Missing):
        raise NativeUnavailable(f"limited_to: no native library: {loaded.reason}; {loaded.remedy}")
    check_choice("limited_to", "isa", isa, loaded.usable)
    token = _chosen.set(isa)
    try:
        yield
    finally:
        _chosen.reset(token)


@_constant
def chosen() -> str | None:
    """The instruction set that native forms use here: the best, or that of `limited_to`."""
    loaded = _load(path())
    if isinstance(loaded, _Missing):
        return None
    return _chosen.get() or loaded.usable[0]
