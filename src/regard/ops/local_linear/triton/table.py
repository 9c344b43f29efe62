"""Which configuration each kernel runs with: data, measured on an H100, by width and type."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Rows and keys of a tile, and how the compiler is to cut it."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None  # at most, per thread
    descriptor: bool = False  # whether tiles come by descriptors (TMA) instead of pointers


# By kernel, then by the wider of the two channel counts.
_HALF = {
    "mean": {
        16: Config(64, 128, 4, 3, None, True), 32: Config(64, 128, 4, 3, None, True),
        64: Config(64, 128, 4, 3, 168, True), 128: Config(64, 64, 4, 3, 168, True),
    },
    "average": {
        16: Config(64, 128, 4, 3, None, True), 32: Config(64, 128, 4, 3, None, True),
        64: Config(64, 128, 4, 3, None, True), 128: Config(64, 64, 4, 3, 168, True),
    },
    "start": {
        16: Config(64, 64, 4, 3, None, True), 32: Config(64, 64, 4, 3, None, True),
        64: Config(64, 128, 4, 3, None, True), 128: Config(64, 64, 4, 3, None, True),
    },
    "conjugate": {
        16: Config(64, 64, 4, 3), 32: Config(64, 64, 4, 3),
        64: Config(64, 64, 4, 3, None, True), 128: Config(64, 64, 4, 3, None, True),
    },
    "output": {
        16: Config(64, 64, 4, 3, 128, True), 32: Config(64, 128, 4, 3, None, True),
        64: Config(64, 64, 4, 3, 168, True), 128: Config(128, 64, 8, 3, None, True),
    },
    "given": {
        16: Config(64, 64, 4, 3, None, True), 32: Config(64, 64, 4, 3, None, True),
        64: Config(64, 64, 4, 3, None, True), 128: Config(64, 64, 4, 2, None, True),
    },
    # The backward.
    "cotangent": {
        16: Config(64, 64, 4, 3, 168), 32: Config(64, 64, 4, 3, 168),
        64: Config(64, 64, 4, 3, 168), 128: Config(128, 64, 8, 3),
    },
    # With a second sum: a mean key, or a residual.
    "cotangent_two": {
        16: Config(64, 64, 4, 3), 32: Config(64, 64, 4, 3),
        64: Config(64, 64, 4, 3), 128: Config(64, 32, 4, 3),
    },
    "queries": {
        16: Config(64, 64, 4, 3, None, True), 32: Config(64, 64, 4, 3, None, True),
        64: Config(64, 64, 4, 3, None, True), 128: Config(128, 64, 8, 2),
    },
    "keys": {
        16: Config(32, 64, 4, 3, 168), 32: Config(32, 64, 4, 3, 168),
        64: Config(32, 64, 4, 3, 168), 128: Config(32, 128, 8, 3),
    },
}
# Where there are tiles enough to fill the device many times, more of them at once are faster.
MANY_TILES = 2048
_MANY = {"conjugate": {64: Config(64, 64, 4, 3, 168, True)}}
# Scores with a bias or a decay need registers of their own.
_SCORED = {
    "mean": {64: Config(64, 64, 4, 3, 168, True)},
    "conjugate": {64: Config(64, 64, 4, 3, 168, True)},
    "keys": {128: Config(32, 128, 8, 2)},
}
# Without a decay, as where keys are masked, it is one number for a key.
_BIASED = {
    "start": {64: Config(64, 128, 4, 2, None, True)},
    "output": {64: Config(64, 64, 4, 3, 168, True)},
}
# float32 operands: twice the memory, and three products for each.
_SINGLE = {
    16: Config(64, 32, 4, 2), 32: Config(64, 32, 4, 2),
    64: Config(64, 32, 4, 2), 128: Config(32, 32, 4, 2),
}
_SINGLE_OF = {
    "cotangent": {
        16: Config(32, 32, 8, 2), 32: Config(32, 32, 8, 2),
        64: Config(32, 32, 8, 2), 128: Config(32, 32, 8, 1),
    },
    "cotangent_two": {
        16: Config(32, 32, 8, 2), 32: Config(32, 32, 8, 2),
        64: Config(32, 32, 8, 2), 128: Config(32, 32, 8, 1),
    },
    "queries": {
        16: Config(32, 32, 8, 1), 32: Config(32, 32, 8, 1),
        64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 1),
    },
    # Of 32 rows: as Triton 3.6 compiles tiles of 16 or 64 for an H100, their products are wrong.
    "keys": {
        16: Config(32, 32, 4, 1), 32: Config(32, 32, 4, 1),
        64: Config(32, 32, 4, 1), 128: Config(32, 32, 8, 1),
    },
}
_INTERPRETED = Config(32, 32, 4, 1)


def config(
    kernel: str,
    width: int,
    half: bool,
    interpreted: bool = False,
    scored: bool = False,
    tiles: int = 0,
    decayed: bool = False,
) -> Config:
    """The configuration of a kernel for `width` channels.

    `scored`: the scores have a bias or a decay, `decayed`: a decay. `tiles`: of 64 queries, in
    all heads.
    """
    if interpreted:
        return _INTERPRETED
    if not half:
        found = _SINGLE_OF.get(kernel, _SINGLE)[width]
        return narrower(found) if scored else found
    if scored:
        biased = None if decayed else _BIASED.get(kernel, {}).get(width)
        return biased or _SCORED.get(kernel, {}).get(width) or narrower(_HALF[kernel][width])
    many = _MANY.get(kernel, {}).get(width)
    return many if many and tiles > MANY_TILES else _HALF[kernel][width]


def narrower(config: Config) -> Config:
    """With fewer keys in a tile, and registers as the compiler likes."""
    return config._replace(keys=min(config.keys, 64), registers=None)
