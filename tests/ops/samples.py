"""What the tests of several mechanisms share: inputs, kinds of keys, memory of a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(
    seed: int = 0,
    *,
    B: int = 2,
    H: int = 4,
    Hk: int = 2,
    T: int = 9,
    S: int = 9,
    D: int = 5,
    Dv: int = 3,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k and v, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, T, D), (B, Hk, S, D), (B, Hk, S, Dv))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return q.to(dtype), k.to(dtype), v.to(dtype)


KINDS = ("normal", "clustered", "offset", "smooth")


def of_kind(kind: str, n: int, D: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, 1, n, D] in float32 with keys as they occur, queries among them.

    "clustered": 16 centres, around them 0.1; "offset": all moved by 2; "smooth": an
    autoregressive series of coefficient 0.98 and variance 1, the queries being its keys.
    Beside these, "sharp": channels of size 6.3 down to 0.063, so that scores are hundreds.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    q, k, v = normal(1, 1, n, D), normal(1, 1, n, D), normal(1, 1, n, D)
    if kind == "clustered":
        centres = normal(16, D)
        own = torch.randint(16, (2, n), generator=generator)
        q, k = (centres[i] + 0.1 * x for i, x in zip(own, (q, k), strict=True))
    elif kind == "offset":
        q, k = q + 2, k + 2
    elif kind == "smooth":
        for t in range(1, n):
            k[:, :, t] = 0.98 * k[:, :, t - 1] + (1 - 0.98**2) ** 0.5 * k[:, :, t]
        q = k.clone()
    elif kind == "sharp":
        q, k = (x * 2 * torch.logspace(0.5, -1.5, D) for x in (q, k))
    return q, k, v


class Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor made inside has had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


_PROGRAM = """
import torch
from regard.bench.measure.memory import growth
torch.set_num_threads(1)
from {module} import {name} as op
def inputs(n):
    return [torch.randn(1, 1, n, {D}, requires_grad={backward}) for _ in range({tensors})]
def call(given):
    out = op(*given, {options})
    if {backward}:
        out.sum().backward()
call(inputs(64))
given = inputs({n})
if {again}:
    call(given)
grown, _ = growth(lambda: call(given))
print(grown)
"""


def megabytes_over_inputs(
    op: str,
    n: int,
    *,
    D: int = 64,
    tensors: int = 3,
    backward: bool = False,
    options: str = "",
    again: bool = False,
) -> float:
    """By how much a fresh process grows at most in one call of "module:name" on one head.

    The call sums its output and goes back, with `backward`: gradients of the inputs count as
    well. `again` measures the second call of that size: the first one also counts the kernels
    that oneDNN generates and keeps for every shape of a product. `options` is source:
    "causal=True".
    """
    module, name = op.split(":")
    code = _PROGRAM.format(
        module=module, name=name, n=n, D=D, tensors=tensors, backward=backward, options=options,
        again=again,
    )
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-800:]
    return int(done.stdout) / 2**20
