"""One row of a kernel benchmark as data: what is called, how exact it must be, how fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

import regard
from regard.bench.kernels import family, sparse
from regard.bench.kernels.draw import Drawn, Kind, draw
from regard.bench.timing.setting import DTYPES
from regard.core.card import Card

Work = Literal["forward", "gradients", "decode"]
PROBE = 0.1  # the deviation of a given probe, as of a solved one on normal keys


@dataclass(frozen=True)
class Target:
    """A bound on one of the numbers of a row: at most, or at least.

    `quantity` names the number: "forward/SDPA" is the time of our forward over that of SDPA's,
    "both" a forward and a backward; "of peak" the share of the processor's peak; "threads" the gain
    from two of them; "memory/inputs", bytes over those of q, k, v.
    """

    quantity: str
    most: float | None = None
    least: float | None = None
    level: Literal["must", "stretch"] = "must"

    def met(self, value: float) -> bool:
        """Whether a number is within the bound."""
        return (self.most is None or value <= self.most) and (
            self.least is None or value >= self.least
        )

    def __str__(self) -> str:
        bound = f"<= {self.most:g}" if self.most is not None else f">= {self.least:g}"
        return f"{self.quantity} {bound} ({self.level})"


@dataclass(frozen=True)
class Case:
    """One call of an op, q, k, v drawn as `keys` says: of local linear attention or a relative,
    of the linear family, or of attention to chosen blocks or within a window.

    `work`: "gradients" times forward, backward and both; "decode" has one query per head (in the
    linear family one token, after `length` of them in a state).
    `queries`: None is `length`. `bound`: the relative error that float32 outputs may have; of
    16-bit inputs it follows from what rounding them does. `gradient_bound` likewise. `against`:
    another case whose forward is timed in the same row, as "base". `published`: milliseconds that
    the authors' kernels took for such a call, on the card that the targets are for. `extra`:
    operands made by their names: "key_mask" (a tenth of the keys masked), "log_decay", "packed"
    (four sequences), "identity_maps" (of Hedgehog: features of what comes in, nothing learned).
    `density`: the share of blocks that a plan names; `policy`: who makes the plan from q and k,
    None for chance.
    """

    section: str
    mechanism: str = "local_linear"
    impl: str = "eager"
    work: Work = "forward"
    dim: int = 64
    length: int = 4096
    queries: int | None = None
    ridge: float = 1.0
    keys: Kind = "normal"
    causal: bool = True
    heads: int = 1
    kv_heads: int | None = None
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    extra: tuple[str, ...] = ()
    bound: float = 1e-4
    gradient_bound: float = 1e-4
    targets: tuple[Target, ...] = ()
    against: Case | None = None
    published: float | None = None
    isa: str | None = None
    density: float | None = None
    policy: str | None = None
    note: str = ""

    @property
    def card(self) -> Card:
        """Of the mechanism."""
        return regard.mechanisms[self.mechanism]

    @property
    def rows(self) -> int:
        """Queries per head."""
        if self.work == "decode":
            return 1
        return self.length if self.queries is None else self.queries

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def name(self) -> str:
        """In words, without the section."""
        words = [self.mechanism.replace("_", " "), self.impl]
        words += [f"D={self.dim}", f"n={self.length}"]
        if self.mechanism == "local_linear":
            words.append(f"ridge {self.ridge:g}")
        words += [] if self.fixed_state else [self.keys]
        if self.work != "forward":
            words.append(self.work)
        if not self.causal and self.work != "decode":
            words.append("non-causal")
        if self.queries is not None:
            words.append(f"{self.queries} queries")
        if self.kv_heads not in (None, self.heads):
            words.append(f"{self.heads} on {self.kv_heads} heads")
        words += [] if self.density is None else [f"density {self.density:g}"]
        words += [] if self.policy is None else [f"plan by {self.policy}"]
        words += [name.replace("_", " ") for name in self.extra]
        words += [f"{name}={value}" for name, value in self.options.items()]
        words += [self.dtype] * (self.dtype != "float32")
        words += [word for word in (self.isa, self.note) if word]
        return ", ".join(words)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, of all heads."""
        if "packed" in self.extra:
            count, part = PACKED, self.length // PACKED
            return self.heads * count * (part * (part + 1) // 2 if self.causal else part * part)
        return self.heads * int(self.seen.sum())

    @property
    def seen(self) -> Tensor:
        """Keys that each query of a head sees, float64 [T]: not masked, and none after it."""
        T, S = self.rows, self.length
        real = torch.ones(S, dtype=torch.bool)
        if "key_mask" in self.extra:
            real = _key_mask(self, "cpu", torch.float32)["key_mask"][0]
        if not self.causal or T == 1:
            return real.sum().double().expand(T)
        before = torch.cat([torch.zeros(max(0, T - S), dtype=torch.int64), real.cumsum(0)])
        return before[-T:].double()  # aligned at the end

    @property
    def fixed_state(self) -> bool:
        """Of the linear family."""
        return self.mechanism in family.MECHANISMS

    @property
    def tokens(self) -> int:
        """Keys that are drawn: a token that is decoded is one more than those before it."""
        return self.length + (self.fixed_state and self.work == "decode")

    def drawn(self, device: str = "cpu") -> Drawn:
        """q, k, v in float32."""
        queries = self.tokens if self.fixed_state else self.rows
        return _drawn(self.keys, self.heads, self.tokens, self.dim, queries, self.kv_heads, device)

    def arguments(self, device: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Keyword arguments of the op; in float64 they are those of the reference, too."""
        dtype = self.torch_dtype if dtype is None else dtype
        wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        given: dict[str, Any] = {
            name: x.to(dtype) for name, x in zip("qkv", self.drawn(device), strict=True)
        }
        given["causal"] = self.causal
        if self.mechanism == "local_linear":
            given["ridge"] = self.ridge
        if self.mechanism == "parallax":
            made = torch.Generator(device).manual_seed(11)
            probe = PROBE * torch.randn(given["q"].shape, generator=made, device=device)
            given["r"] = probe.to(device=device, dtype=dtype)
        if self.fixed_state:
            given |= family.operands(self, self.tokens, device, wide)
        if self.mechanism in sparse.MECHANISMS:
            given |= sparse.operands(self, device)
        for name in self.extra:
            given |= _EXTRA[name](self, device, wide)
        return family.step(self, given) if self.tokens > self.length else given

    def run(self, arguments: Mapping[str, Any]) -> Any:
        """The op in the form that the case asks for."""
        found = self.card.op(**arguments, **self.options, impl=self.impl)
        return found[0] if arguments.get("return_state") else found


PACKED = 4


def _key_mask(case: Case, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    mask = torch.rand(1, case.length, generator=torch.Generator().manual_seed(13)) < 0.9
    return {"key_mask": mask.to(device)}


def _log_decay(case: Case, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    heads = case.heads if case.kv_heads is None else case.kv_heads
    made = torch.Generator().manual_seed(17)
    decay = -0.01 * torch.rand(1, heads, case.length, generator=made)
    return {"log_decay": decay.to(device=device, dtype=dtype)}


def _packed(case: Case, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    part = case.length // PACKED
    return {
        "cu_seqlens": torch.arange(PACKED + 1, dtype=torch.int32, device=device).mul_(part),
    }


def _identity_maps(case: Case, device: str, dtype: torch.dtype) -> dict[str, None]:
    return {"map_q": None, "map_k": None}


_EXTRA = {
    "key_mask": _key_mask, "log_decay": _log_decay, "packed": _packed,
    "identity_maps": _identity_maps,
}  # fmt: skip


@lru_cache(maxsize=2)  # long ones are large
def _drawn(
    keys: Kind, heads: int, length: int, dim: int, queries: int, kv_heads: int | None, device: str
) -> Drawn:
    return draw(
        keys, heads=heads, length=length, dim=dim, queries=queries, kv_heads=kv_heads,
        device=device,
    )  # fmt: skip


def forget() -> None:
    """Lets go of what was drawn last, which is kept for the next call."""
    _drawn.cache_clear()
    sparse.forget()
