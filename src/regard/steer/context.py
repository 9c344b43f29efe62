"""What all editors share: opening and closing, and what a prompt leaves for later calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from regard.lens.tap import Attention


class Steering:
    """A context manager made of others, which are open while it is.

    A subclass says in `parts` what they are, in order; `start` forgets the last use. They close
    in reverse order, whatever happens, also where a later one does not open.
    """

    _open: list[ExitStack] | None = None

    def parts(self) -> list[AbstractContextManager[Any]]:
        """The context managers to open: taps, hooks."""
        raise NotImplementedError

    def start(self) -> None:
        """Called before they open."""

    def __enter__(self) -> Self:
        if self._open is None:
            self._open = []
        self.start()
        with ExitStack() as stack:
            for part in self.parts():
                stack.enter_context(part)
            self._open.append(stack.pop_all())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open:
            self._open.pop().__exit__(kind, error, trace)


@contextmanager
def watching(module: nn.Module, see: Callable[..., Any]) -> Iterator[None]:
    """A forward pre-hook, `see(module, args, kwargs)`, for a while."""
    handle = module.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def for_keys(marks: Bool[Tensor, "b *h s"], attention: Attention) -> Bool[Tensor, "b *h s"]:
    """Marks of the prompt's tokens, laid along the keys of a later call.

    New keys are unmarked, a window's cache holds the last keys only, and the rows of a batch are
    repeated where each became several beams.
    """
    B, S, T = attention.q.shape[0], attention.k.shape[2], attention.q.shape[2]
    if marks.shape[0] != B and B % marks.shape[0] == 0:
        marks = marks.repeat_interleave(B // marks.shape[0], 0)
    start = max(attention.offset + T - S, 0)
    marks = marks[..., start : start + S]
    return torch.nn.functional.pad(marks, (0, S - marks.shape[-1]))
