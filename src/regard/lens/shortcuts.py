"""What a run of a pruned model need not compute: found while the whole model runs once.

Taking out heads of a layer changes what enters that layer's output projection and nothing before:
its queries, keys and values, its weights and its heads' outputs are those of the whole model. And
of the last block, most models read one token only. Neither is assumed of a model: that the
projection is the last step of the attention module is compared, bit for bit, and tokens count as
unread if the answer is the same with NaN in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import nan
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from regard.lens.fused import Answering, FusedCall
from regard.lens.layers import Layer
from regard.ops.local_linear import gemm
from regard.ops.softmax import softmax_attention

NARROWEST = 32  # heads for which our softmax on a CPU is faster than torch's
READ = (slice(0, 1), slice(0, 2), slice(-1, None))  # tokens that a model may read alone


class Shortcuts:
    """Recordings of one batch, and the runs that they shorten."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.read: slice | None = None
        self._fill = 0.0
        self._z: dict[int, Tensor] = {}
        self._end: dict[int, Literal["projection", "heads"]] = {}
        self._tuples: dict[int, int] = {}
        self._waiting: dict[int, Tensor] = {}
        self._projected: dict[int, Tensor] = {}

    def attended(self, number: int, output: Any) -> None:
        """What the attention module of a layer returned, in the run of the whole model."""
        several = isinstance(output, tuple)
        if several and any(part is not None for part in output[1:]):
            return
        self._tuples[number] = len(output) if several else 0
        first = output[0] if several else output
        projected = self._projected.pop(number, None)
        if projected is None:  # the projection is beside the module, and comes after it
            self._waiting[number] = first
        elif _same(first, projected):
            self._end[number] = "projection"

    def projected(self, number: int, z: Tensor, output: Tensor) -> None:
        """What entered and left the output projection of a layer, in the same run."""
        self._z[number] = z
        waiting = self._waiting.pop(number, None)
        if waiting is None:
            self._projected[number] = output
        elif _same(waiting, z):
            self._end[number] = "heads"

    @contextmanager
    def taken(self, start: int, copies: int) -> Iterator[None]:
        """Runs inside begin with `copies` of the recorded input of layer `start`."""
        with ExitStack() as stack:
            for layer in self.layers[start:]:
                for module in layer.block.modules():
                    if type(module) is nn.Linear:
                        stack.enter_context(instead(module, partial(_linear, module)))
            for number, layer in enumerate(self.layers[start:], start):
                read = self.read if number == len(self.layers) - 1 else None
                forward = partial(_attending, layer.attention.forward, read, self._fill)
                stack.enter_context(instead(layer.attention, forward))
            if self.read is not None:
                for module in _behind_the_heads(self.layers[-1]):
                    forward = partial(_of_tokens, module.forward, self.read, self._fill)
                    stack.enter_context(instead(module, forward))
            if start in self._end:
                forward = partial(self._from_heads, start, copies)
                stack.enter_context(instead(self.layers[start].attention, forward))
            yield

    def _from_heads(self, number: int, copies: int, *_: Any, **__: Any) -> Any:
        first = self._z[number].repeat(copies, 1, 1)
        if self._end[number] == "projection":
            first = self.layers[number].projection(first)
        others = self._tuples[number] - 1
        return (first, *[None] * others) if others >= 0 else first

    def find_read(
        self, answer: Callable[[], Sequence[Tensor | None]], recorded: Sequence[Tensor | None]
    ) -> None:
        """Which tokens of the last block count: `answer` runs it and what follows."""
        self._fill = nan
        for tokens in READ:
            self.read = tokens
            if all(map(_close, answer(), recorded)):
                break
        else:
            self.read = None
        self._fill = 0.0


def _same(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and torch.equal(one, other)


def _close(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def _behind_the_heads(layer: Layer) -> list[nn.Linear]:
    """The linear layers of a block that come after the weights have mixed its tokens."""
    before = {id(module) for module in layer.attention.modules()} - {id(layer.projection)}
    linear = (module for module in layer.block.modules() if type(module) is nn.Linear)
    return [module for module in linear if id(module) not in before]


def _of_tokens(forward: Callable[[Tensor], Tensor], read: slice, fill: float, x: Tensor) -> Tensor:
    """A layer that works on each token alone, for some tokens; the others are filled."""
    if x.ndim != 3:
        return forward(x)
    return _filled(forward(x[:, read].contiguous()), x.shape[1], read, fill)


def _filled(found: Tensor, tokens: int, read: slice, fill: float) -> Tensor:
    """The results of some tokens, [..., n, C], among `fill` for the others."""
    whole = found.new_full((*found.shape[:-2], tokens, found.shape[-1]), fill)
    whole[..., read, :] = found
    return whole


def _attending(
    forward: Callable[..., Any], read: slice | None, fill: float, *args: Any, **named: Any
) -> Any:
    """An attention module with `_Fused` in the place of torch's fused attention."""
    with _Fused(read, fill):
        return forward(*args, **named)


class _Fused(Answering):
    """Calls of torch's fused attention: of the queries that are read, by our softmax."""

    def __init__(self, read: slice | None, fill: float) -> None:
        super().__init__()
        self.read, self.fill = read, fill

    def fused(self, call: FusedCall) -> Tensor:
        # A mask or a causal limit would have to be cut as the queries are.
        every = self.read is None or call.attn_mask is not None or call.is_causal
        tokens = call.query.shape[-2]
        if self.read is not None and not every:
            call.query = call.query[..., self.read, :]
        output = _ours(call) if _is_plain(call) else call.run()
        if self.read is not None and not every:
            output = _filled(output, tokens, self.read, self.fill)
        return output


def _is_plain(call: FusedCall) -> bool:
    """Whether our softmax computes it, and faster."""
    q = call.query
    plain = call.attn_mask is None and not call.is_causal and not call.dropout_p
    fits = q.dtype == torch.float32 and q.device.type == "cpu" and q.ndim == 4
    return plain and fits and q.shape[-1] >= NARROWEST


def _ours(call: FusedCall) -> Tensor:
    return softmax_attention(call.query, call.key, call.value, scale=call.scale)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer, by oneDNN where that is faster."""
    width, out = x.shape[-1], module.out_features
    rows = x.numel() // width
    plain = x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    if not plain or not gemm.serves(x, module.weight.dtype, rows, out):
        return functional.linear(x, module.weight, module.bias)
    found = gemm.times(x.reshape(rows, width), module.weight, module.bias)
    return found.view(*x.shape[:-1], out)


@contextmanager
def instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a while; one that somebody else had put there comes back."""
    before = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before  # type: ignore[method-assign]
