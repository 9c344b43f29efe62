"""What a call is given besides tensors, and the shapes of what comes out of it: no Triton here."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.ops.linear.triton.table import FEW, MAPS, NARROW, NARROW_INTERPRETED, segment


class Options(NamedTuple):
    """What is not a tensor in a call of the registered operator."""

    causal: bool
    query_map: str
    key_map: str
    scale: float
    normalised: bool
    minimum: float
    epsilon: float
    wants_state: bool


Shape = tuple[tuple[Any, ...], torch.dtype]
_NONE: Shape = ((0,), torch.float32)


def width(D: int, options: Options) -> int:
    """Features of a key of D channels."""
    return 2 * D if MAPS[options.key_map].two else D


class Twofold(NamedTuple):
    """Whether the forward is that of `twofold`, and which."""

    serves: bool
    wide: bool = False

    @classmethod
    def of(cls, v: Tensor, D: int, options: Options, decays: bool, interpreted: bool) -> Twofold:
        """By what is known without looking at numbers, for keys of D channels."""
        two = MAPS[options.query_map].two and MAPS[options.key_map].two
        small = v.dtype == torch.bfloat16 or interpreted
        serves = options.causal and options.normalised and two and not decays and small
        narrow = NARROW_INTERPRETED if interpreted else NARROW
        return cls(serves, serves and narrow < D)

    def forms(self, length: int, interpreted: bool) -> tuple[bool, bool]:
        """Whether its kernels apply linear maps to queries and to keys, before the activation.

        To keys while what segments add is summed up, which narrow blocks have registers for.
        """
        queries = self.serves and length > FEW
        several = length > segment(length, interpreted, self.wide)
        return queries, queries and several and not self.wide


def of_forward(
    q: Tensor, v: Tensor, options: Options, decays: bool, interpreted: bool
) -> tuple[Shape, ...]:
    """out, S, z; sums of weights; and states of the segments, with those of the normaliser."""
    B, H, T, D = q.shape
    _, HK, S, E = v.shape
    F, single = width(D, options), torch.float32
    causal, normalised, wanted = options.causal, options.normalised, options.wants_state
    length = max(T, S) if causal else S
    wide = Twofold.of(v, D, options, decays, interpreted).wide
    # Written once and read twice by the forward: half the bytes, where nobody asks for more digits.
    kind = torch.bfloat16 if wide and not (wanted or interpreted) else single
    places = 0  # of states
    if not causal or length > FEW:
        places = -(-length // segment(int(length), interpreted, wide))
    places = places + 1 if not causal else places if places > 1 else 0
    return (
        ((B, H, T, E), q.dtype),
        ((B, HK, F, E), single) if wanted else _NONE,
        ((B, HK, F), single) if wanted and normalised else _NONE,
        ((B, H, T), single) if normalised else _NONE,
        ((B * HK, places, F, E), kind) if places else _NONE,
        ((B * HK, places, F), single) if places and normalised else _NONE,
    )


def of_backward(
    q: Tensor, k: Tensor, v: Tensor, options: Options, of_decay: bool, of_first: bool
) -> tuple[Shape, ...]:
    """Gradients of q, k, v, log_decay, S and z."""
    B, HK, S, E = v.shape
    F, single = width(q.shape[3], options), torch.float32
    return (
        (tuple(q.shape), v.dtype), (tuple(k.shape), v.dtype), (tuple(v.shape), v.dtype),
        ((B, HK, S), single) if of_decay else _NONE,
        ((B, HK, F, E), single) if of_first else _NONE,
        ((B, HK, F), single) if of_first and options.normalised else _NONE,
    )  # fmt: skip


def room(shapes: tuple[Shape, ...], like: Tensor) -> list[Tensor]:
    """Memory for them."""
    device = like.device
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
