"""The key-value cache: buffers that double, and small states that look at them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.checks import check_integer, describe, name_of, reject
from regard.core.decay import DecaySums, decay_sums
from regard.core.state import State, check_rows, keep_dtype

# Every stream of the cache: the axis of its length, and what a token has that brought nothing.
_AXIS = {"k": 2, "v": 2, "key_mask": 1, "key_bias": 2, "decay_sums": 2, "decay_first": 2}
_MISSING = {"key_mask": True, "key_bias": 0.0}
SMALLEST = 64


class _Buffers:
    """Tensors longer than what is written; `end` is the first unwritten column."""

    def __init__(self, streams: dict[str, Tensor], end: int) -> None:
        self.streams = streams
        self.end = end

    @property
    def capacity(self) -> int:
        return self.streams["k"].shape[2]

    @property
    def inference(self) -> bool:
        """Whether torch forbids writing here outside of inference mode."""
        return self.streams["k"].is_inference()


@dataclass(frozen=True, eq=False)
class KVCache(State):
    """Keys, values and key-side operands of all tokens so far, `length` of them in every row.

    Ragged rows are told apart by `key_mask`. Appending writes beyond `length` and returns a new
    small object on the same buffers, so an older state stays readable; the buffers double when
    full. To continue one state twice, `fork()` it: otherwise the second continuation would
    write over the first, and it raises. Where a gradient is needed, and under torch.compile
    and torch.func, the buffers are concatenated instead of written.

    >>> k = v = torch.ones(1, 2, 3, 4)
    >>> prompt = KVCache.extend("op", None, k, v)
    >>> longer = KVCache.extend("op", prompt.fork(), k[:, :, :1], v[:, :, :1])
    >>> prompt.length, longer, longer.crop(2).k.shape[2]
    (3, KVCache(length=4, k=float32 Tensor[1, 2, 4, 4] on cpu), 2)
    """

    _buffers: _Buffers
    length: int

    def __repr__(self) -> str:
        return f"KVCache(length={self.length}, k={describe(self.k)})"

    @property
    def k(self) -> Tensor:
        """Keys [B, Hk, length, D]."""
        return self._stream("k")

    @property
    def v(self) -> Tensor:
        """Values [B, Hk, length, Dv]."""
        return self._stream("v")

    @property
    def key_mask(self) -> Tensor | None:
        """[B, length], or None when every key is real."""
        return self._stream("key_mask") if "key_mask" in self._buffers.streams else None

    @property
    def key_bias(self) -> Tensor | None:
        """[B, 1 | Hk | H, length], or None."""
        return self._stream("key_bias") if "key_bias" in self._buffers.streams else None

    @property
    def decay(self) -> DecaySums | None:
        """Running sums of `log_decay` over all keys, or None."""
        if "decay_sums" not in self._buffers.streams:
            return None
        return DecaySums(self._stream("decay_sums"), self._stream("decay_first"))

    def _stream(self, name: str) -> Tensor:
        return self._buffers.streams[name].narrow(_AXIS[name], 0, self.length)

    @staticmethod
    def extend(
        op: str,
        state: KVCache | None,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        key_bias: Tensor | None = None,
        log_decay: Tensor | None = None,
    ) -> KVCache:
        """The cache after these new keys; operands describe the new keys only.

        `op` names the operation in errors. An operand that comes with some tokens only is
        neutral for the others: a real key, no bias, no decay.
        """
        if state is not None:
            state._check_fits(op, k, v, key_bias, log_decay)
        new: dict[str, Tensor] = {"k": k, "v": v}
        if key_mask is not None:
            new["key_mask"] = key_mask
        if key_bias is not None:
            new["key_bias"] = key_bias
        past = state.decay if state is not None else None
        if log_decay is None and past is not None:
            log_decay = k.new_zeros(k.shape[0], past.sums.shape[1], k.shape[2])
        if log_decay is not None:
            if past is None and state is not None:
                past = decay_sums(k.new_zeros(k.shape[0], log_decay.shape[1], state.length))
            sums = decay_sums(log_decay, key_mask, past)
            new["decay_sums"], new["decay_first"] = sums
        if state is None:  # the cache never aliases what the caller may still write into
            nothing = {name: stream.narrow(_AXIS[name], 0, 0) for name, stream in new.items()}
            state = KVCache(_Buffers(nothing, 0), 0)
        return state._append(op, new, k.shape[2])

    def _check_fits(
        self, op: str, k: Tensor, v: Tensor, key_bias: Tensor | None, log_decay: Tensor | None
    ) -> None:
        for name, new in (("k", k), ("v", v)):
            old = self._buffers.streams[name]
            same = old.shape[:2] == new.shape[:2] and old.shape[3] == new.shape[3]
            if not same or old.dtype != new.dtype or old.device != new.device:
                B, Hk, _, D = old.shape
                accepted = f"the state's {name_of(old.dtype)} [{B}, {Hk}, ., {D}] on {old.device}"
                raise reject(op, name, accepted, new)
        bias, sums = self._buffers.streams.get("key_bias"), self._buffers.streams.get("decay_sums")
        for name, old, new in (("key_bias", bias, key_bias), ("log_decay", sums, log_decay)):
            if old is not None and new is not None and old.shape[1] != new.shape[1]:
                raise reject(op, name, f"of the state's {old.shape[1]} heads", new)
        if bias is not None and key_bias is not None and bias.dtype != key_bias.dtype:
            raise reject(op, "key_bias", f"of the state's dtype {name_of(bias.dtype)}", key_bias)

    def _append(self, op: str, new: dict[str, Tensor], count: int) -> KVCache:
        if self.length != self._buffers.end:
            raise ValueError(
                f"{op}: this state (length {self.length}) was already continued, to length "
                f"{self._buffers.end}; continue state.fork() to have both"
            )
        streams = self._buffers.streams
        total = self.length + count
        names = list(dict.fromkeys([*streams, *new]))
        old = {name: self._filled(name, new, self.length, streams) for name in names}
        new = {name: self._filled(name, old, count, new) for name in names}
        differentiable = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (*old.values(), *new.values())
        )
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if differentiable or traced:
            joined = {n: torch.cat([self._cut(n, old[n]), new[n]], _AXIS[n]) for n in names}
            buffers = _Buffers(joined, total)
        else:
            buffers = self._buffers
            full = total > buffers.capacity or len(names) > len(streams)
            if full or (buffers.inference and not torch.is_inference_mode_enabled()):
                capacity = max(SMALLEST, 1 << (total - 1).bit_length())
                longer = {n: _longer(n, old[n], self.length, capacity) for n in names}
                buffers = _Buffers(longer, total)
            for name in names:
                # `.data`: what autograd saved of older states lies before these columns, but
                # its version would count this write and the backward pass refuse.
                unwritten = buffers.streams[name].data.narrow(_AXIS[name], self.length, count)
                unwritten.copy_(new[name])
        # Continued, once, whichever way the new tokens are kept.
        self._buffers.end = buffers.end = total
        return KVCache(buffers, total)

    def _filled(
        self, name: str, like: dict[str, Tensor], count: int, streams: dict[str, Tensor]
    ) -> Tensor:
        """A stream, or the neutral values of one that these tokens did not bring."""
        if name in streams:
            return streams[name]
        shape = list(like[name].shape)
        shape[_AXIS[name]] = count
        return like[name].new_full(shape, _MISSING.get(name, 0))

    def _cut(self, name: str, stream: Tensor) -> Tensor:
        return stream.narrow(_AXIS[name], 0, self.length)

    def fork(self) -> KVCache:
        """The same past, to be continued on its own (its first continuation copies the past)."""
        return self.crop(self.length)

    def crop(self, length: int) -> KVCache:
        """The first `length` tokens; continuing from there copies them, later states stay."""
        check_integer("KVCache.crop", "length", length, least=0)
        if length > self.length:
            accepted = f"at most the state's length {self.length}"
            raise reject("KVCache.crop", "length", accepted, length)
        streams = self._buffers.streams  # views as long as the past: to go on is to copy
        cut = {name: t.narrow(_AXIS[name], 0, length) for name, t in streams.items()}
        return KVCache(_Buffers(cut, length), length)

    def select(self, index: Tensor) -> KVCache:
        """The batch rows `index`, in that order."""
        check_rows("KVCache.select", index)
        return self._with(lambda name, t: t.index_select(0, index.to(t.device)))

    def map(self, function: Callable[[Tensor], Tensor]) -> KVCache:
        """`function` on keys and values; the other streams follow but keep their dtype."""
        return self._with(
            lambda name, t: function(t) if name in ("k", "v") else keep_dtype(function, t)
        )

    def _with(self, function: Callable[[str, Tensor], Tensor]) -> KVCache:
        streams = {name: function(name, self._stream(name)) for name in self._buffers.streams}
        return KVCache(_Buffers(streams, self.length), self.length)

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        streams = {name: self._stream(name).contiguous() for name in self._buffers.streams}
        return streams, {"length": self.length}

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], data: dict[str, Any]) -> KVCache:
        length, names = int(data["length"]), set(tensors)
        paired = ("decay_sums" in names) == ("decay_first" in names)
        if not {"k", "v"} <= names <= set(_AXIS) or not paired:
            raise ValueError(f"streams must be among {sorted(_AXIS)}, got {sorted(names)}")
        for name, tensor in tensors.items():
            dims = {"k": 4, "v": 4, "key_mask": 2}.get(name, 3)
            fits = tensor.dim() == dims and tensor.shape[_AXIS[name]] == length
            if not fits or tensor.shape[0] != tensors["k"].shape[0]:
                raise ValueError(f"{name} must have length {length}, got {list(tensor.shape)}")
        return cls(_Buffers(tensors, length), length)


def _longer(name: str, stream: Tensor, length: int, capacity: int) -> Tensor:
    shape = list(stream.shape)
    shape[_AXIS[name]] = capacity
    buffer = stream.new_empty(shape)
    buffer.narrow(_AXIS[name], 0, length).copy_(stream.narrow(_AXIS[name], 0, length))
    return buffer
