"""A cache layer of transformers for mechanisms whose state has a fixed size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from regard.core.checks import check_integer, reject
from regard.core.state import FixedState

MARK = "_regard_layer"  # on the keys that `update` gives back: the layer that their call continues
RECENT = 256  # the last call can be taken back if it brought no more tokens than these


class StateLayer(CacheLayerMixin):
    """The state of a mechanism after all tokens so far, in place of their keys and values.

    `update` gives the new keys and values back as they came; the attention function continues
    `state` with them. To `crop`, the arguments of the last calls are kept and replayed from an
    older state: of `past` tokens at least (`swap(past=...)`), and always of the last call if it
    brought at most 256 tokens, which is what guessing tokens and taking them back needs.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, past: int = 0) -> None:
        super().__init__()
        check_integer("StateLayer", "past", past, least=0)
        self.past = past
        self.forget()

    def forget(self) -> None:
        """As before the first token."""
        self.state: FixedState | None = None
        self.length = 0
        self.waiting = 0  # tokens that were cached and whose call did not come
        self.base: FixedState | None = None  # before the first call of `calls`
        self.calls: list[Call] = []

    # -- what the model calls ------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is set aside before there is a state."""
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values, which are all that the mechanism needs."""
        self._check_continued()
        self.lazy_initialization(key_states, value_states)
        self.waiting = key_states.shape[2]
        keys = key_states.view_as(key_states)
        setattr(keys, MARK, self)
        return keys, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """A mask over all tokens, as of a layer that keeps its keys: others share it."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length

    def get_max_length(self) -> int:
        """None."""
        return -1

    def reset(self) -> None:
        """As before the first token."""
        self.forget()
        self.is_initialized = False

    def activate_past_recording(self) -> None:
        """From now on, at least 256 tokens can be taken back."""
        self.past = max(self.past, RECENT)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last `-tokens_to_remove` tokens back, by replaying what came before them."""
        self._check_continued()
        if tokens_to_remove > 0:
            accepted = "0, or minus the number of tokens to take back"
            raise reject("StateLayer.crop", "tokens_to_remove", accepted, tokens_to_remove)
        target = self.length + tokens_to_remove
        if tokens_to_remove == 0:
            return
        start = self.length - sum(call.tokens for call in self.calls)
        if target < start or target < 0:
            raise ValueError(
                f"StateLayer.crop: {-tokens_to_remove} tokens cannot be taken back: a state of "
                f"fixed size keeps {self.length - start} of its past; "
                "swap(model, ..., past=N) keeps N tokens at least"
            )
        self.calls, kept = [], self.calls
        state = self.base
        for call in kept:
            tokens = min(call.tokens, target - start)
            if tokens <= 0:
                break
            call = call.cut(0, tokens)
            state = call.run(state)
            self.calls.append(call)
            start += tokens
        self.state, self.length = state, target

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: rows in a new order."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        if self.state is not None:
            rows = next(iter(self.state.tensors.values())).shape[0]
            self._select(torch.arange(rows).repeat_interleave(repeats))

    def offload(self) -> None:
        """A state is small: it stays."""

    def prefetch(self) -> None:
        """A state is small: it stays."""

    # -- what the mechanism calls --------------------------------------------------------------

    def remember(self, state: FixedState, call: Call) -> None:
        """The state after this call."""
        before, self.state, self.waiting = self.state, state, 0
        self.length += call.tokens
        if not self.past:
            short = call.tokens <= RECENT
            self.base, self.calls = (before, [call]) if short else (state, [])
            return
        self.calls.append(call)
        held = sum(item.tokens for item in self.calls)
        if held > 2 * self.past:  # not at every step: a replay costs as much as the calls
            self._advance(held - self.past)

    def _advance(self, tokens: int) -> None:
        while tokens > 0:
            first = self.calls.pop(0)
            if first.tokens > tokens:
                self.calls.insert(0, first.cut(tokens, first.tokens))
                first = first.cut(0, tokens)
            self.base = first.run(self.base)
            tokens -= first.tokens

    def _select(self, index: Tensor) -> None:
        self._check_continued()
        index = index.to(torch.int64)
        self.state, self.base = (
            None if state is None else state.select(index) for state in (self.state, self.base)
        )
        self.calls = [call.select(index) for call in self.calls]

    def _check_continued(self) -> None:
        if self.waiting:
            raise RuntimeError(
                f"StateLayer: {self.waiting} tokens were cached and their attention was never "
                "computed from the keys that the cache gave back; this model cannot decode with a "
                "state of fixed size: call it with use_cache=False"
            )


class Call:
    """The arguments of one call, to be made again: per-token tensors and the rest."""

    def __init__(self, op: Any, per_token: dict[str, tuple[Tensor, int]], fixed: dict) -> None:
        self.op, self.per_token, self.fixed = op, per_token, fixed

    @property
    def tokens(self) -> int:
        """How many keys it brings."""
        return self.per_token["k"][0].shape[2]

    def cut(self, start: int, stop: int) -> Call:
        """The same for some of its tokens."""
        if (start, stop) == (0, self.tokens):
            return self
        cut = {n: (x.narrow(axis, start, stop - start), axis) for n, (x, axis) in self._items()}
        return Call(self.op, cut, self.fixed)

    def select(self, index: Tensor) -> Call:
        """The same for some rows."""
        rows = {n: (x.index_select(0, index.to(x.device)), axis) for n, (x, axis) in self._items()}
        return Call(self.op, rows, self.fixed)

    def _items(self) -> Any:
        return self.per_token.items()

    def run(self, state: FixedState | None) -> FixedState:
        """The state after it."""
        given = {name: x for name, (x, _) in self.per_token.items()}
        with torch.no_grad():
            return self.op(**given, **self.fixed, state=state, return_state=True)[1]


def state_layer(op: str, cache: Any, index: int | None, past: int) -> StateLayer | None:
    """The layer of a cache that holds, or can hold, the state; None: it already holds keys.

    A cache makes layers of keys; an empty one is replaced.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    if not isinstance(cache, Cache) or index is None:
        return None
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    if index >= len(cache.layers):
        return None
    layer: Any = cache.layers[index]
    if isinstance(layer, StateLayer):
        return layer
    if not isinstance(layer, DynamicLayer):
        accepted = "a DynamicCache (or use_cache=False): a state of fixed size grows by itself"
        raise reject(op, "cache", accepted, layer)
    if layer.get_seq_length():
        return None
    made = StateLayer(past)
    if getattr(layer, "record_past", False):
        made.activate_past_recording()
    cache.layers[index] = made
    return made
