"""With how many warps each kernel runs: data, by type of the products and widest head size."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Warps of a program, stages of its loop, registers of a thread at most."""

    warps: int
    stages: int = 1
    registers: int | None = None


# By kernel, then by the wider of the two channel counts.
_HALF = {
    "tokens": {16: Config(2), 32: Config(2), 64: Config(4), 128: Config(4)},
    "inverse": {16: Config(1), 32: Config(1), 64: Config(1), 128: Config(1)},
    "system": {16: Config(4), 32: Config(4), 64: Config(4), 128: Config(8)},
    "scan": {16: Config(4, 4), 32: Config(4, 4), 64: Config(4, 4), 128: Config(8, 3)},
    "output": {16: Config(4), 32: Config(4), 64: Config(4), 128: Config(8)},
    "asked": {16: Config(4), 32: Config(4), 64: Config(4), 128: Config(8)},
    "readers": {16: Config(4), 32: Config(4), 64: Config(4), 128: Config(8)},
    "writers": {16: Config(4), 32: Config(4), 64: Config(4), 128: Config(8)},
}
# float32 operands take twice the memory.
_SINGLE = {
    **_HALF,
    "inverse": {16: Config(1), 32: Config(1), 64: Config(1), 128: Config(2)},
    "system": {16: Config(4), 32: Config(4), 64: Config(8), 128: Config(8)},
    "scan": {16: Config(4, 3), 32: Config(4, 3), 64: Config(4, 2), 128: Config(8, 1)},
    "output": {16: Config(4), 32: Config(4), 64: Config(8), 128: Config(8)},
    "asked": {16: Config(4), 32: Config(4), 64: Config(8), 128: Config(8)},
    "readers": {16: Config(4), 32: Config(8), 64: Config(8), 128: Config(8)},
    "writers": {16: Config(4), 32: Config(8), 64: Config(8), 128: Config(8)},
}
# Rows of S^T that one program of the scan holds: what four warps multiply at once.
SCAN_ROWS = 64
# From this width the scans forwards and backwards are started one after the other.
APART = 128
# Columns of the state that one program of decoding holds, and up to how many tokens it serves.
DECODE_COLUMNS = 16
DECODE_UP_TO = 4


def config(kernel: str, width: int, half: bool) -> Config:
    """The configuration of a kernel for `width` padded channels."""
    return (_HALF if half else _SINGLE)[kernel][width]
