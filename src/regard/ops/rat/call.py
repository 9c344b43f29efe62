"""What a call of `rat_attention` asks for, its checks, and the state that comes back to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from regard.core import checks
from regard.core.checks import Sizes, reject, words
from regard.core.packed import check_packed
from regard.core.precision import compute_dtype
from regard.core.state import FixedState

OP = "rat_attention"
ROPE_BASE = 10000.0
ONE_CHUNK = 1 << 62  # places of a chunk that never ends


@dataclass(frozen=True)
class Call:
    """One checked call."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    chunk_length: int | None
    scale: float | Tensor | None
    rope: bool | float | None  # once checked, the base of the angles or None
    key_mask: Tensor | None
    state: FixedState | None
    return_state: bool

    def one(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, key_mask: Tensor | None) -> Call:
        """The same call on one sequence of a pack."""
        return replace(self, q=q, k=k, v=v, gate=gate, key_mask=key_mask)

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return ONE_CHUNK if self.chunk_length is None else self.chunk_length

    @property
    def length(self) -> int:
        """Tokens of earlier calls."""
        return 0 if self.state is None else self.state.length

    @property
    def name(self) -> str:
        """What a state says of the call that made it."""
        return state_name(self.chunk_length, self.rope)


def state_name(chunk_length: int | None, rope: bool | float | None) -> str:
    """The mechanism of a state: only the same lengths and angles can go on from it."""
    return f"rat(chunk_length={chunk_length}, rope={rope})"


def rope_base(rope: Any, D: int) -> float | None:
    """The base of the angles, or None."""
    if rope is False:
        return None
    base = ROPE_BASE if rope is True else rope
    checks.check_number(OP, "rope", base, above=1)
    if D % 2:
        raise reject(OP, "rope", f"False where the head size is odd, here {D}", rope)
    return float(base)


def check(call: Call, causal: Any, cu_seqlens: Any) -> tuple[Call, Sizes]:
    """The call as it is meant and its sizes, or the error of the first argument that is wrong."""
    q = call.q
    sizes = checks.check_qkv(OP, q, call.k, call.v)
    if sizes.Dv != sizes.D:
        accepted = f"of k's head size {sizes.D} (one gate moves the channels of both)"
        raise reject(OP, "v", accepted, call.v)
    shape = (sizes.B, sizes.Hk, sizes.S, sizes.D)
    if not isinstance(call.gate, Tensor):
        raise reject(OP, "gate", "a torch.Tensor", call.gate, kind=TypeError)
    checks.check_float_operand(OP, "gate", call.gate, shape, q)
    checks.check_flag(OP, "causal", causal)
    if not causal:
        raise reject(OP, "causal", "True: RAT is a recurrence along the tokens", causal)
    checks.check_flag(OP, "return_state", call.return_state)
    if call.chunk_length is not None:
        checks.check_integer(OP, "chunk_length", call.chunk_length)
    call = replace(call, rope=rope_base(call.rope, sizes.D))
    checks.check_scale(OP, call.scale, sizes, q)
    checks.check_key_mask(OP, call.key_mask, sizes, q)
    _check_state(call, sizes)
    check_packed(OP, cu_seqlens, None, sizes, call.state)
    if cu_seqlens is not None and call.return_state:
        raise reject(OP, "return_state", "False with packed sequences", call.return_state)
    return call, sizes


def _check_state(call: Call, sizes: Sizes) -> None:
    state, q = call.state, call.q
    checks.check_state(OP, state, FixedState)
    if state is None:
        return
    if state.mechanism != call.name:
        raise reject(OP, "state", f"one of {call.name}", words(f"one of {state.mechanism}"))
    row, wide = (sizes.B, sizes.Hk, sizes.D), compute_dtype(q.dtype)
    wanted = {"v": (row, wide)}
    if call.chunk_length is not None:
        ends = (sizes.B, sizes.Hk, max(state.length - 1, 0) // call.chunk_length, sizes.D)
        wanted |= {"ends_k": (ends, q.dtype), "ends_v": (ends, q.dtype), "k": (row, wide)}
    if set(state.tensors) - {"count"} != set(wanted):
        accepted = f"one that holds {', '.join(wanted)}"
        raise reject(OP, "state", accepted, words(f"one that holds {', '.join(state.tensors)}"))
    for name, (shape, dtype) in wanted.items():
        tensor = state[name]
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != q.device:
            accepted = f"{checks.name_of(dtype)} {list(shape)} on {q.device}"
            raise reject(OP, f"state[{name!r}]", accepted, tensor)
    if "count" in state.tensors:
        checks.check_shape(OP, "state['count']", state["count"], (sizes.B,), q)
    if state.length and sizes.T > sizes.S + 1:
        accepted = f"of at most {sizes.S + 1} tokens (the state keeps no past to stand in)"
        raise reject(OP, "q", accepted, q)
