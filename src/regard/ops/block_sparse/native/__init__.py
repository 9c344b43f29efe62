"""The native form: plain C on CPUs, see `regard.native`. The files, C and Python:

- `call.h`, `library.py`: what a kernel is told
- `lists.h`: the rows that a block of queries attends to; `tile.h`: its queries, and rows packed
- `forward.c`, `backward.c`: the two passes
- `walk.py`: from the operands of a registered op to C

Windows of a grid (`regard.ops.window`) are lists, too, and use the same kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.native import refusal

MOST_ROWS = 1 << 29  # numbers of rows and of tokens are kept in 32 bits


def unavailable(q: Tensor, k: Tensor) -> str | None:
    """Why the kernels of this folder cannot take such queries and keys, or None."""
    if q.device.type not in ("cpu", "meta"):
        return f"it runs on a CPU, not on {q.device.type}"
    if q.dtype == torch.float64:
        return "it computes in float32"
    if max(q.shape[2], k.shape[2]) > MOST_ROWS:
        return f"it numbers tokens up to {MOST_ROWS}"
    return refusal()
