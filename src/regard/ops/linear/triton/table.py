"""Which maps kernels form, and with which tiles each kernel runs: data."""

from __future__ import annotations

from typing import NamedTuple


class Map(NamedTuple):
    """A map as kernels are told of it: its number, whether it has two blocks, and a floor."""

    number: int
    two: bool = False
    floored: bool = False


# By `Feature.name`: what makes features of z = `Feature.project` of a row.
MAPS = {
    "identity": Map(0),
    "elu": Map(1),
    "relu": Map(2),
    "hedgehog:relu": Map(2, floored=True),
    "hedgehog:pos_elu": Map(1, floored=True),
    "hedgehog:softmax_dim": Map(3, True, True),
    "hedgehog:softmax_dim:half": Map(3, floored=True),
    "hedgehog:exp_dim": Map(4, True, True),
    "hedgehog:exp_dim:half": Map(4, floored=True),
    "hedgehog:exp": Map(5, True),
    "hedgehog:exp:half": Map(5),
    "hedgehog:joint_softmax": Map(6, True),
    "hedgehog:exp_shifted": Map(7, True),
    "hedgehog:exp_shifted:half": Map(7),
}


class Config(NamedTuple):
    """Tokens of a chunk, columns of the state per program, and how the compiler is to cut it."""

    chunk: int
    panel: int
    warps: int
    stages: int
    registers: int | None = None  # at most, per thread


# The blocks of features and the width of one, padded, in the order of the rows below.
_WIDTHS = ((1, 64), (1, 128), (1, 256), (2, 64), (2, 128))
Row = dict[tuple[int, int], Config]


def _of(*configs: tuple[int, int, int, int]) -> Row:
    return dict(zip(_WIDTHS, (Config(*config) for config in configs), strict=True))


def _all(*config: int) -> Row:
    return dict.fromkeys(_WIDTHS, Config(*config))


# By kernel; what walks over all columns of the state has no panel.
_HALF = {
    "sums": _of((64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 4, 3), (64, 64, 8, 2)),
    "outputs": _of((64, 64, 4, 3), (64, 32, 4, 2), (32, 32, 8, 1), (32, 64, 4, 2), (32, 32, 8, 1)),
    # Queries that a map makes, in the place of those above: products of 64 of them with panels of
    # 32 came out wrong on an H100 (Triton 3.6).
    "mapped_outputs": {(1, 128): Config(32, 64, 4, 2)},
    "cotangents": _of(
        (128, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 4, 3), (64, 64, 8, 2)
    ),
    "queries": _of((64, 0, 4, 3), (32, 0, 8, 1), (16, 0, 8, 1), (32, 0, 4, 2), (16, 0, 8, 1)),
    "keys": _of((64, 0, 4, 2), (16, 0, 8, 1), (16, 0, 8, 1), (32, 0, 8, 2), (16, 0, 8, 1)),
    "queries_of_decay": _of(
        (32, 0, 4, 2), (16, 0, 8, 1), (16, 0, 8, 1), (32, 0, 8, 2), (16, 0, 8, 1)
    ),
    "keys_of_decay": _of((32, 0, 4, 3), (16, 0, 8, 1), (16, 0, 8, 1), (32, 0, 8, 2), (16, 0, 8, 1)),
    "read": _of((64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 8, 1), (64, 64, 4, 1), (64, 64, 8, 1)),
    "of_read": _of((64, 0, 4, 1), (64, 0, 8, 1), (64, 0, 8, 1), (64, 0, 8, 1), (64, 0, 8, 1)),
    # Of `twofold`: two blocks of up to 64, or of up to 128.
    "twofold_sums": {(2, 64): Config(64, 64, 4, 2), (2, 128): Config(64, 128, 8, 1)},
    "twofold_outputs": {(2, 64): Config(64, 64, 4, 1), (2, 128): Config(128, 128, 8, 2)},
}
# float32 operands: twice the memory and, for float32 inputs, three products for each. Not 16 rows
# for 8 warps: Triton 3.6 then reads shared memory that is not its own.
_SINGLE = {
    "sums": _of((32, 64, 4, 2), (32, 32, 4, 2), (32, 32, 8, 1), (32, 32, 4, 2), (32, 32, 8, 1)),
    "outputs": _of((16, 32, 4, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    "cotangents": _of(
        (32, 64, 4, 2), (32, 32, 4, 2), (32, 32, 8, 1), (32, 32, 4, 2), (32, 32, 8, 1)
    ),
    "queries": _of((16, 0, 4, 1), (32, 0, 8, 1), (32, 0, 8, 1), (32, 0, 8, 1), (32, 0, 8, 1)),
    "keys": _of((16, 0, 4, 1), (32, 0, 8, 1), (32, 0, 8, 1), (32, 0, 8, 1), (32, 0, 8, 1)),
    "queries_of_decay": _of(
        (16, 0, 4, 1), (32, 0, 8, 1), (32, 0, 8, 1), (32, 0, 8, 1), (32, 0, 8, 1)
    ),
    "keys_of_decay": _of((16, 0, 4, 1), (32, 0, 8, 1), (32, 0, 8, 1), (32, 0, 8, 1), (32, 0, 8, 1)),
    "read": _of((32, 64, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
    "of_read": _of((32, 0, 4, 1), (32, 0, 8, 1), (32, 0, 8, 1), (32, 0, 8, 1), (32, 0, 8, 1)),
}
_INTERPRETED = Config(16, 16, 4, 1)
NARROW_INTERPRETED = 16  # for `NARROW`

SCANNED = 512  # elements of a state that a program of the scan has
ROWS = 64  # of a program that prepares rows
PANEL_OF_TOKENS = 16  # columns of a program of decoding
FEW = 8  # tokens that are decoded one by one
NARROW = 64  # features of a block, padded, of which `twofold` carries a state
WIDE = 256  # tokens of a segment of its wider blocks
KEYS = 64  # of a tile that their outputs come from


def config(kernel: str, blocks: int, width: int, half: bool, interpreted: bool = False) -> Config:
    """The configuration of a kernel for so many blocks of features of that width, padded."""
    if interpreted:
        return _INTERPRETED
    return (_HALF if half else _SINGLE)[kernel][blocks, max(width, 64)]


def keys(interpreted: bool) -> int:
    """Keys of a tile that the outputs of `twofold` come from."""
    return _INTERPRETED.chunk if interpreted else KEYS


def segment(tokens: int, interpreted: bool = False, wide: bool = False) -> int:
    """Tokens that one program walks over: by the length alone, so that a batch changes no bit.

    Shorter segments are more programs, and more states to write and to scan. `wide`: of wide
    blocks of `twofold`.
    """
    if interpreted:
        return 32
    if wide:
        return WIDE
    wanted = max(tokens - 1, 1).bit_length()
    return min(max((1 << wanted) // 32, 256), 1024)
