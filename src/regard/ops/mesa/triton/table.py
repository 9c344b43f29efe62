"""With how many warps each kernel runs: data, by type of products and widest head size."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Warps of a program, stages of its loop, registers of a thread at most."""

    warps: int
    stages: int = 1
    registers: int | None = None


# By kernel, then by the wider of the two channel counts.
_HALF = {
    "segments": {16: Config(4), 32: Config(4), 64: Config(4), 128: Config(8)},
    "scan": {16: Config(1, 4), 32: Config(2, 4), 64: Config(2, 4), 128: Config(2, 4)},
    "sums": {16: Config(4), 32: Config(4), 64: Config(4), 128: Config(8)},
    "solve": {16: Config(4), 32: Config(4), 64: Config(4), 128: Config(8)},
}
# float32 operands take twice the memory.
_SINGLE = {
    **_HALF,
    "solve": {16: Config(4), 32: Config(4), 64: Config(8), 128: Config(8)},
}
LENGTH = 8  # chunks of a segment
BLOCK = 256  # numbers of a sum that one program takes from chunk to chunk
# Whether Hkk and the solution enter products as two 16-bit terms.
SPLIT = True


def config(kernel: str, width: int, half: bool) -> Config:
    """The configuration of a kernel for `width` padded channels."""
    return (_HALF if half else _SINGLE)[kernel][width]
