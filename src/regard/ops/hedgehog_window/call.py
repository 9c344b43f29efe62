"""What a call of `hedgehog_window_attention` asks for, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from regard.core import checks
from regard.core.checks import Sizes, reject, words
from regard.core.packed import check_packed
from regard.core.precision import compute_dtype
from regard.core.state import FixedState
from regard.ops.linear import learned_features

OP = "hedgehog_window_attention"
NAME = "hedgehog_window"


@dataclass(frozen=True)
class Call:
    """The arguments as they came."""

    q: Tensor
    k: Tensor
    v: Tensor
    map_q: Tensor | None
    map_k: Tensor | None
    bias_q: Tensor | None
    bias_k: Tensor | None
    activation: str
    full_space: bool
    skip: bool
    window_length: int
    layout: str
    align: str
    gamma: float | Tensor
    affine: bool
    scale: float | Tensor | None
    causal: bool
    key_mask: Tensor | None
    state: FixedState | None
    return_state: bool
    chunk_size: int | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_k: Tensor | None = None

    @property
    def kept(self) -> int:
        """Keys that a state keeps as they are: the longest window of a query."""
        return self.window_length * (1 if self.layout == "sliding" else 2)

    @property
    def key_heads(self) -> int:
        """Heads of the features of keys."""
        given = [x.shape[0] for x in (self.map_k, self.bias_k) if x is not None]
        return max([self.k.shape[1], *given])

    @property
    def width(self) -> int:
        """Features."""
        channels = self.q.shape[3] if self.map_q is None else self.map_q.shape[2]
        return learned_features.width(self.activation, channels, self.full_space)

    def one(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Call:
        """The same call on one sequence of a pack."""
        return replace(self, q=q, k=k, v=v, key_mask=key_mask, cu_seqlens=None, cu_seqlens_k=None)

    def arguments(self, without: tuple[str, ...]) -> Mapping[str, Any]:
        """By name."""
        names = (item.name for item in fields(self))
        return {name: getattr(self, name) for name in names if name not in without}


def check(call: Call, op: str = OP) -> Sizes:
    """Raises the error of the first argument that is wrong."""
    q = call.q
    sizes = checks.check_qkv(op, q, call.k, call.v)
    for name in ("causal", "affine", "return_state"):
        checks.check_flag(op, name, getattr(call, name))
    if not call.causal:
        accepted = "True: a window of recent keys needs an order (hedgehog_attention has none)"
        raise reject(op, "causal", accepted, call.causal)
    checks.check_integer(op, "window_length", call.window_length)
    checks.check_choice(op, "layout", call.layout, ("sliding", "terraced"))
    checks.check_choice(op, "align", call.align, ("start", "end"))
    checks.check_scale(op, call.scale, sizes, q)
    if isinstance(call.gamma, Tensor):
        checks.check_per_head(op, "gamma", call.gamma, sizes, q)
    else:
        checks.check_number(op, "gamma", call.gamma, least=0.0)
        if call.gamma > 1:
            raise reject(op, "gamma", "in [0, 1]", call.gamma)
    checks.check_key_mask(op, call.key_mask, sizes, q)
    if call.chunk_size is not None:
        checks.check_integer(op, "chunk_size", call.chunk_size)
    if call.activation == "exp":
        accepted = "one of bounded features, as 'softmax_dim', beside a window"
        raise reject(op, "activation", accepted, call.activation)
    maps, biases = (call.map_q, call.map_k), (call.bias_q, call.bias_k)
    options = call.activation, call.full_space, call.skip
    learned_features.check_maps(op, sizes, q, maps, biases, *options)
    _check_state(op, call, sizes)
    check_packed(op, call.cu_seqlens, call.cu_seqlens_k, sizes, call.state)
    if call.cu_seqlens is not None and call.return_state:
        raise reject(op, "return_state", "False with packed sequences", call.return_state)
    if call.align == "end":
        given = {"state": call.state, "key_mask": call.key_mask, "return_state": call.return_state}
        if call.layout == "sliding":
            raise reject(op, "align", "'start' with layout='sliding', which has no blocks", "end")
        for name, value in given.items():
            if value is not None and value is not False:
                accepted = "left out with align='end', whose blocks depend on the whole length"
                raise reject(op, name, accepted, words("one"))
    return sizes


def _check_state(op: str, call: Call, sizes: Sizes) -> None:
    state, q = call.state, call.q
    checks.check_state(op, state, FixedState)
    if state is None:
        return
    if state.mechanism != NAME:
        raise reject(op, "state", f"a state of {op}", words(f"one of {state.mechanism}"))
    dtype = compute_dtype(q.dtype)
    B, Hk, heads, n = sizes.B, sizes.Hk, call.key_heads, call.kept
    wanted = {
        "S": ((B, heads, call.width, sizes.Dv), dtype),
        "z": ((B, heads, call.width), dtype),
        "k": ((B, Hk, n, sizes.D), dtype),
        "v": ((B, Hk, n, sizes.Dv), dtype),
        "count": ((B,), torch.int64),
    }
    if set(state.tensors) != set(wanted):
        held = words(f"one that holds {', '.join(state.tensors)}")
        raise reject(op, "state", f"one that holds {', '.join(wanted)}", held)
    for name, (shape, kind) in wanted.items():
        tensor = state[name]
        if tensor.shape != shape or tensor.dtype != kind or tensor.device != q.device:
            accepted = f"{kind} {list(shape)} on {q.device}".removeprefix("torch.")
            raise reject(op, f"state[{name!r}]", accepted, tensor)
    if sizes.T > sizes.S + 1:
        accepted = f"of at most {sizes.S + 1} tokens (the state keeps no past to stand in)"
        raise reject(op, "q", accepted, q)
