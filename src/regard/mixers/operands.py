"""Makes the operands that a mechanism wants beside q, k and v, from their declaration on its card.

An operand of the query or the key is a linear map of its token, one of the head is a parameter.
A link takes it into its domain: sigmoid for "unit", softplus for "positive", log-sigmoid for
"log_decay" (a learned forget gate), nothing for "free". Linked values are float32 at least.
A *probe*, a free vector [B, H, T, D] of every query, is compared with keys as the query is: its
map has no bias, and the layer normalises and turns it like the query.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from regard.core.card import Domain, Operand
from regard.core.checks import reject, words
from regard.core.precision import compute_dtype
from regard.mixers.norms import RMSNorm

LINKS: dict[Domain, Callable[[Tensor], Tensor]] = {
    "unit": torch.sigmoid,
    "positive": functional.softplus,
    "log_decay": functional.logsigmoid,
}
# Where a parameter or bias starts: a gate that keeps 95% of the past, and 0 elsewhere.
STARTS: dict[Domain, float] = {"log_decay": 3.0}


def check_operand(op: str, operand: Operand) -> None:
    """An operand that can be learned from tokens or heads; others need a mixer of their own."""
    axes = operand.shape.split()
    token = {"query": "t", "key": "s"}.get(operand.source)
    lengths = [axis for axis in axes if axis in "ts"]
    wanted = [] if token is None else [token]
    fits = operand.source != "plan" and operand.domain != "index" and lengths == wanted
    if not fits or ("b" in axes) != (token is not None) or len(set(axes)) != len(axes):
        accepted = "one whose operands are made from tokens or heads (it needs its own mixer)"
        got = f"operand {operand.name!r} [{operand.shape}], a {operand.domain} {operand.source}"
        raise reject(op, "mechanism", accepted, words(got))


def is_probe(operand: Operand) -> bool:
    """Whether the operand is a vector among the keys, as the query is."""
    axes = operand.shape.split()
    return axes == ["b", "h", "t", "d"] and (operand.source, operand.domain) == ("query", "free")


def linked(operand: Operand, free: Tensor) -> Tensor:
    """`free` taken into the operand's domain."""
    if operand.domain == "free":
        return free
    return LINKS[operand.domain](free.to(compute_dtype(free.dtype)))


class TokenOperand(nn.Linear):
    """An operand of every query or key: a linear map of the token, linked and shaped.

    `start` is where the bias begins, None: where the domain says. `norm` gives a probe an RMS
    norm of every head, with a learned gain.
    """

    def __init__(
        self,
        operand: Operand,
        dim: int,
        sizes: Mapping[str, int],
        start: float | None = None,
        norm: bool = False,
    ) -> None:
        self.operand = operand
        self.start = STARTS.get(operand.domain, 0.0) if start is None else start
        self.shape = {a: sizes[a] for a in operand.shape.split() if a in sizes}
        channels = 1
        for size in self.shape.values():
            channels *= size
        super().__init__(dim, channels, bias=not is_probe(operand))
        self.norm = RMSNorm(self.shape["d"]) if norm and is_probe(operand) else None

    def reset_parameters(self) -> None:
        """As `nn.Linear`, with the bias at its start."""
        super().reset_parameters()
        if self.bias is not None:
            nn.init.constant_(self.bias, self.start)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, length, C] -> the operand in the order of its axes."""
        B, length, _ = tokens.shape
        # Linked before it is permuted: torch 2.13 compiles log-sigmoid for contiguous inputs only.
        values = linked(self.operand, super().forward(tokens))
        values = values.view(B, length, *self.shape.values())
        if self.norm is not None:
            values = self.norm(values)
        token = "t" if self.operand.source == "query" else "s"
        order = ["b", token, *self.shape]
        return values.permute([order.index(axis) for axis in self.operand.shape.split()])


class HeadOperand(nn.Module):
    """An operand that belongs to the heads: a parameter, linked."""

    def __init__(self, operand: Operand, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.operand = operand
        self.free = nn.Parameter(torch.empty([sizes[axis] for axis in operand.shape.split()]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """At the start of the domain."""
        nn.init.constant_(self.free, STARTS.get(self.operand.domain, 0.0))

    def forward(self) -> Tensor:
        """The operand."""
        return linked(self.operand, self.free)


class Operands(nn.ModuleDict):
    """All operands of a mechanism by name; `norm` is for its probes."""

    def __init__(
        self,
        op: str,
        operands: tuple[Operand, ...],
        dim: int,
        sizes: Mapping[str, int],
        norm: bool = False,
    ) -> None:
        super().__init__()
        for operand in operands:
            check_operand(op, operand)
            if operand.source == "head":
                self[operand.name] = HeadOperand(operand, sizes)
            else:
                self[operand.name] = TokenOperand(operand, dim, sizes, norm=norm)

    @property
    def probes(self) -> tuple[str, ...]:
        """The names of those that are compared with keys."""
        modules = self.items()
        return tuple(n for n, m in modules if isinstance(m, TokenOperand) and is_probe(m.operand))

    def forward(self, queries: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """From the tokens that ask and those that are asked, [B, T, C] and [B, S, C]."""
        made = {}
        for name, module in self.items():
            if isinstance(module, TokenOperand):
                made[name] = module(queries if module.operand.source == "query" else keys)
            else:
                made[name] = module()
        return made
