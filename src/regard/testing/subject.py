"""Who stands before a law: one mechanism, in one configuration, pattern and device."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from regard.core import budgets
from regard.core.card import Card, Case
from regard.core.checks import name_of
from regard.core.dispatch import Explained, asking
from regard.core.patterns import Pattern
from regard.explain import explain
from regard.testing.calls import ARGUMENTS, OPTIONAL, SETTINGS, Call, optional, sample
from regard.testing.law import DoesNotApply, LawBroken

SIZES = {"B": 2, "H": 4, "Hk": 2, "T": 12, "S": 12, "D": 8, "Dv": 8}
CROSS = 9  # keys where they come from another sequence
LETTERS = {"B": "b", "H": "h", "Hk": "hk", "T": "t", "S": "s", "D": "d", "Dv": "dv"}


@dataclass(frozen=True)
class Subject:
    """A card with a case, a pattern, a device and a seed; `law` is the law being applied.

    `thorough` is set in the slow tier: laws that loop may then loop over everything.
    """

    card: Card
    case: Case
    pattern: Pattern
    device: str = "cpu"
    seed: int = 0
    law: str = ""
    thorough: bool = False
    _served: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    # -- sampling --------------------------------------------------------------------------

    def generator(self, *salt: object) -> torch.Generator:
        """A CPU generator that depends on the seed and the place, on nothing that ran before."""
        words = (self.seed, self.card.name, self.law, self.pattern.value, self.case.name, *salt)
        return torch.Generator().manual_seed(zlib.crc32(repr(words).encode()))

    def sizes(self, **dims: int) -> dict[str, int]:
        """The sizes of a call by axis letter: defaults, then the case's, then `dims`."""
        given = {**self.case.dims, **dims}
        chosen = {**SIZES, **given}
        if "Hk" not in given and chosen["H"] % 2:
            chosen["Hk"] = chosen["H"]
        if "Hk" not in given and not chosen["H"] % 2:
            chosen["Hk"] = chosen["H"] // 2
        if "Dv" not in given:
            chosen["Dv"] = chosen["D"]
        if "S" not in given:
            chosen["S"] = CROSS if self.pattern.cross and "T" not in given else chosen["T"]
        return {LETTERS[name]: size for name, size in chosen.items()}

    def free_lengths(self) -> None:
        """For laws that vary lengths: a case that fixes them has nothing to say."""
        if {"T", "S"} & set(self.case.dims):
            raise DoesNotApply("the case fixes its lengths")

    def sample(
        self, options: Iterable[str] = (), *, forget: bool = False, salt: object = "", **dims: int
    ) -> Call:
        """A call in float64 with these optional arguments; `forget` puts -inf among the decays."""
        sizes, generator = self.sizes(**dims), self.generator("sample", salt)
        call = sample((*ARGUMENTS, *self.card.operands), sizes, generator)
        settings = dict(self.case.options)
        if self.card.accepts("causal"):
            settings.setdefault("causal", self.pattern.causal)
        call = call.with_options(**settings)
        for name in options:
            if name in OPTIONAL:
                axes = OPTIONAL[name][0].split()
                if name == "key_bias":  # it lives on one head, the key heads or the query heads
                    heads = ("1", "hk", "h")
                    axes[1] = heads[int(torch.randint(3, (1,), generator=generator))]
                value = optional(name, axes, sizes, generator)
                if name == "log_decay" and forget:
                    value[torch.rand(value.shape, generator=generator) < 0.12] = -torch.inf
                call = call.with_tensor(name, value, axes)
            else:
                choices = SETTINGS[name]
                pick = int(torch.randint(len(choices), (1,), generator=generator))
                call = call.with_options(**{name: choices[pick]})
        return call.on(self.device)

    # -- which options the op serves here --------------------------------------------------

    @property
    def options(self) -> tuple[str, ...]:
        """Optional arguments of the vocabulary that the op has and serves in this pattern."""
        if "options" not in self._served:
            served, refused = [], {}
            for name in (*OPTIONAL, *SETTINGS):
                if not self.card.accepts(name) or name in self.case.options:
                    continue
                if any(operand.name == name for operand in self.card.operands):
                    continue
                reason = self.refusal((name,))
                if reason is None:
                    served.append(name)
                else:
                    refused[name] = reason
            self._served.update(options=tuple(served), refused=refused)
        return self._served["options"]

    @property
    def refused(self) -> Mapping[str, str]:
        """Optional arguments that the op has but refuses here, with its own words."""
        assert self.options is not None
        return self._served["refused"]

    def refusal(self, options: Sequence[str]) -> str | None:
        """The op's own error for this combination of options, or None if it serves it."""
        call = self.sample(options, salt="trial").to(torch.float32)
        try:
            with asking():
                self.card.op(**call.arguments)
        except Explained:
            return None
        except (ValueError, TypeError) as error:
            if any(name in str(error) for name in options):
                return str(error)
            raise
        return None

    @property
    def all_options(self) -> tuple[str, ...]:
        """As many options together as the op serves in one call."""
        if "together" not in self._served:
            together: list[str] = []
            for name in self.options:
                if self.refusal((*together, name)) is None:
                    together.append(name)
            self._served["together"] = tuple(together)
        return self._served["together"]

    def option_sets(self, without: Sequence[str] = ()) -> list[tuple[str, ...]]:
        """None, each alone, and all together."""
        alone = [name for name in self.options if name not in without]
        together = tuple(name for name in self.all_options if name not in without)
        sets: list[tuple[str, ...]] = [(), *((name,) for name in alone)]
        return sets if len(together) < 2 else [*sets, together]

    def some_options(self, without: Sequence[str] = ()) -> list[tuple[str, ...]]:
        """All option sets when thorough; else none, all together, and one that the seed chooses."""
        sets = self.option_sets(without)
        if self.thorough or len(sets) < 4:
            return sets
        pick = torch.randint(len(sets) - 2, (1,), generator=self.generator("options"))
        return [sets[0], sets[1 + int(pick)], sets[-1]]

    # -- running ---------------------------------------------------------------------------

    def run(self, call: Call, **extra: Any) -> Any:
        """The op on this call."""
        return self.card.op(**call.arguments, **extra)

    def reference(self, call: Call) -> Tensor:
        """The float64 reference on this call; it must know every argument that has a meaning."""
        known = inspect.signature(self.card.reference).parameters
        call = call.to(torch.float64)
        for name in (*call.tensors, *call.options):
            means = name in call.tensors or name in SETTINGS or name == "causal"
            if name not in known and means and call.arguments[name] not in (None, False):
                self.broken(f"the reference has no argument {name}")
        arguments = {name: value for name, value in call.arguments.items() if name in known}
        return self.card.reference(**arguments)

    def available(self, call: Call) -> tuple[str, ...]:
        """The values of `impl` that can serve this call; empty for an op that has no choice."""
        if not self.card.accepts("impl"):
            return ()
        try:
            return explain(self.card.op, **call.arguments).available
        except TypeError as error:
            if "chooses no form" in str(error):
                return ()
            raise

    def gradients(
        self,
        call: Call,
        names: Iterable[str] | None = None,
        *,
        weight: Tensor | None = None,
        function: Any = None,
        **extra: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The output and the gradients of `names` (all, by default) under a fixed cotangent.

        The cotangent depends on the output's shape only, so two calls can be compared.
        """
        leaves = call.leaves(names)
        out = (function or self.run)(leaves, **extra)
        wanted = {name: t for name, t in leaves.tensors.items() if t.requires_grad}
        if not out.requires_grad:
            self.broken(f"the output has no gradient although {', '.join(wanted)} ask for one")
        if weight is None:
            weight = self.cotangent(out)
        found = torch.autograd.grad(
            out, list(wanted.values()), weight, allow_unused=True, materialize_grads=True
        )
        return out.detach(), dict(zip(wanted, found, strict=True))

    def cotangent(self, out: Tensor) -> Tensor:
        """A fixed gradient to send back through an output of this shape."""
        generator = torch.Generator().manual_seed(zlib.crc32(repr(tuple(out.shape)).encode()))
        return torch.randn(out.shape, generator=generator).to(out)

    # -- judging ---------------------------------------------------------------------------

    def allowed(self, dtype: torch.dtype, quantity: budgets.Quantity) -> float:
        """The budget, loosened by the factor that the card claims with a reason."""
        table = budgets.budget(dtype, quantity)
        claim = self.card.budgets.get(name_of(dtype))
        if claim is None:
            return table
        return table * max(1.0, claim[0] / budgets.budget(dtype, "value"))

    def close(
        self,
        actual: Tensor,
        expected: Tensor,
        quantity: budgets.Quantity,
        what: str,
        dtype: torch.dtype | None = None,
        least: float = 0.0,
    ) -> float:
        """`actual` within the budget of its dtype around `expected`; returns the error.

        The error is relative to the norm of `expected`, or to `least` where that is larger.
        """
        dtype = dtype or actual.dtype
        if actual.shape != expected.shape:
            self.broken(f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}")
        error, allowed = budgets.relative_error(actual, expected), self.allowed(dtype, quantity)
        size = float(expected.detach().double().norm())
        if size < least:
            error *= (size or 1.0) / least
        if not error <= allowed:
            self.broken(
                f"{what}: relative error {error:.3g}, budget {allowed:.3g} ({quantity})", dtype
            )
        return error

    def close_all(
        self,
        call: Call,
        actual: Mapping[str, Tensor],
        expected: Mapping[str, Tensor],
        quantity: budgets.Quantity,
        what: str,
        dtype: torch.dtype,
    ) -> None:
        """Gradients by name, each within the budget of its own size or of what it is a sum of.

        A gradient may vanish by cancellation (that of a scale which a normaliser divides out):
        what is left is rounding of its terms, whose size v times its gradient tells.
        """
        terms = 0.0
        if "v" in expected:
            terms = float((call["v"].double().cpu() * expected["v"].double().cpu()).norm())
        for name, tensor in actual.items():
            other = call[name].detach().double()
            other = other[other.isfinite()]
            usual = float(other.square().mean().sqrt()) if other.numel() else 0.0
            least = terms / max(1.0, usual)
            self.close(
                tensor, expected[name], quantity, f"{what}, gradient of {name}", dtype, least
            )

    def identical(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """The same bits (NaN equal to NaN is not granted)."""
        if torch.equal(actual, expected):
            return
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            shown = f"{name_of(actual.dtype)} {list(actual.shape)}"
            wanted = f"{name_of(expected.dtype)} {list(expected.shape)}"
            self.broken(f"{what}: {shown}, expected {wanted}", actual.dtype)
        differ = int((actual != expected).sum())
        most = float((actual.double() - expected.double()).abs().max())
        self.broken(
            f"{what}: {differ} of {actual.numel()} elements differ, by up to {most:.3g}; "
            "not one bit may",
            actual.dtype,
        )

    def zero(self, actual: Tensor, what: str) -> None:
        """Exactly 0 everywhere."""
        self.identical(actual, torch.zeros_like(actual), what)

    def require(self, condition: bool, what: str) -> None:
        """Breaks the law with these words unless the condition holds."""
        if not condition:
            self.broken(what)

    def broken(self, what: str, dtype: torch.dtype | None = None) -> NoReturn:
        """Raises `LawBroken` with all that is needed to see it again."""
        raise LawBroken(self.message(what, dtype))

    def message(self, what: str, dtype: torch.dtype | None = None) -> str:
        """Where we are, what is wrong, and the line that reproduces it."""
        place = [
            f"card {self.card.name}, law {self.law}, pattern {self.pattern.value}",
            f"case {self.case.name}, seed {self.seed}, device {self.device}",
        ]
        if dtype is not None:
            place.append(name_of(dtype))
        return f"{', '.join(place)}: {what}\n  reproduce: {self.reproduction}"

    @property
    def reproduction(self) -> str:
        """A line of Python that runs this again."""
        device = f", device={self.device!r}" if self.device != "cpu" else ""
        tier = ', tier="slow"' if self.thorough else ""
        return (
            f"regard.testing.check(regard.mechanisms[{self.card.name!r}], laws=[{self.law!r}], "
            f"patterns=[{self.pattern.value!r}], seed={self.seed}{tier}{device})"
        )

    def under(self, law: str) -> Subject:
        """The same subject before another law; what it serves is learnt once."""
        return replace(self, law=law)

    @property
    def tokens(self) -> str:
        """The axes that grow with a token: queries and keys together, or keys alone."""
        return "s" if self.pattern.cross else "ts"
