"""Who takes part: every mechanism, and torch's own attention as the yardstick."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import regard
from regard.bench.timing.setting import Setting
from regard.core.card import Card
from regard.testing.calls import Call

SDPA = "torch SDPA"
# On a GPU torch has several kernels; the first name is whichever torch chooses itself.
_KERNELS: dict[str, SDPBackend | None] = {
    SDPA: None,
    f"{SDPA} (flash)": SDPBackend.FLASH_ATTENTION,
    f"{SDPA} (cuDNN)": SDPBackend.CUDNN_ATTENTION,
}


def yardsticks(kind: str) -> tuple[str, ...]:
    """The names of torch's kernels on a device, "cpu" or "cuda"; ratios are to each of them.

    >>> yardsticks("cpu")
    ('torch SDPA',)
    """
    return tuple(_KERNELS) if kind == "cuda" else (SDPA,)


@dataclass(frozen=True)
class Ran:
    """The form that serves a call, and for every other form why not (None: it could have)."""

    form: str | None
    impl: str | None
    reasons: dict[str, str | None]


@dataclass(frozen=True)
class Contestant:
    """A mechanism, or one of torch's kernels if `card` is None."""

    name: str
    setting: Setting
    card: Card | None

    @classmethod
    def named(cls, name: str, setting: Setting) -> Contestant:
        """By the name of a card or of a yardstick."""
        return cls(name, setting, None if name in _KERNELS else regard.mechanisms[name])

    @property
    def reference(self) -> Card:
        """The card whose float64 reference says what is right."""
        return self.card or regard.mechanisms["softmax"]

    @property
    def exponent(self) -> int:
        """The power of the length that the cost on the card grows with."""
        return 2 if self.card is None or re.search(r"\bT ?S\b|[TS]\^2", self.card.cost) else 1

    def call(self, length: int) -> Call:
        """The arguments at one length."""
        return self.setting.call(self.card, length)

    def forward(self, call: Call) -> Tensor:
        """The output of one call."""
        if self.card is not None:
            return self.card.op(**call.arguments)
        kernel = _KERNELS[self.name]
        with sdpa_kernel(kernel) if kernel is not None else nullcontext():
            return scaled_dot_product_attention(
                call["q"], call["k"], call["v"], is_causal=self.setting.causal
            )

    def work(self, call: Call) -> Callable[[], Any]:
        """What is timed: a forward pass, or a forward and a backward pass."""
        if not self.setting.backward:

            def forward() -> Tensor:
                with torch.no_grad():
                    return self.forward(call)

            return forward
        leaves = call.leaves()
        wanted = [leaves[name] for name in leaves.differentiable]
        cotangent = torch.ones_like(call["v"])

        def both() -> Tensor:
            out = self.forward(leaves)
            torch.autograd.grad(out, wanted, cotangent, allow_unused=True)
            return out.detach()

        return both

    def ran(self, call: Call) -> Ran:
        """Which form serves this call and why not the others."""
        if self.card is None:
            return Ran(self._kernel(call), None, {})
        asked = call.leaves() if self.setting.backward else call
        try:
            found = regard.explain(self.card.op, **asked.arguments)
        except TypeError as error:
            if "chooses no form" in str(error):
                return Ran(None, None, {})
            raise
        return Ran(found.form, found.impl, found.reasons)

    def _kernel(self, call: Call) -> str | None:
        """The kernel that torch chooses, where torch tells."""
        named = _KERNELS[self.name]
        if named is not None:
            return named.name.lower()
        choose = getattr(torch, "_fused_sdp_choice", None)
        if choose is None:
            return None
        chosen = choose(call["q"], call["k"], call["v"], is_causal=self.setting.causal)
        return SDPBackend(chosen).name.lower()
