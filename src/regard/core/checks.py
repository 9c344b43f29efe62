"""Argument checks: one place, one error style.

Every message reads `operation: argument must be <what is accepted>, got <what came>`. Only
metadata (types, shapes, dtypes, devices, options) is looked at, never the values of a tensor,
so a check costs nothing on a GPU and holds under `torch.compile`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sizes:
    """The sizes of one attention call, in the letters that docstrings use."""

    B: int
    H: int
    Hk: int
    T: int
    S: int
    D: int
    Dv: int

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.H // self.Hk if self.Hk else 1


def describe(value: Any) -> str:
    """A value as an error message shows it: `float32 Tensor[2, 4, 16, 8] on cpu`, or its repr.

    >>> describe(torch.zeros(2, 3)), describe("relu")
    ('float32 Tensor[2, 3] on cpu', "'relu'")
    """
    if isinstance(value, Tensor):
        return f"{name_of(value.dtype)} Tensor{list(value.shape)} on {value.device}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{type(value).__name__} {text[:60]}…"


def name_of(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def reject(
    op: str, argument: str, accepted: str, got: Any, *, kind: type[Exception] = ValueError
) -> Exception:
    """The error to raise for a bad argument, in the house's one style.

    >>> raise reject("softmax_attention", "ridge", "a finite number above 0", -1.0)
    Traceback (most recent call last):
    ValueError: softmax_attention: ridge must be a finite number above 0, got -1.0
    """
    shown = got if isinstance(got, _Words) else describe(got)
    return kind(f"{op}: {argument} must be {accepted}, got {shown}")


class _Words(str):
    """A description that is already in words, not a value to be shown by its repr."""


def words(text: str) -> str:
    """Marks `text` as words for `reject`, instead of a string value that came as an argument.

    >>> str(reject("op", "state", "None here", words("a state")))
    'op: state must be None here, got a state'
    """
    return _Words(text)


def _tensor(op: str, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise reject(op, name, "a torch.Tensor", value, kind=TypeError)
    return value


def check_qkv(op: str, q: Any, k: Any, v: Any) -> Sizes:
    """Sizes of q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv], or a clear error."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        _tensor(op, name, value)
        if value.dim() != 4:
            raise reject(op, name, "4-dimensional [batch, heads, length, channels]", value)
        if value.dtype not in FLOATS:
            accepted = "of dtype " + ", ".join(map(name_of, FLOATS))
            raise reject(op, name, accepted, value, kind=TypeError)
    for name, value in (("k", k), ("v", v)):
        if value.dtype != q.dtype:
            raise reject(op, name, f"of q's dtype {name_of(q.dtype)}", value, kind=TypeError)
        if value.device != q.device:
            raise reject(op, name, f"on q's device {q.device}", value)
        if value.shape[0] != q.shape[0]:
            raise reject(op, name, f"of q's batch size {q.shape[0]}", value)
    if k.shape[3] != q.shape[3]:
        raise reject(op, "k", f"of q's head size {q.shape[3]}", k)
    if v.shape[1:3] != k.shape[1:3]:
        raise reject(op, "v", f"[B, {k.shape[1]}, {k.shape[2]}, Dv] like k", v)
    B, H, T, D = q.shape
    Hk, S = k.shape[1], k.shape[2]
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.shape[1] == 0 or value.shape[3] == 0:
            raise reject(op, name, "of at least one head and one channel", value)
    if H % Hk:
        raise reject(op, "q", f"of a number of heads that is a multiple of k's {Hk}", q)
    return Sizes(B, H, Hk, T, S, D, v.shape[3])


def check_key_mask(op: str, key_mask: Any, sizes: Sizes, like: Tensor) -> None:
    """`key_mask` is None or bool [B, S], True = real key."""
    if key_mask is None:
        return
    _tensor(op, "key_mask", key_mask)
    if key_mask.dtype != torch.bool:
        accepted = "a bool tensor (True = real key)"
        raise reject(op, "key_mask", accepted, key_mask, kind=TypeError)
    check_shape(op, "key_mask", key_mask, (sizes.B, sizes.S), like)


def check_shape(
    op: str, name: str, value: Tensor, shape: tuple[int | tuple[int, ...], ...], like: Tensor
) -> None:
    """Each axis equals its number, or is one of several; the device is that of `like`."""
    _tensor(op, name, value)
    options = [axis if isinstance(axis, tuple) else (axis,) for axis in shape]
    fits = value.dim() == len(options) and all(
        size in option for size, option in zip(value.shape, options, strict=True)
    )
    if not fits:
        axes = [" or ".join(map(str, dict.fromkeys(option))) for option in options]
        raise reject(op, name, f"of shape [{', '.join(axes)}]", value)
    if value.device != like.device:
        raise reject(op, name, f"on q's device {like.device}", value)


def check_float_operand(
    op: str, name: str, value: Any, shape: tuple[int | tuple[int, ...], ...], like: Tensor
) -> None:
    """None, or an operand of the given shape in one of `FLOATS`, which need not be q's dtype."""
    if value is None:
        return
    if _tensor(op, name, value).dtype not in FLOATS:
        raise reject(op, name, "a floating-point tensor", value, kind=TypeError)
    check_shape(op, name, value, shape, like)


def check_scale(op: str, scale: Any, sizes: Sizes, like: Tensor) -> None:
    """`scale` is None (the mechanism's default), a finite number, or a tensor [] or [H]."""
    if isinstance(scale, Tensor):
        check_per_head(op, "scale", scale, sizes, like)
    elif scale is not None:
        check_number(op, "scale", scale)


def check_per_head(op: str, name: str, value: Tensor, sizes: Sizes, like: Tensor) -> None:
    """A floating-point tensor with one number for all heads, [], or one for each, [H]."""
    if value.is_floating_point() and tuple(value.shape) not in ((), (sizes.H,)):
        raise reject(op, name, f"of shape [] or [{sizes.H}]", value)
    check_float_operand(op, name, value, (sizes.H,) if value.dim() else (), like)


def check_number(
    op: str, name: str, value: Any, *, above: float | None = None, least: float | None = None
) -> None:
    """A finite real number (not a bool), optionally > `above` or >= `least`."""
    limit = "" if above is None else f" above {above}"
    limit += "" if least is None else f" of at least {least}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise reject(op, name, f"a number{limit}", value, kind=TypeError)
    number: Any = value
    outside = (above is not None and number <= above) or (least is not None and number < least)
    # Comparisons, as math.isfinite fails on a traced float and on an int beyond float64.
    if outside or not -math.inf < number < math.inf:
        raise reject(op, name, f"a finite number{limit}", value)


def check_integer(op: str, name: str, value: Any, *, least: int = 1) -> None:
    """An int (not a bool) of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise reject(op, name, f"an int of at least {least}", value, kind=TypeError)
    if value < least:
        raise reject(op, name, f"an int of at least {least}", value)


def check_flag(op: str, name: str, value: Any) -> None:
    """A plain bool."""
    if not isinstance(value, bool):
        raise reject(op, name, "True or False", value, kind=TypeError)


def check_choice(op: str, name: str, value: Any, choices: Iterable[str]) -> None:
    """One of a few words; the nearest one is offered for a misspelt one."""
    choices = list(choices)
    if isinstance(value, str) and value in choices:
        return
    listed = ", ".join(map(repr, choices))
    raise reject(op, name, f"one of {listed}", words(describe(value) + nearest(value, choices)))


def nearest(value: Any, choices: Iterable[str]) -> str:
    """`; did you mean 'eager'?` when one of the choices is close to `value`, else nothing.

    >>> nearest("eagre", ["auto", "eager"]), nearest("xyz", ["auto", "eager"])
    ("; did you mean 'eager'?", '')
    """
    near = get_close_matches(value, list(choices), n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def check_window(op: str, window: Any) -> None:
    """`window` is None or (left, right): two ints of at least -1, where -1 is unbounded."""
    if window is None:
        return
    accepted = "a pair (left, right) of ints, -1 for unbounded"
    if not isinstance(window, tuple) or len(window) != 2:
        raise reject(op, "window", accepted, window, kind=TypeError)
    for side in window:
        if isinstance(side, bool) or not isinstance(side, int) or side < -1:
            raise reject(op, "window", accepted, window)


def check_state(op: str, state: Any, kind: type) -> None:
    """`state` is None or of the kind that the op continues.

    A `KVCache` holds keys and values and nothing of a mechanism, so any op that keeps one may
    continue it; states of fixed size name their mechanism, which their ops check.
    """
    if state is not None and not isinstance(state, kind):
        accepted = f"None or a {kind.__name__}"
        raise reject(op, "state", accepted, words(type(state).__name__), kind=TypeError)
