"""What a swap did, and how to take it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from regard.adapt.learned import Learned

ATTRIBUTE = "regard"  # of an attention layer: its parameters are `<layer>.regard.<...>`


@dataclass(frozen=True)
class Swap:
    """What `swap` did: the layers, by path. `restore` takes them back."""

    model: nn.Module = field(repr=False)
    mechanism: str
    layers: tuple[str, ...]
    undo: Callable[[nn.Module, tuple[str, ...]], None] = field(repr=False)

    def restore(self) -> None:
        """These layers as they were."""
        self.undo(self.model, self.layers)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the mechanism learns, by its path in the model."""
        found = {f"{name}.{ATTRIBUTE}": self._part(name) for name in self.layers}
        return {f"{n}.{own}": p for n, part in found.items() for own, p in part.named_parameters()}

    def chosen(self) -> dict[str, dict[str, list[float]]]:
        """Layer -> "ridge" or "scale" -> what each head has come to."""
        parts = {name: self._part(name).modules() for name in self.layers}
        return {n: m.chosen() for n, ms in parts.items() for m in ms if isinstance(m, Learned)}

    def _part(self, layer: str) -> nn.Module:
        return self.model.get_submodule(f"{layer}.{ATTRIBUTE}")
