"""Whether a call may leave torch: its kernels then start without the dispatcher, which costs more
than a short call computes.
"""

from __future__ import annotations

import torch

__all__ = ["PLAIN", "is_watched"]

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})  # types whose numbers are all there is


def is_watched() -> bool:
    """Whether anything follows the operators that are called: a tracer, a transform of functorch, a
    dispatch mode, derivatives forwards.

    Gradients are another question: they depend on the operands.

    >>> is_watched()
    False
    >>> torch.func.vmap(lambda x: x * is_watched())(torch.ones(2))
    tensor([1., 1.])
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )
