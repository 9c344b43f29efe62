"""From a mask of transformers to what our ops know: causality, real keys, windows, packed rows.

A mask arrives as bool (True = seen) or as numbers that are added to scores, [B, 1 | H, T, S], or
as None, which under "sdpa" means causal where the layer is. Every candidate structure is formed
and compared with the mask, so what is found is exactly what was asked; a mask of no structure is
handed on as it is, to the ops that take one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from regard.core.checks import reject


@dataclass(frozen=True)
class Sight:
    """Who sees whom in one call.

    causal, window, key_mask as ops take them (queries aligned with the end of the keys);
    segments [B, T]: the packed sequence that each token belongs to; hidden: what no structure
    describes, bool [B, 1 | H, T, S], True = not seen; bias: numbers to add; keys: how many of the
    keys are looked at (a static cache has empty places behind them).
    """

    causal: bool
    key_mask: Tensor | None = None
    window: tuple[int, int] | None = None
    segments: Tensor | None = None
    hidden: Tensor | None = None
    bias: Tensor | None = None
    keys: int | None = None


_seen = WeakTensorKeyDictionary()  # a mask is made once and used by every layer


def see(op: str, mask: Any, B: int, T: int, S: int, causal: bool, *, implied: bool) -> Sight:
    """What `mask` says to a layer of T queries and S keys.

    causal: whether the layer is; `implied`: None then means a causal mask, as under "sdpa".
    """
    if mask is None:
        # As torch's attention under "sdpa": a first call on a static cache sees its first places.
        start = implied and causal and 1 < T < S
        return Sight(causal and implied, keys=T if start else None)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        accepted = "None or a mask [B, 1 | H, T, S]: call model.set_attn_implementation('sdpa')"
        raise reject(op, "attention_mask", accepted, mask)
    if mask.shape[2] not in (1, T) or mask.shape[3] < S or mask.shape[0] not in (1, B):
        raise reject(op, "attention_mask", f"[{B}, 1 | H, {T}, {S}]", mask)
    key = (mask._version, B, T, S, causal)
    known = _seen.get(mask)
    if known is None or known[0] != key:  # also where it was written into
        known = key, _read(mask[..., :S].expand(B, -1, T, S), causal)
        _seen[mask] = known
    return known[1]


def _read(mask: Tensor, causal: bool) -> Sight:
    bias = None
    if mask.dtype != torch.bool:
        least = torch.finfo(mask.dtype).min / 2
        shown = mask > least
        values = mask.masked_fill(~shown, 0.0)
        bias = values if bool(values.any()) else None
        mask = shown
    S = mask.shape[3]
    if mask.shape[1] == 1:
        lengths = [S]
        used = int((mask.flatten(0, 2).any(0) * torch.arange(1, S + 1, device=mask.device)).max())
        if 0 < used < S:
            lengths.append(used)
        for length in lengths:
            found = _structure(mask[:, 0, :, :length], causal)
            if found is not None:
                keys = length if length < S else None
                return Sight(**found, bias=None if bias is None else bias[..., :length], keys=keys)
    return Sight(False, hidden=~mask, bias=bias)


def _structure(seen: Tensor, causal: bool) -> dict[str, Any] | None:
    """Of seen [B, T, S]: the arguments of a `Sight`, if they describe it exactly."""
    _, T, S = seen.shape
    real = seen.any(1)
    key_mask = None if bool(real.all()) else real
    place = torch.arange(T, device=seen.device)[:, None] + (S - T)
    distance = place - torch.arange(S, device=seen.device)
    behind = distance >= 0
    everywhere = torch.ones_like(behind)
    for order in (causal, not causal):
        if torch.equal(seen, real[:, None] & (behind if order else everywhere)):
            return {"causal": order, "key_mask": key_mask}
    if not bool(seen.any()):
        return None
    at = distance.expand_as(seen)[seen]
    left, right = max(int(at.max()), 0), max(int(-at.min()), 0)
    for window in ((left, -1), (-1, right), (left, right)):
        within = everywhere if window[0] < 0 else distance <= window[0]
        within = within if window[1] < 0 else within & (distance >= -window[1])
        for order in (causal, not causal):
            allowed = within & behind if order else within
            if torch.equal(seen, real[:, None] & allowed):
                return {"causal": order, "key_mask": key_mask, "window": window}
    if T != S:
        return None
    first = seen.int().argmax(-1)
    same = first[:, :, None] == first[:, None, :]
    for order in (causal, not causal):
        allowed = same & behind if order else same
        if torch.equal(seen, real[:, None] & allowed):
            return {"causal": order, "key_mask": key_mask, "segments": first}
    return None
