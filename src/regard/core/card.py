"""What the rest of the library knows about a mechanism: its card."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, get_args

from regard.core.patterns import ALL_PATTERNS, Pattern

Source = Literal["query", "key", "head", "plan"]
Domain = Literal["free", "unit", "positive", "log_decay", "index", "flag"]
AXES = ("b", "h", "hk", "t", "s", "d", "dv")


@dataclass(frozen=True)
class Paper:
    """Where a mechanism comes from. `code` and `licence` are those of the authors' release."""

    title: str
    arxiv: str | None = None
    year: int | None = None
    code: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Operand:
    """A required tensor beside q, k, v: tests sample it, mixers make it.

    `shape` spells the axes in the letters of the docstrings (`"b h t d"`); `source` says what
    it is made from: the query's or key's token, a parameter per head, or a plan; `domain` is
    the set its values live in.
    """

    name: str
    shape: str = "b h t d"
    source: Source = "query"
    domain: Domain = "free"

    def __post_init__(self) -> None:
        unknown = [axis for axis in self.shape.split() if axis not in AXES]
        if unknown or self.source not in get_args(Source) or self.domain not in get_args(Domain):
            raise ValueError(f"Operand {self.name!r}: unknown axis, source or domain in {self}")


@dataclass(frozen=True)
class Case:
    """One configuration of a mechanism that tests and benchmarks run.

    `options` are keyword arguments of the op; `dims` overrides the sizes that tests use, for a
    mechanism that needs, say, an even head size: `{"D": 16}`.
    """

    name: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Card:
    """A mechanism, as tests, benchmarks, mixers, documentation and the command line see it.

    Fields:
        name: the word for it, the same as its folder.
        paper: where it comes from.
        op: the public function; its docstring is the meaning.
        reference: the equations, taking the op's arguments that define the mathematics.
        patterns: those it can serve, mathematically.
        cases: configurations to test and to time; the first is the default.
        operands: required tensors beside q, k, v.
        cost: time of one call, in the letters T, S, D, Dv.
        memory: "linear" promises that no T x S tensor is ever held in a call without gradients;
            "quadratic" makes no promise.
        state: "cache" (keys and values are kept), "fixed" (a state of constant size) or None.
        laws_except: law of the contract suite -> the mathematical reason why it cannot hold.
        budgets: dtype name -> (relative error, measured reason), where an iterative or
            approximate mechanism needs more room than the table of `core.budgets`.
        tune: hyper-parameter -> grid of values to choose from when the mechanism is used
            without training. "scale" is in multiples of the default scale; the others are
            arguments of the op as they are. Empty: not usable without training.
    """

    name: str
    paper: Paper
    op: Callable[..., Any]
    reference: Callable[..., Any]
    patterns: Sequence[Pattern] = ALL_PATTERNS
    cases: Sequence[Case] = (Case(),)
    operands: Sequence[Operand] = ()
    cost: str = "O(T S D)"
    memory: Literal["linear", "quadratic"] = "linear"
    state: Literal["cache", "fixed"] | None = None
    laws_except: Mapping[str, str] = field(default_factory=dict)
    budgets: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"Card: name must be lower_snake_case, got {self.name!r}")
        if self.memory not in ("linear", "quadratic"):
            raise ValueError(f"Card {self.name!r}: memory must be 'linear' or 'quadratic'")
        if self.state not in ("cache", "fixed", None):
            raise ValueError(f"Card {self.name!r}: state must be 'cache', 'fixed' or None")
        for law, reason in self.laws_except.items():
            if len(reason) < 10:
                raise ValueError(f"Card {self.name!r}: laws_except[{law!r}] needs a reason")
        for dtype, (_, reason) in self.budgets.items():
            if len(reason) < 10:
                raise ValueError(f"Card {self.name!r}: budgets[{dtype!r}] needs a measured reason")
        for name, grid in self.tune.items():
            if not grid:
                raise ValueError(f"Card {self.name!r}: tune[{name!r}] needs at least one value")
        if not self.patterns or not self.cases:
            raise ValueError(f"Card {self.name!r}: at least one Pattern and one Case are needed")
        for name in ("patterns", "cases", "operands"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("laws_except", "budgets", "tune"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __reduce__(self) -> tuple[Any, ...]:  # a MappingProxyType cannot be pickled
        values = (getattr(self, item.name) for item in fields(self))
        return Card, tuple(dict(v) if isinstance(v, MappingProxyType) else v for v in values)

    def accepts(self, argument: str) -> bool:
        """Whether the op has an argument of that name."""
        return argument in inspect.signature(self.op).parameters

    @property
    def summary(self) -> str:
        """The first line of the op's docstring."""
        return (inspect.getdoc(self.op) or "").split("\n", 1)[0]
