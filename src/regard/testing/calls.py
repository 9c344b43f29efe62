"""One call of an op as data: tensors with spelled axes, so that any law can cut or join them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard.core.card import Domain, Operand

# The vocabulary of optional arguments: tensor operands, with the axes and domain of each, ...
OPTIONAL: dict[str, tuple[str, Domain]] = {
    "key_mask": ("b s", "free"),
    "key_bias": ("b hk s", "free"),
    "log_decay": ("b hk s", "log_decay"),
    "beta": ("b hk s", "unit"),
    "gate": ("b hk s d", "unit"),
    "bias": ("b h t s", "free"),
    "scale": ("h", "positive"),
    "ridge": ("h", "positive"),
    "sinks": ("h", "free"),
}
# ... and settings, with values worth trying.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "window": ((3, 0), (2, -1), (-1, 1), (4, 2)),
    "softcap": (3.0,),
}
ARGUMENTS = (Operand("q"), Operand("k", "b hk s d", "key"), Operand("v", "b hk s dv", "key"))


@dataclass(frozen=True)
class Call:
    """The arguments of one call. `axes` spells the axes of each tensor, as docstrings do.

    Tensors are sampled in float64 with values that float32 holds exactly, so that the float32
    law measures the arithmetic and not the rounding of inputs.
    """

    tensors: Mapping[str, Tensor]
    axes: Mapping[str, tuple[str, ...]]
    domains: Mapping[str, Domain]
    options: Mapping[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the op."""
        return {**self.tensors, **self.options}

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The names of the floating-point tensors."""
        return tuple(name for name, t in self.tensors.items() if t.is_floating_point())

    def along(self, axis: str) -> tuple[str, ...]:
        """The names of the tensors that have this axis."""
        return tuple(name for name, axes in self.axes.items() if axis in axes)

    def size(self, axis: str) -> int:
        """The length of an axis."""
        name = self.along(axis)[0]
        return self.tensors[name].shape[self.axes[name].index(axis)]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Call:
        """`function(name, tensor)` on every tensor."""
        changed = {name: function(name, tensor) for name, tensor in self.tensors.items()}
        return replace(self, tensors=changed)

    def with_tensors(self, **tensors: Tensor) -> Call:
        """Some tensors replaced; a new name must be one of the vocabulary."""
        call = self
        for name, tensor in tensors.items():
            axes = self.axes.get(name) or tuple(OPTIONAL[name][0].split())
            call = call.with_tensor(name, tensor, axes)
        return call

    def with_tensor(self, name: str, tensor: Tensor, axes: Sequence[str]) -> Call:
        """One tensor set, with its axes spelled out; the axis "1" has one element."""
        domain = self.domains.get(name) or OPTIONAL[name][1]
        return Call(
            {**self.tensors, name: tensor},
            {**self.axes, name: tuple(axes)},
            {**self.domains, name: domain},
            self.options,
        )

    def with_options(self, **options: Any) -> Call:
        """Some settings replaced."""
        return replace(self, options={**self.options, **options})

    def without(self, *names: str) -> Call:
        """Some arguments left out."""

        def keep(given: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in given.items() if name not in names}

        return Call(keep(self.tensors), keep(self.axes), keep(self.domains), keep(self.options))

    def narrow(self, axes: str | Iterable[str], start: int, stop: int) -> Call:
        """The part [start, stop) of one axis, or of several at once (`"ts"` for tokens)."""
        wanted = tuple(axes)

        def cut(name: str, tensor: Tensor) -> Tensor:
            for position, axis in enumerate(self.axes[name]):
                if axis in wanted:
                    tensor = tensor.narrow(position, start, stop - start)
            return tensor

        return self.map(cut)

    def rows(self, index: Tensor) -> Call:
        """The batch rows `index`."""
        return self.map(
            lambda name, t: t.index_select(0, index.to(t.device)) if "b" in self.axes[name] else t
        )

    def repeat_heads(self, group: int) -> Call:
        """Every key head `group` times: the call with one key head per query head."""

        def repeat(name: str, tensor: Tensor) -> Tensor:
            if "hk" not in self.axes[name]:
                return tensor
            return tensor.repeat_interleave(group, self.axes[name].index("hk"))

        return self.map(repeat)

    def join(self, other: Call, axes: Iterable[str], *, before: bool = False) -> Call:
        """This call with another laid behind (or before) it along the given axes."""
        wanted = tuple(axes)

        def cat(name: str, tensor: Tensor) -> Tensor:
            shared = [p for p, axis in enumerate(self.axes[name]) if axis in wanted]
            if not shared:
                return tensor
            parts = [other[name], tensor] if before else [tensor, other[name]]
            if len(shared) == 1:
                return torch.cat(parts, shared[0])
            shape = list(tensor.shape)  # along two axes at once (a dense bias): block-diagonal
            for position in shared:
                shape[position] += other[name].shape[position]
            out, starts = tensor.new_zeros(shape), [0] * len(shared)
            for part in parts:
                block = out
                for position, start in zip(shared, starts, strict=True):
                    block = block.narrow(position, start, part.shape[position])
                block.copy_(part)
                starts = [part.shape[position] for position in shared]
            return out

        return self.map(cat)

    def spread(self, mask: Tensor, name: str) -> Tensor:
        """A mask [B, S] seen against the axes of one key-side tensor."""
        sizes = {"b": mask.shape[0], "s": mask.shape[1]}
        return mask.view([sizes.get(axis, 1) for axis in self.axes[name]])

    def to(self, dtype: torch.dtype) -> Call:
        """q, k, v and required operands in `dtype`; the others too, but never below float32."""
        wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32

        def cast(name: str, tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            return tensor.to(wide if name in OPTIONAL else dtype)

        return self.map(cast)

    def on(self, device: str | torch.device) -> Call:
        """The same call on another device."""
        return self.map(lambda name, tensor: tensor.to(device))

    def leaves(self, names: Iterable[str] | None = None) -> Call:
        """Fresh copies, of which `names` (all that can, by default) require a gradient."""
        wanted = self.differentiable if names is None else tuple(names)
        return self.map(lambda name, t: t.detach().clone().requires_grad_(name in wanted))


def sample(
    operands: Iterable[Operand], sizes: Mapping[str, int], generator: torch.Generator
) -> Call:
    """A call of these operands; a generator on the CPU makes it the same on every device."""
    tensors, axes, domains = {}, {}, {}
    for operand in operands:
        axes[operand.name] = tuple(operand.shape.split())
        domains[operand.name] = operand.domain
        shape = [sizes[axis] for axis in axes[operand.name]]
        tensors[operand.name] = values(shape, operand.domain, sizes, generator)
    return Call(tensors, axes, domains, {})


def optional(
    name: str, axes: Sequence[str], sizes: Mapping[str, int], generator: torch.Generator
) -> Tensor:
    """A value of one optional tensor argument, by its place in the vocabulary."""
    domain = OPTIONAL[name][1]
    shape = [sizes.get(axis, 1) for axis in axes]
    if name != "key_mask":
        return values(shape, domain, sizes, generator)
    mask = torch.rand(shape, generator=generator) < 0.7
    if mask.numel():  # a row without any key has a law of its own
        mask[:, torch.randint(mask.shape[1], (1,), generator=generator)] = True
    return mask


def values(
    shape: Iterable[int], domain: Domain, sizes: Mapping[str, int], generator: torch.Generator
) -> Tensor:
    """Values in a domain: float64 that float32 holds exactly; int64 for an index or a flag."""
    shape = list(shape)
    if domain == "flag":  # 0 or 1
        return (torch.rand(shape, generator=generator) < 0.6).long()
    if domain == "index":
        return torch.randint(max(1, sizes["s"]), shape, generator=generator)
    normal = torch.randn(shape, generator=generator)
    if domain == "unit":
        normal = normal.sigmoid()
    elif domain == "positive":
        normal = 0.2 + normal.abs()
    elif domain == "log_decay":
        normal = -0.3 * normal.abs()
        normal[torch.rand(shape, generator=generator) < 0.15] = 0.0
    return normal.double()


def junk(like: Tensor, domain: Domain, value: float) -> Tensor:
    """A tensor full of `value`, or of what is as extreme inside the domain."""
    if like.dtype == torch.bool:
        return ~like
    if domain in ("index", "flag"):
        return torch.zeros_like(like)
    if domain == "unit":
        value = 1.0 if value > 0 else 0.0
    elif domain in ("positive", "log_decay"):
        value = abs(value)
    return torch.full_like(like, -value if domain == "log_decay" else value)
