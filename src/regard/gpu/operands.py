"""Operands as kernels take them."""

from __future__ import annotations

from torch import Tensor


def padded(width: int) -> int:
    """A power of two that tensor cores take.

    >>> padded(5), padded(64), padded(80)
    (16, 64, 128)
    """
    return max(16, 1 << (width - 1).bit_length())


def channels_last(x: Tensor) -> Tensor:
    """x with its channels side by side, as kernels read them; a copy where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()
