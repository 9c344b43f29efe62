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
# What an H100 has registers and shared memory for, and others have not.
_HOPPER = {
    ("forward", 64): Config(128, 64, 4, 3),
    ("forward", 128): Config(128, 128, 8, 3),
    ("queries", 128): Config(128, 64, 8, 3),
    ("keys", 128): Config(32, 64, 4, 3),
}
# Where no more than 64 rows share a list.
_FEW_ROWS = {
    ("forward", 64): Config(64, 64, 4, 3, 168),
    ("forward", 128): Config(64, 64, 4, 3),
    ("queries", 128): Config(64, 64, 4, 2),
}
# Without a plan: a tile wider than what a window cuts off is work for nothing.
_RANGES = {
    ("forward", 64): Config(64, 64, 4, 3),
    ("forward", 128): Config(64, 64, 4, 3),
    ("queries", 128): Config(64, 64, 4, 2),
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

CUT = 64  # keys of a tile where something is cut or pooled, at most
CHUNK = 128  # entries of a plan that are looked at together; counts of them fit in a byte
ONE_WARP = Config(0, 0, 1, 1)
POOLED = 4096  # numbers, of keys or values, in a tile that is pooled
TILES = 8  # of them for a program
FEW = 16  # queries whose lists are cut into parts
PART = 1024  # keys of a part, about
PARTS = 16  # at most


def config(
    kernel: str, width: int, half: bool, rows: int | None, interpreted: bool, hopper: bool
) -> Config:
    """The configuration of a kernel for heads of that width, padded.

    rows: queries, of all heads, that share a list; None for a call without a plan.
    """
    if interpreted:
        return _INTERPRETED
    key = kernel, max(width, 64)
    if not half:
        return _SINGLE[key]
    large = _HALF | _HOPPER if hopper else _HALF
    special = _RANGES if rows is None else _FEW_ROWS if rows <= 64 else {}
    return special.get(key, large[key])


def pooled_tokens(width: int) -> int:
    """Tokens in a tile that is pooled, of heads of that width, padded."""
    return POOLED // max(width, 64)


def parts(queries: int, keys: int, interpreted: bool = False) -> int:
    """Into how many parts a list of so many keys is cut: by lengths alone, not by the batch.

    >>> parts(1, 65536), parts(1, 2000), parts(4096, 65536)
    (16, 1, 1)
    """
    if queries > FEW:
        return 1
    wanted = keys // (16 if interpreted else PART)
    return max(1, min(PARTS, 1 << max(wanted, 1).bit_length() - 1))
