"""The scan over ranks: from what each rank does to a state, the state that each begins with.

Rank p turns the state S that reaches it into  W_p S + N_p:  N_p is the state of its own tokens
from nothing, W_p what they leave of the past,

    decays        [B, Hk, 1 | F, 1]   a product of numbers, one per head or one per row of S
    a transition  [B, Hk, F, F]       of the delta rule, (I - beta k k^T) of its tokens multiplied.

All pairs (W_p, N_p) are gathered by one collective and every rank folds those before it. The
gradient runs the other way: with g_p the gradient of the state that rank p began with,

    G_p = g_{p+1} + W_{p+1}^T G_{p+1}     of the state after rank p,
    dN_p = G_p,   dW_p = the part of G_p S_p^T that W_p has,

so the backward pass gathers g_p, once, and folds those after it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.core.precision import without_autocast
from regard.parallel.collectives import Group, gather


class Carried(NamedTuple):
    """States [B, Hk, F, C]: before this rank's tokens, and after the tokens of all ranks."""

    before: Tensor
    after: Tensor


class Part(NamedTuple):
    """What the tokens of a rank do to a state: W, N, and whether W is a matrix."""

    left: Tensor
    new: Tensor
    transition: bool = False


def scan(part: Part, rank: int, group: Group, *, before: bool, after: bool) -> Carried:
    """W and N of this rank -> the states that are asked for; the others are zeros.

    The two flags, shapes and dtypes are the same on all ranks, and all of them must go through
    the backward pass or none, as it communicates.
    """
    return Carried(*_Scan.apply(*part, rank, group, before, after))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        new: Tensor,
        transition: bool,
        rank: int,
        group: Group,
        before: bool,
        after: bool,
    ) -> tuple[Tensor, Tensor]:
        with without_autocast(new):
            pairs = gather([left, new], group)
            state, own = torch.zeros_like(new), torch.zeros_like(new)
            for p, (W, N) in enumerate(pairs):
                if p == rank:
                    own = state
                    if not after:
                        break
                state = _through(W, state, transition) + N
        # The states of all ranks are read once: only what the gradient needs is kept.
        lefts = [W.clone() if p > rank else W.new_empty(0) for p, (W, _) in enumerate(pairs)]
        ctx.save_for_backward(own, left, *lefts)
        ctx.transition, ctx.rank, ctx.group, ctx.wants = transition, rank, group, (before, after)
        return own if before else torch.zeros_like(own), state if after else torch.zeros_like(own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_before: Tensor, d_after: Tensor) -> tuple[Any, ...]:
        own, left, *lefts = ctx.saved_tensors
        wanted = [d for d, wants in zip((d_before, d_after), ctx.wants, strict=True) if wants]
        with without_autocast(own):
            found = gather([d.contiguous() for d in wanted], ctx.group)
            gradient = torch.zeros_like(own)
            if ctx.wants[1]:
                for row in found:
                    gradient = gradient + row[-1]
            for p in range(len(found) - 1, ctx.rank, -1):
                left_behind = lefts[p].mT if ctx.transition else lefts[p]
                gradient = _through(left_behind, gradient, ctx.transition)
                if ctx.wants[0]:
                    gradient = gradient + found[p][0]
            d_left = None
            if ctx.needs_input_grad[0]:
                d_left = _of_left(left, gradient, own, ctx.transition)
        return d_left, gradient, None, None, None, None, None


def _through(left: Tensor, state: Tensor, transition: bool) -> Tensor:
    """W S; where a decay is 0 the past is gone, whatever it was."""
    return left @ state if transition else torch.where(left == 0, 0.0, left * state)


def _of_left(left: Tensor, gradient: Tensor, state: Tensor, transition: bool) -> Tensor:
    """The gradient of W: 0 where a decay is 0, which is the exponential of minus infinity."""
    if transition:
        return gradient @ state.mT
    found = torch.where(left == 0, 0.0, gradient * state)
    return found.sum(-1, keepdim=True) if left.shape[2] > 1 else found.sum((-2, -1), keepdim=True)
