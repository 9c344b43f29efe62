"""Whether a call fits into memory, estimated before it is made."""

from __future__ import annotations

from dataclasses import dataclass

from regard.bench.timing.contestants import Contestant
from regard.testing.calls import ARGUMENTS

SHARE = 0.9  # of the free memory


@dataclass(frozen=True)
class Need:
    """Bytes that a call takes at least, and those to make its operands, which is done on a CPU."""

    tensors: int
    scores: int
    sampling: int

    @property
    def total(self) -> int:
        """On the device that computes."""
        return self.tensors + self.scores

    def __str__(self) -> str:
        words = f"inputs, outputs and as much again to work with, {readable(self.tensors)}"
        return words + (f"; T x S scores, {readable(self.scores)}" if self.scores else "")


def estimate(contestant: Contestant, length: int) -> Need:
    """What one call at this length takes: a lower bound with some room.

    Inputs and outputs twice (a blockwise form needs room for itself), three times with a
    backward pass (gradients, and what is kept for them). A card whose `memory` is "quadratic" is
    taken at its word: scores and weights, T x S each, with gradients twice that.
    """
    setting, card = contestant.setting, contestant.card
    sizes, width = setting.sizes(length), setting.torch_dtype.itemsize
    numbers = 0
    for operand in (*ARGUMENTS, *(card.operands if card else ())):
        count = 1
        for axis in operand.shape.split():
            count *= sizes[axis]
        numbers += count
    output = setting.batch * setting.heads * length * setting.dim
    tensors = (numbers + output) * width * (3 if setting.backward else 2)
    scores = 0
    if card is not None and card.memory == "quadratic":
        square = setting.batch * setting.heads * length * length
        scores = square * max(4, width) * 2 * (2 if setting.backward else 1)
    return Need(tensors, scores, numbers * (8 + 4 + width))


def why_too_large(need: Need, free: int | None, free_to_sample: int | None) -> str | None:
    """Why a call of this size is not made, or None."""
    for wanted, there, what in (
        (need.total, free, f"it would take at least {readable(need.total)} ({need})"),
        (need.sampling, free_to_sample, f"its operands take {readable(need.sampling)} to make"),
    ):
        if there is not None and wanted > SHARE * there:
            return f"{what}, and {readable(there)} are free"
    return None


def readable(count: int) -> str:
    """Bytes in the largest unit that gives a number of at least one.

    >>> readable(3 * 2**30), readable(1536)
    ('3.0 GiB', '1.5 KiB')
    """
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.1f} {units[0]}"
