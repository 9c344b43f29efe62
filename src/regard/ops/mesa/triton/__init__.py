"""The Triton form of causal Mesa attention by conjugate gradients.

Importing this needs no Triton and no GPU. The files:

- `registered.py`: the operators and the gradient; `launch.py`: from operands to kernels;
  `table.py`: their warps
- `sums.py`: the sums before every chunk; `solve.py`: the solve, and what solutions read

The gradient makes its second solve in a kernel, and takes the sums around it from the eager form
of linear attention, which a long sequence feels: some ten times the forward.
"""

from __future__ import annotations

from torch import Tensor

from regard import gpu
from regard.ops.mesa.triton.registered import mesa

__all__ = ["CHUNK", "NAME", "WIDEST", "mesa", "refuse", "unverified"]

NAME = "mesa"
WIDEST = 128  # channels of a key and of a value
CHUNK = 64


def refuse(q: Tensor, v: Tensor) -> str | None:
    """Why no kernel here can serve tensors like these, or None."""
    reason = gpu.refusal(q.device, q.dtype)
    if reason is not None:
        return reason
    size = max(q.shape[3], v.shape[3])
    return None if size <= WIDEST else f"its heads have at most {WIDEST} channels, not {size}"


def unverified(q: Tensor, v: Tensor) -> str | None:
    """Why `auto` does not take the kernels where they can run, or None."""
    return gpu.unverified(NAME, q.device, q.dtype, max(q.shape[3], v.shape[3]))
