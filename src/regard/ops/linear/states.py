"""The check of a state of fixed size that comes back to an op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from regard.core.checks import Sizes, check_state, reject, words
from regard.core.precision import compute_dtype
from regard.core.state import FixedState


def check_fixed(
    op: str,
    mechanism: str,
    state: Any,
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Sizes,
    q: Tensor,
    causal: bool,
) -> None:
    """`state` is None, or one of this mechanism with tensors of these names and shapes."""
    check_state(op, state, FixedState)
    if state is None:
        return
    if state.mechanism != mechanism:
        raise reject(op, "state", f"a state of {op}", words(f"one of {state.mechanism}"))
    held = set(state.tensors)
    if held ^ set(shapes) == {"z"}:
        accepted = f"one of a call with normalise={'z' in shapes}"
        raise reject(op, "state", accepted, words(f"one that holds {', '.join(state.tensors)}"))
    if held != set(shapes):
        accepted, held = ", ".join(shapes), ", ".join(state.tensors)
        raise reject(op, "state", f"one that holds {accepted}", words(f"one that holds {held}"))
    for name, shape in shapes.items():
        tensor, dtype = state[name], compute_dtype(q.dtype)
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != q.device:
            accepted = f"{dtype} {list(shape)} on {q.device}".removeprefix("torch.")
            raise reject(op, f"state[{name!r}]", accepted, tensor)
    if causal and state.length and sizes.T > sizes.S + 1:
        accepted = f"of at most {sizes.S + 1} tokens (the state keeps no past to stand in)"
        raise reject(op, "q", accepted, q)
