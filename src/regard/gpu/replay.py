"""A call that starts several kernels, and calls like it, which start them again.

To put together what a kernel is given takes Python longer than a short kernel takes. Where calls
differ in nothing but the memory of their tensors, all of it is the same but for addresses. So the
first call is recorded, and others fill in addresses:

    plan = PLANS.get(key)                    # key: `alike(tensors)`, and whatever else decides
    if plan is None:
        steps = Recording()                  # steps.empty(...), steps.start(...) instead of
        ...                                  # torch.empty(...), start(...)
        PLANS.keep(key, steps, tensors)
    else:
        plan.run(tensors)

`tensors` are the arguments and results of the call, in one order; what else kernels are given must
come from `steps.empty`. Scratch memory is one allocation then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.gpu.start import Shared, argument_names, start

_ALIGNED = 256  # bytes: what torch gives to every tensor on a GPU is no less aligned
_NOTHING = Shared({}, ())


def alike(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What must be equal for tensors to take each other's place."""
    same = list(map(id, tensors))
    return *map(same.index, same), *(
        None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)
        for x in tensors
    )


class _Step(NamedTuple):
    compiled: Any
    programs: int
    arguments: list[Any]


class Plan:
    """Kernels with everything they are given, but for addresses."""

    def __init__(self, steps: Sequence[_Step], sources: dict[int, int], sizes: list[int]) -> None:
        self._places, self._bytes = [], 0
        for size in sizes:
            self._places.append(self._bytes)
            self._bytes += -(-size // _ALIGNED) * _ALIGNED
        self._launches = []
        for compiled, programs, arguments in steps:
            holes = [
                (place, sources[id(value)])
                for place, value in enumerate(arguments)
                if isinstance(value, Tensor)
            ]
            template = [None if isinstance(value, Tensor) else value for value in arguments]
            self._launches.append((compiled[programs, 1, 1], template, holes))

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        """Starts the kernels on other tensors, `alike` those of the recording."""
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        if self._bytes:
            device = next(x.device for x in tensors if x is not None)
            scratch = torch.empty(self._bytes, dtype=torch.uint8, device=device)
            first = scratch.data_ptr()
            addresses += [first + place for place in self._places]
        for launch, template, holes in self._launches:
            arguments = template.copy()
            for place, source in holes:
                arguments[place] = addresses[source]
            launch(*arguments)


class Recording:
    """Starts kernels and notes them."""

    def __init__(self) -> None:
        self.room: list[Tensor] = []
        self._steps: list[_Step] = []
        self._whole = True

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Scratch memory: nothing of it is asked for after the call."""
        self.room.append(torch.empty(shape, dtype=dtype, device=device))
        return self.room[-1]

    def start(
        self,
        kernel: Any,
        programs: int,
        arguments: dict[str, Any],
        shared: Shared = _NOTHING,
        warps: int = 4,
        stages: int = 1,
        registers: int | None = None,
    ) -> None:
        """As `start` does."""
        found = start(kernel, programs, arguments, shared, warps, stages, registers)
        if found is None:  # interpreted, or only looked at
            self._whole = False
            return
        merged = {**shared.arguments, **arguments}
        given = [merged[name] for name in argument_names(kernel)]
        self._steps.append(_Step(found, programs, given))

    def plan(self, tensors: Sequence[Tensor | None]) -> Plan | None:
        """What was recorded; None where a kernel was given a tensor that is none of the call's."""
        known = [*tensors, *self.room]
        sources = {id(x): place for place, x in enumerate(known) if x is not None}
        used = {id(x) for step in self._steps for x in step.arguments if isinstance(x, Tensor)}
        if not self._whole or not used <= set(sources):
            return None
        return Plan(self._steps, sources, [x.numel() * x.element_size() for x in self.room])


class Plans(dict[tuple[Any, ...], Plan]):
    """Plans by what calls have in common; forgotten when there are too many."""

    most = 256

    def keep(
        self, key: tuple[Any, ...], steps: Recording, tensors: Sequence[Tensor | None]
    ) -> None:
        plan = steps.plan(tensors)
        if plan is None:
            return
        if len(self) >= self.most:
            self.clear()
        self[key] = plan
