"""The equations of RAT, token by token: the specification."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from regard.core.precision import compute_dtype
from regard.core.state import FixedState


class _Past(NamedTuple):
    """After some tokens of a row: how many, finished chunks among them, the running key, value."""

    count: int
    finished: int
    key: Tensor  # [Hk, D], as the value
    value: Tensor


def rat_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    chunk_length: int | None = 16,
    causal: bool = True,
    scale: float | Tensor | None = None,
    rope: bool | float = False,
    key_mask: Tensor | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, FixedState]:
    """k~_t = g_t k~_{t-1} + (1 - g_t) k_t in every chunk, v~ likewise; softmax over chunk ends.

    In float64, whatever the inputs are. `causal` is always meant: there is no other form.
    """
    (B, H, T, D), (_, Hk, S, _), wide = q.shape, v.shape, torch.float64
    length = state.length if state is not None else 0
    L = chunk_length if chunk_length is not None else length + S + 1
    base = (10000.0 if rope is True else float(rope)) if rope else None
    factor = torch.as_tensor(D**-0.5 if scale is None else scale, dtype=wide, device=q.device)
    if key_mask is not None:  # what a masked key holds is replaced before it is computed on
        real = key_mask[:, None, :, None]
        k, v, gate = torch.where(real, k, 0.0), torch.where(real, v, 0.0), gate.where(real, 0.0)
    outputs, pasts = [], []
    for b in range(B):
        keys, values, now = _begin(state, b, Hk, D, L, q)
        history = [now]
        for s in range(S):
            if key_mask is None or bool(key_mask[b, s]):
                if now.count and now.count % L == 0:
                    keys.append(_turned(now.key, now.finished, base))
                    values.append(now.value)
                    now = now._replace(finished=now.finished + 1)
                g, key, value = (x[b, :, s].to(wide) for x in (gate, k, v))
                key, value = (1 - g) * key, (1 - g) * value
                if now.count % L:
                    key, value = key + g * now.key, value + g * now.value
                now = _Past(now.count + 1, now.finished, key, value)
            history.append(now)
        rows = [q.new_zeros(H, D, dtype=wide)] * min(max(T - S - 1, 0), T)  # before the first key
        for i in range(len(rows), T):
            seen = history[i + S - T + 1]
            if not seen.count:
                rows.append(q.new_zeros(H, D, dtype=wide))
                continue
            query = _turned(q[b, :, i].to(wide), seen.finished, base) * factor.reshape(-1, 1)
            own = _turned(seen.key, seen.finished, base)
            all_keys = torch.stack([*keys[: seen.finished], own], 1)  # [Hk, n, D]
            all_values = torch.stack([*values[: seen.finished], seen.value], 1)
            scores = query.reshape(Hk, H // Hk, D) @ all_keys.mT
            rows.append((scores.softmax(-1) @ all_values).reshape(H, D))
        outputs.append(torch.stack(rows, 1) if rows else q.new_zeros(H, 0, D, dtype=wide))
        pasts.append((keys, values, now))
    out = torch.stack(outputs) if outputs else q.new_zeros(B, H, T, D, dtype=wide)
    if not B or not S:  # an output without terms is still one of all inputs
        out = out + sum(0.0 * x.sum() for x in (q, k, v, gate))
    out = out.to(q.dtype)
    if not return_state:
        return out
    ragged = key_mask is not None or (state is not None and "count" in state.tensors)
    name = f"rat(chunk_length={chunk_length}, rope={base})"
    total = length + S
    return out, FixedState(name, total, _kept(pasts, (total - 1) // L, q, k, ragged, chunk_length))


def _begin(
    state: FixedState | None, b: int, Hk: int, D: int, L: int, like: Tensor
) -> tuple[list[Tensor], list[Tensor], _Past]:
    zero = like.new_zeros(Hk, D, dtype=torch.float64)
    if state is None:
        return [], [], _Past(0, 0, zero, zero)
    count = int(state["count"][b]) if "count" in state.tensors else state.length
    finished = max(count - 1, 0) // L
    ends = ([], [])
    if "ends_k" in state.tensors:
        ends = (state["ends_k"][b].double().unbind(1), state["ends_v"][b].double().unbind(1))
    keys, values = (list(rows[:finished]) for rows in ends)
    key = state["k"][b].double() if "k" in state.tensors else zero
    return keys, values, _Past(count, finished, key, state["v"][b].double())


def _turned(x: Tensor, chunk: int, base: float | None) -> Tensor:
    """Rotary position: the number of the chunk, the same for all of its tokens."""
    if base is None:
        return x
    half = x.shape[-1] // 2
    power = torch.arange(half, dtype=torch.float64, device=x.device) / half
    angle = chunk * torch.pow(base, -power)
    one, other = x[..., :half], x[..., half:]
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat([one * cosine - other * sine, other * cosine + one * sine], -1)


def _kept(
    pasts: list[tuple[list[Tensor], list[Tensor], _Past]], slots: int, q: Tensor, k: Tensor,
    ragged: bool, chunk_length: int | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of the state: ends in the inputs' dtype, running sums in that of accumulators."""
    B, Hk, D, wide = len(pasts), k.shape[1], k.shape[3], compute_dtype(q.dtype)
    empty = q.new_zeros(B, Hk, D, dtype=torch.float64)
    kept = {}
    if chunk_length is not None:
        slots, zero = max(slots, 0), q.new_zeros(Hk, D, dtype=torch.float64)
        for position, name in enumerate(("ends_k", "ends_v")):
            rows = [[*past[position], *[zero] * (slots - len(past[position]))] for past in pasts]
            whole = [torch.stack(row, 1) for row in rows if row]
            kept[name] = (torch.stack(whole) if whole else q.new_zeros(B, Hk, slots, D)).to(q.dtype)
        kept["k"] = (torch.stack([now.key for *_, now in pasts]) if B else empty).to(wide)
    kept["v"] = (torch.stack([now.value for *_, now in pasts]) if B else empty).to(wide)
    if ragged:
        counts = [now.count for *_, now in pasts]
        kept["count"] = torch.tensor(counts, dtype=torch.int64, device=q.device)
    return kept
