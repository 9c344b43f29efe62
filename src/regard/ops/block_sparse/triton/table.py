"""With which tiles each kernel runs, by the width of its heads: data."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Rows of queries and of keys in a tile, and how the compiler is to cut it."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None  # at most, per thread


# By kernel and width of a head, padded: 16-bit operands, then float32 ones, of which every
# product is three.
_HALF = {
    ("forward", 64): Config(64, 64, 4, 3),
    ("forward", 128): Config(64, 64, 4, 3),
    ("queries", 64): Config(64, 64, 4, 3),
    ("queries", 128): Config(64, 64, 4, 2),
    ("keys", 64): Config(64, 64, 4, 3),
    ("keys", 128): Config(32, 64, 4, 2),
}
_SINGLE = {
    ("forward", 64): Config(64, 32, 4, 2),
    ("forward", 128): Config(32, 32, 4, 1),
    ("queries", 64): Config(32, 32, 8, 1),
    ("queries", 128): Config(32, 32, 8, 1),
    ("keys", 64): Config(32, 32, 4, 1),
    ("keys", 128): Config(32, 32, 8, 1),
}
_INTERPRETED = Config(32, 32, 4, 1)

CHUNK = 256  # entries of a plan that are looked at together
PREPARED = 32  # rows of a program that prepares the gradients
GROUPS = 8  # of 8 tokens, of a program that pools
PANEL = 32  # and the channels it takes at a time
FEW = 16  # queries whose lists are cut into parts
PART = 1024  # keys of a part, about
PARTS = 16  # at most


def config(kernel: str, width: int, half: bool, interpreted: bool = False) -> Config:
    """The configuration of a kernel for heads of that width, padded."""
    if interpreted:
        return _INTERPRETED
    return (_HALF if half else _SINGLE)[kernel, max(width, 64)]


def parts(queries: int, keys: int, interpreted: bool = False) -> int:
    """Into how many parts a list of so many keys is cut: by lengths alone, not by the batch.

    >>> parts(1, 65536), parts(1, 2000), parts(4096, 65536)
    (16, 1, 1)
    """
    if queries > FEW:
        return 1
    wanted = keys // (16 if interpreted else PART)
    return max(1, min(PARTS, 1 << max(wanted, 1).bit_length() - 1))
