"""Torch's fused attention inside of modules that call it: what its calls are given, and a mode that
has them answered by somebody else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


@dataclass
class FusedCall:
    """The arguments of `torch.nn.functional.scaled_dot_product_attention`, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def run(self) -> Tensor:
        """What torch returns."""
        return scaled_dot_product_attention(
            self.query, self.key, self.value, self.attn_mask, self.dropout_p, self.is_causal,
            scale=self.scale, enable_gqa=self.enable_gqa,
        )  # fmt: skip


class Answering(TorchFunctionMode):
    """A mode in which `fused` answers calls of torch's fused attention, and `other` all others."""

    def fused(self, call: FusedCall) -> Tensor:
        """The output of a call."""
        return call.run()

    def other(
        self, function: Callable[..., Any], args: Sequence[Any], named: dict[str, Any]
    ) -> Any:
        """The result of any other function of torch."""
        return function(*args, **named)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is scaled_dot_product_attention:
            return self.fused(FusedCall(*args, **(kwargs or {})))
        return self.other(func, args, kwargs or {})
